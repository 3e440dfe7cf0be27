"""The schema seen as a flat list of dotted keys: what exists, what is allowed, what was probably meant."""

from __future__ import annotations

from collections.abc import Iterator
from difflib import SequenceMatcher
from functools import cache
from typing import Any, NamedTuple

from pydantic.fields import FieldInfo

from siirl.config.schema import Config, Section

KeyPath = tuple[str | int, ...]

_FILE_KEYS = ("extends", "warmup")


class Key(NamedTuple):
    """One key of the schema."""

    key: str
    type: str
    default: Any
    description: str


def section(path: KeyPath) -> type[Section] | None:
    """Return the class of the section at ``path``, or None where there is none."""
    model: type[Section] = Config
    for part in path:
        field = model.model_fields.get(str(part))
        if field is None or not _is_section(field):
            return None
        model = field.annotation  # type: ignore[assignment]
    return model


def leaf(path: KeyPath) -> Key | None:
    """Return the key at ``path``, or the key whose list or free mapping ``path`` leads into."""
    for end in range(1, len(path) + 1):
        found = _leaves().get(dotted(path[:end]))
        if found and (end == len(path) or isinstance(path[end], int) or found.type.startswith("a mapping")):
            return found
    return None


def describe() -> list[Key]:
    """Every key of the schema in its order: dotted name, what it may hold, default, description."""
    return list(_leaves().values())


def unknown(key: str) -> str:
    """Say that there is no such key, and name the one most like it, sought in the whole schema.

    A right name in the wrong section counts nearly as much as a misspelt name in the right one.
    """
    if key in _FILE_KEYS:
        return f"'{key}' can only stand at the top of a file"
    last = key.rpartition(".")[2]
    score, best = max((max(_alike(key, k), 0.95 * _alike(last, k.rpartition(".")[2])), k) for k in _names())
    return f"unknown key '{key}'" + (f"; did you mean '{best}'?" if score > 0.65 else "")


def dotted(path: KeyPath) -> str:
    """``("rollout", "stop", 1)`` as ``rollout.stop[1]``."""
    return "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in path).removeprefix(".")


def _alike(a: str, b: str) -> float:
    return SequenceMatcher(None, a, b).ratio()


@cache
def _names() -> tuple[str, ...]:
    sections = (name for name, field in Config.model_fields.items() if _is_section(field))
    return (*_leaves(), *sections, *_FILE_KEYS)


@cache
def _leaves() -> dict[str, Key]:
    return {key.key: key for key in _walk(Config, "")}


def _walk(model: type[Section], prefix: str) -> Iterator[Key]:
    schemas = model.model_json_schema()["properties"]
    for name, field in model.model_fields.items():
        if _is_section(field):
            yield from _walk(field.annotation, f"{prefix}{name}.")  # type: ignore[arg-type]
        else:
            default = field.get_default(call_default_factory=True)
            yield Key(prefix + name, _allowed(schemas[name]), default, field.description or "")


def _is_section(field: FieldInfo) -> bool:
    return isinstance(field.annotation, type) and issubclass(field.annotation, Section)


def _allowed(schema: dict[str, Any]) -> str:
    """Say in words what a JSON schema allows."""
    if "anyOf" in schema:
        return ", or ".join(_allowed(option) for option in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        values = [f"'{value}'" for value in schema.get("enum", [schema.get("const")])]
        return " or ".join(filter(None, [", ".join(values[:-1]), values[-1]]))
    if "prefixItems" in schema:
        return f"a list of {len(schema['prefixItems'])} values, each {_allowed(schema['prefixItems'][0])}"
    kind = schema.get("type")
    if kind == "array":
        return f"a list, each entry {_allowed(schema['items'])}"
    words = {"string": "text", "boolean": "true or false", "null": "null", "object": "a mapping"}
    if kind in words:
        return words[kind]
    return {"integer": "a whole number", "number": "a number"}.get(str(kind), "any value") + _bounds(schema)


def _bounds(schema: dict[str, Any]) -> str:
    low, high = schema.get("minimum"), schema.get("maximum")
    if low is not None and high is not None:
        return f" from {low:g} to {high:g}"
    parts = [
        f"{words} {schema[name]:g}"
        for name, words in (
            ("exclusiveMinimum", "greater than"),
            ("minimum", "of at least"),
            ("exclusiveMaximum", "less than"),
            ("maximum", "at most"),
        )
        if name in schema
    ]
    return " " + " and ".join(parts) if parts else ""
