"""Compiling the C++ kernels: once, safely, and not at all where there is no compiler."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from siirl_kernels import bind, obstacle, pages, provider, providers, registry
from siirl_kernels.native import build, functions
from siirl_kernels.weights import LinearWeights

COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")
SMALL = 'extern "C" int answer() { return 42; }\n'


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """One small source in place of the kernels, and an empty cache."""
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "answer.cpp").write_text(SMALL)
    monkeypatch.setattr(build, "_HERE", folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    build.library.cache_clear()
    yield folder
    build.library.cache_clear()


@needs_compiler
def test_it_compiles_once(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = build.compiled()
    assert ctypes.CDLL(str(path)).answer() == 42
    monkeypatch.setattr(build, "_compile", lambda command, target: pytest.fail("it is there already"))
    assert build.compiled() == path
    assert os.listdir(path.parent) == [path.name]


@needs_compiler
def test_other_sources_are_another_library(sources: Path) -> None:
    before = build.compiled()
    (sources / "answer.cpp").write_text(SMALL.replace("42", "43"))
    after = build.compiled()
    assert after != before
    assert ctypes.CDLL(str(after)).answer() == 43


def test_without_a_compiler_it_says_so(sources: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(build.Unavailable, match=r"no C\+\+ compiler was found"):
        build.library()
    monkeypatch.setenv("CXX", "absent-c++ -m64")
    with pytest.raises(build.Unavailable, match="CXX names, absent-c\\+\\+, is not there"):
        build.library()


@needs_compiler
def test_a_compiler_that_fails_is_quoted(sources: Path) -> None:
    (sources / "answer.cpp").write_text("#error this machine is too old\n")
    with pytest.raises(build.Unavailable, match="fails: .*this machine is too old"):
        build.library()
    assert not list((sources.parent / "cache" / "siirl").iterdir())


@needs_compiler
def test_a_cache_that_cannot_be_written_is_replaced(sources: Path, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    monkeypatch.setattr(build.tempfile, "gettempdir", lambda: str(tmp_path))
    path = build.compiled()
    assert path.parent == tmp_path / f"siirl-{os.getuid()}"
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


@needs_compiler
def test_processes_that_compile_at_once_load_a_whole_library(sources: Path) -> None:
    program = (
        "import ctypes, pathlib, sys; from siirl_kernels.native import build; "
        "build._HERE = pathlib.Path(sys.argv[1]); print(ctypes.CDLL(str(build.compiled())).answer())"
    )
    started = [
        subprocess.Popen([sys.executable, "-c", program, str(sources)], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert [process.communicate(timeout=120)[0].strip() for process in started] == ["42", "42"]


def test_a_provider_that_cannot_run_is_left_out_with_one_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(registry, "_ops", {name: dict(functions) for name, functions in registry._ops.items()})
    monkeypatch.setattr(registry, "_obstacles", dict(registry._obstacles))
    provider("broken", lambda: "its compiler is on holiday")
    registry.implementation("swiglu", "broken")(lambda gate, up: gate)
    for _ in range(2):
        assert bind(["broken", "torch"])["swiglu"] == "torch"
    assert [record.getMessage() for record in caplog.records] == [
        "the kernel provider 'broken' is left out: its compiler is on holiday"
    ]
    assert "broken" not in providers("swiglu")
    assert obstacle("broken") == "its compiler is on holiday"
    with pytest.raises(ValueError, match="cannot run here: its compiler is on holiday"):
        bind([], {"swiglu": "broken"})
    bind([])


def test_importing_the_kernels_compiles_nothing(tmp_path: Path) -> None:
    program = "import siirl_kernels.native, siirl_kernels.invariant"
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "CXX": "absent-c++"}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)
    assert not list(tmp_path.iterdir())


@needs_compiler
@pytest.mark.skipif(platform.machine() != "x86_64", reason="its flags are those of x86-64")
def test_a_cpu_without_wide_vectors_computes_the_same(tmp_path: Path) -> None:
    script, environment = Path(__file__).with_name("older_cpu.py"), os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 40


@needs_compiler
def test_only_weights_that_allow_it_overwrite_their_last_result() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, first, second = (torch.randn(3, 64, generator=generator) for _ in range(3))
    for one_result in (False, True):
        weights = LinearWeights(weight, one_result=one_result)
        before = functions.inference_linear(first, weights)
        kept = before.clone()
        torch.testing.assert_close(kept, first @ weight.t())
        after = functions.inference_linear(second[:2], weights)
        torch.testing.assert_close(after, second[:2] @ weight.t())
        assert torch.equal(before, kept) != one_result


def test_large_pages_hold_what_was_asked_for() -> None:
    for shape, dtype in (((3, 5), torch.float32), ((2, 1024, 1025), torch.bfloat16)):
        room = pages.empty(shape, torch.empty(0, dtype=dtype)).fill_(1.0)
        assert room.shape == shape and room.dtype == dtype and room.is_contiguous()
        assert room.float().sum() == room.numel()
        assert room.numel() * room.itemsize < pages.PAGE or room.data_ptr() % pages.PAGE == 0
