"""L3: collectives, through the back end's library as it claims and through the facade as the framework calls it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from siirl.device import current
from siirl.device.backend import Unsupported
from siirl.device.collectives import Collectives
from siirl.validation.checks import Broken, check, require
from siirl.validation.numbers import same
from siirl.validation.subject import Subject
from siirl.validation.world import RemoteError

DTYPES = (
    *("bool", "uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64"),
    *("float8_e4m3fn", "float8_e5m2", "complex64"),
)
REDUCTIONS = ("sum", "mean", "max", "min")
SIZES = {"smoke": (1, 7, 1001), "full": (1, 2, 7, 129, 1001, 65_537)}


def values(rank: int, size: int, dtype: torch.dtype) -> Tensor:
    """Small integers that every dtype holds, and their sums over a few workers too; on the host."""
    whole = (torch.arange(size) * 5 + rank * 3) % 7
    if dtype == torch.bool:
        return whole > 3
    return whole.to(torch.float32).to(dtype)


def reduced(op: str, world: int, size: int, dtype: torch.dtype) -> Tensor:
    """The reduction over all workers, computed here."""
    stacked = torch.stack([values(rank, size, dtype).double() for rank in range(world)])
    whole = {
        "sum": stacked.sum(0),
        "mean": stacked.sum(0) / world,
        "max": stacked.amax(0),
        "min": stacked.amin(0),
    }[op]
    return whole.to(torch.float32 if dtype.itemsize < 4 else torch.float64).to(dtype)


def claimed(subject: Subject) -> Iterator[tuple[str, str]]:
    for collective, dtypes in subject.backend.communication().dtypes.items():
        yield from ((collective, name) for name in DTYPES if name in dtypes)


def _library(collectives: Collectives, collective: str, name: str, size: int) -> Tensor:
    """The collective of torch.distributed itself, between tensors of the device."""
    dtype, device, rank, world = getattr(torch, name), current().device(), collectives.rank, collectives.size
    own = values(rank, size, dtype).to(device)
    if collective == "all_reduce":
        dist.all_reduce(own, op=dist.ReduceOp.MAX if dtype == torch.bool else dist.ReduceOp.SUM)
        return own.cpu()
    if collective == "broadcast":
        dist.broadcast(own, src=world - 1)
        return own.cpu()
    out, into = _uneven(rank, world, size)
    received = torch.empty(sum(into), dtype=dtype, device=device)
    dist.all_to_all_single(received, values(rank, sum(out), dtype).to(device), into, out)
    return received.cpu()


def _uneven(rank: int, world: int, size: int) -> tuple[list[int], list[int]]:
    """How many elements a worker sends to each and gets from each; some none at all."""
    sizes = [[(size * (1 + source) + target) % (size + 1) for target in range(world)] for source in range(world)]
    sizes[0][world - 1] = 0
    return sizes[rank], [row[rank] for row in sizes]


def exchanged(rank: int, world: int, size: int, dtype: torch.dtype) -> Tensor:
    """What worker `rank` gets in the exchange of `_uneven` sizes."""
    parts = []
    for source in range(world):
        out, _ = _uneven(source, world, size)
        start = sum(out[:rank])
        parts.append(values(source, sum(out), dtype)[start : start + out[rank]])
    return torch.cat(parts)


@check("L3", "the library moves and reduces each dtype it claims, at odd sizes", claimed)
def library(subject: Subject, collective: str, name: str) -> None:
    dtype, world = getattr(torch, name), subject.world
    for size in SIZES[subject.depth]:
        for rank, found in enumerate(world.run(_library, collective, name, size)):
            if collective == "all_reduce":
                expected = reduced("max" if dtype == torch.bool else "sum", world.size, size, dtype)
            elif collective == "broadcast":
                expected = values(world.size - 1, size, dtype)
            else:
                expected = exchanged(rank, world.size, size, dtype)
            same(found, expected, f"{size} elements on worker {rank}")


def _all_reduce(collectives: Collectives, name: str, op: Any, size: int) -> Any:
    """The facade's; the name of the error where it refuses."""
    own = values(collectives.rank, size, getattr(torch, name)).to(current().device())
    try:
        returned = collectives.all_reduce(own, op)
    except (Unsupported, ValueError) as error:
        return type(error).__name__
    return returned.cpu(), own.cpu()


def meaningful(op: str, dtype: torch.dtype) -> bool:
    """The mean of integers and the sum of booleans are refused for every device."""
    return not ((op == "mean" and not dtype.is_floating_point) or (op == "sum" and dtype == torch.bool))


@check(
    "L3",
    "a reduction gives the right numbers in every dtype or refuses at once, on every worker alike",
    lambda _: ((op,) for op in REDUCTIONS),
)
def all_reduce(subject: Subject, op: str) -> None:
    world, claims = subject.world, subject.backend.communication().dtypes.get("all_reduce", frozenset())
    for name in DTYPES:
        dtype = getattr(torch, name)
        for size in SIZES[subject.depth]:
            answers = world.run(_all_reduce, name, op, size)
            refused = [answer for answer in answers if isinstance(answer, str)]
            require(len(refused) in (0, world.size), f"{name}: {len(refused)} of {world.size} workers refuse it")
            if refused:
                defined = name in claims and meaningful(op, dtype)
                require(not defined, f"{name} is claimed and refused: {refused[0]}")
                break
            require(meaningful(op, dtype), f"the {op} of {name} is not defined, and was computed")
            expected = reduced(op, world.size, size, dtype)
            for rank, (returned, own) in enumerate(answers):
                same(returned, expected, f"{name}, {size} elements on worker {rank}")
                same(own, expected, f"{name}, {size} elements in place on worker {rank}")


