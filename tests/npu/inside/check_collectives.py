"""The simulated hccl: what the vendor documents works between two processes, and what it does not is refused."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import simulated_npu
import torch
import torch.distributed as dist
import torch_npu
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from siirl.device import Collectives, current
from tests.device.world import run_world

DTYPES = [
    "bfloat16",
    "float16",
    "float32",
    "float64",
    "uint8",
    "int8",
    "int16",
    "int32",
    "int64",
    "bool",
    "float8_e5m2",
]
ANY = {"bfloat16", "float16", "float32", "float64", "uint8", "int8", "int16", "int32", "int64", "bool"}
# docs/zh/api/native_api/pytorch_2-13-0/torch-distributed.md of Ascend/pytorch; all_gather besides what
# all_gather_object and DistributedDataParallel, listed there too, gather themselves.
DOCUMENTED = {
    "all_reduce": {"bfloat16", "float16", "float32", "int32", "int64", "bool"},
    "reduce": {"bfloat16", "float16", "float32", "uint8", "int8", "int32", "int64", "bool"},
    "reduce_scatter": {"bfloat16", "float16", "float32", "int8", "int32"},
    "all_gather": {"bfloat16", "float16", "float32", "int8", "int32", "bool"} | {"uint8", "int64"},
    "gather": {"bfloat16", "float16", "float32", "int8", "int32", "bool"} | {"uint8", "int64"},
    "all_to_all": {"float32"},
    "broadcast": ANY,
    "scatter": ANY,
    "send": ANY,
}


def calls(rank: int, size: int) -> dict[str, Callable[[torch.dtype], Any]]:
    """One call of each operation, and what this rank has afterwards; rank r puts in r + 1."""

    def own(dtype: torch.dtype, count: int = 2) -> Tensor:
        return torch.full((count,), rank + 1, device="npu").to(dtype)

    def blank(dtype: torch.dtype, count: int = 2) -> Tensor:
        return torch.zeros(count, dtype=dtype, device="npu")

    def after(function: Callable[..., Any], result: Tensor, *arguments: Any, **options: Any) -> Tensor:
        function(*arguments, **options)
        return result

    def all_reduce(dtype: torch.dtype) -> Tensor:
        return after(dist.all_reduce, x := own(dtype), x)

    def reduce(dtype: torch.dtype) -> Tensor:
        return after(dist.reduce, x := own(dtype), x, dst=0)

    def reduce_scatter(dtype: torch.dtype) -> Tensor:
        return after(dist.reduce_scatter_tensor, x := blank(dtype, 1), x, own(dtype, size))

    def all_gather(dtype: torch.dtype) -> Tensor:
        return after(dist.all_gather_into_tensor, x := blank(dtype, size), x, own(dtype, 1))

    def gather(dtype: torch.dtype) -> Tensor:
        rows = [blank(dtype, 1) for _ in range(size)]
        dist.gather(own(dtype, 1), rows if rank == 0 else None, dst=0)
        return torch.cat(rows)

    def all_to_all(dtype: torch.dtype) -> Tensor:
        return after(dist.all_to_all_single, x := blank(dtype, size), x, own(dtype, size))

    def broadcast(dtype: torch.dtype) -> Tensor:
        return after(dist.broadcast, x := own(dtype), x, src=1)

    def scatter(dtype: torch.dtype) -> Tensor:
        return after(dist.scatter, x := blank(dtype), x, [own(dtype), own(dtype)] if rank == 1 else None, src=1)

    def send(dtype: torch.dtype) -> Tensor:
        x = own(dtype)
        return after(dist.send, x, x, 1) if rank == 0 else after(dist.recv, x, x, 0)

    return {
        function.__name__: function
        for function in (
            all_reduce, reduce, reduce_scatter, all_gather, gather, all_to_all, broadcast, scatter, send,
        )
    }  # fmt: skip


def outcome(function: Callable[[], Any]) -> Any:
    """What it returns, as numbers, or what it says."""
    try:
        result = function()
    except (RuntimeError, ValueError) as error:
        return str(error).splitlines()[0]
    return result.cpu().tolist() if isinstance(result, Tensor) else result


def options_named(name: str) -> Any:
    options = torch_npu._C._distributed_c10d.ProcessGroupHCCL.Options()
    options.hccl_config = {"group_name": name}
    return options


def special(rank: int) -> dict[str, Any]:
    own = functools.partial(torch.full, (2,), float(rank + 1), device="npu")

    def reduced(x: Tensor, **options: Any) -> Tensor:
        work = dist.all_reduce(x, **options)
        if work is not None:
            work.wait()
        return x

    def exchanged() -> Tensor:
        got = torch.empty(2, device="npu")
        sides = [dist.P2POp(dist.isend, own(), 1 - rank), dist.P2POp(dist.irecv, got, 1 - rank)]
        for work in dist.batch_isend_irecv(sides):
            work.wait()
        return got

    def lists() -> Tensor:
        got = [torch.empty(n, device="npu") for n in (rank + 1, rank + 1)]
        dist.all_to_all(got, [torch.full((n,), 10.0 * rank + n, device="npu") for n in (1, 2)])
        return torch.cat(got)

    def private() -> Tensor:
        torch_npu.npu.config.allow_internal_format = True
        x = torch_npu.npu_format_cast(torch.ones(2, 2, device="npu"), 29)
        torch_npu.npu.config.allow_internal_format = False
        dist.all_reduce(current().to_canonical(x))
        return reduced(x)

    pure = dist.new_group([0, 1], backend="hccl")
    return {
        "mean": outcome(lambda: reduced(own(), op=dist.ReduceOp.AVG)),
        "mean, later": outcome(lambda: reduced(own(), op=dist.ReduceOp.AVG, async_op=True)),
        "any of bools": outcome(lambda: reduced(torch.tensor([rank == 1, False], device="npu"))),
        "bits": outcome(lambda: reduced(own().int(), op=dist.ReduceOp.BAND)),
        "exchange": outcome(exchanged),
        "lists": outcome(lists),
        "from any": outcome(lambda: dist.recv(own())),
        "no dimension": outcome(lambda: dist.all_to_all_single(torch.zeros((), device="npu"), own()[0])),
        "strided": outcome(lambda: reduced(torch.ones(4, 4, device="npu")[:, 1])),
        "private": outcome(private),
        "host tensor": outcome(lambda: reduced(torch.ones(2), group=pure)),
        "objects": (gathered := [None, None], dist.all_gather_object(gathered, {rank}, group=pure))[0],
        "long name": outcome(lambda: dist.new_group([0, 1], backend="hccl", pg_options=options_named("n" * 33))),
        "short name": outcome(
            lambda: reduced(own(), group=dist.new_group([0, 1], backend="hccl", pg_options=options_named("n" * 32)))
        ),
    }  # fmt: skip


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 4))


def trained(model: nn.Module, data: Tensor) -> nn.Module:
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model(data).square().mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model


def gathered(model: nn.Module) -> list[Any]:
    """The whole parameters as numbers, which travel between processes that end."""
    whole = (p.to("npu").full_tensor() if isinstance(p, DTensor) else p for p in model.parameters())
    return [parameter.detach().cpu().tolist() for parameter in whole]


def sharded(offload: bool) -> nn.Module:
    options = {"offload_policy": CPUOffloadPolicy(pin_memory=False)} if offload else {}
    model = network() if offload else network().to("npu")
    mesh = dist.init_device_mesh("npu", (2,))
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh, **options)
    return model


def training(rank: int) -> dict[str, list[Any]]:
    data = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
    mine = data.chunk(2)[rank].to("npu")
    offloaded = trained(sharded(offload=True), mine)
    assert {p.device.type for p in offloaded.parameters()} == {"cpu"}
    return {
        "alone": gathered(trained(network(), data)),
        "DDP": gathered(trained(DistributedDataParallel(network().to("npu")), mine)),
        "FSDP2": gathered(trained(sharded(offload=False), mine)),
        "FSDP2, offloaded": gathered(offloaded),
    }


def checkpointed(rank: int, folder: str) -> dict[str, list[Any]]:
    """Saved sharded on the device; loaded whole, by rank 0, on the host."""
    import torch.distributed.checkpoint as dcp

    model = sharded(offload=False)
    dcp.save(model.state_dict(), checkpoint_id=folder)
    saved, loaded = gathered(model), nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 4))
    if rank == 0:
        dcp.load(loaded.state_dict(), checkpoint_id=folder, no_dist=True)
    return {"saved": saved, "loaded": gathered(loaded)}


def exercise(rank: int, size: int) -> dict[str, Any]:
    warnings.simplefilter("ignore")  # torch names its own deprecated parts
    comm = Collectives.init(current(), rank, size, timeout_s=60)
    named = calls(rank, size)
    simulated_npu.reset_counters()
    named["all_reduce"](torch.float32)
    counted = simulated_npu.counters()["collectives"]
    table = {
        (operation, dtype): outcome(functools.partial(call, getattr(torch, dtype)))
        for operation, call in named.items()
        for dtype in DTYPES
    }
    result = {
        "counted": counted,
        "table": table,
        "special": special(rank),
        "training": training(rank),
        "checkpoint": checkpointed(rank, os.environ["CHECKPOINT"]),
    }
    comm.close()
    return result


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CHECKPOINT", str(tmp_path_factory.mktemp("saved") / "checkpoint"))
        results = run_world(exercise, 2)
    assert None not in results, "a process was lost"
    return results


@pytest.mark.parametrize("operation", DOCUMENTED)
def test_documented_dtypes_work_and_others_are_refused(operation: str, world: list[dict[str, Any]]) -> None:
    expected = {
        "all_reduce": [[3, 3], [3, 3]], "reduce": [[3, 3], None], "reduce_scatter": [[3], [3]],
        "all_gather": [[1, 2], [1, 2]], "gather": [[1, 2], [0, 0]], "all_to_all": [[1, 2], [1, 2]],
        "broadcast": [[2, 2], [2, 2]], "scatter": [[2, 2], [2, 2]], "send": [[1, 1], [1, 1]],
    }[operation]  # fmt: skip
    for rank, result in enumerate(world):
        for dtype in DTYPES:
            found = result["table"][operation, dtype]
            if dtype not in DOCUMENTED[operation]:
                assert "Unsupported data type" in str(found), (dtype, found)
            elif expected[rank] is not None:
                assert found == ([bool(x) for x in expected[rank]] if dtype == "bool" else expected[rank]), dtype


def test_the_back_end_claims_what_is_documented() -> None:
    from siirl_npu import MOVED

    assert all(claimed <= DOCUMENTED[operation] for operation, claimed in MOVED.items())


def test_means_bools_and_exchanges_follow_their_definitions(world: list[dict[str, Any]]) -> None:
    for rank, result in enumerate(world):
        found = result["special"]
        assert found["mean"] == found["mean, later"] == [1.5, 1.5]
        assert found["any of bools"] == [True, False]
        assert found["exchange"] == [2.0 - rank] * 2
        assert found["lists"] == [rank + 1.0] * (rank + 1) + [11.0 + rank] * (rank + 1)
        assert found["objects"] == [{0}, {1}]
        assert found["short name"] == [3.0, 3.0]


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        ("bits", "HCCL: Unsupported reduction"),
        ("from any", "HCCL recv: the rank to receive from must be named"),
        ("no dimension", "HCCL all_to_all: a tensor of no dimension cannot be split"),
        ("strided", "HCCL all_reduce: Tensors must be contiguous"),
        ("private", "this one lies in the private format FRACTAL_NZ; cast it to ND first"),
        ("host tensor", "No backend type associated with device type cpu"),
        ("long name", "HCCL: a group's name has at most 32 characters"),
    ],
)
def test_what_hccl_cannot_do_is_refused_on_every_rank(what: str, sentence: str, world: list[dict[str, Any]]) -> None:
    for result in world:
        assert sentence in str(result["special"][what])


def test_collectives_are_counted(world: list[dict[str, Any]]) -> None:
    assert [result["counted"] for result in world] == [{"all_reduce": {"calls": 1, "bytes": 8}}] * 2


@pytest.mark.parametrize("way", ["DDP", "FSDP2", "FSDP2, offloaded"])
def test_sharded_training_equals_training_alone_on_the_host(way: str, world: list[dict[str, Any]]) -> None:
    for result in world:
        for ours, alone in zip(result["training"][way], result["training"]["alone"], strict=True):
            torch.testing.assert_close(torch.tensor(ours), torch.tensor(alone), atol=1e-6, rtol=1e-5)


def test_a_checkpoint_of_sharded_weights_is_read_by_the_host(world: list[dict[str, Any]]) -> None:
    found = world[0]["checkpoint"]
    assert found["saved"] == found["loaded"]
