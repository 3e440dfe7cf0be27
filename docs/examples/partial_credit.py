"""A reward of one's own: credit for every character of the answer that is in place."""

from __future__ import annotations

from typing import Any


def partial_credit(prompt: str, response: str, sample: dict[str, Any], *, digits: float = 0.2) -> float:
    """The share of the answer's characters in place; the part `digits` of the reward is for writing digits at all."""
    answer = sample["answer"]
    in_place = sum(wanted == given for wanted, given in zip(answer, response, strict=False)) / len(answer)
    written = sum(character.isdigit() for character in response) / max(1, len(response))
    return (1 - digits) * in_place + digits * written
