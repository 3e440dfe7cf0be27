"""A run's way of drawing tokens, from its configuration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from siirl.config.schema import RolloutConfig
from siirl.rollout.sampling import Sampling


def sampling_of(config: RolloutConfig, encode: Callable[[str], list[int]]) -> Sampling:
    """The options of training; ``encode`` gives the tokens of a text without special tokens."""
    # a word begins with another token behind a space than at a line's start
    bad = {tuple(encode(text)) for word in config.bad_words for text in (word, f" {word}")}
    return Sampling(
        config.max_new_tokens,
        config.temperature,
        config.top_p,
        config.top_k,
        config.min_p,
        config.ignore_eos,
        tuple(config.stop),
        tuple(config.stop_ids),
        config.min_new_tokens,
        config.repetition_penalty,
        config.presence_penalty,
        config.frequency_penalty,
        tuple(sorted(word for word in bad if word)),
        draft_tokens=config.draft_tokens,
        draft_match=config.draft_match,
    )


def greedy(sampling: Sampling) -> Sampling:
    """The likeliest token each time, everything else alike."""
    return replace(sampling, temperature=0.0)
