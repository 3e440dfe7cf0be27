"""A worker that only generates: it runs ahead of training by a bounded number of steps.

Three threads share its work. The main thread generates a step's rows and evaluates; one delivers the rows of the
oldest step to the workers that train and ends the step together with them; one takes in new weights while the engine
still computes with those before.

Step n is always generated with the weights after step n - 1 - `rollout.max_staleness` (those of the start, before there
are such), however fast anybody is: so results do not depend on timing, no sample is older than the bound, and the queue
of generated steps is bounded by it too. A slow consumer makes the producer wait for weights, not lose rows.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from siirl.config.schema import Config
from siirl.dag.plan import Step, due
from siirl.data.batch import Batch
from siirl.errors import SiirlError
from siirl.telemetry.accumulator import StepMetrics
from siirl.worker.context import Context
from siirl.worker.dag_worker import DagWorker
from siirl.worker.weights import Message, WeightReceiver

STOP = -1
"""The step of a last message without weights, which ends a stage early."""


@dataclass
class Produced:
    """A step's rows on their way: its metrics so far, and where the dataloader stands after it."""

    step: int
    batch: Batch
    metrics: StepMetrics
    loader: dict[str, Any]


@dataclass(frozen=True)
class Ahead:
    """What a checkpoint after a step holds of the steps generated ahead: their rows, and the dataloader's states."""

    produced: Sequence[Produced]
    loader: dict[str, Any]
    loader_ahead: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return {
            "loader": self.loader,
            "loader_ahead": self.loader_ahead,
            "ahead": [{"step": p.step, "metrics": p.metrics.state_dict(), "loader": p.loader} for p in self.produced],
        }

    def tensors(self) -> dict[str, Tensor]:
        return {f"{p.step}.{name}": part for p in self.produced for name, part in p.batch.to_tensors().items()}


def restore(state: dict[str, Any], tensors: dict[str, Tensor]) -> list[Produced]:
    """The steps generated ahead, from what :class:`Ahead` saved."""
    produced = []
    for item in state["ahead"]:
        own = f"{item['step']}."
        batch = Batch.from_tensors({k.removeprefix(own): part for k, part in tensors.items() if k.startswith(own)})
        produced.append(Produced(item["step"], batch, StepMetrics.from_state(item["metrics"]), item["loader"]))
    return produced


class Producer:
    """Generates the steps of a stage.

    Args:
        worker, context: of this worker.
        receiver: takes in weights.
        start: the last step that has ended.
        ahead: steps generated already, from ``start + 1`` on.
        end_step: called when the rows of a step were delivered, with the step and its metrics; ends it together with
            all workers and says whether to save a checkpoint, and whether to stop.
        save: saves a checkpoint after a step, together with all workers.
    """

    def __init__(
        self,
        worker: DagWorker,
        context: Context,
        receiver: WeightReceiver,
        start: int,
        ahead: Sequence[Produced],
        end_step: Callable[[int, StepMetrics], tuple[bool, bool]],
        save: Callable[[int, Ahead], None],
    ) -> None:
        self._worker, self._context, self._receiver, self._start = worker, context, receiver, start
        self._end_step, self._save = end_step, save
        steps = worker.plan.steps
        hop = next(i for i, step in enumerate(steps) if step.kind == "redistribute" and step.role == "all")
        self._making, self._hop = steps[:hop], steps[hop]
        self._evaluations = [step for step in steps[hop:] if step.op == "evaluate"]
        self._produced = {item.step: item for item in ahead}
        self._message: Message | None = None
        self._evaluated = start
        self._stopping = False
        self._failure: BaseException | None = None
        self._changed = threading.Condition()

    @property
    def _config(self) -> Config:
        return self._context.config

    def run(self) -> bool:
        """Run the stage to its end; True when the run was asked to stop."""
        threads = [
            threading.Thread(target=self._guarded, args=(work,), name=work.__name__.strip("_"), daemon=True)
            for work in (self._deliver, self._receive)
        ]
        for thread in threads:
            thread.start()
        self._produce()
        for thread in threads:
            thread.join()
        if self._failure is not None:
            raise self._failure
        return self._stopping

    # The main thread.

    def _produce(self) -> None:
        staleness, steps = self._config.rollout.max_staleness, self._config.training.steps
        first = self._start + 1 + len(self._produced)
        for number in range(first, steps + 2 + staleness):
            for ended in range(self._context.policy_version + 1, min(number - 1 - staleness, steps) + 1):
                if not self._take_weights(ended):
                    return
                self._evaluate(ended)
            if number <= steps and not self._stopping:
                self._make(number)

    def _take_weights(self, ended: int) -> bool:
        """Compute with the weights after step ``ended`` from now on; False when the run stops."""
        self._wait(lambda: self._message is not None or self._stopping)
        if self._stopping or self._message is None:
            return False
        message = self._message
        if message.step != ended:
            raise SiirlError(f"weights after step {message.step} came where those after step {ended} were due")
        if message.weights is not None and message.answers is not None:
            self._context.models.take_weights(message.weights, message.checksum, message.answers)
        self._context.policy_version = ended
        self._set(_message=None)
        return True

    def _evaluate(self, ended: int) -> None:
        wanted = self._evaluations_due(ended)
        if wanted:
            self._context.step, self._context.metrics = ended, self._produced[ended].metrics
            self._worker.run(wanted, Batch({}))
        self._set(_evaluated=ended)

    def _evaluations_due(self, ended: int) -> list[Step]:
        return [step for step in self._evaluations if due(step, ended, self._config)]

    def _make(self, number: int) -> None:
        context = self._context
        context.step, context.metrics = number, StepMetrics()
        context.backend.reset_peak_memory()
        batch = self._worker.run(self._making, Batch({}))
        self._worker.add_times(context.metrics)
        with self._changed:
            self._produced[number] = Produced(number, batch, context.metrics, context.loader.state_dict())
            self._changed.notify_all()

    # The other threads.

    def _deliver(self) -> None:
        last = self._config.training.steps
        for number in range(self._start + 1, last + 1):
            self._wait_for_step(number)
            item = self._produced[number]
            self._worker.redistribute(self._hop, item.batch, item.metrics)
            item.batch = Batch({})
            if self._evaluations_due(number):
                self._wait_for_evaluation(number)
            saving, stopping = self._end_step(number, item.metrics)
            if saving:
                newest = min(number + self._config.rollout.max_staleness, last)
                self._wait_for_step(newest)
                ahead = [self._produced[step] for step in range(number + 1, newest + 1)]
                self._save(number, Ahead(ahead, item.loader, self._produced[newest].loader))
            del self._produced[number]
            if stopping:
                self._set(_stopping=True)
                self._context.models.rollout.abort()  # what is being generated now, nobody will train on
                return

    def _wait_for_step(self, number: int) -> None:
        self._wait(lambda: number in self._produced)

    def _wait_for_evaluation(self, number: int) -> None:
        self._wait(lambda: self._evaluated >= number)

    def _receive(self) -> None:
        for _ in range(self._start, self._config.training.steps):
            self._wait(lambda: self._message is None or self._stopping)
            message = self._receiver.receive()
            if message.step == STOP:
                return
            self._set(_message=message)

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # raised again where the main thread waits
            self._set(_failure=error)
            self._context.models.rollout.abort()

    def _set(self, **values: Any) -> None:
        with self._changed:
            for name, value in values.items():
                setattr(self, name, value)
            self._changed.notify_all()

    def _wait(self, ready: Callable[[], bool]) -> None:
        with self._changed:
            self._changed.wait_for(lambda: ready() or self._failure is not None)
        if self._failure is not None:
            raise self._failure
