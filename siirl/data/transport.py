"""How bytes get from worker to worker: by the back end's collectives, or through memory that workers of one host share.

Both give the same bytes. The planner chooses between them.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from siirl.data.partition import Ints

if TYPE_CHECKING:
    from siirl.dag.plan import TransportName
    from siirl.device.collectives import Collectives

_PAGE = 1 << 21


class Transport(Protocol):
    """Moves bytes between all workers; every worker makes the same calls in the same order."""

    name: str
    compresses: bool  # whether what travels is worth narrowing

    def begin(self) -> None:
        """All workers have read what came before, and every worker's memory may be written again."""
        ...

    def allocate(self, size: int) -> Tensor:
        """Room for the bytes to send next, uint8 [size]."""
        ...

    def exchange(self, outgoing: Tensor, sizes: Ints) -> Sequence[Tensor]:
        """Send ``outgoing``, segments in rank order; what comes from each worker, uint8, valid until the next but one.

        Args:
            outgoing: from :meth:`allocate`, filled.
            sizes: int64 [workers, workers], bytes from each worker (rows) to each (columns). Only the row and the
                column of this worker need be right where :attr:`whole` is False.
        """
        ...

    @property
    def whole(self) -> bool:
        """Whether ``exchange`` needs the sizes between other workers too."""
        ...


class CollectiveTransport:
    """One uneven all-to-all of the back end's collectives."""

    name, whole = "collectives", False

    def __init__(self, collectives: Collectives, *, compresses: bool = False) -> None:
        self._collectives, self.compresses = collectives, compresses

    def begin(self) -> None:
        pass

    def allocate(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8)

    def exchange(self, outgoing: Tensor, sizes: Ints) -> Sequence[Tensor]:
        rank = self._collectives.rank
        receive = sizes[:, rank].tolist()
        return torch.split(self._collectives.all_to_all_bytes(outgoing, sizes[rank].tolist(), receive), receive)


class SharedMemoryTransport:
    """Each worker writes what it sends to memory of its own, and the others read it there.

    The memory has no name in the file system: workers open it through /proc, and it is gone with its owner, however
    that ends. There are two such memories a worker, used in turn, so that one barrier an exchange is enough: who has
    passed it may write again where the others read the time before. The second one is touched only where exchanges
    follow each other without `begin`.
    """

    name, compresses, whole = "shared_memory", False, True

    def __init__(self, collectives: Collectives) -> None:
        self._collectives, self._turn = collectives, 0
        own = [os.memfd_create("siirl-exchange") for _ in range(2)]
        told = collectives.all_gather_ints(torch.tensor([os.getpid(), *own]))
        self._own = [_Memory(file) for file in own]
        self._others: list[list[_Memory]] = []
        for rank, (pid, *files) in enumerate(row.tolist() for row in told):
            if rank == collectives.rank:
                self._others.append(self._own)
            else:
                opened = [os.open(f"/proc/{pid}/fd/{file}", os.O_RDWR) for file in files]
                self._others.append([_Memory(file) for file in opened])
        collectives.barrier()

    def begin(self) -> None:
        self._turn = 0

    def allocate(self, size: int) -> Tensor:
        memory = self._own[self._turn]
        memory.grow(size)
        return memory.view(0, size)

    def exchange(self, outgoing: Tensor, sizes: Ints) -> Sequence[Tensor]:
        rank, turn = self._collectives.rank, self._turn
        self._turn = 1 - turn
        self._collectives.barrier()
        starts = np.cumsum(sizes, axis=1)[:, rank] - sizes[:, rank]
        return [
            memory[turn].view(int(start), int(size))
            for memory, start, size in zip(self._others, starts, sizes[:, rank], strict=True)
        ]


class _Memory:
    """A file without a name, mapped as far as it is used."""

    def __init__(self, file: int) -> None:
        self._file = file
        self._mapped: Tensor | None = None

    def grow(self, size: int) -> None:
        wanted = -(-max(size, 1) // _PAGE) * _PAGE
        if os.fstat(self._file).st_size < wanted:
            os.ftruncate(self._file, wanted)

    def view(self, start: int, size: int) -> Tensor:
        """Bytes of it, which are there: their owner has grown it before it wrote them."""
        if size == 0:
            return torch.empty(0, dtype=torch.uint8)
        if self._mapped is None or len(self._mapped) < start + size:
            length = os.fstat(self._file).st_size
            access = mmap.PROT_READ | mmap.PROT_WRITE
            self._mapped = torch.frombuffer(mmap.mmap(self._file, length, mmap.MAP_SHARED, access), dtype=torch.uint8)
        return self._mapped[start : start + size]


class Transports:
    """The transports of a group of workers; all of them ask for the same ones in the same order."""

    def __init__(self, collectives: Collectives) -> None:
        self.collectives = collectives
        self._open: dict[TransportName, Transport] = {}

    def __getitem__(self, name: TransportName) -> Transport:
        if name not in self._open:
            self._open[name] = open_transport(name, self.collectives)
        return self._open[name]


def open_transport(name: TransportName, collectives: Collectives) -> Transport:
    """The transport of that name among all workers of ``collectives``, who are on one host if it is shared memory."""
    if name == "collectives":
        return CollectiveTransport(collectives, compresses=True)
    return SharedMemoryTransport(collectives)


def hosts(collectives: Collectives) -> list[int]:
    """The number of each worker's host, by rank. A host is here a set of processes that can share memory."""
    numbers: dict[bytes, int] = {}
    return [
        numbers.setdefault(place or str(rank).encode(), len(numbers))
        for rank, place in enumerate(collectives.all_gather_bytes(_place()))
    ]


def _place() -> bytes:
    """The host, process namespace and user of this process; empty where memory cannot be shared through /proc."""
    boot, namespace = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    if not hasattr(os, "memfd_create") or not boot.exists() or not namespace.exists():
        return b""
    return f"{boot.read_text().strip()} {os.readlink(namespace)} {os.getuid()}".encode()
