"""From a source's rows to token columns: what the pipeline's `data` node does."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from siirl.config.schema import DataConfig
from siirl.data.batch import Batch, Ragged
from siirl.data.dataloader import Item, prompt_id, sample_id
from siirl.errors import RequestError, did_you_mean
from siirl.model.tokenizer import encode_prompt
from siirl.rollout.sampling import uniforms


class Rows(Protocol):
    """Random access to JSON-able rows; see :mod:`siirl.data.sources`."""

    name: str

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
        training_rows: Sequence[int],
        seed: int,
    ) -> None:
        self._source, self._config, self._tokenizer = source, config, tokenizer
        self._eos_id, self._training_rows, self._seed = eos_id, training_rows, seed
        self.skipped = 0

    def read(self, items: Sequence[Item], supervised: bool = False) -> Batch:
        """Columns sample_id, group_id, slot, prompt_ids and row, and response_ids when ``supervised``.

        Raises:
            RequestError: a row has no usable prompt, or one longer than the limit, and ``data.on_error`` is ``stop``.
        """
        kept, prompts, responses, rows = [], [], [], []
        for item in items:
            row = self._source[item.row]
            problem, prompt = self._prompt(row)
            if problem is not None:
                if self._config.on_error == "stop":
                    raise RequestError(f"row {item.row} of {self._source.name}: {problem}")
                self.skipped += 1
                continue
            kept.append(item)
            prompts.append(prompt)
            rows.append(json.dumps(row))
            if supervised:
                responses.append(self._target(row, item))
        groups = torch.tensor([prompt_id(item.position) for item in kept], dtype=torch.int64)
        columns: dict[str, torch.Tensor | Ragged] = {
            "sample_id": sample_id(groups, 0),
            "group_id": groups,
            "slot": torch.tensor([item.slot for item in kept], dtype=torch.int64),
            "prompt_ids": Ragged.from_lists(prompts, torch.int64),
            "row": Ragged.from_texts(rows),
        }
        if supervised:
            columns["response_ids"] = Ragged.from_lists(responses, torch.int64)
        return Batch(columns)

    def prompt_text(self, row: dict[str, Any]) -> str:
        """The prompt as a reward function and a reader see it: the text, or the chat's last message."""
        prompt = row.get(self._config.prompt_key, "")
        return prompt if isinstance(prompt, str) else str(prompt[-1].get("content", "")) if prompt else ""

    def _prompt(self, row: dict[str, Any]) -> tuple[str | None, list[int]]:
        config = self._config
        if config.prompt_key not in row:
            return f"no column '{config.prompt_key}'{did_you_mean(config.prompt_key, row)} (data.prompt_key)", []
        ids = encode_prompt(
            self._tokenizer,
            row[config.prompt_key],
            system_prompt=config.system_prompt,
            template=config.prompt_template,
            chat=config.chat_template,
        )
        if not ids:
            return "the prompt is empty", []
        if len(ids) > config.max_prompt_tokens:
            return (
                f"the prompt has {len(ids)} tokens, data.max_prompt_tokens is {config.max_prompt_tokens}; "
                "raise it, or leave such rows out with data.on_error=skip"
            ), []
        return None, ids

    def _target(self, row: dict[str, Any], item: Item) -> list[int]:
        if self._config.label_noise:
            noise, choice = uniforms(self._seed, torch.tensor([item.position]), 2)[0].tolist()
            if noise < self._config.label_noise:
                row = self._source[self._training_rows[int(choice * len(self._training_rows))]]
        if self._config.answer_key not in row:
            raise RequestError(
                f"row {item.row} of {self._source.name}: no column '{self._config.answer_key}'"
                f"{did_you_mean(self._config.answer_key, row)} (data.answer_key)"
            )
        text = self._config.response_template.format(**{**row, "answer": row[self._config.answer_key]})
        ids = self._tokenizer(text, add_special_tokens=False).input_ids
        return ids if self._eos_id is None else [*ids, self._eos_id]
