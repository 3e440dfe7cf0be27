"""Run through :mod:`siirl.validation.pytest_plugin`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from siirl.validation.checks import Check
from siirl.validation.expected import read_expected
from siirl.validation.run import run_check
from siirl.validation.subject import Subject


def test_promise(
    asked: tuple[Subject, Check, str, tuple[Any, ...]], record_property: Callable[[str, object], None]
) -> None:
    subject, check, check_id, values = asked
    result = run_check(subject, check, check_id, values, read_expected(subject.backend.expected_failures()))
    for each in result.measurements:
        record_property(each.name, each.value)
    if result.status == "skipped":
        pytest.skip(result.sentence)
    if result.status == "expected":
        pytest.xfail(result.sentence)
    assert result.status == "passed", f"{result.title}: {result.sentence}"
