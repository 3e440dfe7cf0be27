"""L4: new weights on the device are confirmed, and those that are not whole are refused."""

from __future__ import annotations

import torch
from torch import Tensor

from siirl.errors import SiirlError
from siirl.rollout.checksum import weights_checksum
from siirl.validation import tiny
from siirl.validation.checks import Broken, check, require
from siirl.validation.rollout import engine
from siirl.validation.subject import Subject

DTYPES = ("float32", "bfloat16")


@check(
    "L4", "weights have the checksum on the device that they have on the host", lambda subject: [(d,) for d in DTYPES]
)
def weights_checksum_agrees(subject: Subject, dtype: str) -> None:
    device, kind = subject.backend.device(), getattr(torch, dtype)
    generator = torch.Generator().manual_seed(2)
    named = {str(n): torch.randn(n, generator=generator).to(kind) for n in (1, 2, 3, 7, 1024, 300_001)}
    for name, tensor in named.items():
        here, there = weights_checksum([(name, tensor)]), weights_checksum([(name, tensor.to(device))])
        require(here == there, f"a tensor of {name} elements has the checksum {there:x}, and {here:x} on the host")
    moved = {name: tensor.to(device, copy=True) for name, tensor in named.items()}
    moved["300001"][-1] *= -1
    require(
        weights_checksum(moved.items()) != weights_checksum(named.items()),
        "the sign of a number is not in the checksum",
    )


@check("L4", "weights that do not arrive whole are refused with a sentence")
def weights_are_confirmed(subject: Subject) -> None:
    other, device = tiny.decoder(seed=8), subject.backend.device()
    sent = {name: p.detach().to(device) for name, p in other.named_parameters()}
    checksum = weights_checksum(sent.items())
    engine(subject).update_weights(sent.items(), 1, checksum)
    last = next(reversed(sent))
    _refused(
        subject, {n: t for n, t in sent.items() if n != last}, checksum, f"did not arrive whole: {last} is missing"
    )
    changed = sent[last].clone()
    changed.view(-1)[0] += 1
    _refused(subject, sent | {last: changed}, checksum, "did not arrive as they were sent")


def _refused(subject: Subject, weights: dict[str, Tensor], checksum: int, says: str) -> None:
    try:
        engine(subject).update_weights(weights.items(), 1, checksum)
    except SiirlError as error:
        require(says in str(error), f"it says '{error}'")
    else:
        raise Broken(f"an update is taken though the weights {says}")
