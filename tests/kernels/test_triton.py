"""Triton kernels without a GPU: interpreted on the host in a process of their own, compiled for GPUs but not run."""

from __future__ import annotations

import importlib.util
import inspect
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from siirl_kernels.contracts import CONTRACTS
from siirl_kernels.triton import support

ROOT = Path(__file__).parents[2]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="there is no Triton")
# What a block of threads may hold of shared memory on the smallest GPUs of compute capability 8.x.
SHARED_BYTES = 99 * 1024
UNFIT_FOR_THE_INTERPRETER = "not as_often and not passes_the_number"  # 4096 rows, 500 rows; it has smaller ones


def run(program: str) -> str:
    """What a program of its own prints, without the interpreter."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True).stdout


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("module", ["test_contracts", "test_paging", "triton_interpreted"])
def test_interpreted_kernels_keep_their_contracts(module: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "siirl_kernels.triton", "-p", "no:cacheprovider"]
    chosen = ["-k", f"triton and {UNFIT_FOR_THE_INTERPRETER}", f"tests/kernels/{module}.py"]
    env = os.environ | {"TRITON_INTERPRET": "1", "SIIRL_TEST_DEVICE": "cpu"}
    child = subprocess.run(command + chosen, cwd=ROOT, env=env, capture_output=True, text=True)
    assert child.returncode == 0, child.stdout[-6000:] + child.stderr[-2000:]


def test_registering_imports_no_triton() -> None:
    program = "import sys, siirl, siirl_kernels.triton; print('triton' in sys.modules)"
    assert run(program) == "False\n"


def test_without_triton_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support.importlib.util, "find_spec", lambda name: None)
    assert support.unavailable() == "Triton is not installed; pip install 'siirl[cuda]' brings it"


@needs_triton
@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_references_run_and_the_log_says_why() -> None:
    program = (
        "import logging; logging.basicConfig(format='%(message)s', stream=__import__('sys').stdout)\n"
        "import siirl_kernels.triton; print(*set(siirl_kernels.bind(['triton', 'torch']).values()))"
    )
    said, bound = run(program).splitlines()
    assert said.startswith("the kernel provider 'triton' is left out: PyTorch finds no GPU")
    assert bound == "torch"


def test_an_old_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support.importlib.util, "find_spec", lambda name: object())
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert support.unavailable() == "its kernels want a GPU of compute capability 8.0 or higher, this one has 7.5"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    assert support.unavailable() == "Triton needs a C compiler; install gcc or clang, or name one in CC"


class Compiler:
    """Compiles each launch for an NVIDIA GPU instead of running it; its tensors have no numbers that could be read."""

    def __init__(self, capability: int) -> None:
        self.capability = capability
        self.compiled: dict[str, Any] = {}

    def __call__(self, function: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        from triton import compile as compiled
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        options = {name: kwargs.pop(name) for name in list(kwargs) if name not in function.arg_names}
        arguments = inspect.signature(function.fn).bind(*args, **kwargs).arguments
        fixed = {p.name: arguments[p.name] for p in function.params if p.is_constexpr}
        types = {name: "constexpr" if name in fixed else type_of(x) for name, x in arguments.items()}
        aligned = [i for i, (name, x) in enumerate(arguments.items()) if name not in fixed and is_aligned(x)]
        source = ASTSource(function, types, fixed, {(i,): [["tt.divisibility", 16]] for i in aligned})
        kernel = compiled(source, target=GPUTarget("cuda", self.capability, 32), options=options)
        self.compiled[function.fn.__name__] = kernel


def type_of(x: Any) -> str:
    names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.int32: "i32", torch.int64: "i64"}
    return f"*{names[x.dtype]}" if isinstance(x, torch.Tensor) else "fp32" if isinstance(x, float) else "i32"


def is_aligned(x: Any) -> bool:
    return isinstance(x, torch.Tensor) or (isinstance(x, int) and x % 16 == 0)


def arguments(op: str, name: str, level: Any, dtype: torch.dtype) -> dict[str, Any]:
    (case,) = (case for case in CONTRACTS[op].cases(level, dtype, "cpu") if case.name == name)
    return case.to(torch.device("meta")).arguments


@needs_triton
@pytest.mark.slow
@pytest.mark.skipif(support.interpreted(), reason="the interpreter compiles nothing")
@pytest.mark.parametrize(("capability", "instruction"), [(80, "mma.sync"), (90, "wgmma")])
def test_it_compiles_for_a_gpu_without_reading_a_number(
    capability: int, instruction: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from triton.runtime.jit import JITFunction

    from siirl_kernels.triton import attention, pointwise, sampling

    compiler = Compiler(capability)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(JITFunction, "run", lambda self, *args, **kwargs: compiler(self, *args, **kwargs))
    monkeypatch.setattr(attention, "_units", lambda device: 132)
    half = torch.bfloat16
    attention.paged_attention(**arguments("paged_attention", "one long", "full", half))
    assert "_join" in compiler.compiled
    attention.paged_attention(**arguments("paged_attention", "a long chunk", "full", half))
    assert instruction in compiler.compiled["_attend"].asm["ptx"]
    attention.paged_attention(**arguments("paged_attention", "wide heads", "full", torch.float32))
    sampling.categorical(**arguments("categorical", "4099 words", "full", torch.float32))
    sampling.token_log_prob(**arguments("token_log_prob", "4099 words", "full", half))
    pointwise.rms_norm(**arguments("rms_norm", "wide 7x4099", "full", half))
    pointwise.rope(**arguments("rope", "many heads", "full", half))
    pointwise.swiglu(**arguments("swiglu", "wide 5x8191", "full", half))
    assert len(compiler.compiled) == 9
    assert max(kernel.metadata.shared for kernel in compiler.compiled.values()) <= SHARED_BYTES
