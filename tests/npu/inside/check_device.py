"""The simulated device behaves as a device: memory, random numbers, streams, autograd, and what it must refuse."""

from __future__ import annotations

import copy
import gc
import io
import subprocess
import sys
import time

import pytest
import simulated_npu
import torch
import torch.nn.functional as F
import torch_npu
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.device_under_test import backend

NPU = torch.device("npu", 0)


def test_pytorch_knows_the_device_by_its_entry_point_alone() -> None:
    code = "import torch, sys; print('torch_npu' in sys.modules, torch.ones(2, device='npu').device)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["True", "npu:0"], done.stderr


# The eight defects that a device outside PyTorch is prone to.


def test_recomputed_activations_drop_out_the_same_elements() -> None:
    """checkpoint() keeps a device's random state only where its module says that it is initialised."""
    weight = torch.ones(4096, device=NPU, requires_grad=True)
    masks: list[Tensor] = []

    def dropped(x: Tensor) -> Tensor:
        out = F.dropout(x, 0.5)
        masks.append(out.detach() != 0)
        return out * out  # whose gradient needs the recomputed values

    torch.manual_seed(3)
    checkpoint(dropped, weight, use_reentrant=False).sum().backward()
    forward, recomputed = masks
    assert torch.equal(forward, recomputed)
    assert 0.4 < float(forward.float().mean()) < 0.6
    assert torch.equal(weight.grad, 8.0 * forward)  # (2x)² = 4x², its derivative 8x


def test_random_state_is_a_seed_and_an_offset_of_16_bytes() -> None:
    torch.manual_seed(5)
    fresh = torch.npu.get_rng_state()
    assert fresh.dtype == torch.uint8 and fresh.numel() == 16 and fresh.device.type == "cpu"
    assert int.from_bytes(bytes(fresh[:8].tolist()), sys.byteorder) == 5
    first = torch.randn(100, device=NPU)
    second = torch.randn(100, device=NPU)
    torch.npu.set_rng_state(fresh)
    assert torch.equal(torch.randn(100, device=NPU), first)
    assert not torch.equal(first, second)


def test_a_parameter_moves_and_stays_the_same_parameter() -> None:
    """`_has_compatible_shallow_copy_type` decides whether module.to() swaps the data or the parameter."""
    embedding, head = nn.Embedding(8, 4), nn.Linear(4, 8, bias=False)
    head.weight = embedding.weight
    both = nn.ModuleList([embedding, head])
    optimizer = torch.optim.AdamW(both.parameters(), lr=0.1)
    for place in ("npu", "cpu", "npu"):
        both.to(place)
        assert embedding.weight is head.weight is optimizer.param_groups[0]["params"][0]
        assert head.weight.device.type == place
    head.weight.data = torch.zeros(8, 4)
    assert head.weight.device.type == "cpu"


def test_a_tensor_can_be_recorded_on_a_stream() -> None:
    torch.ones(3, device=NPU).record_stream(torch.Stream(NPU))


def test_events_measure_time() -> None:
    start, end = (torch.npu.Event(enable_timing=True) for _ in range(2))
    start.record()
    time.sleep(0.02)
    end.record()
    end.synchronize()
    assert 20 <= start.elapsed_time(end) < 2000  # milliseconds
    assert isinstance(start, torch.Event)


def test_a_process_that_ends_after_a_backward_pass_in_python_ends_well() -> None:
    """The autograd engine's thread of the device wants the interpreter back while it shuts down."""
    code = """
import torch
class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): return 2 * x
    @staticmethod
    def backward(ctx, grad): return 2 * grad
x = torch.ones(4, device="npu", requires_grad=True)
Twice.apply(x).sum().backward()
assert x.grad.tolist() == [2.0] * 4
"""
    ended = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True) for _ in range(4)]
    assert [(done.returncode, done.stderr) for done in ended] == [(0, "")] * 4


def test_spawned_children_read_the_devices_tensors() -> None:
    context = torch.multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        assert pool.apply(_sum_on_device, (10,)) == 45.0


def _sum_on_device(count: int) -> float:
    return float(torch.arange(count, device="npu").sum())


# Memory.


def test_memory_is_accounted_for_to_the_block() -> None:
    gc.collect()
    torch.npu.reset_peak_memory_stats()
    before = torch.npu.memory_allocated()
    small, large = torch.empty(1, device=NPU), torch.empty(1000, dtype=torch.float64, device=NPU)
    assert torch.npu.memory_allocated() - before == 512 + 8192  # rounded up to 512 bytes
    view = large[10:]
    del large, small
    assert torch.npu.memory_allocated() - before == 8192
    del view
    assert torch.npu.memory_allocated() == before
    assert torch.npu.max_memory_allocated() - before == 512 + 8192
    free, total = torch.npu.mem_get_info()
    assert total - free == before


