"""What a device cannot honour is a sentence: determinism, graphs, memory formats, operators that it lacks."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from siirl.device import Capabilities, Collectives, CommSpec, Role, TorchBackend, Unsupported
from siirl_cpu import CpuBackend
from siirl_cuda import CudaBackend
from siirl_npu import NpuBackend
from tests.device.distribution import install, python
from tests.device.world import run_world

FACTS = {"memory_bytes": 0, "compute_units": 0, "compute_dtypes": (), "fast_dtypes": ()}
SWITCHES = {"LCCL_DETERMINISTIC", "ATB_MATMUL_SHUFFLE_K_ENABLE", "ATB_LLM_LCOC_ENABLE", "CLOSE_MATMUL_K_SHIFT"}


def loaded(kind: type[TorchBackend], device_name: str = "a device", **facts: Any) -> Any:
    """A back end on this machine's PyTorch, of which a device would say `facts`."""
    backend: Any = kind()
    backend._torch = torch
    backend.capabilities = lambda: Capabilities(device_name, **(FACTS | facts))
    return backend


@pytest.fixture
def switched_back(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Restores what a test of determinism switches in this process."""
    for key in ("CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO", "HCCL_DETERMINISTIC", *SWITCHES):
        monkeypatch.setenv(key, "to be restored")
        monkeypatch.delenv(key)
    yield monkeypatch
    loaded(CpuBackend).deterministic("off")


ROLES: dict[Role, dict[str, str]] = {
    "driver": {},
    "trainer": {"TASK_QUEUE_ENABLE": "1", "PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True"},
    "colocated": {"TASK_QUEUE_ENABLE": "1"},
    "rollout": {"TASK_QUEUE_ENABLE": "1"},
    "validation": {
        "TASK_QUEUE_ENABLE": "1",
        "PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True",
        "TORCH_NPU_FALLBACK_CPU_DISABLE": "1",
    },
}


@pytest.mark.parametrize("role", ROLES)
def test_each_role_on_an_npu_has_its_queue_and_its_allocator(role: Role, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("PYTORCH_ALLOC_CONF", "PYTORCH_NPU_ALLOC_CONF"):
        monkeypatch.delenv(variable, raising=False)
    ports = {"HCCL_HOST_SOCKET_PORT_RANGE": "auto", "HCCL_NPU_SOCKET_PORT_RANGE": "auto"}
    assert NpuBackend.bootstrap_env(role) == ports | ROLES[role]


def test_cuda_sets_what_its_libraries_need_to_repeat_themselves(switched_back: pytest.MonkeyPatch) -> None:
    assert loaded(CudaBackend).deterministic("on") == []
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert os.environ["NCCL_ALGO"] == "^NVLS,NVLSTree"
    assert torch.backends.cudnn.deterministic
    assert torch.is_deterministic_algorithms_warn_only_enabled()
    assert loaded(CudaBackend).deterministic("off") == []
    assert not torch.backends.cudnn.deterministic


def test_cuda_leaves_what_the_user_chose_and_says_what_that_costs(switched_back: pytest.MonkeyPatch) -> None:
    switched_back.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    switched_back.setenv("NCCL_ALGO", "Ring")
    unmet = loaded(CudaBackend).deterministic("on")
    assert unmet == ["set before the process starts: CUBLAS_WORKSPACE_CONFIG=:4096:8"]
    switched_back.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    assert loaded(CudaBackend).deterministic("on") == []


def test_what_comes_after_the_first_communicator_is_too_late(switched_back: pytest.MonkeyPatch) -> None:
    switched_back.setattr(dist, "is_initialized", lambda: True)
    assert loaded(CudaBackend).deterministic("on") == ["set before the process starts: NCCL_ALGO=^NVLS,NVLSTree"]
    (unmet,) = loaded(NpuBackend).deterministic("on")
    assert unmet.startswith("set before the process starts: ")
    assert {pair.split("=")[0] for pair in unmet.partition(": ")[2].split(", ")} == {*SWITCHES, "HCCL_DETERMINISTIC"}


def test_an_npu_orders_reductions_strictly_where_it_can(switched_back: pytest.MonkeyPatch) -> None:
    assert loaded(NpuBackend, "Ascend910B2").deterministic("strict") == []
    assert os.environ["HCCL_DETERMINISTIC"] == "strict"
    assert loaded(NpuBackend, "Ascend910_9391").deterministic("on") == [], "stricter than asked for is good enough"
    switched_back.delenv("HCCL_DETERMINISTIC")
    (unmet,) = loaded(NpuBackend, "Ascend310P3").deterministic("strict")
    assert unmet == "Ascend310P3 adds up a collective in no fixed order (no HCCL_DETERMINISTIC=strict)"
    assert os.environ["HCCL_DETERMINISTIC"] == "true"


class Recorder(CpuBackend):
    name = "recorder"


def test_a_device_without_graphs_refuses_to_record_one() -> None:
    with pytest.raises(Unsupported, match="device 'cpu' records no graphs: call the work each time instead"):
        loaded(CpuBackend).capture(lambda: None)


def test_a_pytorch_without_graphs_is_named() -> None:
    backend = loaded(Recorder, graph_capture="training")
    backend._torch = SimpleNamespace(__version__="2.11.0", accelerator=SimpleNamespace())
    with pytest.raises(Unsupported, match=r"PyTorch 2\.11\.0 records no graphs on 'recorder', 2\.12 and newer do"):
        backend.capture(lambda: None)


class Stream:
    """A stream that writes down who waits for whom, and when it is the current one."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def wait_stream(self, other: Stream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")

    def __enter__(self) -> None:
        self.log.append(f"on {self.name}")

    def __exit__(self, *error: object) -> None:
        self.log.append(f"off {self.name}")


