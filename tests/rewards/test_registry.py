"""A reward is found by its name, or refused with a sentence before anything runs."""

from __future__ import annotations

import subprocess
import sys

import pytest

from siirl.errors import RequestError
from siirl.rewards import choose, resolve, reward
from siirl.rewards.text import exact_match

FILE = """
from siirl.rewards import reward

def score(prompt, response, sample, scale=1.0):
    return scale * len(response)

def scores(prompt, response):
    return 0.0

@reward("by_length")
def named(prompt, response, sample):
    return float(len(response))

class Judge:
    def __call__(self, prompt, response, sample):
        return 2.0

judge = Judge()
number = 3

async def slow(prompt, response, sample):
    return 1.0
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(FILE)
    (tmp_path / "broken.py").write_text("import siirl\n\nimport no_such_package\n")
    (tmp_path / "script.py").write_text("import sys\nsys.exit(3)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


def test_built_in_rewards_are_found_by_name():
    assert resolve("exact_match").function is exact_match
    assert resolve("gsm8k")("", "#### 4", {"answer": "4"}) == 1.0


def test_auto_is_the_scorer_of_the_source_else_exact_match():
    assert choose("auto", "reasoning_gym") == "reasoning_gym"
    assert choose("auto", None) == "exact_match"
    assert choose("math", "reasoning_gym") == "math"


def test_a_function_of_a_file_or_module_is_called_with_the_parameters(here):
    assert resolve("mine.py:score", {"scale": 0.5})("", "abcd", {}) == 2.0
    assert resolve(str(here / "mine.py") + ":score")("", "abcd", {}) == 4.0
    assert resolve("mine:score")("", "abcd", {}) == 4.0
    assert resolve("mine.py:by_length")("", "abc", {}) == 3.0
    assert resolve("mine.py:judge")("", "", {}) == 2.0


def test_a_resolved_reward_knows_where_it_is_defined(here):
    assert resolve("mine.py:score").location == f"{here / 'mine.py'}:4"
    assert resolve("mine.py:judge").location == f"{here / 'mine.py'}:15"


@pytest.mark.parametrize(
    ("spec", "params", "sentence"),
    [
        ("exact_mach", {}, "did you mean 'exact_match'"),
        ("mine.py", {}, "mine.py:FUNCTION"),
        ("mime.py:score", {}, "'mime.py' does not exist; did you mean 'mine.py'"),
        ("mine.py:scor", {}, "has no 'scor'; did you mean 'score'"),
        ("mine.py:number", {}, "is a int, not a function"),
        ("mine.py:Judge", {}, "not a function"),
        ("mine.py:slow", {}, "async"),
        ("mine.py:scores", {}, r"mine\.py:7\) cannot be called as \(prompt, response, sample\): too many"),
        ("mine.py:score", {"scal": 1}, "unexpected keyword argument 'scal'; did you mean 'scale'"),
        ("exact_match", {"strict": True}, "unexpected keyword argument 'strict'"),
        ("no_such_module:score", {}, "reward module 'no_such_module' cannot be imported: ModuleNotFoundError"),
        ("broken.py:score", {}, r"ModuleNotFoundError at .*broken\.py:3: No module named 'no_such_package'"),
        ("script.py:score", {}, r"SystemExit at .*script\.py:2"),
        (":score", {}, "there is no reward ':score'"),
    ],
)
def test_what_cannot_be_resolved_is_one_sentence(here, spec, params, sentence):
    with pytest.raises(RequestError, match=sentence) as caught:
        resolve(spec, params)
    assert "\n" not in str(caught.value)


def test_a_built_in_name_cannot_be_taken():
    with pytest.raises(ValueError, match="built-in"):
        reward("exact_match")(lambda prompt, response, sample: 0.0)


def test_importing_rewards_loads_neither_torch_nor_the_libraries_of_single_rewards():
    heavy = "{'torch', 'math_verify', 'reasoning_gym', 'numpy'}"
    code = f"import sys, siirl.rewards; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
