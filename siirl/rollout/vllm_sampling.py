"""Sampling options as vLLM's parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

from siirl.errors import RequestError
from siirl.rollout.sampling import Sampling

# options that have the same name and meaning there
_SAME = ("top_p", "top_k", "min_p", "repetition_penalty")
# taken from logits that the model divides by the temperature beforehand
_SUBTRACTED = ("presence_penalty", "frequency_penalty")
# options that the adapter handles itself
_OWN = ("max_new_tokens", "temperature", "ignore_eos", "stop", "stop_ids", "min_new_tokens", *_SUBTRACTED)


def vllm_sampling(sampling: Sampling, eos_ids: Sequence[int]) -> Callable[[int], Any]:
    """Parameters of a request as a function of its seed.

    The model divides logits by the temperature, so vLLM samples at temperature 1; 0 stays greedy. End tokens that are
    never to be drawn are held back by vLLM's minimum length.

    Raises:
        RequestError: an option that vLLM does not have is on.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    refuse_unknown(sampling)
    given: dict[str, Any] = {field.name: getattr(sampling, field.name) for field in fields(sampling)}
    heat = sampling.temperature or 1.0
    arguments: dict[str, Any] = {name: given[name] for name in _SAME if name in given}
    subtracted = {name: given[name] / heat for name in _SUBTRACTED if given.get(name)}
    minimum = sampling.max_new_tokens if sampling.ignore_eos else given.get("min_new_tokens", 0)
    arguments |= {
        "temperature": 0.0 if sampling.temperature == 0 else 1.0,
        "max_tokens": sampling.max_new_tokens,
        "min_tokens": min(minimum, sampling.max_new_tokens),
        "stop_token_ids": [*eos_ids, *given.get("stop_ids", ())],
        "logprobs": 0,  # of the token drawn alone
        "flat_logprobs": True,
        "detokenize": False,
        "output_kind": RequestOutputKind.DELTA,
        "skip_clone": True,  # every request has parameters of its own
    }

    def parameters(seed: int) -> Any:
        made = SamplingParams(seed=seed, **arguments)
        for name, value in subtracted.items():
            setattr(made, name, value)  # its constructor takes 2 at most, meant for undivided logits
        return made

    return parameters


def refuse_unknown(sampling: Sampling) -> None:
    """Raise RequestError for an option that is on and that vLLM does not have."""
    given = {field.name: getattr(sampling, field.name) for field in fields(sampling)}
    if sampling.ignore_eos and given.get("stop_ids"):
        raise RequestError(
            "rollout.ignore_eos and rollout.stop_ids are both set, which rollout.engine 'vllm' cannot do at once"
        )
    for field in fields(sampling):
        if field.name not in (*_SAME, *_OWN) and given[field.name] != field.default:
            raise RequestError(
                f"rollout.{field.name} is set, which rollout.engine 'vllm' does not have; set rollout.engine=native"
            )
