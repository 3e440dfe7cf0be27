"""YAML in and out: plain data with the line of every key, and none of YAML 1.1's surprises.

Scalars follow YAML 1.2's core schema: ``1e-3`` is a float, ``on``, ``off``, ``yes``, ``no``, ``12:30`` and
``2026-01-01`` stay text, ``010`` is ten. ``16_384`` is an integer, as in Python. Tags, merge keys, duplicate
keys, recursive anchors and files of unreasonable size are refused.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from siirl.errors import RequestError, did_you_mean

KeyPath = tuple[str | int, ...]

MAX_BYTES = 1_000_000
MAX_NODES = 100_000
MAX_DEPTH = 64

_PREFIX = "tag:yaml.org,2002:"
_CORE: list[tuple[str, re.Pattern[str], str]] = [
    ("null", re.compile(r"(?:~|null|Null|NULL|)\Z"), "~nN"),
    ("bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z"), "tTfF"),
    ("int", re.compile(r"(?:[-+]?[0-9]+(?:_[0-9]+)*|0o[0-7]+|0x[0-9a-fA-F]+)\Z"), "-+0123456789"),
    (
        "float",
        re.compile(
            r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:_[0-9]+)*(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
            r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z"
        ),
        "-+.0123456789",
    ),
]
_PATTERNS = {name: pattern for name, pattern, _ in _CORE}


class Lines(dict[KeyPath, int]):
    """Line numbers (from 1) by path: ``("nodes", 2, "when")`` is the line where that key stands."""

    def __init__(self, file: str) -> None:
        super().__init__()
        self.file = file

    def line(self, *path: str | int) -> int:
        """The line of ``path``, or of its nearest parent that the file has."""
        for end in range(len(path), 0, -1):
            if path[:end] in self:
                return self[path[:end]]
        return self.get((), 1)

    def where(self, *path: str | int) -> str:
        """``FILE:LINE`` of ``path``, the way an error names a place."""
        return f"{self.file}:{self.line(*path)}"


class _Loader(yaml.SafeLoader):
    """PyYAML's reader and composer with the core schema, a limit on depth, and YAML 1.2's ``?`` in flow collections."""

    yaml_implicit_resolvers: dict[str, Any] = {}
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, f"more than {MAX_DEPTH} levels deep", mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def scan_plain(self) -> yaml.ScalarToken:
        """Take a ``?`` at the end of a word as part of it, as in ``[old_log_probs?]``; YAML 1.1 ends the word there."""
        token = super().scan_plain()
        if self.flow_level and self.peek() == "?" and self.index == token.end_mark.index:
            self.forward()
            return yaml.ScalarToken(token.value + "?", True, token.start_mark, self.get_mark())
        return token


class _Dumper(yaml.SafeDumper):
    """Quotes whatever either schema would not read back as text; repeats values rather than anchoring them."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_text(self, text: str) -> yaml.ScalarNode:
        """Escape the breaks that YAML 1.1 takes for the end of a line; PyYAML writes them bare."""
        return self.represent_scalar(
            _PREFIX + "str", text, style='"' if re.search("[\x85\u2028\u2029]", text) else None
        )


_Dumper.add_representer(str, _Dumper.represent_text)
_Dumper.yaml_implicit_resolvers = {key: list(pairs) for key, pairs in yaml.SafeDumper.yaml_implicit_resolvers.items()}
for _name, _pattern, _first in _CORE:
    _characters = [*_first, ""] if _name == "null" else list(_first)
    _Loader.add_implicit_resolver(_PREFIX + _name, _pattern, _characters)
    _Dumper.add_implicit_resolver(_PREFIX + _name, _pattern, _characters)


