"""Layers of configuration: plain data in which every value remembers where it was written."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from siirl.config import keys, paths
from siirl.config.keys import KeyPath
from siirl.config.schema import Config
from siirl.config.yaml import load_yaml
from siirl.errors import RequestError

# What a warm-up may not change: it goes on in the same processes, with the model there is.
RUN_KEYS: set[KeyPath] = {
    ("name",),
    ("seed",),
    ("device",),
    ("workers",),
    ("placement",),
    ("threads_per_worker",),
    ("training", "engine"),
    ("training", "dtype"),
    ("training", "sharding"),
    ("training", "compile"),
    ("training", "deterministic"),
    ("rollout", "engine"),
    ("rollout", "max_sequences"),
    ("rollout", "parallel"),
    ("rollout", "workers"),
    ("logging", "tensorboard"),
    ("logging", "trace"),
    ("logging", "report"),
    ("timeout_s",),
    ("run_dir",),
    ("model", "path"),
    ("model", "initializer_range"),
    ("model", "lora", "alpha"),
    ("model", "lora", "rslora"),
    ("model", "lora", "targets"),
}


@dataclass(frozen=True)
class Layer:
    """Nested mappings, and for each path in them the place (``FILE:LINE``, ``command line``) it comes from."""

    data: dict[str, Any] = field(default_factory=dict)
    origins: dict[KeyPath, str] = field(default_factory=dict)

    def where(self, path: KeyPath) -> str:
        """The place of ``path``, or of the nearest parent that was written."""
        places = (self.origins[path[:end]] for end in range(len(path), 0, -1) if path[:end] in self.origins)
        return next(places, self.origins.get((), "config"))

    def over(self, low: Layer) -> Layer:
        """Merge this layer over ``low``: mappings merge, everything else replaces."""
        replaced = set(self.leaf_paths())
        kept = {path: place for path, place in low.origins.items() if not _has_prefix(path, replaced)}
        return Layer(_merged(low.data, self.data), {**kept, **self.origins})

    def leaf_paths(self) -> list[KeyPath]:
        """The paths of all values that are not mappings."""
        return _leaf_paths(self.data, ())

    def at(self, path: KeyPath) -> Any:
        """The value at ``path``."""
        value: Any = self.data
        for part in path:
            value = value[part]
        return value

    def check(self) -> None:
        """Refuse keys that the schema does not have, and single values where a section belongs."""
        self._check((), self.data)

    def _check(self, path: KeyPath, data: dict[str, Any]) -> None:
        for name, value in data.items():
            here = (*path, name)
            if keys.section(here) is None:
                if keys.leaf(here) is None:
                    raise RequestError(f"{self.where(here)}: {keys.unknown(keys.dotted(here))}")
            elif isinstance(value, dict):
                self._check(here, value)
            elif value is None:
                data[name] = {}  # a section whose keys are all commented out
            else:
                known = ", ".join(keys.section(here).model_fields)  # type: ignore[union-attr]
                raise RequestError(f"{self.where(here)}: '{keys.dotted(here)}' is a section; its keys are {known}")


def layer_of(values: dict[KeyPath, Any], where: str) -> Layer:
    """A layer of single values that all come from one place."""
    data: dict[str, Any] = {}
    for path, value in values.items():
        section = data
        for part in path[:-1]:
            section = section.setdefault(str(part), {})
        section[str(path[-1])] = value
    return Layer(data, dict.fromkeys([(), *values], where))


@dataclass(frozen=True)
class Recipe:
    """A recipe's files, merged: the main stage and the overlays of its warm-ups."""

    main: Layer
    warmup: list[Layer]


