"""siirl: reinforcement-learning post-training for language models, on any accelerator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__version__ = "0.1.0"

__all__ = ["Run", "__version__", "train"]


@dataclass(frozen=True)
class Run:
    """A finished run."""

    dir: Path

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """One mapping a step, as in ``metrics.jsonl``."""
        from siirl.telemetry.metrics import read_metrics

        return read_metrics(self.dir)


def train(
    config: str | Path,
    overrides: Mapping[str, Any] | Sequence[str] | None = None,
    *,
    device: str | None = None,
    workers: int | None = None,
    run_dir: str | Path | None = None,
    resume: bool = False,
) -> Run:
    """Run a recipe, as ``siirl train`` does, and return when it has ended.

    Args:
        config: a recipe's file, or the name of a shipped one.
        overrides: dotted keys with their values: ``{"training.steps": 5}``.
        device: a back end's name; default: the recipe's.
        workers: number of worker processes; default: the recipe's.
        run_dir: where the run writes; default: the recipe's.
        resume: go on from the run directory's last checkpoint.

    Raises:
        SiirlError: `RequestError` for a wrong request, `DeviceError` for a device that is not usable, itself for a
            run that failed; the message is one sentence.
    """
    from siirl.config import load
    from siirl.worker import launch

    resolved = load(config, {} if overrides is None else overrides)
    result = launch.train(
        resolved,
        device=device,
        workers=workers,
        run_dir=None if run_dir is None else Path(run_dir),
        resume=resume,
        launcher="local",
    )
    return Run(Path(result.dir))
