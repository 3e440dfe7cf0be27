"""What a check is given: the back end under validation, other workers on the same device, and a place to measure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from siirl.device.backend import Backend
from siirl.validation.checks import NotApplicable, require
from siirl.validation.world import Setup, World, by_name

Depth = Literal["smoke", "full"]


@dataclass(frozen=True)
class Measurement:
    """A number that a check saw; `limit` is the largest that keeps the promise, None where there is none."""

    name: str
    value: float
    limit: float | None = None


class Subject:
    """A loaded and bound back end.

    Args:
        backend: under validation.
        depth: `full` asks for more cases.
        scratch: a directory that the run removes.
        setup: makes the same back end in another process; by default its name is selected there.
    """

    def __init__(self, backend: Backend, depth: Depth, scratch: Path, setup: Setup | None = None) -> None:
        self.backend, self.depth, self.scratch = backend, depth, scratch
        self.measurements: list[Measurement] = []
        self._setup = setup or partial(by_name, backend.name)
        self._world: World | None = None

    @property
    def world(self) -> World:
        """Workers on devices of their own (the host is one for all), started when they are first needed."""
        wanted = 3 if self.depth == "full" else 2
        count = self.backend.probe().count if self.backend.is_accelerator() else wanted
        if count < 2:
            raise NotApplicable("collectives need two devices, and this process sees one")
        if self._world is None:
            self._world = World(self._setup, min(wanted, count))
        return self._world

    def measure(self, name: str, value: float, limit: float | None = None) -> None:
        """Note a number for the report; above its limit, or not a number, it breaks the check."""
        self.measurements.append(Measurement(name, value, limit))
        if limit is not None:
            require(not math.isnan(value) and value <= limit, f"{name} is {value:.3g}, at most {limit:.3g} is allowed")

    def close(self) -> None:
        if self._world is not None:
            self._world.close()
