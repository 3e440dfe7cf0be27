"""Shipped description files (clusters, models): found by name or path, read into a typed section."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from siirl.config.paths import SUFFIXES, configs_dir
from siirl.config.schema import Section
from siirl.config.yaml import load_yaml
from siirl.errors import RequestError, did_you_mean

Kind = TypeVar("Kind", bound=Section)


def shipped(folder: str) -> dict[str, Path]:
    """The files of a folder of `configs/`, by their names without a suffix."""
    return {p.stem: p for p in sorted((configs_dir() / folder).glob("*")) if p.suffix in SUFFIXES}


def find(name: str, folder: str, what: str) -> Path:
    """The file that ``name`` means: a path, or a shipped one's name.

    Raises:
        RequestError: there is none; names the nearest.
    """
    path, known = Path(name).expanduser(), shipped(folder)
    if path.is_file():
        return path
    if path.name == name or path.parent == Path("configs") / folder:
        stem = path.stem if path.suffix in SUFFIXES else path.name
        if stem in known:
            return known[stem]
    hint = did_you_mean(path.stem, known) or f"; there are {', '.join(known)}"
    raise RequestError(f"no such {what} file: '{name}'{hint}")


def read(kind: type[Kind], file: Path) -> Kind:
    """Read a YAML file into a section.

    Raises:
        RequestError: the first thing that is wrong, with file and line.
    """
    data, lines = load_yaml(file)
    try:
        return kind.model_validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    path = first["loc"]
    key = ".".join(map(str, path))
    if first["type"] == "extra_forbidden":
        section: type[Section] = kind
        for part in path[:-1]:
            annotation = section.model_fields[str(part)].annotation if str(part) in section.model_fields else None
            section = annotation if isinstance(annotation, type) and issubclass(annotation, Section) else section
        message = f"unknown key '{key}'{did_you_mean(str(path[-1]), section.model_fields)}"
    elif first["type"] == "missing":
        message = f"'{key}' is missing"
    else:
        shown = json.dumps(first["input"]) if not isinstance(first["input"], dict) else "a mapping"
        message = f"{key} is {shown}: {first['msg'][:1].lower()}{first['msg'][1:]}".removeprefix(" is ")
    raise RequestError(f"{lines.where(*path)}: {message}")
