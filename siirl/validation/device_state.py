"""L1: memory, randomness, streams and events, dtypes, determinism."""

from __future__ import annotations

import random
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from siirl.device.backend import RngState, Unsupported
from siirl.errors import RequestError
from siirl.validation.checks import Broken, NotApplicable, check, require
from siirl.validation.numbers import distance, same
from siirl.validation.subject import Subject

MIB = 2**20
BLOCK = 64 * MIB
DTYPES = ("float64", "float32", "bfloat16", "float16")


def _block(subject: Subject) -> Tensor:
    block = torch.ones(BLOCK // 4, device=subject.backend.device())
    subject.backend.synchronize()
    return block


@check("L1", "tensors are made on the device that the back end names, and it waits for them")
def device(subject: Subject) -> None:
    wanted = subject.backend.device()
    require(wanted.type == subject.backend.torch_type, f"it names {wanted}, a {subject.backend.torch_type} is promised")
    x = torch.arange(5, device=wanted)
    require(x.device == wanted, f"a tensor asked for on {wanted} is on {x.device}")
    subject.backend.synchronize()
    same(x * x, torch.tensor([0, 1, 4, 9, 16]), "squares")


@check("L1", "what the back end says of its device is so")
def capabilities(subject: Subject) -> None:
    facts, memory = subject.backend.capabilities(), subject.backend.memory()
    require(bool(facts.device_name.strip()), "the device has no name")
    require(facts.compute_units > 0, f"it has {facts.compute_units} compute units")
    subject.measure("memory_bytes off by", abs(facts.memory_bytes / memory.total - 1), 0.1)
    require("float32" in facts.compute_dtypes, "it does not compute in float32")
    require(not memory.unified or subject.backend.torch_type == "cpu", "its memory is the host's, its tensors are not")


@check("L1", "memory in use rises with an allocation and falls when it is gone")
def memory_accounting(subject: Subject) -> None:
    backend = subject.backend
    del_me = _block(subject)
    del del_me  # what is made at the first allocation is there now
    backend.empty_cache()
    before = backend.memory()
    block = _block(subject)
    during = backend.memory()
    del block
    backend.synchronize()
    backend.empty_cache()
    after = backend.memory()
    slack = BLOCK // 4 if before.unified else MIB
    risen, fallen = during.allocated - before.allocated, during.allocated - after.allocated
    require(abs(risen - BLOCK) <= slack, f"an allocation of {BLOCK} bytes counts as {risen}")
    require(abs(fallen - BLOCK) <= slack, f"{BLOCK} bytes were freed, {fallen} less are in use")
    require(0 < after.free <= after.total, f"{after.free} bytes of {after.total} are free")
    require(during.reserved >= during.allocated, f"{during.reserved} bytes reserved, {during.allocated} in use")
    require(after.reserved <= during.reserved, "empty_cache makes the reserved memory grow")


@check("L1", "the peak of memory outlives the allocation, and starts anew when asked")
def memory_peak(subject: Subject) -> None:
    backend = subject.backend
    if not backend.reset_peak_memory():
        raise NotApplicable("the system keeps only the peak since the process began")
    before = backend.memory()
    block = _block(subject)
    del block
    backend.empty_cache()
    high = backend.memory().peak
    require(
        high - before.allocated > 0.75 * BLOCK, f"{BLOCK} bytes came and went, the peak rose by {high - before.peak}"
    )
    backend.reset_peak_memory()
    low = backend.memory().peak
    require(high - low > 0.5 * BLOCK, f"the peak was {high} bytes before it started anew and {low} after")


@check("L1", "too large an allocation raises what callers catch, and the device goes on")
def out_of_memory(subject: Subject) -> None:
    memory = subject.backend.memory()
    expected = RuntimeError if memory.unified else torch.OutOfMemoryError
    size = 2**50 if memory.unified else 2 * memory.total
    try:
        torch.empty(size, dtype=torch.uint8, device=subject.backend.device())
    except expected:
        same(torch.ones(3, device=subject.backend.device()) + 1, torch.full((3,), 2.0), "ones and one")
        return
    raise Broken(f"an allocation of {size} bytes passed, of {memory.total} in all")


def _draw(subject: Subject) -> Tensor:
    return torch.rand(257, device=subject.backend.device())


@check("L1", "the same seed gives the same numbers, another seed others")
def seed(subject: Subject) -> None:
    drawn = []
    for n in (7, 7, 8):
        subject.backend.seed(n)
        drawn.append((_draw(subject), torch.rand(17)))
    same(drawn[1][0], drawn[0][0], "numbers of the device")
    same(drawn[1][1], drawn[0][1], "numbers of the host")
    require(not torch.equal(drawn[0][0], drawn[2][0]), "seeds 7 and 8 give the same numbers")


@check("L1", "a random state comes back through JSON, for the device and for the host")
def rng_round_trip(subject: Subject) -> None:
    subject.backend.seed(3)
    _draw(subject)
    saved = RngState.from_json(subject.backend.rng_state().to_json())
    expected = _draw(subject), torch.rand(17)
    _draw(subject)
    subject.backend.set_rng_state(saved)
    same(_draw(subject), expected[0], "numbers of the device after its state came back")
    same(torch.rand(17), expected[1], "numbers of the host after its state came back")


@check("L1", "the random state of another device is refused")
def foreign_rng_state(subject: Subject) -> None:
    saved = subject.backend.rng_state()
    try:
        subject.backend.set_rng_state(RngState(f"not {saved.backend}", saved.states))
    except RequestError:
        return
    raise Broken("it was taken over")


@check("L1", "drawing on the device moves no other generator")
def rng_isolation(subject: Subject) -> None:
    def others() -> list[Any]:
        own = "device" in subject.backend.rng_state().states
        host = [torch.get_rng_state().tolist()] if own else []
        return [random.getstate(), np.random.get_state()[1].tolist(), *host]  # type: ignore[index]

    before = others()
    _draw(subject)
    subject.backend.seed(11)
    torch.nn.functional.dropout(_draw(subject), 0.5)
    require(others()[:2] == before[:2], "Python's or NumPy's generator moved")
    after_seed = others()
    _draw(subject)
    require(others() == after_seed, "the host's generator moved though the device has its own")


@check("L1", "an event measures the time between, and work on a stream waits for the event of another")
def streams_and_events(subject: Subject) -> None:
    backend = subject.backend
    start, end = backend.event(timing=True), backend.event(timing=True)
    first, second = backend.stream(), backend.stream()
    x = torch.full((512, 512), 1.0 / 512, device=backend.device())
    backend.synchronize()
    with first:
        start.record(first)
        y = x
        for _ in range(20):
            y = y @ x  # every element stays 1/512
        backend.synchronize()
        time.sleep(0.02)
        end.record(first)
    second.wait_event(end)
    with second:
        z = y * 512
    second.synchronize()
    end.synchronize()
    require(end.query(), "an event that was waited for is not over")
    elapsed = start.elapsed_time(end)
    subject.measure("milliseconds between two events", elapsed)
    require(elapsed >= 19, f"20 ms passed between two events that are {elapsed:.3g} ms apart")
    backend.synchronize()
    subject.measure("error of work on two streams", distance(z, torch.ones(512, 512)), 1e-3)


@check("L1", "an event made without timing refuses to tell a time")
def untimed_events(subject: Subject) -> None:
    first, second = subject.backend.event(), subject.backend.event()
    first.record()
    second.record()
    subject.backend.synchronize()
    try:
        elapsed = first.elapsed_time(second)
    except (RuntimeError, ValueError, Unsupported):
        return
    raise Broken(f"it says {elapsed} ms")


@check("L1", "recorded work is done again by a replay, or recording is refused where it is not claimed")
def graphs(subject: Subject) -> None:
    x = torch.ones(64, device=subject.backend.device())
    claimed = subject.backend.capabilities().graph_capture != "none"
    try:
        captured = subject.backend.capture(lambda: 2 * x + 1)
    except Unsupported as reason:
        require(not claimed, f"it claims to record graphs, and says: {reason}")
        return
    require(claimed, "it records graphs, and does not claim so")
    x.fill_(5.0)
    captured.replay()
    subject.backend.synchronize()
    same(captured.result, torch.full((64,), 11.0), "what a replay computes from new inputs")


def _computes(dtype: torch.dtype, device: torch.device) -> float:
    """Relative error of a product, a softmax, a norm and their gradient, in units of the dtype's roundoff."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(64, 64, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))

    def chain(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        a = a.detach().requires_grad_()
        out = torch.nn.functional.layer_norm(torch.softmax(a @ b / 8, dim=-1), (64,)) + a
        return out, torch.autograd.grad(out.square().sum(), a)[0]

    ours, truth = chain(a.to(device), b.to(device)), chain(a.double(), b.double())
    roundoff = torch.finfo(dtype).eps / 2
    return max(distance(x, y) for x, y in zip(ours, truth, strict=True)) / roundoff


@check("L1", "the device computes rightly in each dtype it claims, and claims each it computes rightly in")
def dtype_claims(subject: Subject) -> None:
    claimed = subject.backend.capabilities().compute_dtypes
    unknown = sorted(set(claimed) - set(DTYPES))
    require(not unknown, f"it claims {', '.join(unknown)}, in which nothing here computes")
    for name in DTYPES:
        dtype = getattr(torch, name)
        if name in claimed:
            subject.measure(f"error in {name}, roundoffs", _computes(dtype, subject.backend.device()), 64.0)
            continue
        try:
            error = _computes(dtype, subject.backend.device())
        except (RuntimeError, TypeError):
            continue
        require(not error <= 64.0, f"it computes in {name} within {error:.3g} roundoffs but does not claim so")


@check("L1", "mixed precision computes products in the dtype asked for, and refuses one it has not")
def autocast(subject: Subject) -> None:
    x = torch.ones(8, 8, device=subject.backend.device())
    for name in ("float32", "bfloat16", "float16"):
        if name in subject.backend.capabilities().compute_dtypes:
            with subject.backend.autocast(getattr(torch, name)):
                found = (x @ x).dtype
            require(found == getattr(torch, name), f"a product in {name} is {found}")
    require((x @ x).dtype == torch.float32, "mixed precision outlives its block")
    try:
        subject.backend.autocast(torch.int32)
    except Unsupported:
        return
    raise Broken("mixed precision in int32 is taken for possible")


@check("L1", "in deterministic mode the same sums come out, and the mode ends when it is switched off")
def determinism(subject: Subject) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(20_000, 3, generator=generator).to(subject.backend.device())
    index = torch.randint(7, (20_000,), generator=generator).to(subject.backend.device())

    def sums() -> Tensor:
        table = torch.zeros(7, 3, device=values.device, requires_grad=True)
        gathered = (table[index] * values).sum() + table.index_add(0, index, values).square().sum()
        return torch.autograd.grad(gathered, table)[0]

    before = torch.get_deterministic_debug_mode()
    try:
        unmet = subject.backend.deterministic("on")
        require(isinstance(unmet, list), f"what stays unmet is a list of sentences, not {unmet!r}")
        require(torch.are_deterministic_algorithms_enabled(), "PyTorch is not told")
        first = sums()
        for _ in range(3):
            same(sums(), first, "sums by index")
        subject.backend.deterministic("off")
        require(not torch.are_deterministic_algorithms_enabled(), "it stays on")
    finally:
        subject.backend.deterministic("off")
        torch.set_deterministic_debug_mode(before)