def load_yaml(path: str | Path) -> tuple[dict[str, Any], Lines]:
    """Read the mapping in the file ``path``; an empty file is an empty mapping.

    Raises:
        RequestError: the file cannot be read or is not YAML of the accepted kind; names file and line.
    """
    file = Path(path)
    if not file.is_file():
        if file.is_dir():
            raise RequestError(f"{path}: is a directory, not a YAML file")
        siblings = [p.name for p in file.parent.glob("*.y*ml")] if file.parent.is_dir() else []
        raise RequestError(f"{path}: no such file{did_you_mean(file.name, siblings)}")
    try:
        with file.open("rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
        text = raw.decode("utf-8-sig")
    except OSError as error:
        raise RequestError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise RequestError(f"{path}:{line}: is not UTF-8 text") from error
    return parse_yaml(text, str(path))


def parse_yaml(text: str, file: str) -> tuple[dict[str, Any], Lines]:
    """`load_yaml` for text at hand; ``file`` is the name errors use."""
    data, lines = _parse(text, file)
    if data is None:
        return {}, lines
    if not isinstance(data, dict):
        raise RequestError(f"{lines.where()}: holds {_kind(data)}, not keys with values")
    return data, lines


def parse_value(text: str) -> Any:
    """Read one value as it would stand after ``key:`` in a file: ``"1e-3"`` is 0.001, ``"[1, 2]"`` a list."""
    return _parse(text, "value")[0]


def dump_yaml(data: Any) -> str:
    """Write plain data so that `parse_yaml` (and a YAML 1.1 reader) gives it back, keys in their order."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def _parse(text: str, file: str) -> tuple[Any, Lines]:
    if len(text) > MAX_BYTES or len(text.encode()) > MAX_BYTES:
        raise RequestError(f"{file}: is larger than {MAX_BYTES:,} bytes")
    lines = Lines(file)
    try:
        root = yaml.compose(text, Loader=_Loader)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise RequestError(f"{file}:{line}: holds a character that YAML does not allow") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{file}:{mark.line + 1}" if mark else file
        detail = ", ".join(part for part in (error.context, error.problem) if part)
        raise RequestError(f"{place}: is not valid YAML: {detail}") from error
    return (None if root is None else _Builder(lines).build(root, ())), lines


class _Builder:
    """Turns composed nodes into plain data, noting lines and counting what aliases expand to."""

    def __init__(self, lines: Lines) -> None:
        self.lines = lines
        self.count = 0
        self.open: set[int] = set()

    def fail(self, node: yaml.Node, message: str) -> RequestError:
        return RequestError(f"{self.lines.file}:{node.start_mark.line + 1}: {message}")

    def build(self, node: yaml.Node, path: KeyPath) -> Any:
        self.count += 1
        if self.count > MAX_NODES:
            raise self.fail(node, f"aliases expand to more than {MAX_NODES:,} values")
        self.lines.setdefault(path, node.start_mark.line + 1)
        if isinstance(node, yaml.ScalarNode):
            return self.scalar(node)
        if id(node) in self.open:
            raise self.fail(node, "an anchor contains itself")
        if len(self.open) >= MAX_DEPTH:
            raise self.fail(node, f"aliases expand to more than {MAX_DEPTH} levels")
        self.open.add(id(node))
        kind = "map" if isinstance(node, yaml.MappingNode) else "seq"
        self.check_tag(node, kind)
        value = self.mapping(node, path) if isinstance(node, yaml.MappingNode) else self.sequence(node, path)
        self.open.discard(id(node))
        return value

    def sequence(self, node: yaml.Node, path: KeyPath) -> list[Any]:
        return [self.build(item, (*path, index)) for index, item in enumerate(node.value)]

    def mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = self.key(key_node)
            if key in found:
                first = self.lines.line(*path, key)
                raise self.fail(key_node, f"key '{key}' is given twice; it stands on line {first} already")
            self.lines[*path, key] = key_node.start_mark.line + 1
            found[key] = self.build(value_node, (*path, key))
        return found

    def key(self, node: yaml.Node) -> str:
        key = self.scalar(node) if isinstance(node, yaml.ScalarNode) else None
        if not isinstance(node, yaml.ScalarNode) or not isinstance(key, str):
            raise self.fail(node, "a key must be text; put it in quotes")
        if key == "<<" and node.style is None:
            raise self.fail(node, "merge keys (<<) are not supported; use 'extends'")
        return key

    def scalar(self, node: yaml.ScalarNode) -> Any:
        name = node.tag.removeprefix(_PREFIX)
        self.check_tag(node, "str", *_PATTERNS)
        if name == "str":
            return node.value
        if not _PATTERNS[name].match(node.value) or len(node.value) > 400:
            raise self.fail(node, f"'{node.value[:40]}' is not a YAML {name}")
        return _convert(name, node.value)

    def check_tag(self, node: yaml.Node, *allowed: str) -> None:
        if node.tag.removeprefix(_PREFIX) not in allowed:
            raise self.fail(node, f"tag '{node.tag.replace(_PREFIX, '!!')}' is not allowed")


def _convert(name: str, text: str) -> Any:
    if name == "null":
        return None
    if name == "bool":
        return text.lower() == "true"
    if name == "int":
        base = {"0o": 8, "0x": 16}.get(text[:2], 10)
        return int(text, base)
    special = text.lower().lstrip("+-")
    if special in (".inf", ".nan"):
        return float(text.lower().replace(".", ""))
    return float(text)


def _kind(value: Any) -> str:
    return "a list" if isinstance(value, list) else "a single value"
