"""What a model path says, checked without importing torch: a wrong one is refused before anything heavy starts."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from siirl.errors import RequestError, did_you_mean

ARCHITECTURES = ("qwen2", "qwen3", "llama")  # those of GGUF files too
TINY_ARCHITECTURES = (*ARCHITECTURES, "qwen3_moe")

CHARACTERS = ("<pad>", "<eos>", "<bos>", *(chr(i) for i in range(32, 127)), "\n")
"""The vocabulary of `tiny:` models' tokenizer; the index is the id."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True)
class TinyModel:
    """A model made from scratch: `tiny:ARCH:HIDDEN:LAYERS:VOCAB`."""

    architecture: str
    hidden_size: int
    num_layers: int
    vocab_size: int

    @property
    def num_heads(self) -> int:
        return max(2, self.hidden_size // 32)

    @property
    def num_kv_heads(self) -> int:
        return max(1, self.hidden_size // 64)

    @property
    def head_dim(self) -> int:
        return 32 if self.architecture.startswith("qwen3") else self.hidden_size // self.num_heads

    @property
    def num_experts(self) -> int:
        return 8 if self.architecture == "qwen3_moe" else 0

    @property
    def experts_per_token(self) -> int:
        return 2 if self.num_experts else 0

    @property
    def expert_size(self) -> int:
        """Intermediate size of an expert: a token's experts together have a dense model's, three times the hidden."""
        return 3 * self.hidden_size // self.experts_per_token if self.num_experts else 0


@dataclass(frozen=True)
class ModelPath:
    """A checked model path; ``file`` is set for directories and GGUF files, ``tiny`` for models made from scratch."""

    kind: Literal["directory", "hub", "gguf", "tiny"]
    text: str
    file: Path | None = None
    tiny: TinyModel | None = None


def check_path(text: str, base: Path | None = None, *, key: str = "model.path") -> ModelPath:
    """Read a model path; relative files are looked for in ``base``, then in the working directory.

    A hub id is checked for its form only.

    Raises:
        RequestError: the path names nothing that can be loaded; the sentence begins with ``key``.
    """
    where = f"{key} '{text}'"
    if text.startswith("tiny:"):
        return ModelPath("tiny", text, tiny=_tiny(text, where))
    if text.startswith("package://"):
        return _local(_packaged(text.removeprefix("package://"), where), text, where)
    roots = [*([base] if base else []), Path.cwd()]
    if text.startswith("gguf:"):
        file = _find(text.removeprefix("gguf:"), roots)
        if file is None or not file.is_file():
            raise RequestError(f"{where}: there is no such file{_near(text.removeprefix('gguf:'), roots)}")
        return ModelPath("gguf", text, _checked_gguf(file, where))
    found = _find(text, roots)
    if found is not None:
        if found.suffix == ".gguf":
            raise RequestError(f"{where} is a GGUF file; write gguf:{text}")
        return _local(found, text, where)
    if ":" in text:
        scheme = text.partition(":")[0]
        hint = did_you_mean(scheme, ["gguf", "package", "tiny"])
        raise RequestError(
            f"{where}: '{scheme}:' is no form of a model path; use a directory, a hub id, gguf:FILE, "
            f"package://PACKAGE/FILE or tiny:ARCH:HIDDEN:LAYERS:VOCAB{hint}"
        )
    if text.endswith((".gguf", ".safetensors", "/")) or not _HUB_ID.fullmatch(text):
        raise RequestError(f"{where}: there is no such directory{_near(text, roots)}")
    return ModelPath("hub", text)


def weight_files(directory: Path, where: str) -> list[Path]:
    """The safetensors files of a Hugging Face directory.

    Raises:
        RequestError: there are none, or the index names one that is missing. Pickled weights are never read.
    """
    index, single = directory / "model.safetensors.index.json", directory / "model.safetensors"
    if index.is_file():
        weight_map = read_json(index, where).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise RequestError(f"{where}: {index.name} has no weight_map")
        files = [directory / name for name in sorted(set(weight_map.values()))]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise RequestError(f"{where}: {len(missing)} of {len(files)} shards are missing, the first is {missing[0]}")
        return files
    if single.is_file():
        return [single]
    if (directory / "adapter_config.json").is_file():
        raise RequestError(f"{where} holds an adapter without its base model; merge them and name the merged directory")
    if any(directory.glob("pytorch_model*.bin")):
        raise RequestError(f"{where} holds pickled weights only, which can run code; convert them to safetensors")
    raise RequestError(f"{where} has no model.safetensors and no model.safetensors.index.json")


def _local(found: Path, text: str, where: str) -> ModelPath:
    if found.is_file() and found.suffix == ".gguf":
        return ModelPath("gguf", text, _checked_gguf(found, where))
    if not found.is_dir():
        raise RequestError(f"{where} is neither a directory nor a GGUF file")
    if not (found / "config.json").is_file():
        gguf = sorted(file.name for file in found.glob("*.gguf"))
        hint = f"; did you mean gguf:{Path(text) / gguf[0]}?" if gguf else ""
        raise RequestError(f"{where} has no config.json, so it is no Hugging Face model{hint}")
    read_json(found / "config.json", where)
    weight_files(found, where)
    return ModelPath("directory", text, found)


def _checked_gguf(file: Path, where: str) -> Path:
    with file.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise RequestError(f"{where} is no GGUF file: it does not begin with the letters GGUF")
    return file


def _tiny(text: str, where: str) -> TinyModel:
    parts = text.split(":")[1:]
    if len(parts) != 4:
        raise RequestError(f"{where} has {len(parts)} parts of four; write tiny:ARCH:HIDDEN:LAYERS:VOCAB")
    architecture, *numbers = parts
    if architecture not in TINY_ARCHITECTURES:
        hint = did_you_mean(architecture, TINY_ARCHITECTURES)
        known = ", ".join(TINY_ARCHITECTURES)
        raise RequestError(f"{where}: no architecture '{architecture}', there are {known}{hint}")
    for name, number in zip(("HIDDEN", "LAYERS", "VOCAB"), numbers, strict=True):
        if not (number.isascii() and number.isdigit() and int(number) > 0):
            raise RequestError(f"{where}: {name} is '{number}', which is no positive whole number")
    tiny = TinyModel(architecture, *map(int, numbers))
    even = tiny.head_dim % 2 == 0 and (architecture.startswith("qwen3") or tiny.hidden_size % tiny.num_heads == 0)
    if tiny.num_heads % tiny.num_kv_heads or not even:
        near = max(64, round(tiny.hidden_size / 64) * 64)
        raise RequestError(f"{where}: HIDDEN {tiny.hidden_size} does not divide into heads; use {near}")
    if tiny.vocab_size < len(CHARACTERS):
        raise RequestError(f"{where}: VOCAB is {tiny.vocab_size}, the tokenizer needs at least {len(CHARACTERS)}")
    return tiny


def _packaged(text: str, where: str) -> Path:
    """The file PACKAGE/PATTERN of an installed package, found without importing the package."""
    package, _, pattern = text.partition("/")
    if not package.isidentifier() or not pattern or pattern.startswith("/") or ".." in pattern.split("/"):
        raise RequestError(f"{where}: write package://PYTHON_PACKAGE/FILE, with the top-level name that Python imports")
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        name = package.replace("_", "-")
        raise RequestError(f"{where}: the Python package '{package}' is not installed here; pip install {name}")
    roots = [Path(root) for root in spec.submodule_search_locations]
    matches = sorted(match for root in roots for match in root.glob(pattern))
    if not matches:
        models = [match.name for root in roots for match in root.glob("*.gguf")]
        hint = did_you_mean(pattern, models) or (f"; it has {', '.join(models)}" if models else "")
        raise RequestError(f"{where}: the package has no such file{hint}")
    if len(matches) > 1:
        names = ", ".join(match.name for match in matches[:4])
        raise RequestError(f"{where} matches {len(matches)} files ({names}); name one of them")
    return matches[0]


def _find(text: str, roots: list[Path]) -> Path | None:
    """The first existing file or directory; an absolute path stands for itself."""
    candidates = [root / Path(text).expanduser() for root in roots]
    return next((path for path in candidates if text and path.exists()), None)


def _near(text: str, roots: list[Path]) -> str:
    for root in roots:
        path = root / Path(text).expanduser()
        if path.parent.is_dir():
            hint = did_you_mean(path.name, [other.name for other in path.parent.iterdir()])
            if hint:
                return hint
    return ""


def read_json(file: Path, where: str) -> dict[str, Any]:
    """The JSON object in a file; a RequestError that begins with ``where`` if there is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RequestError(f"{where}: {file.name} is no JSON ({error})") from None
    if not isinstance(content, dict):
        raise RequestError(f"{where}: {file.name} is no JSON object")
    return content
