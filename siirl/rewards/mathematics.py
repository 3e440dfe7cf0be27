"""Mathematical equivalence by math-verify: LaTeX, boxed answers, sets, intervals, plain numbers."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from math_verify import parse, verify

from siirl.rewards.registry import reward
from siirl.rewards.text import expected_answer

# math-verify reads LaTeX only inside one of these.
MATHEMATICS = re.compile(r"\\boxed|\\\(|\\\[|\$[^$]+\$")
BARE_CHARS = 100
PARSE_S, VERIFY_S = 2, 3


@reward("math")
def math(prompt: str, response: str, sample: dict[str, Any]) -> float:
    """1 when the response's final answer is mathematically equal to the row's.

    What the response says last counts, a boxed expression first. A response that cannot be read, or whose comparison
    does not end within a few seconds, is not a verified one: 0.
    """
    expected = _expected(expected_answer(sample))
    if not expected:
        raise ValueError(f"the row's answer cannot be read as mathematics: {sample['answer']!r:.80}")
    readings = [response]
    if len(response) <= BARE_CHARS and not MATHEMATICS.search(response):
        readings.insert(0, _boxed(response))  # nothing but the answer, perhaps in bare LaTeX
    return float(any(_equal(expected, _parse(reading)) for reading in readings))


@lru_cache(maxsize=256)
def _expected(answer: str) -> list[Any]:
    """The answer's expressions; the rows of a group share them. A bare answer is read as LaTeX."""
    answer = answer.rpartition("####")[2].strip()
    return (_parse(answer) if MATHEMATICS.search(answer) else []) or _parse(_boxed(answer))


def _boxed(text: str) -> str:
    return "\\boxed{" + text.strip() + "}"


def _parse(text: str) -> list[Any]:
    return parse(text, parsing_timeout=PARSE_S)


def _equal(expected: list[Any], found: list[Any]) -> bool:
    return bool(verify(expected, found, timeout_seconds=VERIFY_S))
