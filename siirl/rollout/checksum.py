"""A checksum of named weights, by which a rollout engine confirms that it holds what training sent."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from functools import cache
from typing import SupportsInt

import torch
from torch import Tensor

from siirl.errors import SiirlError

_MASK = 2**63 - 1
_WORD = 4
# words of 4 bytes that are weighed at a time: the products of a piece are all the memory that the checksum takes
_PIECE = 2**18
_PIECE_FACTOR = 0x5851F42D4C957F2D  # odd, as every factor here


class Checksum:
    """Sums up weights as they pass by, each on its own device in one pass; eight bytes a tensor go to the host.

    The bytes of a tensor are read as 32-bit words w_i, and Σ w_i · m_i mod 2⁶⁴ is taken with odd factors m_i of 64 bits
    drawn for each place (multilinear hashing: Carter and Wegman 1979; Lemire and Kaser, arXiv 1202.4961). An odd factor
    can be inverted, so a change within one word always changes the sum, and changes of several words cancel with a
    probability of at most 2⁻³². The names, shapes and sums are then hashed by BLAKE2b and added up. It is no signature:
    it finds accidents, not an adversary.

    Args:
        dtype: to which each tensor is cast first, as an engine of that dtype does; None: as they are.
    """

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        self._dtype = dtype
        self._seen: list[tuple[str, Tensor]] = []

    def passing(self, named: Iterable[tuple[str, Tensor]]) -> Iterator[Tensor]:
        """The tensors, cast, one after another; a generator is consumed as this one is."""
        for name, tensor in named:
            cast = tensor.detach() if self._dtype is None else tensor.detach().to(self._dtype)
            self._seen.append((f"{name} {list(cast.shape)} {cast.dtype}", _weigh(cast)))
            yield cast

    def pairs(self, named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """As :meth:`passing`, with the names."""
        for name, tensor in named:
            for cast in self.passing([(name, tensor)]):
                yield name, cast

    def __int__(self) -> int:
        return self.value()

    def value(self) -> int:
        """The checksum of what has passed."""
        total = 0
        for about, weighed in self._seen:
            text = f"{about} {weighed.item()}"
            total += int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
        return total & _MASK


def weights_checksum(named: Iterable[tuple[str, Tensor]], dtype: torch.dtype | None = None) -> int:
    """A number from 0 to 2⁶³ - 1 that names, shapes, dtypes and every bit of the weights go into; their order does not.

    See :class:`Checksum`. A generator of weights is consumed once, one tensor alive at a time.
    """
    checksum = Checksum(dtype)
    for _ in checksum.passing(named):
        pass
    return checksum.value()


def combined(*checksums: int) -> int:
    """The checksum of weights in several parts, by those of the parts."""
    return sum(checksums) & _MASK


def require_alike(
    version: int, checksum: SupportsInt | None, arrived: Checksum, received: Iterable[str], names: Iterable[str]
) -> None:
    """As :func:`confirm`, for an engine that keeps weights in another form: by what passed on its way there."""
    _require_whole(version, received, names)
    if checksum is not None:
        _require_equal(version, int(checksum), arrived.value())


def confirm(
    version: int,
    checksum: SupportsInt,
    held: Iterable[tuple[str, Tensor]],
    received: Iterable[str],
    names: Iterable[str],
) -> None:
    """Raise unless an engine holds after an update what was sent.

    Args:
        version, checksum: what the update came with.
        held: the engine's own weights after loading, whole, under the names that they were sent with.
        received: names of the weights that came.
        names: of the weights that the engine has.

    Raises:
        SiirlError: weights are missing, by their names, or the engine holds others than were sent.
    """
    _require_whole(version, received, names)
    _require_equal(version, int(checksum), weights_checksum(held))


def _require_whole(version: int, received: Iterable[str], names: Iterable[str]) -> None:
    if missing := sorted(set(names) - set(received)):
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        verb = "is" if len(missing) == 1 else "are"
        raise SiirlError(
            f"weights of version {version} did not arrive whole: {', '.join(missing[:3])}{more} {verb} missing"
        )


def _require_equal(version: int, sent: int, found: int) -> None:
    if found != sent:
        raise SiirlError(
            f"weights of version {version} did not arrive as they were sent: the rollout engine holds weights with the "
            f"checksum {found:016x}, and those of training have {sent:016x}"
        )


def _weigh(tensor: Tensor) -> Tensor:
    """Σ w_i · m_i over the 32-bit words of a tensor, an int64 scalar on its device that wraps around."""
    words, rest = _words(tensor)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for piece in (*words.split(_PIECE), rest):
        total = total * _PIECE_FACTOR + (piece * _factors(tensor.device)[: len(piece)]).sum()
    return total


def _words(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """A tensor's bytes as int32 words, without a copy where they lie in order, and those left over in one more."""
    data = tensor.contiguous()
    if data.storage_offset() * data.element_size() % _WORD:
        data = data.clone()
    flat = data.view(-1).view(torch.uint8)
    whole = len(flat) // _WORD * _WORD
    rest = torch.zeros(_WORD, dtype=torch.uint8, device=tensor.device)
    rest[: len(flat) - whole] = flat[whole:]
    return flat[:whole].view(torch.int32), rest.view(torch.int32)


@cache
def _factors(device: torch.device) -> Tensor:
    """Odd factors of a piece's words, int64 [_PIECE], the same on every device: the host draws them."""
    generator = torch.Generator().manual_seed(0x51112)
    info = torch.iinfo(torch.int64)
    return torch.randint(info.min, info.max, (_PIECE,), generator=generator, dtype=torch.int64).bitwise_or(1).to(device)
