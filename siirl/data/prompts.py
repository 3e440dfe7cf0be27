"""From a source's rows to token columns: what the pipeline's `data` node does."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from siirl.config.schema import DataConfig
from siirl.data.batch import Batch, Ragged
from siirl.data.dataloader import Item, prompt_id, sample_id
from siirl.errors import RequestError, did_you_mean
from siirl.model.tokenizer import encode_prompts, encode_texts
from siirl.rollout.sampling import uniforms

# so many rows are looked at for the longest prompt before a stage begins
_CHECKED_ROWS = 1024


class Rows(Protocol):
    """Random access to JSON-able rows; see :mod:`siirl.data.sources`."""

    @property
    def name(self) -> str: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


class PromptReader:
    """Reads and tokenises the rows of a step.

    Args:
        source: the rows.
        config: of the data; names the columns and the templates.
        tokenizer: a Hugging Face tokenizer.
        eos_id: ends a supervised target.
        training_rows: rows that a noisy target may be taken from.
        seed: of the label noise.
    """

    def __init__(
        self,
        source: Rows,
        config: DataConfig,
        tokenizer: Any,
        eos_id: int | None,
        training_rows: NDArray[np.int64],
        seed: int,
    ) -> None:
        self._source, self._config, self._tokenizer = source, config, tokenizer
        self._eos_id, self._training_rows, self._seed = eos_id, training_rows, seed

    def check_longest(self) -> None:
        """Read the row that looks longest among many of the training rows, as :meth:`read` would.

        Raises:
            RequestError: it cannot be used and ``data.on_error`` is ``stop``: better now than after a day.
        """
        rows = self._training_rows[:: -(-len(self._training_rows) // _CHECKED_ROWS)]
        longest = max(rows, key=lambda row: len(json.dumps(self._source[row].get(self._config.prompt_key))))
        self._usable([Item(int(longest), 0, 0, 0)])

    def read(self, items: Sequence[Item], supervised: bool = False) -> Batch:
        """Columns sample_id, group_id, slot, prompt_ids and row, and response_ids when ``supervised``.

        Raises:
            RequestError: a row has no usable prompt, or one longer than the limit, and ``data.on_error`` is ``stop``.
        """
        kept, rows, prompts = self._usable(items)
        groups = torch.tensor([prompt_id(item.position) for item in kept], dtype=torch.int64)
        columns: dict[str, torch.Tensor | Ragged] = {
            "sample_id": sample_id(groups, 0),
            "group_id": groups,
            "slot": torch.tensor([item.slot for item in kept], dtype=torch.int64),
            "prompt_ids": Ragged.from_lists(prompts, torch.int64),
            "row": Ragged.from_texts([json.dumps(row) for row in rows]),
        }
        if supervised:
            columns["response_ids"] = Ragged.from_lists(self._targets(kept, rows), torch.int64)
        return Batch(columns)

    def prompt_text(self, row: dict[str, Any]) -> str:
        """The prompt as a reward function and a reader see it: the text, or the chat's last message."""
        prompt = row.get(self._config.prompt_key, "")
        return prompt if isinstance(prompt, str) else str(prompt[-1].get("content", "")) if prompt else ""

    def _usable(self, items: Sequence[Item]) -> tuple[list[Item], list[dict[str, Any]], list[list[int]]]:
        """The rows that can be used, with their prompts' tokens; the others stop the run or are counted."""
        config = self._config
        rows = [self._source[item.row] for item in items]
        for item, row in zip(items, rows, strict=True):
            if config.prompt_key not in row:
                hint = did_you_mean(config.prompt_key, row)
                raise self._refusal(item, f"no column '{config.prompt_key}'{hint} (data.prompt_key)")
        prompts = encode_prompts(
            self._tokenizer,
            [row[config.prompt_key] for row in rows],
            system_prompt=config.system_prompt,
            template=config.prompt_template,
            chat=config.chat_template,
        )
        good = [i for i, ids in enumerate(prompts) if 0 < len(ids) <= config.max_prompt_tokens]
        if len(good) < len(items) and config.on_error == "stop":
            i = next(i for i in range(len(items)) if i not in good)
            raise self._refusal(
                items[i],
                f"the prompt has {len(prompts[i])} tokens, data.max_prompt_tokens is {config.max_prompt_tokens}; "
                "raise it, or leave such rows out with data.on_error=skip",
            )
        return [items[i] for i in good], [rows[i] for i in good], [prompts[i] for i in good]

    def _targets(self, items: Sequence[Item], rows: Sequence[dict[str, Any]]) -> list[list[int]]:
        """Tokens of the supervised targets; with label noise, some are another row's."""
        config = self._config
        chosen = list(rows)
        if config.label_noise:
            positions = torch.tensor([item.position for item in items], dtype=torch.int64)
            for i, (noise, choice) in enumerate(uniforms(self._seed, positions, 2).tolist()):
                if noise < config.label_noise:
                    chosen[i] = self._source[self._training_rows[int(choice * len(self._training_rows))]]
        for item, row in zip(items, chosen, strict=True):
            if config.answer_key not in row:
                hint = did_you_mean(config.answer_key, row)
                raise self._refusal(item, f"no column '{config.answer_key}'{hint} (data.answer_key)")
        texts = [config.response_template.format(**{**row, "answer": row[config.answer_key]}) for row in chosen]
        end = [] if self._eos_id is None else [self._eos_id]
        return [[*ids, *end] for ids in encode_texts(self._tokenizer, texts)]

    def _refusal(self, item: Item, problem: str) -> RequestError:
        return RequestError(f"row {item.row} of {self._source.name}: {problem}")
