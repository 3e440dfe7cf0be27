"""What the suites work on: a small model, prompts and responses of it, all made from fixed seeds."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from torch import Tensor

from siirl.config.schema import Config
from siirl.data.batch import Batch, Ragged, offsets_of
from siirl.device.backend import Backend
from siirl.device.host import usable_cores
from siirl.model.config import DecoderConfig
from siirl.model.decoder import Decoder
from siirl.model.load import load_model
from siirl.planning.models import find_shape
from siirl.planning.shape import ModelShape

MODEL = "tiny:qwen3:128:2:512"
END = 1  # the model's end-of-sequence token


def need_devices(backend: Backend, workers: int) -> None:
    """Leave the benchmark out where the workers would have to share a device that is no host."""
    count = backend.probe().count
    if backend.is_accelerator() and count < workers:
        pytest.skip(f"{workers} workers need {workers} devices, {count} found")


def crowded(backend: Backend, workers: int) -> bool:
    """Whether the workers have to take turns on the host's cores."""
    return not backend.is_accelerator() and workers > usable_cores()


def decoder(backend: Backend, path: str = MODEL) -> Decoder:
    """A model on the device, the same weights each time."""
    model = load_model(path).model
    assert isinstance(model, Decoder)
    return model.to(backend.device())


def decoder_of(backend: Backend, name: str) -> tuple[Decoder, ModelShape]:
    """A model of a shipped shape on the device, its weights the same each time; and its shape."""
    shape = find_shape(name)
    sizes = shape.model_dump(include={field.name for field in fields(DecoderConfig)})
    config = DecoderConfig(family="llama", max_positions=4096, **sizes)
    with backend.device():
        model = Decoder(config)
    model.initialize(torch.Generator(backend.device()).manual_seed(0))
    return model, shape


def random_tokens(count: int, length: int, seed: int = 0) -> Tensor:
    """Ordinary tokens, int64 [count, length], on the host."""
    return torch.randint(3, 512, (count, length), generator=torch.Generator().manual_seed(seed))


def config(prompts: int, group: int, new_tokens: int) -> Config:
    """A run of GRPO on the model; the learning rate is so small that work does not change as weights do."""
    return Config.model_validate(
        {
            "model": {"path": MODEL},
            "data": {"prompts_per_step": prompts},
            "rollout": {"group_size": group, "max_new_tokens": new_tokens, "ignore_eos": True},
            "training": {"lr": 1e-8},
        }
    )


def responses(prompts: int, group: int, prompt: int, longest: int) -> Batch:
    """Rows ready for an update: groups that share a prompt, responses from a quarter of ``longest`` to all of it."""
    rows = prompts * group
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(longest // 4, longest + 1, (rows,), generator=generator)
    lengths[0] = longest
    ids, tokens = torch.arange(rows), int(lengths.sum())
    prompt_ids = random_tokens(prompts, prompt).repeat_interleave(group, 0)
    rewards = torch.randn(rows, generator=generator)
    return Batch(
        {
            "sample_id": ids,
            "group_id": ids // group,
            "slot": ids // group,
            "prompt_ids": Ragged(prompt_ids.flatten(), torch.arange(rows + 1) * prompt),
            "response_ids": Ragged(random_tokens(tokens, 1, seed=2).flatten(), offsets_of(lengths)),
            "advantages": Ragged(rewards.repeat_interleave(lengths), offsets_of(lengths)),
        }
    )


def padded(batch: Batch, prompt: int) -> tuple[Tensor, Tensor]:
    """The rows as a rectangle, int64 [rows, prompt + longest response], and the lengths of the responses."""
    prompts = batch.ragged("prompt_ids").values.view(len(batch), prompt)
    rows = torch.nn.utils.rnn.pad_sequence(batch.ragged("response_ids").rows(), batch_first=True)
    return torch.cat((prompts, rows), 1), batch.lengths("response_ids")
