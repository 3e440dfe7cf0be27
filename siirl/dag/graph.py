"""A pipeline as the user writes it: nodes that declare the columns they read and write.

`Graph.from_yaml` reads a pipeline file, ``Graph("name").node(...)`` builds the same in Python, `to_yaml` writes it.
What can be judged of a node without the other nodes, the configuration and the ops is judged here; the rest is the
planner's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import pydantic

from siirl.config.paths import find_pipeline
from siirl.config.schema import AlgorithmConfig
from siirl.config.yaml import KeyPath, Lines, dump_yaml, load_yaml, parse_yaml
from siirl.dag.expressions import names_in
from siirl.dag.ops import MODELS
from siirl.dag.plan import Split
from siirl.errors import RequestError, did_you_mean

SPLITS: tuple[str, ...] = get_args(Split)

_NODE_KEYS = ("id", "op", "model", "reads", "writes", "after", "layout", "when", "every", "params")
_GRAPH_KEYS = ("name", "description", "algorithm", "nodes")
_ID = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*\Z")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")
_KEY = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+\Z")


@dataclass(frozen=True)
class Read:
    """One input of a node: a column, which may be absent when it is optional."""

    column: str
    optional: bool = False


@dataclass(frozen=True)
class Node:
    """One operation. `reads` and `writes` map the op's formal names to columns."""

    id: str
    op: str
    model: str | None = None
    reads: Mapping[str, Read] = field(default_factory=dict)
    writes: Mapping[str, str] = field(default_factory=dict)
    after: tuple[str, ...] = ()
    layout: Split | None = None
    when: str | None = None
    every: int | str = 1
    params: Mapping[str, Any] = field(default_factory=dict)
    places: Mapping[KeyPath, str] = field(default_factory=dict, compare=False, repr=False)
    """``FILE:LINE`` of the node, of its keys and of its inputs and outputs, by path; () is the node itself."""

    def error(self, message: str, *path: str | int) -> RequestError:
        """A `RequestError` that names the place of ``path`` within the node."""
        place = next((self.places[path[:end]] for end in range(len(path), -1, -1) if path[:end] in self.places), "")
        return RequestError(f"{place}{': ' if place else ''}node '{self.id}': {message}")


class Graph:
    """A named list of nodes, with defaults for the `algorithm` section of the configuration.

    The order of nodes matters only where the data leaves a choice: of two nodes that could run next, the earlier runs.
    """

    def __init__(
        self,
        name: str,
        *,
        description: str = "",
        algorithm: Mapping[str, Any] | None = None,
        nodes: Iterable[Node] = (),
        file: str | None = None,
    ) -> None:
        self.name = name
        self.description = description
        self.algorithm = dict(algorithm or {})
        self.nodes = list(nodes)
        self.file = file

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Graph):
            return NotImplemented
        return self._content() == other._content()

    def __repr__(self) -> str:
        return f"Graph({self.name!r}, nodes={[node.id for node in self.nodes]})"

    def _content(self) -> tuple[Any, ...]:
        return self.name, self.description, self.algorithm, self.nodes

    @property
    def place(self) -> str:
        """What an error about the whole graph begins with."""
        return self.file or f"pipeline '{self.name}'"

    def node(
        self,
        id: str,
        *,
        op: str,
        model: str | None = None,
        reads: Sequence[str] | Mapping[str, str] = (),
        writes: Sequence[str] | Mapping[str, str] = (),
        after: Sequence[str] = (),
        layout: Split | None = None,
        when: str | bool | None = None,
        every: int | str = 1,
        params: Mapping[str, Any] | None = None,
    ) -> Graph:
        """Add a node, with the meaning of the same keys in a pipeline file, and return the graph.

        Raises:
            RequestError: a value is of the wrong kind.
        """
        entry: dict[str, Any] = {
            "id": id,
            "op": op,
            "model": model,
            "reads": reads,
            "writes": writes,
            "after": after,
            "layout": layout,
        }
        entry |= {"when": when, "every": every, "params": params}
        self.nodes.append(_NodeReader(entry, {(): f"pipeline '{self.name}'"}).read())
        return self

    @classmethod
    def from_yaml(cls, source: str | Path) -> Graph:
        """Read a pipeline file, given by path or by the name of a built-in pipeline.

        Raises:
            RequestError: there is no such pipeline, or the file is not one; names file and line.
        """
        return cls._from_data(*load_yaml(find_pipeline(str(source))))

    @classmethod
    def from_text(cls, text: str, file: str = "pipeline") -> Graph:
        """Read a pipeline from YAML text; ``file`` is the name that errors use."""
        return cls._from_data(*parse_yaml(text, file))

    @classmethod
    def _from_data(cls, data: dict[str, Any], lines: Lines) -> Graph:
        for key in data:
            if key not in _GRAPH_KEYS:
                raise RequestError(f"{lines.where(key)}: unknown key '{key}'{did_you_mean(key, _GRAPH_KEYS)}")
        name = data.get("name", Path(lines.file).stem)
        description = data.get("description", "")
        entries = data.get("nodes")
        for key, value in (("name", name), ("description", description)):
            if not isinstance(value, str):
                raise RequestError(f"{lines.where(key)}: '{key}' is not text")
        if not isinstance(entries, list) or not entries:
            raise RequestError(f"{lines.where('nodes')}: a pipeline needs 'nodes', a list of at least one node")
        nodes = [_NodeReader(entry, _places(lines, "nodes", i)).read() for i, entry in enumerate(entries)]
        algorithm = _algorithm(data.get("algorithm"), lines)
        return cls(name, description=description, algorithm=algorithm, nodes=nodes, file=lines.file)

    def to_yaml(self) -> str:
        """The pipeline file that `from_yaml` reads back as an equal graph."""
        data: dict[str, Any] = {"name": self.name}
        if self.description:
            data["description"] = self.description
        if self.algorithm:
            data["algorithm"] = self.algorithm
        return dump_yaml(data | {"nodes": [_entry(node) for node in self.nodes]})


