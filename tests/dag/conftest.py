from __future__ import annotations

from textwrap import dedent

import pytest

from siirl.config.schema import Config
from siirl.dag import Graph

DATA = "{id: data, op: data, writes: [sample_id, group_id, slot, prompt_ids, row]}"


@pytest.fixture
def config() -> Config:
    return Config()


@pytest.fixture
def graph_of():
    """Make a graph of entries of `nodes`, one a line; entry i stands on line i + 2, after a data node on line 2."""

    def make(*entries: str, data: str = DATA) -> Graph:
        lines = ["nodes:", *(f"  - {entry}" for entry in (data, *entries))]
        return Graph.from_text("\n".join(lines) + "\n", "p.yaml")

    return make


@pytest.fixture
def parse():
    return lambda text: Graph.from_text(dedent(text), "p.yaml")