def test_out_of_memory_is_raised_and_what_was_there_goes_on() -> None:
    kept = torch.ones(1000, device="npu:1")
    simulated_npu.set_memory_limit(1 << 20, 1)
    try:
        with pytest.raises(
            torch.OutOfMemoryError, match=r"NPU out of memory. Tried to allocate 4194304 bytes \(NPU 1;"
        ):
            torch.empty(1 << 20, device="npu:1")
        assert float((kept + kept).sum()) == 2000.0
        assert simulated_npu.counters(1)["memory"]["ooms"] == 1
    finally:
        simulated_npu.set_memory_limit(8 << 30, 1)
    torch.empty(1 << 20, device="npu:1")


def test_pinned_memory_is_told_from_other_memory() -> None:
    assert torch.randn(3).pin_memory().is_pinned()
    assert not torch.randn(3).is_pinned()


# One device at a time.


@pytest.mark.parametrize(
    "mixed",
    [
        lambda x: x + torch.ones(4),
        lambda x: torch.ones(4) * x,
        lambda x: x.index_select(0, torch.tensor([1])),
        lambda x: x.gather(0, torch.tensor([1])),
        lambda x: torch.where(torch.ones(4, dtype=torch.bool), x, x),
        lambda x: torch.cat((x, torch.ones(4))),
        lambda x: torch.add(x, x, out=torch.empty(4)),
        lambda x: torch.ones(4).add_(x),
        lambda x: torch.tensor(1.0).add_(x[0]),
        lambda x: F.embedding(torch.tensor([0]), x[:, None]),
        lambda x: F.linear(x, torch.ones(2, 4)),
        lambda x: x.scatter_(0, torch.tensor([1]), x.clone()),
        lambda x: x + x.to("npu:1"),
        lambda x: torch._foreach_add([x], [torch.ones(4)]),
    ],
)
def test_tensors_of_two_devices_do_not_meet(mixed: object) -> None:
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        mixed(torch.ones(4, device=NPU))


def test_what_pytorch_allows_across_devices_is_allowed() -> None:
    x = torch.arange(4.0, device=NPU)
    assert (x * torch.tensor(2.0)).tolist() == [0, 2, 4, 6]  # a number of the host
    assert x[torch.tensor([2, 1])].tolist() == [2, 1]  # indices of the host
    assert torch.zeros(4).copy_(x).tolist() == [0, 1, 2, 3]


def test_numpy_and_a_generator_of_the_host_are_refused() -> None:
    with pytest.raises(TypeError, match="can't convert npu:0 device type tensor to numpy"):
        torch.ones(2, device=NPU).numpy()
    with pytest.raises(RuntimeError, match="Expected a 'npu' device type for generator but found 'cpu'"):
        torch.randn(2, device=NPU, generator=torch.Generator())


def test_matrices_are_multiplied_in_the_vendors_data_types_alone() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert (torch.eye(2, dtype=dtype, device=NPU) @ torch.ones(2, 2, dtype=dtype, device=NPU)).sum().item() == 4
    for dtype in (torch.float64, torch.int64):
        x = torch.ones(2, 2, dtype=dtype, device=NPU)
        with pytest.raises(RuntimeError, match="the npu multiplies matrices of Float, Half and BFloat16"):
            x @ x


# Random numbers.


def test_the_hosts_random_numbers_are_left_alone() -> None:
    torch.manual_seed(1)
    expected = torch.randn(5)
    torch.manual_seed(1)
    torch.randn(7, device=NPU)
    F.dropout(torch.ones(9, device=NPU), 0.5)
    torch.multinomial(torch.ones(5, device=NPU), 2)
    assert torch.equal(torch.randn(5), expected)


def test_generators_and_devices_have_streams_of_their_own() -> None:
    generator = torch.Generator("npu").manual_seed(7)
    drawn = torch.randn(50, device=NPU, generator=generator)
    torch.manual_seed(7)
    assert torch.equal(torch.randn(50, device=NPU), drawn)
    with torch.random.fork_rng(devices=[0], device_type="npu"):
        inside = torch.randn(50, device=NPU)
    assert torch.equal(torch.randn(50, device=NPU), inside)
    many = torch.randn(100_000, device=NPU)
    assert abs(float(many.mean())) < 0.02 and abs(float(many.std()) - 1) < 0.02  # 6 standard deviations


# What training needs, against the host.


def losses(device: str, **options: bool | None) -> list[float]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 1))
    data = torch.randn(16, 8).to(device)
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, **options)
    found = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = model(data).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"foreach": True}, {"foreach": False}], ids=str)
def test_an_optimizer_takes_the_hosts_path(options: dict[str, bool]) -> None:
    assert losses("npu", **options) == pytest.approx(losses("cpu"), rel=1e-6)


def test_attention_and_its_gradients_are_the_hosts() -> None:
    torch.manual_seed(2)
    leaves = [torch.randn(2, 4, 16, 8) for _ in range(3)]
    found = []
    for device in ("cpu", "npu"):
        q, k, v = (x.detach().to(device).requires_grad_() for x in leaves)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        found.append([x.cpu() for x in (out, *torch.autograd.grad(out.square().sum(), (q, k, v)))])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)


