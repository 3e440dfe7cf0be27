"""One answer to one prompt, for the command line."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from siirl.config.schema import Config
from siirl.device import select
from siirl.model.load import load_model
from siirl.model.tokenizer import decode, encode_prompt, encode_texts, eos_ids
from siirl.rollout.engine import NativeEngine
from siirl.rollout.graphs import recorder
from siirl.rollout.options import sampling_of


def generate_text(
    config: Config, prompt: str, *, device: str | None, max_new_tokens: int, temperature: float, seed: int
) -> Iterator[str]:
    """Yield the answer of the config's model to ``prompt``.

    Raises:
        RequestError: the model cannot be loaded, or the prompt has no token.
    """
    backend = select(device, config.device)
    backend.bind(0)
    loaded = load_model(
        config.model.path,
        seed=config.seed,
        initializer_range=config.model.initializer_range,
        trust_remote_code=config.model.trust_remote_code,
    )
    model = loaded.model.to(backend.device(), getattr(torch, config.training.dtype))
    data = config.data
    ids = encode_prompt(
        loaded.tokenizer,
        prompt,
        system_prompt=data.system_prompt,
        template=data.prompt_template,
        chat=data.chat_template,
    )
    engine = NativeEngine(
        model,
        eos_ids(loaded.tokenizer, loaded.model.config),
        lambda tokens: decode(loaded.tokenizer, tokens),
        cache_bytes=2**62,
        capture=recorder(backend, config.rollout.graphs),
    )
    settings = config.rollout.model_copy(update={"max_new_tokens": max_new_tokens, "temperature": temperature})
    sampling = sampling_of(settings, lambda text: encode_texts(loaded.tokenizer, [text])[0])
    done = engine.generate([ids], torch.zeros(1, dtype=torch.int64), sampling, 1, seed)
    yield decode(loaded.tokenizer, done.response_ids.values.tolist())
