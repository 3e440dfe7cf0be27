"""The CPU back end, and the host's facts behind it."""

from __future__ import annotations

import os
import time
from pathlib import Path

import psutil
import pytest
import torch

from siirl.device import RngState, Unsupported, host
from siirl.errors import RequestError
from siirl_cpu import CpuBackend

GIB = 2**30


@pytest.fixture
def cpu() -> CpuBackend:
    backend = CpuBackend()
    backend.load()
    return backend


def test_the_same_seed_gives_the_same_numbers(cpu: CpuBackend) -> None:
    cpu.seed(7)
    first = torch.randn(5)
    cpu.seed(7)
    assert torch.equal(torch.randn(5), first)


def test_random_state_comes_back_through_json(cpu: CpuBackend) -> None:
    cpu.seed(3)
    torch.randn(11)
    saved = RngState.from_json(cpu.rng_state().to_json())
    expected = torch.randn(5)
    cpu.seed(0)
    cpu.set_rng_state(saved)
    assert torch.equal(torch.randn(5), expected)


def test_random_state_of_another_device_is_refused(cpu: CpuBackend) -> None:
    with pytest.raises(RequestError, match="saved on device 'other' means nothing to 'cpu'"):
        cpu.set_rng_state(RngState("other", cpu.rng_state().states))


def test_memory_is_that_of_the_process(cpu: CpuBackend) -> None:
    if not cpu.reset_peak_memory():
        pytest.skip("this system keeps only the peak since the process began")
    before = cpu.memory()
    block = torch.ones(64 * 2**20 // 4)
    during = cpu.memory()
    del block
    after = cpu.memory()
    assert before.unified
    assert during.allocated - before.allocated > 60 * 2**20
    assert after.peak - before.allocated > 60 * 2**20, "the peak outlives the allocation"
    assert after.host_peak == after.peak
    assert during.allocated == pytest.approx(psutil.Process().memory_info().rss, rel=0.5)
    assert 0 < after.free <= after.total <= psutil.virtual_memory().total


def test_peak_can_start_anew(cpu: CpuBackend) -> None:
    torch.ones(64 * 2**20 // 4)
    high = cpu.memory().peak
    if cpu.reset_peak_memory():
        assert cpu.memory().peak < high


def test_threads_are_set_by_binding(cpu: CpuBackend) -> None:
    before = torch.get_num_threads()
    cpu.bind(5, threads=2)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)
    assert cpu.device() == torch.device("cpu")


def test_mixed_precision(cpu: CpuBackend) -> None:
    x = torch.ones(4, 4)
    with cpu.autocast(torch.bfloat16):
        assert (x @ x).dtype == torch.bfloat16
    with cpu.autocast(torch.float32):
        assert (x @ x).dtype == torch.float32
    with pytest.raises(Unsupported, match="mixed precision in float64 does not work on device 'cpu'"):
        cpu.autocast(torch.float64)


def test_determinism_is_switched_and_nothing_stays_unmet(cpu: CpuBackend) -> None:
    try:
        assert cpu.deterministic("strict") == []
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert cpu.deterministic("on") == []
        assert torch.is_deterministic_algorithms_warn_only_enabled()
        with pytest.raises(ValueError, match="not 'often'"):
            cpu.deterministic("often")  # type: ignore[arg-type]
    finally:
        cpu.deterministic("off")
    assert not torch.are_deterministic_algorithms_enabled()


def test_events_measure_the_hosts_clock(cpu: CpuBackend) -> None:
    start, end = cpu.event(timing=True), cpu.event(timing=True)
    with cpu.stream() as stream:
        start.record(stream)
        time.sleep(0.05)
        end.record()
    stream.synchronize()
    assert 50 <= start.elapsed_time(end) < 1000
    with pytest.raises(Unsupported, match="timing=True"):
        cpu.event().elapsed_time(end)
    with pytest.raises(Unsupported, match="only after record"):
        start.elapsed_time(cpu.event(timing=True))


def test_the_profiler_sees_operators(cpu: CpuBackend) -> None:
    with cpu.profiler() as profile:
        torch.ones(8, 8) @ torch.ones(8, 8)
    assert "aten::mm" in {event.key for event in profile.key_averages()}


def test_capabilities_are_facts_of_this_machine(cpu: CpuBackend) -> None:
    facts = cpu.capabilities()
    assert facts.compute_units == host.usable_cores() <= (os.cpu_count() or 1)
    assert facts.memory_bytes <= psutil.virtual_memory().total
    hardware = {"avx512_bf16", "amx_bf16", "bf16"} & set(Path("/proc/cpuinfo").read_text().split())
    assert ("bfloat16" in facts.fast_dtypes) == bool(hardware)
    assert set(facts.fast_dtypes) <= set(facts.compute_dtypes)


def test_control_groups_cut_cores_and_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "CGROUP", tmp_path)
    real_read = host._read
    monkeypatch.setattr(
        host, "_read", lambda path: "0::/pod/box\n" if str(path) == "/proc/self/cgroup" else real_read(path)
    )
    box = tmp_path / "pod" / "box"
    box.mkdir(parents=True)
    (box / "memory.max").write_text("max\n")
    (box / "memory.current").write_text(f"{GIB // 8}\n")
    (tmp_path / "pod" / "memory.max").write_text(f"{GIB}\n")
    (tmp_path / "pod" / "memory.current").write_text(f"{GIB // 4}\n")
    (tmp_path / "pod" / "cpu.max").write_text("150000 100000\n")
    (box / "cpu.max").write_text("max 100000\n")
    assert host.memory_total() == GIB
    assert host.memory_available() == GIB - GIB // 4
    assert host.usable_cores() == min(2, len(os.sched_getaffinity(0)))


def test_pytorchs_build_is_read_without_importing_it() -> None:
    build = host.torch_build()
    assert build["__version__"] == torch.__version__
    assert build["cuda"] == torch.version.cuda