def _algorithm(value: Any, lines: Lines) -> dict[str, Any]:
    """Check a pipeline's `algorithm` defaults against the schema, and give them as they were written."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise RequestError(f"{lines.where('algorithm')}: 'algorithm' is not keys with values")
    for key in value:
        if key not in AlgorithmConfig.model_fields:
            hint = did_you_mean(key, AlgorithmConfig.model_fields)
            raise RequestError(f"{lines.where('algorithm', key)}: unknown key 'algorithm.{key}'{hint}")
    try:
        AlgorithmConfig.model_validate_json(json.dumps(value), strict=True)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        path = ("algorithm", *first["loc"])
        dotted = ".".join(str(part) for part in path)
        raise RequestError(f"{lines.where(*path)}: {dotted}: {first['msg']}") from error
    return value


def _places(lines: Lines, *prefix: str | int) -> dict[KeyPath, str]:
    return {path[len(prefix) :]: lines.where(*path) for path in lines if path[: len(prefix)] == prefix}


def _entry(node: Node) -> dict[str, Any]:
    """A node as its YAML entry, with the defaults left out."""
    entry: dict[str, Any] = {"id": node.id, "op": node.op}
    reads = {formal: read.column + "?" * read.optional for formal, read in node.reads.items()}
    optional: dict[str, Any] = {
        "model": node.model,
        "reads": _shorten(reads),
        "writes": _shorten(dict(node.writes)),
        "after": list(node.after),
        "layout": node.layout,
        "when": node.when,
        "every": None if node.every == 1 else node.every,
        "params": dict(node.params),
    }
    return entry | {key: value for key, value in optional.items() if value not in (None, [], {})}


def _shorten(names: dict[str, str]) -> list[str] | dict[str, str]:
    """A list when every formal name is its column's."""
    same = all(formal == column.removesuffix("?") for formal, column in names.items())
    return list(names.values()) if same else names


