"""Rewards that compare text and numbers."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Any

from siirl.rewards.registry import reward

# A number as people write it: 42, -5, 1,000, 3.50, .5, 1e3, $18, -$18. A minus after a digit, a letter or a closing
# bracket is an operator ("10-3"), and a comma groups only when it is followed by exactly three digits.
NUMBER = re.compile(
    r"(?P<sign>(?<![\w)\]])[-+])?\$?(?P<inner>(?<=\$)[-+])?"
    r"(?P<digits>(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)(?P<exponent>[eE][-+]?[0-9]{1,3}\b)?"
)
FINAL = re.compile(r"####\s*(?=[-+$.0-9\u2212])")


def expected_answer(sample: dict[str, Any]) -> str:
    """The row's answer as text.

    Raises:
        ValueError: the row has none.
    """
    answer = sample.get("answer")
    if answer is None:
        raise ValueError("the row has no answer; data.answer_key names the column that holds it")
    return str(answer).strip()


def final_number(text: str) -> Decimal | None:
    """The number after the last ``####`` (how GSM8K writes an answer), else the last number of the text."""
    text = text.replace("\u2212", "-")
    for marker in reversed(list(FINAL.finditer(text))):
        if match := NUMBER.match(text, marker.end()):
            return _value(match)
    last = None
    for last in NUMBER.finditer(text):  # noqa: B007 - only the last match is wanted
        pass
    return _value(last) if last else None


def _value(match: re.Match[str]) -> Decimal:
    sign = match["sign"] or match["inner"] or ""
    return Decimal(sign + match["digits"].replace(",", "") + (match["exponent"] or ""))


@reward("exact_match")
def exact_match(prompt: str, response: str, sample: dict[str, Any]) -> float:
    """1 when the response, without the space around it, is the row's answer."""
    return float(response.strip() == expected_answer(sample))


@reward("gsm8k")
def gsm8k(prompt: str, response: str, sample: dict[str, Any]) -> float:
    """1 when the response's final number equals the answer's, as numbers: 1,000 is 1000.0.

    The row's answer may be a number or a whole GSM8K solution that ends in ``#### 42``.
    """
    expected = final_number(expected_answer(sample))
    if expected is None:
        raise ValueError(f"the row's answer has no number: {sample['answer']!r:.80}")
    return float(final_number(response) == expected)
