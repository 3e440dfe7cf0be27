"""A process for the commands of a file's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.bench.commands import Commands


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    commands = Commands(tmp_path_factory.mktemp("bench"))
    yield commands
    commands.close()
