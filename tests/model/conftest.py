"""Fixtures of the model tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from tests.model.small_models import make_model, save


@pytest.fixture
def sequences() -> list[list[int]]:
    """Four sequences of very different lengths, free of token 0: as padding, it has no gradient in `transformers`."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1, 120, (length,), generator=generator).tolist() for length in (9, 1, 70, 30)]


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., tuple[PreTrainedModel, Path]]:
    """Make a model and save it: ``saved(model_type, **config) -> (model, directory)``."""

    def build(model_type: str, **settings: Any) -> tuple[PreTrainedModel, Path]:
        model = make_model(model_type, **settings)
        return model, save(model, tmp_path / model_type)

    return build