def _broadcast(collectives: Collectives, name: str, source: int) -> Tensor:
    own = values(collectives.rank, 3 * 7, getattr(torch, name)).to(current().device()).view(3, 7)
    part = own[:, 1:4]  # neither contiguous nor all of its storage
    collectives.broadcast(part, source)
    return own.cpu()


@check(
    "L3",
    "a broadcast moves every dtype, into a part of a tensor, and leaves the rest",
    lambda _: ((x,) for x in DTYPES),
)
def broadcast(subject: Subject, name: str) -> None:
    dtype = getattr(torch, name)
    for source in range(subject.world.size):
        for rank, found in enumerate(subject.world.run(_broadcast, name, source)):
            expected = values(rank, 21, dtype).view(3, 7).clone()
            expected[:, 1:4] = values(source, 21, dtype).view(3, 7)[:, 1:4]
            same(found, expected, f"from worker {source} on worker {rank}")


def _exchange(collectives: Collectives, size: int) -> tuple[Tensor, str]:
    out, into = _uneven(collectives.rank, collectives.size, size)
    send = values(collectives.rank, sum(out), torch.uint8).to(current().device())
    received = collectives.all_to_all_bytes(send, out, into)
    return received.cpu(), received.device.type


@check("L3", "an exchange of bytes delivers uneven and empty segments in the order of ranks")
def all_to_all(subject: Subject) -> None:
    for size in SIZES[subject.depth]:
        for rank, (found, place) in enumerate(subject.world.run(_exchange, size)):
            require(place == subject.backend.torch_type, f"bytes of the device come back on {place}")
            same(found, exchanged(rank, subject.world.size, size, torch.uint8), f"segments of {size} on worker {rank}")


def _gathers(collectives: Collectives) -> dict[str, Any]:
    rank, last = collectives.rank, collectives.size - 1
    collectives.barrier()
    return {
        "ints": [t.tolist() for t in collectives.all_gather_ints(torch.arange(2 * rank, 4 * rank))],
        "rows": [t.tolist() for t in collectives.all_gather_ints(torch.full((rank, 2), rank))],
        "bytes": collectives.all_gather_bytes(b"\0w" * rank),
        "gathered": collectives.gather_bytes(f"worker {rank}".encode(), last),
    }


@check("L3", "gathers keep the order of ranks, and uneven and empty contributions")
def gathers(subject: Subject) -> None:
    ranks = range(subject.world.size)
    for rank, found in enumerate(subject.world.run(_gathers)):
        expected = {
            "ints": [list(range(2 * r, 4 * r)) for r in ranks],
            "rows": [[[r, r]] * r for r in ranks],
            "bytes": [b"\0w" * r for r in ranks],
            "gathered": [f"worker {r}".encode() for r in ranks] if rank == ranks[-1] else None,
        }
        for what, value in expected.items():
            require(found[what] == value, f"{what} on worker {rank}: {found[what]!r} instead of {value!r}")


def _group(collectives: Collectives, parts: list[list[int]]) -> tuple[list[float], list[float]]:
    groups = [dist.new_group(part) for part in parts]  # every worker makes every group
    mine = next(group for group, part in zip(groups, parts, strict=True) if collectives.rank in part)
    x = torch.full((3,), 1.0 + collectives.rank, device=current().device())
    in_group, whole = x.clone(), x.clone()
    dist.all_reduce(in_group, group=mine)
    work = dist.all_reduce(whole, async_op=True)
    work.wait()
    dist.destroy_process_group(mine)
    return in_group.tolist(), whole.tolist()


@check("L3", "a reduction within a group leaves out the others, and one that is waited for is done")
def groups(subject: Subject) -> None:
    size = subject.world.size
    total = sum(1.0 + r for r in range(size))
    for parts in ([[0], list(range(1, size))], [[0, size - 1], list(range(1, size - 1))]):
        parts = [part for part in parts if part]
        for rank, (found, whole) in enumerate(subject.world.run(_group, parts)):
            own = next(sum(1.0 + r for r in part) for part in parts if rank in part)
            require(found == [own] * 3, f"groups {parts}, worker {rank}: {found} instead of {[own] * 3}")
            require(whole == [total] * 3, f"all workers, worker {rank}: {whole} instead of {[total] * 3}")


def _unclaimed(collectives: Collectives, collective: str, name: str) -> None:
    _library(collectives, collective, name, 7)


def not_claimed(subject: Subject) -> Iterator[tuple[str, str]]:
    for collective, dtypes in subject.backend.communication().dtypes.items():
        yield from ((collective, name) for name in DTYPES if name not in dtypes)


@check("L3", "the library refuses at once a dtype that is not claimed, and does not hang", not_claimed, full=True)
def unclaimed(subject: Subject, collective: str, name: str) -> None:
    answers = subject.world.try_run(_unclaimed, collective, name, deadline_s=20.0)
    raised = [answer for answer in answers if isinstance(answer, RemoteError)]
    if not raised:
        subject.measure("works, though it is not claimed", 1.0)
    elif len(raised) < len(answers):
        raise Broken(f"{len(raised)} of {len(answers)} workers refuse it: {raised[0]}")
