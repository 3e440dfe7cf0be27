"""The batch of vs_dataflow.py and what its three sides have in common; needs torch alone, in any environment.

Every value is a function of its sample's id and its position, so each worker makes its own rows, and each side proves
afterwards that every row arrived whole: `digest` of the ragged form and of the padded form are the same number.
"""

from __future__ import annotations

import ctypes
import json
import sys
from typing import Any

import torch
from torch import Tensor

SAMPLES, GROUP = 4096, 8
PROMPT, RESPONSE = 1024, 1024  # tokens: of every prompt, of the longest response
# Responses are log-normal: half of them longer than MEDIAN tokens, e^SIGMA times it within one standard deviation.
MEDIAN, SIGMA = 320.0, 0.8
VOCABULARY = 150_000
# What a GRPO step knows of each response token, in verl's and in siirl's words.
PER_TOKEN = {
    "old_log_probs": "old_log_probs",
    "ref_log_prob": "ref_log_probs",
    "advantages": "advantages",
    "returns": "returns",
    "token_level_rewards": "token_rewards",
}
_MIX = 1_000_003


def response_lengths() -> Tensor:
    """Tokens of all responses, int64 [SAMPLES]."""
    normal = torch.randn(SAMPLES, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (MEDIAN * torch.exp(SIGMA * normal)).round().to(torch.int64).clamp(1, RESPONSE)


def padded(samples: Tensor) -> dict[str, Tensor]:
    """The rows as verl carries them; padding is zero.

    samples: ids, int64 [rows]. Returns int64 prompts [rows, PROMPT], responses and response_mask [rows, RESPONSE],
    input_ids, attention_mask and position_ids [rows, PROMPT + RESPONSE]; float32 [rows, RESPONSE] per-token values.
    """
    mask = (torch.arange(RESPONSE) < response_lengths()[samples, None]).to(torch.int64)
    prompts = _tokens(samples // GROUP, PROMPT, salt=0)
    responses = _tokens(samples, RESPONSE, salt=1) * mask
    whole = torch.cat([torch.ones_like(prompts), mask], dim=1)
    return {
        "prompts": prompts,
        "responses": responses,
        "response_mask": mask,
        "input_ids": torch.cat([prompts, responses], dim=1),
        "attention_mask": whole,
        "position_ids": (whole.cumsum(1) - 1).clamp_(min=0),
        **{name: _numbers(samples, salt) * mask for salt, name in enumerate(PER_TOKEN)},
    }


def _tokens(rows: Tensor, count: int, salt: int) -> Tensor:
    return (rows[:, None] * 7919 + torch.arange(count) * 104_729 + salt) % VOCABULARY


def _numbers(rows: Tensor, salt: int) -> Tensor:
    """Multiples of 1/1024, which float32 holds exactly."""
    return ((rows[:, None] * 31 + torch.arange(RESPONSE) * 17 + salt * 257) % 1024).to(torch.float32) / 1024


def digest(rows: dict[str, Tensor]) -> int:
    """A number that changes when a token or value of a row does, or moves to another row; int64, wraps.

    rows: of ``padded``'s fields at least prompts, responses and the per-token values. Digests of parts of a batch add
    up to that of the whole, in any order.
    """
    mixed = torch.zeros(len(rows["prompts"]), dtype=torch.int64)
    for name in ("prompts", "responses", *PER_TOKEN):
        values = rows[name] if name in ("prompts", "responses") else (rows[name] * 1024).to(torch.int64)
        mixed = (mixed ^ (mixed >> 29)) * _MIX + (values * torch.arange(1, values.shape[1] + 1)).sum(1)
    return int(mixed.sum())


def add(digests: list[int]) -> int:
    """The digest of the whole."""
    return int(torch.tensor(digests, dtype=torch.int64).sum())


def expected_digest() -> int:
    """The digest of all samples; made in parts, for the padded form of all is large."""
    return add([digest(padded(torch.arange(start, start + 256))) for start in range(0, SAMPLES, 256)])


def settle() -> None:
    """Give freed memory back to the system, so that what making the rows took does not count as held."""
    ctypes.CDLL(None).malloc_trim(0)


def tell(event: str, **details: Any) -> None:
    """Say on standard output where the side is, and go on when the other end has taken note."""
    print(json.dumps({"event": event, **details}), flush=True)
    if event != "result":
        sys.stdin.readline()
