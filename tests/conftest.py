"""What every test of the suite can rely on."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def determinism_ends_with_the_test() -> Iterator[None]:
    """The order of tests decides nothing: what one switches in PyTorch for its process, the next does not inherit."""
    yield
    if torch := sys.modules.get("torch"):
        torch.set_deterministic_debug_mode("default")
