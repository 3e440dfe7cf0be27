"""From a recipe's file to the typed configuration of every stage of a run, and back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from siirl.config import keys, paths
from siirl.config import overrides as given
from siirl.config.layers import Layer, Recipe, algorithm_defaults, read_recipe
from siirl.config.schema import Config
from siirl.config.yaml import dump_yaml
from siirl.errors import RequestError, did_you_mean


@dataclass(frozen=True)
class Stage:
    """One stretch of a run with its own configuration: ``warmup.0``, ``warmup.1``, …, ``main``."""

    name: str
    config: Config


@dataclass(frozen=True)
class Resolved:
    """A recipe with everything merged in: its stages in the order they run, ``main`` last."""

    path: Path
    stages: tuple[Stage, ...]

    @property
    def main(self) -> Config:
        """The configuration of the main stage, which also holds what belongs to the whole run."""
        return self.stages[-1].config


def load(
    path: str | Path, overrides: Sequence[str] | Mapping[str, Any] = (), *, pipeline_defaults: bool = True
) -> Resolved:
    """Read a recipe and everything it refers to.

    Later layers win: the pipeline's ``algorithm:``, the files of ``extends``, the recipe, the overrides, and for a
    warm-up its overlay on top of them. An overlay that names a pipeline brings that pipeline's ``algorithm:`` along
    as if it stood in the overlay; the main pipeline's then has no part in it.

    Args:
        path: a file, or the name of a shipped recipe.
        overrides: ``KEY=VALUE`` texts, or dotted keys with Python values.
        pipeline_defaults: False leaves the pipelines' files unread.

    Raises:
        RequestError: anything wrong with the request, in one sentence with file, line and key.
    """
    file = paths.find_config(path)
    parsed = given.parse_overrides(overrides)
    recipe = given.apply_to_warmup(read_recipe(file), parsed)
    main = given.of_main(parsed)
    overlays = [(f"warmup.{index}", overlay) for index, overlay in enumerate(recipe.warmup)]
    stages = [
        Stage(name, _stage_config(recipe.main, main, overlay, pipeline_defaults))
        for name, overlay in [*overlays, ("main", Layer())]
    ]
    _check_ranks(stages, recipe)
    return Resolved(file, tuple(stages))


def dump(config: Config | Resolved) -> str:
    """Return YAML that `load` reads back to the same configuration, or to the same stages."""
    if isinstance(config, Config):
        return dump_yaml(config.model_dump(mode="json"))
    main = config.main.model_dump(mode="json")
    overlays = [_overlay(stage.config, main) for stage in config.stages[:-1]]
    return dump_yaml({**main, "warmup": overlays} if overlays else main)


def _stage_config(recipe: Layer, main: list[given.Override], overlay: Layer, defaults: bool) -> Config:
    if defaults and "pipeline" in overlay.data:
        overlay = overlay.over(algorithm_defaults(overlay))
    layer = overlay.over(given.as_layer(given.reaching(main, overlay)).over(recipe))
    if defaults and "pipeline" not in overlay.data:
        layer = layer.over(algorithm_defaults(layer))
    return _validated(layer)


def _check_ranks(stages: list[Stage], recipe: Recipe) -> None:
    """A warm-up trains the run's adapters, or all weights: the adapters are made once."""
    rank = stages[-1].config.model.lora.rank
    for stage, overlay in zip(stages, recipe.warmup, strict=False):
        own = stage.config.model.lora.rank
        if own not in (0, rank):
            allowed = f"{rank} as in the main stage, or 0" if rank else "0 as in the main stage"
            where = overlay.where(("model", "lora", "rank"))
            raise RequestError(f"{where}: model.lora.rank is {own}; in a warm-up it must be {allowed}")


def _validated(layer: Layer) -> Config:
    """Check types and bounds: strictly, as JSON, where a list may stand for a tuple and 1 for 1.0 but not "1" for 1."""
    try:
        return Config.model_validate_json(json.dumps(layer.data, default=str), strict=True)
    except ValidationError as error:
        raise _sentence(error, layer) from error


def _sentence(error: ValidationError, layer: Layer) -> RequestError:
    """The first of pydantic's findings in our words: the place, the key, what it is, what it must be."""
    first, *others = error.errors(include_url=False)
    path = tuple(first["loc"][:-1] if first["type"] == "missing" else first["loc"])
    key = keys.dotted(path)
    leaf = keys.leaf(path)
    if first["type"] == "value_error" or leaf is None:
        message = f"{key}: {first['msg'].removeprefix('Value error, ')}".removeprefix(": ")
    else:
        subject = "it" if leaf.key == key else leaf.key
        message = f"{key} is {_shown(first['input'])}; {subject} must be {leaf.type}"
        if first["type"] == "literal_error":
            message += did_you_mean(str(first["input"]), first["ctx"]["expected"].replace("'", "").split())
    more = f" (and {len(others)} more)" if others else ""
    return RequestError(f"{layer.where(path)}: {message}{more}")


def _shown(value: Any) -> str:
    if isinstance(value, str):
        return f"'{value}'" if len(value) <= 60 else f"'{value[:57]}...'"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    return json.dumps(value)


def _overlay(stage: Config, main: dict[str, Any]) -> dict[str, Any]:
    """The values of a warm-up that differ from the main stage's.

    All constants of another pipeline are written out: what is left out there would be taken from its file.
    """
    values = stage.model_dump(mode="json")
    differing = _difference(values, main)
    if "pipeline" in differing:
        differing["algorithm"] = values["algorithm"]
    return differing


def _difference(values: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        if value == base.get(name):
            continue
        both = isinstance(value, dict) and isinstance(base.get(name), dict)
        found[name] = _difference(value, base[name]) if both else value
    return found
