"""Where configuration files are found: as given, then among those that ship with siirl."""

from __future__ import annotations

import os
from pathlib import Path

import siirl
from siirl.errors import RequestError, did_you_mean

SUFFIXES = (".yaml", ".yml")


def configs_dir() -> Path:
    """The folder of shipped recipes and pipelines, in an installed package or in a source tree."""
    package = Path(siirl.__file__).resolve().parent
    installed = package / "_configs"
    return installed if installed.is_dir() else package.parent / "configs"


def find_config(name: str | Path) -> Path:
    """Return the file of a recipe: a path, or the name of a shipped one (``quickstart``).

    Raises:
        RequestError: no such file; names the nearest one there is.
    """
    path = Path(name).expanduser()
    shipped = configs_dir() / "recipes"
    by_name = [shipped / path.name, *(shipped / f"{path.name}{suffix}" for suffix in SUFFIXES)]
    is_shipped_name = path.parent in (Path(), Path("configs/recipes"))
    found = _first_file([path, *(by_name if is_shipped_name else [])])
    if found is None:
        if path.is_dir():
            raise RequestError(f"'{name}' is a directory, not a config file")
        near = [_shown(p) for folder in (path.parent, shipped) for p in _yaml_files(folder)]
        raise RequestError(f"no such config file: '{name}'{_nearest(str(name), near)}")
    return found


def is_config(name: str) -> bool:
    """Whether ``name`` means a recipe where a model may be meant too: a YAML file, or a shipped recipe's name."""
    shipped = configs_dir() / "recipes" / f"{name}.yaml"
    return name.endswith(SUFFIXES) or ("/" not in name and shipped.is_file() and not Path(name).exists())


def find_extended(name: str, base: Path, where: str) -> Path:
    """Return the file that ``extends`` names, beside the extending file (in ``base``) or under `configs_dir`."""
    path = Path(name).expanduser()
    found = _first_file([base / path, configs_dir() / path])
    if found is None:
        near = [os.path.relpath(p, base) for p in _yaml_files((base / path).parent)]
        raise RequestError(f"{where}: extends names '{name}', which does not exist{_nearest(name, near)}")
    return found


def is_path(name: str) -> bool:
    """Whether ``pipeline: NAME`` means a file of the user's rather than a shipped pipeline."""
    return "/" in name or name.endswith(SUFFIXES)


def anchored(name: str, base: Path) -> str:
    """A pipeline's path seen from ``base`` as an absolute one; names of shipped pipelines stay as they are."""
    found = (base / Path(name).expanduser()).resolve()
    return str(found) if is_path(name) and found.is_file() else name


def find_pipeline(name: str, base: str | Path | None = None, where: str = "") -> Path:
    """Return the file of a pipeline: ``configs/pipelines/NAME.yaml``, or a path seen from ``base``, else from here.

    ``where`` is the place that names it, for the message.

    Raises:
        RequestError: there is no such pipeline; names the nearest one there is.
    """
    shipped = configs_dir() / "pipelines"
    if is_path(name):
        path = Path(name).expanduser()
        found = _first_file([Path(base or ".") / path, path, configs_dir() / path])
        near = [str(p) for p in _yaml_files(path.parent)]
    else:
        found = _first_file([shipped / f"{name}{suffix}" for suffix in SUFFIXES])
        near = [p.stem for p in _yaml_files(shipped)]
    if found is None:
        place = f"{where}: " if where else ""
        raise RequestError(f"{place}no such pipeline: '{name}'{did_you_mean(name, near) or _listing(near)}")
    return found


def _first_file(candidates: list[Path]) -> Path | None:
    return next((path for path in candidates if path.is_file()), None)


def _yaml_files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("*") if p.suffix in SUFFIXES) if folder.is_dir() else []


def _shown(path: Path) -> str:
    """A path as the user would type it: relative where it lies below the working directory."""
    return str(path.relative_to(Path.cwd())) if path.is_absolute() and path.is_relative_to(Path.cwd()) else str(path)


def _nearest(name: str, near: list[str]) -> str:
    """`did_you_mean`, which also finds a right file name in a wrong folder."""
    by_file_name = {Path(p).name: p for p in reversed(near)}
    clause = did_you_mean(name, near)
    if clause:
        return clause
    clause = did_you_mean(Path(name).name, by_file_name)
    for file_name, path in by_file_name.items():
        clause = clause.replace(f"'{file_name}'", f"'{path}'")
    return clause


def _listing(names: list[str]) -> str:
    return f"; there are {', '.join(names)}" if names else ""