class _NodeReader:
    """Reads one node's entry, whatever it is; every complaint names its place."""

    def __init__(self, entry: Any, places: Mapping[KeyPath, str]) -> None:
        self.places = dict(places)
        identity = entry.get("id") if isinstance(entry, dict) else None
        self.id = identity if isinstance(identity, str) else ""
        if not isinstance(entry, dict):
            raise self.error("a node is keys with values, such as {id: reward, op: reward}")
        for key in entry:
            if key not in _NODE_KEYS:
                raise self.error(f"unknown key '{key}'{did_you_mean(key, _NODE_KEYS)}", key)
        self.entry = {key: value for key, value in entry.items() if value is not None}

    def error(self, message: str, *path: str | int) -> RequestError:
        return Node(self.id, "", places=self.places).error(message, *path)

    def read(self) -> Node:
        identity = self.text("id")
        if not _ID.match(identity):
            raise self.error("an id is letters, digits, '_' and '-', and begins with a letter or '_'", "id")
        model = self.choice("model", MODELS)
        layout = self.choice("layout", SPLITS)
        reads = {formal: Read(name.removesuffix("?"), name.endswith("?")) for formal, name in self.names("reads")}
        return Node(
            id=identity,
            op=self.text("op"),
            model=model,
            reads=reads,
            writes=dict(self.names("writes")),
            after=self.after(),
            layout=layout,  # type: ignore[arg-type]  # one of SPLITS, which are Split's values
            when=self.when(),
            every=self.every(),
            params=self.params(),
            places=self.places,
        )

    def text(self, key: str) -> str:
        value = self.entry.get(key)
        if not isinstance(value, str) or not value:
            raise self.error(f"needs '{key}', a text" if value is None else f"'{key}' is not text", key)
        return value

    def choice(self, key: str, options: Sequence[str]) -> str | None:
        value = self.entry.get(key)
        if value is not None and value not in options:
            hint = did_you_mean(str(value), options) or f"; use {' or '.join(options)}"
            raise self.error(f"unknown {key} '{value}'{hint}", key)
        return value

    def names(self, key: str) -> list[tuple[str, str]]:
        """Pairs of formal name and column, from a list of names or a mapping; a read keeps its ``?``."""
        value = self.entry.get(key, [])
        if isinstance(value, str) or not isinstance(value, Mapping | Sequence):
            raise self.error(f"'{key}' is neither a list of columns nor a mapping of names to columns", key)
        listed = [(name, name, index) for index, name in enumerate(value)]
        items = [(k, v, k) for k, v in value.items()] if isinstance(value, Mapping) else listed
        found: dict[str, str] = {}
        for formal, column, at in items:
            bare = column.removesuffix("?") if isinstance(column, str) and key == "reads" else column
            name = formal if isinstance(value, Mapping) else bare
            for text in (bare, name):
                if not isinstance(text, str) or not _NAME.match(text):
                    raise self.error(f"'{key}' has {text!r}, which is not a name of a column", key, at)
            if name in found or (key == "writes" and bare in found.values()):
                raise self.error(f"'{key}' has '{bare}' twice", key, at)
            found[name] = column
            if (key, at) in self.places:
                self.places[key, name] = self.places[key, at]
        return list(found.items())

    def after(self) -> tuple[str, ...]:
        value = self.entry.get("after", [])
        if isinstance(value, str) or not isinstance(value, Sequence) or not all(isinstance(v, str) for v in value):
            raise self.error("'after' is not a list of node ids", "after")
        return tuple(value)

    def when(self) -> str | None:
        value = self.entry.get("when")
        if isinstance(value, bool):
            return str(value)
        if value is None:
            return None
        if not isinstance(value, str):
            raise self.error("'when' is not a condition", "when")
        try:
            names_in(value)
        except RequestError as error:
            raise self.error(str(error), "when") from error
        return value

    def every(self) -> int | str:
        value = self.entry.get("every", 1)
        number = isinstance(value, int) and not isinstance(value, bool) and value >= 0
        if not number and not (isinstance(value, str) and _KEY.match(value)):
            raise self.error(f"'every' is {value!r}, neither a number of steps nor a configuration key", "every")
        return value

    def params(self) -> dict[str, Any]:
        value = self.entry.get("params", {})
        if not isinstance(value, Mapping):
            raise self.error("'params' is not keys with values", "params")
        try:
            return json.loads(json.dumps(dict(value), allow_nan=False))
        except (TypeError, ValueError) as error:
            raise self.error(f"'params' is not plain data: {error}", "params") from error
