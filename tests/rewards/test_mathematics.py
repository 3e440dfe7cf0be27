"""The `math` reward: equivalence, not spelling. Every pair is decided by the mathematics."""

from __future__ import annotations

import pytest

from siirl.rewards.mathematics import math


@pytest.mark.parametrize(
    ("answer", "response"),
    [
        ("42", "42"),
        (42, "The answer is 42."),
        ("42", "So \\boxed{42}."),
        ("1/2", "0.5"),
        ("\\frac{1}{2}", "we get $\\frac{2}{4}$"),
        ("\\frac{1}{2}", "\\boxed{0.5}"),
        ("$\\frac{1}{2}$", "\\frac12"),
        ("\\boxed{3}", "$3$"),
        ("1,000", "1000"),
        ("\\sqrt{8}", "\\boxed{2\\sqrt{2}}"),
        ("3\\pi", "3\\pi"),
        ("(0, \\infty)", "\\boxed{(0,\\infty)}"),
        ("\\{1,2\\}", "\\boxed{\\{2, 1\\}}"),
        ("x^2+2x+1", "$(x+1)^2$"),
        ("The legs are 3 and 4, so\n#### 5", "\\boxed{5}"),
        ("5", "First 3, then 4, so the hypotenuse is \\boxed{5}."),
    ],
)
def test_equal_expressions_are_rewarded(answer, response):
    assert math("", response, {"answer": answer}) == 1.0


@pytest.mark.parametrize(
    ("answer", "response"),
    [
        ("42", "41"),
        ("42", "-42"),
        ("42", ""),
        ("42", "I do not know"),
        ("42", "42 or so; in the end \\boxed{43}"),
        ("3\\pi", "\\boxed{3}"),
        ("x+1", "$x-1$"),
        ("(0, 1)", "\\boxed{[0, 1]}"),
        ("42", "\\boxed{((((("),
    ],
)
def test_other_expressions_are_not(answer, response):
    assert math("", response, {"answer": answer}) == 0.0


def test_an_answer_that_is_no_mathematics_is_an_error():
    with pytest.raises(ValueError, match="cannot be read"):
        math("", "42", {"answer": " "})


def test_a_comparison_without_end_is_a_response_that_is_not_verified():
    assert math("", "$9^{9^{9^{9}}}$", {"answer": "5"}) == 0.0