def test_mixed_precision_computes_products_in_halves_and_losses_in_float32() -> None:
    x = torch.randn(4, 8, device=NPU)
    with torch.autocast("npu", dtype=torch.bfloat16):
        product = x @ x.t()
        assert product.dtype == torch.bfloat16
        assert F.cross_entropy(product, torch.zeros(4, dtype=torch.int64, device=NPU)).dtype == torch.float32
    assert (x @ x.t()).dtype == torch.float32


def test_tensors_are_saved_and_loaded_to_any_device() -> None:
    x, file = torch.randn(3, device="npu:1"), io.BytesIO()
    torch.save(x, file)
    for target, place in ((None, "npu:1"), ("cpu", "cpu"), ("npu:0", "npu:0")):
        file.seek(0)
        loaded = torch.load(file, map_location=target)
        assert str(loaded.device) == place and torch.equal(loaded.cpu(), x.cpu())
    assert copy.deepcopy(x).device == x.device


def test_views_share_memory_and_out_takes_results() -> None:
    x = torch.zeros(4, 6, device=NPU)
    x.t()[1:3].add_(1)
    assert float(x.sum()) == 8.0
    out = torch.empty(0, device=NPU)
    torch.nonzero(x, out=out.long())
    torch.mul(x, 2, out=out)
    assert out.shape == (4, 6) and float(out.sum()) == 16.0


def test_streams_nest_and_the_profiler_sees_operators() -> None:
    stream = torch.npu.Stream(NPU)
    with torch.npu.stream(stream):
        assert torch.npu.current_stream() == stream
    assert torch.npu.current_stream() == torch.npu.default_stream()
    with torch_npu.profiler.profile(activities=torch_npu.profiler.supported_activities()) as profiler:
        torch.ones(8, 8, device=NPU) @ torch.ones(8, 8, device=NPU)
    assert "aten::mm" in {event.key for event in profiler.key_averages()}


def test_a_graph_is_replayed_on_new_inputs_and_never_waits() -> None:
    x = torch.ones(4, device=NPU)
    recorded = torch.npu.NPUGraph()
    with torch.npu.graph(recorded):
        y = (x * 3).cumsum(0)
    waits = pytest.raises(RuntimeError, match="reading a value is not permitted while a graph is recorded")
    with waits, torch.npu.graph(torch.npu.NPUGraph()):
        float(x[0])
    x.fill_(2.0)
    recorded.replay()
    assert y.tolist() == [6, 12, 18, 24]


def test_at_the_second_level_of_the_task_queue_nothing_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    npu = backend()
    assert npu.capabilities().graph_capture == "inference"
    monkeypatch.setenv("TASK_QUEUE_ENABLE", "2")
    assert npu.capabilities().graph_capture == "none"
    with (
        pytest.raises(RuntimeError, match="Do not support TASK_QUEUE_ENABLE = 2"),
        torch.npu.graph(torch.npu.NPUGraph()),
    ):
        pass


# Counters.


def test_counters_are_exact() -> None:
    x = torch.ones(8, 8, device=NPU)
    simulated_npu.reset_counters()
    y = (x @ x).relu()
    counted = simulated_npu.counters()
    assert counted["calls"] == 2 and counted["distinct"] == 2
    assert sorted(name.split(".")[0] for name in counted["operators"]) == ["aten::mm", "aten::relu"]
    assert counted["copies"] == {} and counted["fallbacks"] == {}
    y.cpu()
    assert simulated_npu.counters()["copies"] == {"device to host": {"calls": 1, "bytes": 256}}


def test_an_operator_without_a_kernel_falls_back_and_is_counted() -> None:
    simulated_npu.remove_kernel("aten::erfinv")
    before = simulated_npu.counters()["fallbacks"]
    assert torch.zeros(2, device=NPU).erfinv().tolist() == [0, 0]
    assert before == {} and list(simulated_npu.counters()["fallbacks"].values()) == [1]


def test_an_operator_without_a_kernel_is_an_error_where_falling_back_is_forbidden(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TORCH_NPU_FALLBACK_CPU_DISABLE", "1")
    code = "import torch, simulated_npu as s; s.remove_kernel('aten::erfinv'); torch.zeros(2, device='npu').erfinv()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "NotImplementedError: CAUTION: The operator 'aten::erfinv" in done.stderr


def test_private_memory_formats_follow_the_vendors_switch() -> None:
    x = torch.ones(4, 4, device=NPU)
    assert torch_npu.get_npu_format(x) == torch_npu.Format.ND
    assert torch_npu.get_npu_format(x[None, None].clone()) == torch_npu.Format.NCHW
    assert torch_npu.get_npu_format(torch_npu.npu_format_cast(x, 29)) == torch_npu.Format.ND
    torch_npu.npu.config.allow_internal_format = True
    try:
        cast = torch_npu.npu_format_cast(x, torch_npu.Format.FRACTAL_NZ)
        assert torch_npu.get_npu_format(cast) == torch_npu.Format.FRACTAL_NZ
        assert torch_npu.get_npu_format(torch_npu.npu_format_cast(cast, 2)) == torch_npu.Format.ND
    finally:
        torch_npu.npu.config.allow_internal_format = False
