from __future__ import annotations

from collections.abc import Iterator

import pytest

from siirl_kernels import bind, resolved


@pytest.fixture
def references() -> Iterator[None]:
    """What the formulas count: other kernels keep less, and PyTorch counts no operation of theirs."""
    before = resolved()
    bind([])
    yield
    bind([], {op: provider.partition(" > ")[0] for op, provider in before.items()})
