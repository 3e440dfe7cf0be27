"""Rewards that compare text and numbers. The GSM8K cases follow the data set's format: a solution, then ``#### 42``."""

from __future__ import annotations

from decimal import Decimal

import pytest

from siirl.rewards.text import exact_match, final_number, gsm8k


@pytest.mark.parametrize(
    ("response", "answer", "expected"),
    [
        ("095", "095", 1),
        (" 095\n", "095", 1),
        ("95", "095", 0),
        ("095.", "095", 0),
        ("", "095", 0),
        ("42", 42, 1),  # JSON rows may hold the number itself
        ("Paris", "paris", 0),
    ],
)
def test_exact_match_is_equality_of_the_stripped_text(response, answer, expected):
    assert exact_match("", response, {"answer": answer}) == expected


@pytest.mark.parametrize("function", [exact_match, gsm8k])
@pytest.mark.parametrize("sample", [{}, {"answer": None}])
def test_a_row_without_an_answer_is_an_error_and_not_a_wrong_response(function, sample):
    with pytest.raises(ValueError, match=r"data\.answer_key"):
        function("", "42", sample)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 42", "42"),
        ("Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n#### 72", "72"),
        ("####72", "72"),
        ("#### 1,000", "1000"),
        ("#### 1,234,567.50", "1234567.5"),
        ("#### -5", "-5"),
        ("#### $18", "18"),
        ("#### -$18", "-18"),
        ("#### $-18", "-18"),
        ("#### 42 apples, of 100", "42"),
        ("#### 3\nno, wait\n#### 4", "4"),
        ("7 #### none", "7"),
        ("The answer is 42.", "42"),
        ("so she has 3 and then 10-3=7", "7"),
        ("between 3-5", "5"),
        ("x - 5", "5"),
        ("it is -5 degrees", "-5"),
        ("it is \u22125 degrees", "-5"),
        ("a total of 3.50 dollars", "3.5"),
        (".5", "0.5"),
        ("lists 1,2,3", "3"),
        ("10,5", "5"),
        ("50%", "50"),
        ("1e3", "1000"),
        ("(4)", "4"),
        ("f(2)-3", "3"),
        ("version v2", "2"),
    ],
)
def test_the_final_number_is_the_one_after_the_marker_else_the_last(text, number):
    assert final_number(text) == Decimal(number)


@pytest.mark.parametrize("text", ["", "no number", "####", "-", "$", ",."])
def test_text_without_a_number_has_none(text):
    assert final_number(text) is None


@pytest.mark.parametrize(
    ("response", "answer", "expected"),
    [
        ("#### 42", "42", 1),
        ("It is 42.0", "42", 1),
        ("#### 1000", "1,000", 1),
        ("#### 41", "42", 0),
        ("#### -42", "42", 0),
        ("I do not know", "42", 0),
        ("#### 72", "She sold 24.\n#### 72", 1),
        ("100000000000000000000000001", "100000000000000000000000000", 0),  # equal as floats
        ("0.1", 0.1, 1),
    ],
)
def test_gsm8k_compares_numbers_exactly(response, answer, expected):
    assert gsm8k("", response, {"answer": answer}) == expected


def test_a_long_response_of_digits_is_read_in_linear_time():
    assert final_number("1," * 100_000 + "7") == 7