def test_work_is_warmed_up_and_recorded_on_a_stream_of_its_own() -> None:
    log: list[str] = []

    class Graph:
        def __init__(self, pool: object, capture_error_mode: str) -> None:
            log.append(f"graph in {pool}, {capture_error_mode}")

        def pool(self) -> str:
            return "its pool"

        def replay(self) -> None:
            log.append("replay")

        def __enter__(self) -> None:
            log.append("record")

        def __exit__(self, *error: object) -> None:
            log.append("recorded")

    def work() -> str:
        log.append("work")
        return "the same tensors"

    backend = loaded(Recorder, graph_capture="training")
    backend._torch = SimpleNamespace(
        accelerator=SimpleNamespace(Graph=Graph, current_stream=lambda: Stream("main", log)), __version__="2.13.0"
    )
    backend.stream = lambda: Stream("side", log)
    captured = backend.capture(work, warm_ups=2)
    recording = ["side waits for main", "on side", "work", "work", "record", "work", "recorded", "off side"]
    assert log == ["graph in None, thread_local", *recording, "main waits for side"]
    captured.replay()
    assert (log[-1], captured.result) == ("replay", "the same tensors")
    backend.stream = None  # the same stream records again
    backend.capture(work, warm_ups=0, beside=captured)
    assert log[-6:-4] == ["on side", "record"] and "graph in its pool, thread_local" in log


@pytest.mark.parametrize(
    ("words", "kind"),
    [("ACL stream synchronize failed, error code is 207008", Unsupported), ("out of order", RuntimeError)],
)
def test_an_npu_without_streams_records_no_more(words: str, kind: type[Exception]) -> None:
    class Full(NpuBackend):
        def _recording(self, pool: Any) -> Any:
            raise RuntimeError(words)

    with pytest.raises(kind) as caught:
        loaded(Full, graph_capture="inference").capture(lambda: None)
    assert type(caught.value) is kind


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_recorded_graph_computes_what_the_work_computes() -> None:
    backend = CudaBackend()
    backend.load()
    backend.bind(0)
    x = torch.ones(64, device=backend.device())
    captured = backend.capture(lambda: (x * 3).sum())
    x.fill_(2.0)
    captured.replay()
    backend.synchronize()
    assert captured.result.item() == 64 * 2 * 3


@pytest.mark.skipif(not dist.is_nccl_available(), reason="this PyTorch is built without NCCL")
def test_communicators_of_cuda_run_before_computation_and_keep_the_groups_limit() -> None:
    options = CudaBackend()._communicator_options(timedelta(seconds=7))
    assert options.is_high_priority_stream
    assert options._timeout == timedelta(seconds=7)


