"""Rows made on the spot: arithmetic, and the tasks of reasoning-gym."""

from __future__ import annotations

import dataclasses
import operator
import random
from typing import Any

from siirl.config.schema import DataConfig
from siirl.data.source_base import Row, Source, parse_query
from siirl.errors import RequestError, did_you_mean
from siirl.rewards import exact_json

# operation: sign, function, digits of the widest result beyond those of `digits` operands
OPERATIONS = {
    "addition": ("+", operator.add, lambda digits: digits + 1),
    "subtraction": ("-", operator.sub, lambda digits: digits + 1),
    "multiplication": ("*", operator.mul, lambda digits: 2 * digits),
}
MAX_PAIRS = 200_000
REASONING_GYM_ROWS = 10_000


def open_arithmetic(spec: str, config: DataConfig, seed: int) -> Source:
    """``arithmetic:addition?digits=2&reverse=false``: all pairs of operands below 10^digits, in a seeded order.

    The prompt is ``37+58=``; the answer has a fixed width, zero-padded (``095``; a difference keeps one place for its
    sign, ``-21`` and ``021``), with `reverse` the least significant digit first. Of more than 200,000 pairs a seeded
    sample of as many.
    """
    name, options = parse_query(spec, ["digits", "reverse"])
    operation = name.partition(":")[2]
    if operation not in OPERATIONS:
        near = did_you_mean(operation, OPERATIONS)
        raise RequestError(f"'{spec}': no operation '{operation}'{near} (there are {', '.join(OPERATIONS)})")
    digits, reverse = options.get("digits", 2), options.get("reverse", False)
    if type(digits) is not int or not 1 <= digits <= 9:
        raise RequestError(f"'{spec}': digits is {digits!r}, not a number from 1 to 9")
    if type(reverse) is not bool:
        raise RequestError(f"'{spec}': reverse is {reverse!r}, not true or false")
    sign, compute, width_of = OPERATIONS[operation]
    base, width = 10**digits, width_of(digits)
    pairs = random.Random(seed).sample(range(base * base), min(base * base, MAX_PAIRS, config.limit or MAX_PAIRS))

    def read(index: int) -> Row:
        left, right = divmod(pairs[index], base)
        answer = f"{compute(left, right):0{width}d}"
        answer = answer[::-1] if reverse else answer
        return {config.prompt_key: f"{left}{sign}{right}=", config.answer_key: answer, "answer": answer}

    return Source(spec, len(pairs), read, scorer="exact_match")


def open_reasoning_gym(spec: str, config: DataConfig, seed: int) -> Source:
    """``reasoning-gym:TASK?size=N&parameter=value``: a task of reasoning-gym with the task's own parameters.

    The rows depend on `seed`; ``seed=N`` in the query gives the rows that reasoning-gym itself gives for that seed.
    Row i of seed s is row i-1 of seed s+1 there, so the run's seed is spread first: two seeds share no stretch of rows.
    """
    try:
        import reasoning_gym
    except ModuleNotFoundError as error:
        raise RequestError(f"'{spec}' needs the package reasoning-gym: pip install reasoning-gym") from error
    tasks = reasoning_gym.factory.DATASETS
    task = spec.partition(":")[2].partition("?")[0]
    if task not in tasks:
        raise RequestError(f"'{spec}': reasoning-gym has no task '{task}'{did_you_mean(task, tasks)}")
    _, params = parse_query(spec, [field.name for field in dataclasses.fields(tasks[task][1])])
    size = params.pop("size", REASONING_GYM_ROWS)
    if type(size) is not int or size < 1:
        raise RequestError(f"'{spec}': size is {size!r}, not a positive number")
    task_seed = params.pop("seed", random.Random(seed).getrandbits(31))
    try:
        dataset = reasoning_gym.create_dataset(task, size=size, seed=task_seed, **params)
    except (AssertionError, ValueError, TypeError) as error:
        raise RequestError(f"'{spec}': reasoning-gym refuses these parameters: {error}") from error

    def read(index: int) -> Row:
        entry = dataset[index]
        row: dict[str, Any] = {config.prompt_key: entry["question"]}
        if entry["answer"] is not None:  # some tasks know how to score and no answer
            row[config.answer_key] = row["answer"] = entry["answer"]
        row["reasoning_gym"] = {"task": task, "params": params, "metadata": exact_json.encode(entry["metadata"])}
        return row

    return Source(spec, min(size, config.limit or size), read, scorer="reasoning_gym")