def read_recipe(file: Path, extended_by: tuple[Path, ...] = ()) -> Recipe:
    """Read ``file`` over the files it extends; every key is known afterwards, no value is checked yet."""
    data, lines = load_yaml(file)
    layer = Layer(data, {path: lines.where(*path) for path in lines})
    bases = data.pop("extends", None)
    overlays = data.pop("warmup", None)
    inherits_warmup = ("warmup",) not in lines
    layer.check()
    _anchor_pipeline(data, file.parent)
    warmup = [] if overlays is None else _overlays(layer, overlays, file.parent)
    for base in reversed(_extended(bases, file, layer.where(("extends",)), extended_by)):
        low = read_recipe(base, (*extended_by, file.resolve()))
        layer = layer.over(low.main)
        if inherits_warmup:
            warmup, inherits_warmup = low.warmup, not low.warmup
    return Recipe(layer, warmup)


def algorithm_defaults(layer: Layer) -> Layer:
    """The ``algorithm:`` section of the file of the pipeline that ``layer`` names, to lie under it."""
    name = layer.data.get("pipeline", Config.model_fields["pipeline"].default)
    if not isinstance(name, str):
        return Layer()  # a wrong type is reported with all the others
    data, lines = load_yaml(paths.find_pipeline(name, where=layer.where(("pipeline",))))
    section = data.get("algorithm")
    if not isinstance(section, dict):
        return Layer()  # the graph's own checks look at the rest of the file
    layer = Layer({"algorithm": section}, {p: lines.where(*p) for p in lines if p[:1] == ("algorithm",)})
    layer.check()
    return layer


def check_overlay(overlay: Layer) -> None:
    """Refuse unknown keys in a warm-up's overlay, and keys that belong to the run as a whole."""
    overlay.check()
    for path in overlay.leaf_paths():
        if _has_prefix(path, RUN_KEYS):
            raise RequestError(
                f"{overlay.where(path)}: a warm-up cannot set '{keys.dotted(path)}', which belongs to the whole run"
            )


def overlay_layer(layer: Layer, index: int, overlay: Any) -> Layer:
    """Entry ``index`` of ``warmup`` as a layer; ``layer`` knows its places."""
    place = layer.where(("warmup", index))
    if not isinstance(overlay, dict):
        raise RequestError(f"{place}: warmup[{index}] must be a mapping of keys, such as 'pipeline: sft'")
    origins = {p[2:]: at for p, at in layer.origins.items() if p[:2] == ("warmup", index)}
    return Layer(overlay, {(): place, **origins})


def _overlays(layer: Layer, overlays: Any, base: Path) -> list[Layer]:
    if not isinstance(overlays, list):
        raise RequestError(f"{layer.where(('warmup',))}: 'warmup' must be a list of overlays, each a mapping of keys")
    found = [overlay_layer(layer, index, overlay) for index, overlay in enumerate(overlays)]
    for overlay in found:
        check_overlay(overlay)
        _anchor_pipeline(overlay.data, base)
    return found


def _extended(bases: Any, file: Path, where: str, extended_by: tuple[Path, ...]) -> list[Path]:
    if bases is None:
        return []
    names = [bases] if isinstance(bases, str) else bases
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise RequestError(f"{where}: 'extends' must be a file or a list of files")
    found = [paths.find_extended(name, file.parent, where) for name in names]
    chain = [*extended_by, file.resolve()]
    for name, base in zip(names, found, strict=True):
        if base.resolve() in chain:
            raise RequestError(f"{where}: extends '{name}', which extends this file again")
    return found


def _anchor_pipeline(data: dict[str, Any], base: Path) -> None:
    if isinstance(data.get("pipeline"), str):
        data["pipeline"] = paths.anchored(data["pipeline"], base)


def _merged(low: dict[str, Any], high: dict[str, Any]) -> dict[str, Any]:
    result = dict(low)
    for name, value in high.items():
        both = isinstance(value, dict) and isinstance(low.get(name), dict)
        result[name] = _merged(low[name], value) if both else value
    return result


def _leaf_paths(data: dict[str, Any], path: KeyPath) -> list[KeyPath]:
    found: list[KeyPath] = []
    for name, value in data.items():
        found += _leaf_paths(value, (*path, name)) if isinstance(value, dict) else [(*path, name)]
    return found


def _has_prefix(path: KeyPath, prefixes: set[KeyPath]) -> bool:
    return any(path[:end] in prefixes for end in range(1, len(path) + 1))
