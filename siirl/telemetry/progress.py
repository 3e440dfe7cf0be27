"""What the progress display says of a run: where each stage stands, its latest values, the time left."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

_RECENT_STEPS = 16  # shown in the reward's little curve, averaged for the time left
_BARS = "▁▂▃▄▅▆▇█"


@dataclass
class StageProgress:
    """Where one stage stands."""

    name: str
    total: int
    step: int = 0
    reward: float | None = None
    loss: float | None = None
    evaluation: float | None = None
    tokens_per_s: float | None = None
    seconds: float = 0.0
    recent_rewards: deque[float] = field(default_factory=lambda: deque(maxlen=_RECENT_STEPS))
    recent_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=_RECENT_STEPS))

    def add(self, record: Mapping[str, Any]) -> None:
        """Take in one line of the metrics."""
        self.step = record["step"]
        self.reward = record.get("reward/mean")
        self.loss = record.get("actor/loss")
        self.tokens_per_s = record.get("throughput/tokens_per_s")
        self.evaluation = record.get("eval/reward_mean", self.evaluation)
        if self.reward is not None:
            self.recent_rewards.append(self.reward)
        if (seconds := record.get("time/step_s")) is not None:
            self.seconds += seconds
            self.recent_seconds.append(seconds)

    @property
    def seconds_left(self) -> float | None:
        """The stage's remaining steps at its recent pace; None before a step's time is known."""
        if not self.recent_seconds:
            return None
        return (self.total - self.step) * sum(self.recent_seconds) / len(self.recent_seconds)

    def clock(self) -> str:
        """Return the time left, or the time taken once the stage is done."""
        if self.step >= self.total:
            return f"took {format_seconds(self.seconds)}"
        return "" if self.seconds_left is None else f"{format_seconds(self.seconds_left)} left"

    def values(self) -> list[str]:
        """Return the latest values that exist, each with its name."""
        parts = []
        if self.reward is not None:
            parts.append(f"reward {self.reward:.3f}")
        if self.evaluation is not None:
            parts.append(f"held-out {self.evaluation:.3f}")
        if self.loss is not None:
            parts.append(f"loss {self.loss:.3g}")
        if self.tokens_per_s is not None:
            parts.append(f"{format_count(self.tokens_per_s)} tokens/s")
        return parts

    def line(self) -> str:
        """Return the stage's standing as one plain line."""
        where = f"{self.name} {self.step}/{self.total}"
        return "  ".join(filter(None, [where, *self.values(), self.clock()]))


def sparkline(values: Sequence[float]) -> str:
    """Draw the values as a row of bars between their least and their greatest."""
    low, high = min(values), max(values)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((value - low) * scale)] for value in values)


def format_seconds(seconds: float) -> str:
    """Format as h:mm:ss, or m:ss below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def format_count(value: float) -> str:
    """Format with three significant digits and k, M or G."""
    for unit, factor in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= 0.9995 * factor:
            return f"{value / factor:.3g}{unit}"
    return f"{value:.3g}"
