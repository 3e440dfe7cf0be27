"""A reasoning-gym task scored by the task's own `score_answer`."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

import reasoning_gym
from reasoning_gym.utils import extract_answer

from siirl.rewards import exact_json
from siirl.rewards.registry import reward


@reward("reasoning_gym")
def score(prompt: str, response: str, sample: dict[str, Any]) -> float:
    """The task's own score of the text in the last ``<answer>…</answer>``, or of the whole response without one.

    `sample["reasoning_gym"]` is what the source `reasoning-gym:TASK` put there: task, params, metadata.
    """
    if "reasoning_gym" not in sample:
        raise ValueError("the row is not from a reasoning-gym:TASK source")
    origin = sample["reasoning_gym"]
    entry = {
        "question": prompt,
        "answer": sample.get("answer"),
        "metadata": exact_json.decode(origin["metadata"]),
    }
    answer = extract_answer(response)
    scorer = _task(origin["task"], json.dumps(origin["params"], sort_keys=True))
    return scorer.score_answer(response.strip() if answer is None else answer, entry)


@lru_cache(maxsize=32)
def _task(name: str, params: str) -> Any:
    return reasoning_gym.create_dataset(name, size=1, seed=0, **json.loads(params))
