"""``KEY=VALUE`` of the command line, and the ``overrides`` mapping of the Python call."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from siirl.config import keys, paths
from siirl.config.keys import KeyPath
from siirl.config.layers import Layer, Recipe, check_overlay, layer_of, overlay_layer
from siirl.config.yaml import parse_value
from siirl.errors import RequestError

COMMAND_LINE = "command line"
PYTHON = "overrides"


@dataclass(frozen=True)
class Override:
    """One value given beside the files."""

    path: KeyPath
    value: Any
    where: str


def parse_overrides(given: Sequence[str] | Mapping[str, Any]) -> list[Override]:
    """Return one `Override` per value; text is typed by the schema, Python values are kept as they are.

    Raises:
        RequestError: not of the form KEY=VALUE, or a key that the schema does not have.
    """
    if isinstance(given, Mapping):
        pairs = [(key, value, PYTHON) for key, value in given.items()]
    else:
        pairs = [(*_split(text), COMMAND_LINE) for text in given]
    return [override for pair in pairs for override in _expand(*pair)]


def apply_to_warmup(recipe: Recipe, overrides: Sequence[Override]) -> Recipe:
    """Carry out the overrides that address warm-ups: ``warmup=[]``, ``warmup.0.training.steps=3``."""
    warmup = list(recipe.warmup)
    for override in overrides:
        if override.path == ("warmup",):
            layer = Layer({}, {(): override.where})
            warmup = [overlay_layer(layer, index, overlay) for index, overlay in enumerate(override.value)]
            for overlay in warmup:
                check_overlay(overlay)
        elif override.path[0] == "warmup":
            index = int(override.path[1])
            if index >= len(warmup):
                count = len(warmup)
                raise RequestError(f"{override.where}: there is no warmup.{index}; the config has {count} warm-ups")
            changed = layer_of({override.path[2:]: override.value}, override.where)
            check_overlay(changed)
            warmup[index] = changed.over(warmup[index])
    return replace(recipe, warmup=warmup)


def of_main(overrides: Sequence[Override]) -> list[Override]:
    """The overrides that address the main stage."""
    return [override for override in overrides if override.path[0] != "warmup"]


def reaching(overrides: Sequence[Override], overlay: Layer) -> list[Override]:
    """The overrides that reach a warm-up: those at keys where ``overlay`` sets no value of its own."""
    own = overlay.leaf_paths()
    return [o for o in overrides if not any(_overlaps(o.path, path) for path in own)]


def as_layer(overrides: Sequence[Override]) -> Layer:
    """The overrides as one layer; of two at one key the last wins."""
    layer = Layer()
    for override in overrides:
        layer = layer_of({override.path: override.value}, override.where).over(layer)
    return layer


def _split(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise RequestError(f"{COMMAND_LINE}: '{text}' is not of the form KEY=VALUE, such as training.steps=5")
    return key.strip(), value


def _expand(key: str, value: Any, where: str) -> Iterator[Override]:
    """Yield one override per leaf of the schema that ``key`` with ``value`` sets."""
    stage, path = _stage_and_path(key, where)
    if stage and not path:
        yield Override(stage, _overlays(value, where), where)
    elif keys.section(path) is not None:
        yield from (Override((*stage, *leaf), v, where) for leaf, v in _section_values(path, value, where))
    elif (leaf := keys.leaf(path)) is not None:
        typed = _typed(key, value, leaf, exact=keys.dotted(path) == leaf.key) if where == COMMAND_LINE else value
        if path == ("pipeline",) and isinstance(typed, str):
            typed = paths.anchored(typed, Path())
        below = layer_of({path: typed}, where)
        for each in below.leaf_paths():
            yield Override((*stage, *each), below.at(each), where)
    else:
        raise RequestError(f"{where}: {keys.unknown(keys.dotted(path))}")


def _stage_and_path(key: str, where: str) -> tuple[KeyPath, KeyPath]:
    """``warmup.0.training.lr`` as ``("warmup", 0)`` and the path in that stage."""
    parts = key.split(".")
    if parts[0] != "warmup":
        return (), tuple(parts)
    if len(parts) == 1:
        return ("warmup",), ()
    if not parts[1].isdecimal() or len(parts) == 2:
        raise RequestError(f"{where}: '{key}' must be 'warmup' or 'warmup.NUMBER.KEY', such as warmup.0.training.steps")
    return ("warmup", int(parts[1])), tuple(parts[2:])


def _overlays(value: Any, where: str) -> list[Any]:
    overlays = _parse("warmup", value) if where == COMMAND_LINE else value
    if overlays is not None and not isinstance(overlays, list):
        raise RequestError(f"{where}: 'warmup' must be a list of overlays, or [] for none")
    return overlays or []


def _section_values(path: KeyPath, value: Any, where: str) -> list[tuple[KeyPath, Any]]:
    key = keys.dotted(path)
    values = _parse(key, value) if where == COMMAND_LINE else value
    if not isinstance(values, dict):
        first = next(iter(keys.section(path).model_fields))  # type: ignore[union-attr]
        raise RequestError(f"{where}: '{key}' is a section; set one of its keys, such as {key}.{first}")
    layer = layer_of({path: values}, where)
    layer.check()
    return [(leaf, layer.at(leaf)) for leaf in layer.leaf_paths()]


def _typed(key: str, text: str, leaf: keys.Key, exact: bool) -> Any:
    """Read ``text`` as the schema's type: text stays as it is, everything else follows the rules of the files."""
    options = leaf.type.split(", or ")
    if not exact or "text" not in options:
        return _parse(key, text)
    if "null" in options and text.lower() in ("", "~", "null"):
        return None
    return _parse(key, text) if text[:1] in ("'", '"') else text


def _parse(key: str, text: str) -> Any:
    try:
        return parse_value(text)
    except RequestError as error:
        detail = str(error).partition(": ")[2]
        raise RequestError(f"{COMMAND_LINE}: {key}={text} cannot be read: it {detail}") from error


def _overlaps(a: KeyPath, b: KeyPath) -> bool:
    shorter = min(len(a), len(b))
    return a[:shorter] == b[:shorter]
