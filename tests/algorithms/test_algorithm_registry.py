from __future__ import annotations

import pytest

from siirl.algorithms import registry
from siirl.algorithms.registry import advantage, get_advantage, get_policy_loss, policy_loss
from siirl.errors import RequestError


@pytest.fixture
def clean(monkeypatch):
    monkeypatch.setattr(registry, "_registered", {key: dict(table) for key, table in registry._registered.items()})


def test_a_decorated_function_is_found_by_its_name_and_stays_itself(clean):
    @advantage("ours")
    def estimator(batch, config, collectives):
        return {}

    @policy_loss("ours")
    def loss(inputs, config):
        return inputs.log_probs_T, {}

    assert get_advantage("ours") is estimator
    assert get_policy_loss("ours") is loss
    assert estimator(None, None, None) == {}


def test_the_defaults_of_the_config_are_registered():
    assert callable(get_advantage("grpo"))
    assert callable(get_advantage("gae"))
    assert callable(get_policy_loss("ppo_clip"))


def test_a_misspelt_name_gets_a_suggestion_and_a_strange_one_the_list():
    with pytest.raises(
        RequestError, match="algorithm.advantage: nothing is registered as 'grop'; did you mean 'grpo'?"
    ):
        get_advantage("grop")
    with pytest.raises(RequestError, match="algorithm.policy_loss: .*'ppoclip'; did you mean 'ppo_clip'?"):
        get_policy_loss("ppoclip")
    with pytest.raises(RequestError, match="'zzz'; known: gae, grpo"):
        get_advantage("zzz")


def test_a_name_is_taken_once():
    with pytest.raises(ValueError, match="'grpo' is already registered"):
        advantage("grpo")(lambda batch, config, collectives: {})
