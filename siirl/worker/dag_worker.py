"""The worker: runs its own plan, one step after another, and asks nobody what comes next."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace

import numpy as np
import torch

from siirl.dag.ops import find_op, python_target
from siirl.dag.plan import Step, WorkerPlan, due
from siirl.data.batch import Batch, Column
from siirl.data.databuffer import redistribute
from siirl.data.transport import Transports
from siirl.errors import SiirlError
from siirl.telemetry.accumulator import StepMetrics
from siirl.telemetry.trace import Tracer
from siirl.training.microbatch import mini_batch_index
from siirl.user_code import guarded, load_function
from siirl.worker.context import Context, Op, Output
from siirl.worker.ops import OPS

# which of a step's times an op counts for
_TIMES = {
    "rollout": "time/rollout_s",
    "reward": "time/reward_s",
    "log_prob": "time/log_prob_s",
    "value": "time/log_prob_s",
    "update": "time/update_s",
    "sync_weights": "time/sync_weights_s",
    "evaluate": "time/evaluate_s",
}
_IDS = ("sample_id", "group_id", "slot")
# ops that compute with training engines alone, while the rollout engine sleeps
_TRAINING = ("log_prob", "value", "update")


class DagWorker:
    """Runs one :class:`WorkerPlan`.

    Args:
        plan: this worker's pipeline.
        context: what its nodes may use.
        tracer: times every node.
    """

    def __init__(self, plan: WorkerPlan, context: Context, tracer: Tracer) -> None:
        self._plan, self._context, self._tracer = plan, context, tracer
        self._functions = {step.id: _function(step) for step in plan.steps if step.kind == "node"}
        self._resting = {
            step.id: weights_follow(plan.steps[place + 1 :])
            for place, step in enumerate(plan.steps)
            if step.op in _TRAINING
        }
        for step in plan.steps:
            if step.transport is not None:
                self._transports(step)[step.transport]  # opened here, by all alike, and in no step's time

    def run_step(self, number: int) -> None:
        """Run the pipeline once."""
        context = self._context
        context.step = number
        context.backend.reset_peak_memory()
        start = time.perf_counter()
        if context.pool is not None:
            context.pool.begin()
        self.run(self._plan.steps, Batch({}))
        self._seconds = time.perf_counter() - start

    @property
    def plan(self) -> WorkerPlan:
        return self._plan

    def run(self, steps: Sequence[Step], batch: Batch) -> Batch:
        """Run a part of the plan in the step ``context.step``; the batch after it."""
        at = 0
        while at < len(steps):
            step, beside = steps[at], steps[at + 1 : at + 1 + steps[at].overlaps]
            after = self._move(step, beside, batch) if step.overlaps else self._run(step, batch)
            batch, at = (Batch({}), 0) if after is None else (after, at + 1 + step.overlaps)
        return batch

    def _move(self, step: Step, beside: Sequence[Step], batch: Batch) -> Batch | None:
        """Move the rows on a thread of its own, while steps beside it compute with them as they lie."""
        if not any(other.kind == "node" and self._due(other) for other in beside):
            return self._run(step, batch)
        moved: Future[Batch | None] = Future()

        def move(rows: Batch) -> None:
            try:
                moved.set_result(self._run(step, rows))
            except BaseException as error:  # raised again where the result is taken
                moved.set_exception(error)

        threading.Thread(target=move, args=(batch,), name=step.id, daemon=True).start()
        for other in beside:
            after = self._run(other, batch)
            assert after is not None, "an observer begins no round"
            batch = after
        return moved.result()

    def _due(self, step: Step) -> bool:
        return due(step, self._context.step, self._context.config)

    def _run(self, step: Step, batch: Batch) -> Batch | None:
        """The batch after a step; None when another round is due, so that the plan begins anew."""
        if step.kind == "drop":
            return batch.drop([name for name in step.fields if name in batch])
        if step.kind == "node" and not self._due(step):
            return batch
        with self._tracer.span(step.id, step=self._context.step, stage=self._context.stage):
            if step.kind == "redistribute":
                return self.redistribute(step, batch, self._context.metrics)
            if step.id in self._resting:
                self._context.models.rest_rollout(weights_follow=self._resting[step.id])
            output = self._node(step, batch)
        return self._apply(step, batch, output)

    def _node(self, step: Step, batch: Batch) -> Output | Mapping[str, Column] | None:
        """What a node gives. Where several workers hold the same rows, statistics are over the first holders."""
        context, mesh = self._context, self._context.mesh
        shared = step.target is not None and step.target.split == "tokens" and step.reads
        if shared and mesh is not None and mesh.data is not mesh.workers:
            metrics = StepMetrics() if mesh.copy else context.metrics
            context = replace(context, collectives=mesh.data, metrics=metrics)
        output = self._functions[step.id](context, self._view(step, batch), step)
        if context.metrics is not self._context.metrics:
            self._context.metrics.name(context.metrics)
        return output

    def redistribute(self, step: Step, batch: Batch, metrics: StepMetrics) -> Batch:
        """Move the rows as a step says, among the workers that have it in their plans."""
        config = self._context.config
        assert step.source is not None and step.target is not None and step.transport is not None
        transports = self._transports(step)
        slots = batch.dense("slot") if "slot" in batch else torch.empty(0, dtype=torch.int64)
        batch, moved = redistribute(
            batch,
            transports.collectives,
            fields=[name for name in step.fields if name in batch and name not in _IDS],
            split=step.target.split,
            strata=mini_batch_index(slots, config.data.prompts_per_step, config.algorithm.mini_batches),
            source=np.array(step.source.shares()),
            target=np.array(step.target.shares()),
            transport=transports[step.transport],
        )
        metrics.sum("data/redistributed_bytes", moved.bytes_sent)
        return batch

    def _transports(self, step: Step) -> Transports:
        return self._context.world_transports if step.role == "all" else self._context.transports

    def _view(self, step: Step, batch: Batch) -> Batch:
        """The columns a node reads, under the names its op knows them by, and the rows' ids."""
        columns = {name: batch[name] for name in _IDS if name in batch}
        return Batch(columns | {formal: batch[name] for formal, name in step.reads.items() if name in batch})

    def _apply(self, step: Step, batch: Batch, output: Output | Mapping[str, Column] | None) -> Batch | None:
        if not isinstance(output, Output):
            output = Output(columns=output or {})
        if output.batch is not None:
            return output.batch
        if output.whole is not None:
            return output.whole(batch)
        if output.take is not None:
            batch = batch.take(output.take)
        if missing := [formal for formal in step.writes if formal not in output.columns]:
            raise SiirlError(f"node '{step.id}' did not give back the column '{missing[0]}', which its 'writes' names")
        columns = {}
        for formal, column in output.columns.items():
            if formal in step.writes or formal in _IDS:
                columns[step.writes.get(formal, formal)] = column
            elif step.op not in OPS:  # the built-in ops leave out what a node has no use for
                raise SiirlError(f"node '{step.id}' gave back the column '{formal}', which its 'writes' does not name")
        return batch.with_columns(**columns)

    def reduce_metrics(self) -> dict[str, float]:
        """The metrics of the step that was run, over all workers."""
        self.add_step_time()
        return self.reduce(self._context.metrics)

    def add_step_time(self) -> None:
        """Add how long the step and its nodes took."""
        self._context.metrics.max("time/step_s", self._seconds)
        self.add_times(self._context.metrics)

    def add_times(self, metrics: StepMetrics) -> None:
        """Add how long this worker's nodes took since the last call, and its memory."""
        memory = self._context.backend.memory()
        durations = self._tracer.durations()
        times: dict[str, float] = {}
        for step in self._plan.steps:
            key = "time/redistribute_s" if step.kind == "redistribute" else _TIMES.get(step.op)
            if key is not None and step.id in durations:
                times[key] = times.get(key, 0.0) + durations[step.id]
        for key, value in times.items():
            metrics.max(key, value)
        metrics.max("memory/host_peak_bytes", memory.host_peak)
        metrics.max("memory/device_peak_bytes", memory.peak)

    def reduce(self, metrics: StepMetrics) -> dict[str, float]:
        """Metrics of a step over all workers of the run, whatever their roles."""
        world = self._context.world
        reduced = metrics.reduce(world, roles=world is not self._context.collectives)
        for unit in ("samples", "tokens"):
            if (count := reduced.pop(f"throughput/{unit}", None)) is not None:
                reduced[f"throughput/{unit}_per_s"] = count / reduced["time/step_s"]
        return reduced


def weights_follow(steps: Sequence[Step]) -> bool:
    """Whether the rollout engine is given weights before any of the steps may generate."""
    for step in steps:
        if step.op == "sync_weights":
            return step.when is None and step.every == 1
        if step.op not in ("", "reward", "advantage", "filter", "kl_reward", "record_samples", *_TRAINING):
            return False
    return False


def _function(step: Step) -> Op:
    """The implementation of a node's op."""
    if step.op in OPS:
        return OPS[step.op]
    if step.op.startswith("python:"):
        target, name = python_target(step.op)
        function = load_function(f"{target}:{name}", f"node '{step.id}':")
    else:
        registered = find_op(step.op).function
        assert registered is not None, f"the op '{step.op}' has no implementation"
        function = guarded(registered, f"node '{step.id}': '{step.op}'")
    return lambda context, batch, node: function(batch, context=context, **node.params)
