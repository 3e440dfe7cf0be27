"""Collective communication: one object for the control plane and the data plane, on any device.

Control (integers, bytes) travels between host tensors over gloo. Data (tensors) travels between devices over the
back end's library; what that library lacks is worked around without loss: a reduction widens to a dtype that holds
every value, or goes through the host; a copy moves the same bits under a dtype the library knows.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Callable, Sequence
from datetime import timedelta
from time import perf_counter
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from siirl.device.backend import HOST_DTYPES, Backend, Unsupported
from siirl.errors import RequestError, SiirlError, WorkerLost

Result = TypeVar("Result")
Reduction = Literal["sum", "mean", "max", "min"]

REDUCTIONS = {"sum": dist.ReduceOp.SUM, "mean": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}
# The next dtype that holds every value of a narrower one.
WIDER = {
    torch.bool: torch.uint8,
    torch.uint8: torch.int32,
    torch.int8: torch.int32,
    torch.int16: torch.int32,
    torch.int32: torch.int64,
    torch.float8_e4m3fn: torch.float32,
    torch.float8_e5m2: torch.float32,
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float32: torch.float64,
}


class Collectives:
    """All workers of a run. Every worker makes the same calls in the same order.

    With one worker there is no process group and every call is a local identity. A call that fails, because a
    worker was lost or did not arrive in time, raises SiirlError.
    """

    def __init__(self, backend: Backend | None, rank: int, size: int, timeout_s: float) -> None:
        self.rank = rank
        self.size = size
        self._backend = backend
        self.calls = 0
        self.seconds = 0.0  # in calls, waiting for other workers included
        self._timeout_s = timeout_s
        self._spec = backend.communication() if backend else None
        self.group: dist.ProcessGroup | None = None
        """PyTorch's group, None for all workers of the run."""

    @classmethod
    def single(cls) -> Collectives:
        """The collectives of a run with one worker."""
        return cls(None, rank=0, size=1, timeout_s=0.0)

    @classmethod
    def init(cls, backend: Backend, rank: int, size: int, timeout_s: float) -> Collectives:
        """Meet the other workers at MASTER_ADDR (default 127.0.0.1) and MASTER_PORT.

        Sockets bind to the loopback interface when MASTER_ADDR is a loopback address. `timeout_s` limits this
        meeting and every later call.
        """
        if size == 1:
            return cls.single()
        if "MASTER_PORT" not in os.environ:
            raise RequestError("MASTER_PORT is not set: a launcher gives every worker MASTER_ADDR and MASTER_PORT")
        comm = cls(backend, rank, size, timeout_s)
        comm._attempt("the first meeting", comm._meet)
        return comm

    def _meet(self) -> None:
        assert self._spec is not None
        address = os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        timeout = timedelta(seconds=self._timeout_s)
        arguments: dict[str, Any] = {"init_method": "env://"}
        if self._spec.options is not None:
            arguments["pg_options"] = self._spec.options(timeout)
        if _is_loopback(address):
            for variable in self._spec.interface_env:
                os.environ.setdefault(variable, _loopback_interface())
            # PyTorch's own store listens on every interface; an elastic agent brings a store of its own.
            if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
                del arguments["init_method"]
                port = int(os.environ["MASTER_PORT"])
                arguments["store"] = _loopback_store(address, port, self.rank == 0, timeout)
        dist.init_process_group(
            self._spec.torch_backend, rank=self.rank, world_size=self.size, timeout=timeout, **arguments
        )

    def subgroup(self, ranks: Sequence[int]) -> Collectives | None:
        """Collectives of some of the workers, which are numbered anew in the order given; None on the others.

        All workers call it, for one group after another in the same order. Calls of different groups may run in
        different threads at a time.
        """
        if self.size == 1:
            return self
        assert self._spec is not None and self._backend is not None
        timeout = timedelta(seconds=self._timeout_s)
        options = None if self._spec.options is None else self._spec.options(timeout)
        group = self._attempt("making a group", dist.new_group, list(ranks), timeout, pg_options=options)
        if self.rank not in ranks:
            return None
        part = Collectives(self._backend, list(ranks).index(self.rank), len(ranks), self._timeout_s)
        part.group = group
        return part

    def close(self) -> None:
        """Leave the group. The object is of no use afterwards."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()

    # The data plane.

    @torch.no_grad()
    def all_reduce(self, t: Tensor, op: Reduction = "sum") -> Tensor:
        """Reduce `t` over all workers in place and return it; shape and dtype are the same everywhere.

        Raises ValueError for the mean of integers and for the sum of booleans, Unsupported for a dtype that has no way.
        """
        if op not in REDUCTIONS:
            raise ValueError(f"all_reduce knows {', '.join(REDUCTIONS)}, not '{op}'")
        if op == "mean" and not t.is_floating_point():
            raise ValueError(f"the mean of {t.dtype} is not defined: convert the tensor to a floating dtype first")
        if op == "sum" and t.dtype == torch.bool:
            raise ValueError("the sum of booleans is not defined: convert the tensor to an integer dtype first")
        if self.size == 1 or t.numel() == 0:
            return t
        dtype, on_host = self._reduction_way(t)
        moved = self._canonical(t.detach()).to(device="cpu" if on_host else t.device, dtype=dtype).contiguous()
        self._attempt("all_reduce", dist.all_reduce, moved, op=REDUCTIONS[op], group=self.group)
        if op == "mean":
            moved.div_(self.size)
        if moved.data_ptr() != t.data_ptr():
            t.copy_(moved)
        return t

    @torch.no_grad()
    def broadcast(self, t: Tensor, src: int = 0) -> Tensor:
        """Overwrite `t` with worker `src`'s, in place, and return it. Any dtype; the same shape everywhere."""
        if self.size == 1 or t.numel() == 0:
            return t
        moved = self._canonical(t.detach()).to(self._broadcast_place(t)).contiguous()
        self._attempt("broadcast", dist.broadcast, moved.view(-1).view(torch.uint8), group=self.group, group_src=src)
        if moved.data_ptr() != t.data_ptr():
            t.copy_(moved)
        return t

    def all_to_all_bytes(self, send: Tensor, send_sizes: list[int], recv_sizes: list[int]) -> Tensor:
        """Give every worker its segment of `send`, get one from each.

        Args:
            send: uint8 [sum(send_sizes)], the segments in rank order.
            send_sizes: bytes for each worker; any may be 0.
            recv_sizes: bytes each worker sends here.

        Returns:
            uint8 [sum(recv_sizes)] in rank order, on the device of `send`. May share memory with it.
        """
        assert send.dtype == torch.uint8, send.dtype
        assert send.shape == (sum(send_sizes),), (send.shape, send_sizes)
        assert len(send_sizes) == len(recv_sizes) == self.size
        assert send_sizes[self.rank] == recv_sizes[self.rank], "what a worker keeps is what it gets from itself"
        if self.size == 1:
            return send
        assert self._backend is not None
        carrier = self._byte_carrier()
        width = carrier.itemsize
        words_out, words_in = ([-(-n // width) for n in sizes] for sizes in (send_sizes, recv_sizes))
        outgoing = _respace(send, send_sizes, [n * width for n in words_out]).to(self._backend.device())
        incoming = torch.empty(sum(words_in), dtype=carrier, device=outgoing.device)
        words = outgoing.view(carrier)
        self._attempt(
            "all_to_all_bytes", dist.all_to_all_single, incoming, words, words_in, words_out, group=self.group
        )
        return _respace(incoming.view(torch.uint8).to(send.device), [n * width for n in words_in], recv_sizes)

    # The control plane.

    def barrier(self) -> None:
        """Return when every worker has called it."""
        if self.size > 1:
            self._attempt("barrier", dist.all_reduce, torch.zeros(1, dtype=torch.int32), group=self.group)

    def all_gather_ints(self, t: Tensor) -> list[Tensor]:
        """Every worker's integers, in rank order.

        Args:
            t: int64 [n] or [n, k] on the host; n may differ between workers, k may not.
        """
        assert (t.dtype, t.device.type) == (torch.int64, "cpu"), (t.dtype, t.device)
        assert t.dim() in (1, 2), t.shape
        if self.size == 1:
            return [t]
        shapes = self._all_gather(torch.tensor([len(t), t.shape[1] if t.dim() == 2 else -1]))
        counts = [int(shape[0]) for shape in shapes]
        if len({int(shape[1]) for shape in shapes}) > 1:
            raise SiirlError(f"all_gather_ints: the workers' rows differ in shape: {[s.tolist() for s in shapes]}")
        padded = t.new_zeros((max(counts), *t.shape[1:]))
        padded[: len(t)] = t
        rows = self._all_gather(padded) if padded.numel() else [padded] * self.size
        return [row[:count] for row, count in zip(rows, counts, strict=True)]

    def all_gather_bytes(self, b: bytes) -> list[bytes]:
        """Every worker's bytes, in rank order; lengths may differ."""
        return self._gather_bytes(b, None)

    def gather_bytes(self, b: bytes, dst: int = 0) -> list[bytes] | None:
        """Every worker's bytes, in rank order, on worker `dst`; None on the others."""
        gathered = self._gather_bytes(b, dst)
        return gathered if self.rank == dst else None

    def _gather_bytes(self, b: bytes, dst: int | None) -> list[bytes]:
        if self.size == 1:
            return [b]
        counts = [int(count) for count in self._all_gather(torch.tensor([len(b)]))]
        if max(counts) == 0:
            return [b""] * self.size
        padded = torch.frombuffer(bytearray(b.ljust(max(counts), b"\0")), dtype=torch.uint8)
        if dst is None:
            rows = self._all_gather(padded)
        else:
            rows = [torch.empty_like(padded) for _ in counts] if self.rank == dst else []
            self._attempt("gather_bytes", dist.gather, padded, rows or None, group=self.group, group_dst=dst)
        return [row[:count].numpy().tobytes() for row, count in zip(rows, counts, strict=False)]

    def _all_gather(self, t: Tensor) -> list[Tensor]:
        rows = [torch.empty_like(t) for _ in range(self.size)]
        self._attempt("all_gather", dist.all_gather, rows, t, group=self.group)
        return rows

    # What a library lacks, and what can fail.

    def _canonical(self, t: Tensor) -> Tensor:
        assert self._backend is not None
        return self._backend.to_canonical(t)

    def _reduction_way(self, t: Tensor) -> tuple[torch.dtype, bool]:
        """The dtype to reduce `t` in, and whether to do it on the host."""
        assert self._spec is not None
        tables = [(HOST_DTYPES, True)]
        if t.device.type != "cpu":
            tables.insert(0, (self._spec.dtypes.get("all_reduce", frozenset()), False))
        for table, on_host in tables:
            dtype: torch.dtype | None = t.dtype
            while dtype is not None and _name(dtype) not in table:
                dtype = WIDER.get(dtype)
            if dtype is not None:
                return dtype, on_host
        raise Unsupported(f"all_reduce of {_name(t.dtype)} is possible neither on the device nor on the host")

    def _broadcast_place(self, t: Tensor) -> torch.device:
        """Where the bytes of `t` are broadcast: the host's library moves what the device's does not."""
        assert self._spec is not None
        return t.device if self._spec.supports("broadcast", "uint8") else torch.device("cpu")

    def _byte_carrier(self) -> torch.dtype:
        """The narrowest dtype under which the device's library exchanges bytes."""
        assert self._spec is not None
        for dtype in (torch.uint8, torch.int8, torch.int32, torch.float32):
            if self._spec.supports("all_to_all", _name(dtype)):
                return dtype
        raise Unsupported(f"'{self._spec.torch_backend}' has no dtype that can carry bytes through an all_to_all")

    def _attempt(self, operation: str, function: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
        began = perf_counter()
        try:
            return function(*args, **kwargs)
        except RuntimeError as error:  # the base of torch.distributed's errors; gloo raises it bare
            cause = str(error).strip().splitlines()[0]
            raise WorkerLost(
                f"{operation} failed on worker {self.rank} of {self.size}: another worker was lost, "
                f"or did not arrive within {self._timeout_s:g} s ({cause})"
            ) from error
        finally:
            self.calls += 1
            self.seconds += perf_counter() - began


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _respace(packed: Tensor, sizes: list[int], spaces: list[int]) -> Tensor:
    """Segments of `sizes` bytes laid out in `spaces` bytes each, cut or filled up with zeros at their ends."""
    if sizes == spaces:
        return packed
    laid = packed.new_zeros(sum(spaces))
    for source, target in zip(packed.split(sizes), laid.split(spaces), strict=True):
        count = min(len(source), len(target))
        target[:count] = source[:count]
    return laid


def _is_loopback(address: str) -> bool:
    if address == "localhost":
        return True
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:  # a host name
        return False


def _loopback_interface() -> str:
    return next(name for _, name in socket.if_nameindex() if name.startswith("lo"))


def _loopback_store(address: str, port: int, serve: bool, timeout: timedelta) -> dist.TCPStore:
    host = "127.0.0.1" if address == "localhost" else address
    if not serve:
        return dist.TCPStore(host, port, is_master=False, timeout=timeout)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family)
    except OSError as error:
        raise SiirlError(f"worker 0 cannot listen on {host}, MASTER_PORT {port}: {error.strerror}") from error
    return dist.TCPStore(
        host, port, is_master=True, timeout=timeout, wait_for_workers=False, master_listen_fd=listener.detach()
    )
