"""The reader's look at the longest prompt, before a stage begins."""

from __future__ import annotations

import numpy as np
import pytest

from siirl.config.schema import DataConfig
from siirl.data.prompts import PromptReader
from siirl.data.source_base import Source
from siirl.errors import RequestError
from siirl.model.tokenizer import char_tokenizer


def reader(prompts: list[str], **config: object) -> PromptReader:
    source = Source("rows", len(prompts), lambda i: {"prompt": prompts[i], "answer": "1"})
    settings = DataConfig(max_prompt_tokens=16, **config)
    return PromptReader(source, settings, char_tokenizer(), None, np.arange(len(prompts)), seed=0)


def test_one_long_prompt_among_many_is_found_before_the_first_step() -> None:
    prompts = ["1+1="] * 1000
    reader(prompts).check_longest()
    prompts[700] = "1+" * 10 + "1="
    with pytest.raises(RequestError, match=r"row 700 of rows: the prompt has 22 tokens, data\.max_prompt_tokens is 16"):
        reader(prompts).check_longest()


def test_a_long_prompt_that_is_to_be_left_out_stops_nothing() -> None:
    reader(["1+1=", "1+" * 10 + "1="], on_error="skip").check_longest()


def test_of_a_large_source_a_bounded_number_of_rows_is_read() -> None:
    read = []
    source = Source("rows", 10**6, lambda i: read.append(i) or {"prompt": "1+1="})
    PromptReader(source, DataConfig(), char_tokenizer(), None, np.arange(10**6), seed=0).check_longest()
    assert len(read) <= 1025
    assert max(read) > 990_000
