"""Conditions: what they compute, what they may contain, when they are settled before a run."""

from __future__ import annotations

import pytest

from siirl.config.schema import Config
from siirl.dag.expressions import decide, evaluate, lookup, names_in
from siirl.errors import RequestError


def make(**algorithm: object) -> Config:
    return Config(algorithm=algorithm, training={"steps": 100})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("step == 12", True),
        ("step % 5 == 2", True),
        ("step // 5 == 2 and step / 5 == 2.4", True),
        ("1 < step <= 12", True),
        ("not step == 12", False),
        ("step - 2 * 5 + 1 == 3", True),
        ("-step == -12", True),
        ("algorithm.kl_coef > 0", True),
        ("algorithm.advantage == 'grpo'", True),
        ("algorithm.dual_clip is None", True),
        ("algorithm.dual_clip != None", False),
        ("algorithm.norm_adv_by_std", True),
        ("step == training.steps or False", False),
        ("True and None", False),
        ("algorithm.kl_coef > 0 and (step > 20 or step % 3 == 0)", True),
    ],
)
def test_evaluate(expression: str, expected: bool) -> None:
    assert evaluate(expression, make(kl_coef=0.1), 12) is expected


def test_names_in_order_each_once() -> None:
    names = names_in("algorithm.kl_coef > 0 and step % evaluation.every == 0 or step == 1 < algorithm.kl_coef")
    assert names == ("algorithm.kl_coef", "step", "evaluation.every")


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("algorithm.kl_coef > 0", False),
        ("algorithm.kl_coef == 0", True),
        ("step > 3", None),
        ("step > 3 and algorithm.kl_coef > 0", False),
        ("algorithm.kl_coef > 0 and step % 0 == 1", False),
        ("step > 3 or algorithm.kl_coef == 0", True),
        ("not (step > 3 and algorithm.kl_coef > 0)", True),
        ("not step > 3", None),
        ("1 > 2 > step", False),
        ("(evaluation.every > 0 and step % evaluation.every == 0) or (evaluation.at_end and step == 1)", None),
    ],
)
def test_a_condition_is_settled_as_soon_as_the_step_cannot_change_it(expression: str, expected: bool | None) -> None:
    config = make()
    assert decide(expression, config) is expected
    if expected is not None:
        assert all(evaluate(expression, config, step) is expected for step in range(1, 8))


@pytest.mark.parametrize(
    "expression",
    [
        "__import__('os').system('true')",
        "().__class__",
        "'a'.join",
        "[1, 2]",
        "step[0]",
        "2 ** 10",
        "1 << 3",
        "lambda: 1",
        "f'{step}'",
        "(x := 1)",
        "1 if step else 2",
        "step in (1, 2)",
        "b'a' == 1",
        "1j == step",
        "... == 1",
        "step is 5",
        "~step",
    ],
)
def test_nothing_else_is_allowed(expression: str) -> None:
    with pytest.raises(RequestError, match="is not allowed in a condition"):
        evaluate(expression, make(), 1)


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("algorithm.kl_coeff > 0", "'algorithm.kl_coeff' is no configuration key; did you mean 'algorithm.kl_coef'?"),
        ("stepp > 1", "'stepp' is no configuration key"),
        ("algorithm", "'algorithm' is a section of the configuration"),
        ("algorithm.model_fields", "is no configuration key"),
        ("algorithm.__class__", "is no configuration key"),
        ("step >", "is not a condition"),
        ("", "is not a condition"),
        ("step = 1", "is not a condition"),
        ("1 / 0 == step", "divides by zero"),
        ("step % evaluation.every == 0", "divides by zero"),
        ("algorithm.advantage > 1", "compares 'grpo' with 1"),
        ("'a' * 1000000000 == 1", "'a', not a number"),
        ("True + 1 == 2", "True, not a number"),
        ("1 + " * 200 + "1", "is longer than 400"),
        ("(" * 190 + "1", "is not a condition"),
    ],
)
def test_complaints(expression: str, message: str) -> None:
    with pytest.raises(RequestError) as error:
        decide(expression, make())
    assert message in str(error.value)


def test_an_unknown_key_is_found_behind_a_settled_part() -> None:
    with pytest.raises(RequestError, match="no configuration key"):
        decide("False and algorithm.nothing", make())


def test_depth_is_limited_before_the_stack_ends() -> None:
    assert evaluate("-" * 48 + "1", make(), 1)
    for deep in ("-" * 399 + "1", "not " * 99 + "1", "a." * 199 + "a"):
        with pytest.raises(RequestError):
            evaluate(deep, make(), 1)


def test_lookup_reaches_free_parameters() -> None:
    config = Config(reward={"params": {"strict": True}})  # type: ignore[arg-type]
    assert lookup(config, "reward.params.strict") is True
