"""The distributed dataloader: which prompts make a step, and which of them this worker reads.

There is one endless stream of global positions. Epoch e is the positions [e n, (e + 1) n) of a source with n rows, in
an order that depends on the seed and the epoch alone. Each read takes the positions that come next, a step's number of
them unless another one is asked for, and may cross epochs. Every worker reads a contiguous slice of them, so they are
the same for any number of workers.

Importing this module imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from siirl.errors import RequestError

# A sample id is prompt id * RESPONSES + response, so it fits in 63 bits for 8.8e12 prompts.
RESPONSES = 1 << 20


class Item(NamedTuple):
    """A prompt to read: its row in the source, its global position, its slot in the step, and its epoch."""

    row: int
    position: int
    slot: int
    epoch: int


class DistributedDataloader:
    """This worker's prompts, step by step; the same global order for every number of workers."""

    def __init__(
        self,
        indices: Sequence[int] | NDArray[np.int64],
        prompts_per_step: int,
        rank: int = 0,
        workers: int = 1,
        seed: int = 0,
        shuffle: bool = True,
    ) -> None:
        """``indices``: rows of the source to draw from, in its order. Raises RequestError when there are none."""
        self._indices = np.asarray(indices, dtype=np.int64)
        if len(self._indices) == 0:
            raise RequestError("data.source has no rows to draw prompts from")
        assert prompts_per_step > 0 and 0 <= rank < workers
        self._prompts_per_step = prompts_per_step
        self._rank, self._workers = rank, workers
        self._seed = seed
        self._shuffle = shuffle
        self._position = 0
        self._epoch, self._order = -1, self._indices[:0]

    def next_indices(self, prompts: int | None = None) -> list[Item]:
        """Return this worker's part of the next prompts; parts differ by at most one prompt and may be empty.

        ``prompts``: how many over all workers, the same on each; default: those of a step.
        """
        count = self._prompts_per_step if prompts is None else prompts
        start, stop = (count * r // self._workers for r in (self._rank, self._rank + 1))
        items = [self._item(slot) for slot in range(start, stop)]
        self._position += count
        return items

    def state_dict(self) -> dict[str, Any]:
        """Return where the stream stands, as JSON; the same on every worker."""
        return {
            "position": self._position,
            "seed": self._seed,
            "shuffle": self._shuffle,
            "rows": len(self._indices),
            "fingerprint": self._fingerprint(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a state was taken, with any number of workers and any number of prompts a step.

        Raises RequestError when the rows or their order are not those of the state.
        """
        here = self.state_dict()
        for key, name in (("rows", "data.source's rows"), ("seed", "seed"), ("shuffle", "data.shuffle")):
            if state[key] != here[key]:
                raise RequestError(
                    f"the checkpoint was made with {name} = {state[key]} and this run has {here[key]}; "
                    "resume with the same data, or start a new run"
                )
        if state["fingerprint"] != here["fingerprint"]:
            raise RequestError(
                "the checkpoint was made with other rows of data.source; resume with the same data, or start a new run"
            )
        self._position = int(state["position"])

    def _item(self, slot: int) -> Item:
        position = self._position + slot
        epoch, place = divmod(position, len(self._indices))
        if self._shuffle:
            if epoch != self._epoch:
                self._epoch, self._order = epoch, permutation(len(self._indices), self._seed, epoch)
            place = self._order[place]
        return Item(int(self._indices[place]), position, slot, epoch)

    def _fingerprint(self) -> str:
        return sha256(self._indices.astype("<i8").tobytes()).hexdigest()[:16]


def permutation(rows: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Return the order of an epoch, int64 [rows].

    NumPy promises never to change the numbers of RandomState (NEP 19), so a run resumes under any version of it.
    """
    words = [seed % 2**32, (seed >> 32) % 2**32, epoch]
    return np.random.RandomState(words).permutation(rows).astype(np.int64, copy=False)


def prompt_id(position: int) -> int:
    """Return the id of the prompt at a global position: the position, unique over the run. Column group_id."""
    return position


def sample_id(prompt: Any, response: Any) -> Any:
    """Return the id of response 0 <= ``response`` < 2^20 of a prompt; ints, int64 arrays or int64 tensors."""
    return prompt * RESPONSES + response


def split_sample_id(sample: Any) -> tuple[Any, Any]:
    """Return (prompt id, response) of a sample id; ints, int64 arrays or int64 tensors."""
    return sample // RESPONSES, sample % RESPONSES