class OptionsBackend(CpuBackend):
    """Writes down what its group was made with."""

    asked: list[timedelta]

    def communication(self) -> CommSpec:
        self.asked = []
        return CommSpec("gloo", {}, options=self.asked.append)


def meet_with_options(rank: int, size: int) -> tuple[list[timedelta], float]:
    backend = OptionsBackend()
    backend.load()
    comm = Collectives.init(backend, rank, size, timeout_s=60)
    total = comm.all_reduce(torch.ones(1)).item()
    comm.close()
    return backend.asked, total


def test_a_group_is_made_with_the_librarys_options() -> None:
    assert run_world(meet_with_options, 2) == [([timedelta(seconds=60)], 2.0)] * 2


@pytest.mark.parametrize(("dtype", "place"), [("uint8", "meta"), ("float32", "cpu")])
def test_a_broadcast_that_the_library_lacks_goes_through_the_host(dtype: str, place: str) -> None:
    backend = loaded(CpuBackend)
    backend.communication = lambda: CommSpec("gloo", {"broadcast": frozenset({dtype})})
    comm = Collectives(backend, 0, 2, 1.0)
    assert comm._broadcast_place(torch.empty(4, device="meta")) == torch.device(place)


class FormatBackend(NpuBackend):
    torch_type = "cpu"


@contextmanager
def formats(monkeypatch: pytest.MonkeyPatch, of: Callable[[torch.Tensor], int]) -> Any:
    """A torch_npu whose tensors have the memory formats that `of` gives them; a cast to ND (2) adds one."""
    cast = {2: lambda t: t + 1}
    module = SimpleNamespace(get_npu_format=of, npu_format_cast=lambda t, wanted: cast[wanted](t))
    monkeypatch.setitem(sys.modules, "torch_npu", module)  # type: ignore[arg-type]
    yield FormatBackend()


def test_private_formats_are_undone_and_others_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    fractal_nz, nd, t = 29, 2, torch.zeros(2)
    with formats(monkeypatch, lambda tensor: fractal_nz) as backend:
        assert backend.to_canonical(t).tolist() == [1.0, 1.0]
    with formats(monkeypatch, lambda tensor: nd) as backend:
        assert backend.to_canonical(t) is t
    shard = SimpleNamespace(device=torch.device("cpu"), to_local=lambda: t)
    with formats(monkeypatch, lambda tensor: nd) as backend:
        assert backend.to_canonical(shard) is shard
    with (
        formats(monkeypatch, lambda tensor: fractal_nz) as backend,
        pytest.raises(Unsupported, match="a sharded tensor in a private memory format cannot be read"),
    ):
        backend.to_canonical(shard)


# A device whose memory holds every number one too small: whoever reads it past `to_canonical` is found out.
SHIFTED = """
from siirl_cpu import CpuBackend

class Backend(CpuBackend):
    name = "shifted"

    def to_canonical(self, t):
        return t + 1 if t.is_floating_point() and t.dim() else t
"""
RECIPE = """
model: {path: "tiny:qwen3:16:1:99"}
data: {source: "arithmetic:addition?digits=1", prompts_per_step: 2, max_prompt_tokens: 8}
rollout: {group_size: 2, max_new_tokens: 2}
training: {steps: 1}
logging: {report: false}
"""


def test_checkpoints_and_exports_are_read_in_pytorchs_own_format(tmp_path: Path) -> None:
    install(
        tmp_path,
        "siirl-shifted",
        modules={"siirl_shifted.py": SHIFTED},
        entry_points={"siirl.backends": {"shifted": "siirl_shifted:Backend"}},
    )
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    code = (
        f"import os, siirl; os.chdir({str(tmp_path)!r})\n"
        "for device in ('cpu', 'shifted'): siirl.train('recipe.yaml', device=device, run_dir=device)"
    )
    done = python(code, tmp_path)
    assert done.returncode == 0, done.stderr
    for pattern in ("model/*.safetensors", "checkpoints/*/tensors/*.safetensors"):
        ((expected,), (given,)) = ([load_file(f) for f in (tmp_path / d).glob(pattern)] for d in ("cpu", "shifted"))
        assert expected.keys() == given.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(given[name], tensor + 1 if tensor.dim() else tensor, msg=f"{pattern} {name}")
