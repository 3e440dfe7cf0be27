"""The life of one worker: every stage of a run, from the first step or from a checkpoint, to the end or to a signal."""

from __future__ import annotations

import logging
import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from siirl.algorithms.kl import kl_controller
from siirl.algorithms.mismatch import Trust
from siirl.checkpoint import store
from siirl.config.loader import Resolved, Stage
from siirl.config.schema import Config
from siirl.dag.graph import Graph
from siirl.dag.plan import Placement, WorkerPlan, training_layout
from siirl.dag.planner import plan_worker
from siirl.data.dataloader import DistributedDataloader, Item
from siirl.data.dynamic_sampling import GroupPool
from siirl.data.prompts import PromptReader
from siirl.data.sources import open_source, split
from siirl.data.transport import Transports, hosts
from siirl.device.backend import Backend, RngState
from siirl.device.collectives import Collectives
from siirl.errors import RequestError, SiirlError
from siirl.model.export import save_adapter, save_pretrained
from siirl.rewards.pool import RewardPool
from siirl.rewards.registry import choose
from siirl.rollout.partial import CarriedGroups
from siirl.telemetry.accumulator import StepMetrics
from siirl.telemetry.metrics import MetricsWriter, TensorBoardWriter
from siirl.telemetry.trace import Tracer
from siirl.training.mesh import Mesh
from siirl.worker import run_dir as directories
from siirl.worker.context import Context
from siirl.worker.dag_worker import DagWorker
from siirl.worker.kernels import bind_kernels
from siirl.worker.models import Models
from siirl.worker.place import Place
from siirl.worker.producer import STOP, Ahead, Produced, Producer, restore
from siirl.worker.weights import WeightReceiver, WeightSender

log = logging.getLogger(__name__)

_STOP = "stop_signal"


class StopRequest:
    """SIGTERM and SIGINT ask a run to end after the step in flight; a second one ends it at once."""

    def __init__(self) -> None:
        self.signal = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._take) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _take(self, number: int, frame: object) -> None:
        if self.signal:
            raise SystemExit(128 + number)
        self.signal = number
        log.warning("%s: the run ends after this step, with a checkpoint", signal.Signals(number).name)


class RunWorker:
    """One worker of a run.

    Args:
        resolved: the run's configuration.
        run_dir: of the run; shared by all workers.
        backend: bound to this worker's device.
        world: collectives of all workers.
        resume: go on from the newest checkpoint.
    """

    def __init__(self, resolved: Resolved, run_dir: Path, backend: Backend, world: Collectives, resume: bool) -> None:
        config = resolved.main
        self._resolved, self._run_dir = resolved, run_dir
        self._backend, self._world = backend, world
        self._place = Placement.of(config, world.size)
        self._role = self._place.role(world.rank)
        self._collectives, self._link = self._groups()
        backend.seed(config.seed)
        self._plans = self._plan()
        log.info("kernels: %s", bind_kernels(backend, config, world, run_dir))
        layout = training_layout(config, len(self._place.training))
        self._mesh = Mesh.of(world, layout, None if self._role == "rollout" else self._collectives)
        self._models = Models(config, backend, self._collectives, self._role, self._mesh)
        # rows have a group of their own where a node may use the workers' at the same time
        overlaps = config.data.overlap and not self._place.disaggregated and world.size > 1
        moving = world.subgroup(range(world.size)) if overlaps else world
        assert moving is not None
        self._world_transports = self._transports = Transports(moving)
        if self._place.disaggregated:
            self._transports = Transports(self._collectives)
        self._sender, self._receiver = self._weights_link()
        self._tracer = Tracer(run_dir, world.rank, enabled=config.logging.trace)
        saved = store.checkpoints(run_dir) if resume else []
        self._checkpoint = saved[-1] if saved else None
        self._state = store.load_state(self._checkpoint) if self._checkpoint else None
        self._ahead: list[Produced] = []
        self._writers = self._open_writers(config.logging.tensorboard) if world.rank == 0 else []

    def _plan(self) -> list[WorkerPlan]:
        """This worker's plan of each stage; worker 0 also writes those of all."""
        world, where = self._world, hosts(self._world)
        plans = [
            plan_worker(Graph.from_yaml(stage.config.pipeline), stage.config, world.size, world.rank, where)
            for stage in self._resolved.stages
        ]
        if world.rank == 0:
            directories.write_plans(self._resolved, self._run_dir, where)
        return plans

    def _groups(self) -> tuple[Collectives, Collectives | None]:
        """The workers with this one's role; training worker 0 with those that generate, where this one is of them."""
        if not self._place.disaggregated:
            return self._world, None
        roles = [self._world.subgroup(ranks) for ranks in (self._place.training, self._place.rollout)]
        link = self._world.subgroup([0, *self._place.rollout])
        return next(group for group in roles if group is not None), link

    def _weights_link(self) -> tuple[WeightSender | None, WeightReceiver | None]:
        if self._role == "training":
            return WeightSender(self._link, self._models.sent_names(), self._models.rollout_dtype), None
        if self._role == "rollout":
            assert self._link is not None
            assert self._models.merger is not None
            moving, frozen = self._models.merger.room()
            return None, WeightReceiver(self._link, moving, self._models.probe, frozen)
        return None, None

    def run(self) -> int:
        """Run all stages; the number of the signal that stopped the run, or 0."""
        with StopRequest() as stop:
            first = 0 if self._state is None else self._state["stage_index"]
            for index in range(first, len(self._resolved.stages)):
                if self._run_stage(index, stop):
                    return stop.signal or signal.SIGTERM
        self._export()
        return 0

    def _open_writers(self, tensorboard: bool) -> list[MetricsWriter | TensorBoardWriter]:
        metrics = MetricsWriter(self._run_dir)
        if self._state is not None:
            metrics.truncate_after(self._state["stage"], self._state["step"])
        else:
            metrics.truncate_after(self._resolved.stages[0].name, 0)
        return [metrics, *([TensorBoardWriter(self._run_dir)] if tensorboard else [])]

    def _run_stage(self, index: int, stop: StopRequest) -> bool:
        """Run one stage; True when the run was asked to stop."""
        stage = self._resolved.stages[index]
        with self.open_stage(index) as (worker, context, start):
            if self._role == "rollout":
                return self._generate(index, worker, context, start, stop)
            for number in range(start + 1, stage.config.training.steps + 1):
                worker.run_step(number)
                self._send_weights(number, changed=context.policy_version == number)
                worker.add_step_time()
                saving, stopping = self._end_step(stage, worker, number, context.metrics, stop)
                if saving:
                    self._save(index, context, number)
                if stopping:
                    if self._sender is not None:
                        self._sender.send(STOP, None)
                    return True
        return False

    def _generate(self, index: int, worker: DagWorker, context: Context, start: int, stop: StopRequest) -> bool:
        """A stage of a worker that only generates; True when the run was asked to stop."""
        stage = self._resolved.stages[index]
        assert self._receiver is not None

        def end_step(number: int, metrics: StepMetrics) -> tuple[bool, bool]:
            return self._end_step(stage, worker, number, metrics, stop)

        def save(number: int, ahead: Ahead) -> None:
            self._save(index, context, number, ahead)

        producer = Producer(worker, context, self._receiver, start, self._ahead, end_step, save)
        self._ahead = []
        return producer.run()

    def _end_step(
        self, stage: Stage, worker: DagWorker, number: int, metrics: StepMetrics, stop: StopRequest
    ) -> tuple[bool, bool]:
        """Reduce and write a step's metrics, together with all workers; whether to save, and whether to stop."""
        metrics.max(_STOP, float(stop.signal))  # one worker's signal stops all of them after one step
        reduced = worker.reduce(metrics)
        stopping = reduced.pop(_STOP) > 0
        self._write({"stage": stage.name, "step": number, **reduced})
        return self._wants_checkpoint(stage, number) or stopping, stopping

    @contextmanager
    def open_stage(self, index: int) -> Iterator[tuple[DagWorker, Context, int]]:
        """A stage with its models and reward processes: what runs its steps, what they use, how many are done."""
        stage = self._resolved.stages[index]
        config, plan = stage.config, self._plans[index]
        context = self._context(index, stage)
        context.pool = self._pool(config, {step.op for step in plan.steps})
        context.reader.check_longest()  # before the models of the stage, which take a while
        self._models.begin_stage(config, plan.models, first=index == 0)
        state = self._state if self._state is not None and self._state["stage_index"] == index else None
        start = 0
        if state is not None:
            self._restore(state, context)
            start = state["step"]
        context.policy_version = start
        self._begin_weights(start)
        worker = DagWorker(plan, context, self._tracer)
        with context.rewards:
            if any(step.op in ("reward", "evaluate") for step in plan.steps):
                context.rewards.start()
            yield worker, context, start

    def _pool(self, config: Config, ops: set[str]) -> GroupPool | CarriedGroups | None:
        """What a stage keeps from step to step."""
        wanted, collectives = config.data.prompts_per_step, self._collectives
        if "dynamic_sampling" in ops:
            return GroupPool(wanted, config.algorithm.oversample, config.algorithm.max_rounds)
        if "rollout" in ops and config.rollout.partial:
            extra = math.ceil(wanted * config.rollout.partial)
            return CarriedGroups(wanted, extra, config.rollout.group_size, collectives.rank, collectives.size)
        return None

    def _context(self, index: int, stage: Stage) -> Context:
        config, rank, workers = stage.config, self._collectives.rank, self._collectives.size
        source = open_source(config.data.source, config=config.data, seed=config.seed)
        train, held_out = split(source, config.data.held_out, config.seed)
        eval_source = source
        if config.data.eval_source is not None:
            eval_source = open_source(config.data.eval_source, config=config.data, seed=config.seed)
            held_out = np.arange(len(eval_source))
        models = self._models
        eos_id = models.eos_ids[0] if models.eos_ids else None
        mine = range(rank, len(held_out), workers)
        return Context(
            stage=stage.name,
            config=config,
            run_dir=self._run_dir,
            backend=self._backend,
            collectives=self._collectives,
            transports=self._transports,
            world=self._world,
            world_transports=self._world_transports,
            mesh=self._mesh,
            models=models,
            loader=DistributedDataloader(
                train, config.data.prompts_per_step, rank, workers, config.seed, config.data.shuffle
            ),
            reader=PromptReader(source, config.data, models.tokenizer, eos_id, train, config.seed),
            held_out=[Item(int(held_out[i]), i, i, 0) for i in mine],
            eval_reader=PromptReader(eval_source, config.data, models.tokenizer, eos_id, train, config.seed),
            rewards=RewardPool(
                choose(config.reward.function, source.scorer),
                config.reward.params,
                config.reward.timeout_s,
                config.reward.workers,
            ),
            metrics=StepMetrics(),
            kl=kl_controller(config.algorithm),
            rollout_seed=config.seed * 1_000 + index,
            trust=Trust(config.algorithm.trust_bound, config.algorithm.trust_every)
            if config.algorithm.old_log_probs == "trust"
            else None,
        )

    def _write(self, record: dict[str, Any]) -> None:
        for writer in self._writers:
            writer.append(record)
        self._tracer.flush()

    def _wants_checkpoint(self, stage: Stage, number: int) -> bool:
        checkpoint = stage.config.checkpoint
        last = stage.name == "main" and number == stage.config.training.steps
        return (checkpoint.every > 0 and number % checkpoint.every == 0) or (last and checkpoint.save_last)

    def _begin_weights(self, start: int) -> None:
        """The workers that generate get the weights that the workers that train begin a stage with."""
        self._send_weights(start, first=True)
        if self._receiver is not None:
            message = self._receiver.receive()
            assert message.weights is not None and message.answers is not None
            self._models.take_weights(message.weights, message.checksum, message.answers)

    def _send_weights(self, step: int, changed: bool = True, first: bool = False) -> None:
        """Tell the workers that generate, where this one trains for them, that a step has ended."""
        if self._sender is None:
            return
        if changed:
            moving, frozen = self._models.sent_weights(first)
            self._sender.send(step, moving, self._models.answers(), frozen)
        else:
            self._sender.send(step, None)

    def _save(self, index: int, context: Context, step: int, ahead: Ahead | None = None) -> None:
        with self._tracer.span("checkpoint", step=step, stage=context.stage):
            state: dict[str, Any] = {
                "order": [index, step],
                "stage_index": index,
                "stage": context.stage,
                "step": step,
                "kl": context.kl.state_dict(),
                "own_reference": not self._models.reloadable_reference,
                "adapters": self._models.adapters_state(),
            }
            if context.trust is not None:
                state["trust"] = context.trust.state_dict()
            if self._place.disaggregated:
                state |= {"generating": list(self._place.rollout)}
            else:
                state |= {"loader": context.loader.state_dict(), "leftovers": _leftovers(context)}
            worker = {"rng": self._backend.rng_state().to_json()} | ({} if ahead is None else ahead.to_json())
            held = None if context.pool is None else context.pool.state()
            store.save(
                self._run_dir,
                store.directory_name(context.stage, step),
                {key: self._backend.to_canonical(t) for key, t in self._models.tensors().items()},
                state,
                worker,
                self._world,
                holders=self._collectives,
                worker_tensors=held if ahead is None else ahead.tensors(),
            )
            if self._world.rank == 0:
                store.prune(self._run_dir, context.config.checkpoint.keep)

    def _restore(self, state: dict[str, Any], context: Context) -> None:
        assert self._checkpoint is not None
        _check_leftovers(state, context)
        self._models.reloadable_reference = not state["own_reference"]
        if self._role != "rollout":
            self._models.check_adapters_state(state.get("adapters"))
            store.load_tensors(self._checkpoint, self._models.tensors(), self._collectives)
        context.loader.load_state_dict(self._loader_state(state))
        context.kl.load_state_dict(state["kl"])
        if context.trust is not None and "trust" in state:  # else the next step measures
            context.trust.load_state_dict(state["trust"])
        if context.pool is not None:
            savers = range(self._collectives.rank, state["workers"], self._collectives.size)  # each goes to one worker
            held = [store.load_worker_tensors(self._checkpoint, saver) for saver in savers]
            context.pool.restore(held, self._collectives)
        self._models.sync_rollout()
        worker = store.load_worker_state(self._checkpoint, self._world.rank)
        if worker is not None:
            self._restore_random_state(RngState.from_json(worker["rng"]), context.config.seed + state["step"])

    def _loader_state(self, state: dict[str, Any]) -> dict[str, Any]:
        """Where the dataloader goes on. What was generated ahead is taken over where the same workers generate."""
        assert self._checkpoint is not None
        if "loader" in state:
            return state["loader"]
        saved = store.load_worker_state(self._checkpoint, state["generating"][0])
        assert saved is not None
        if state["generating"] != list(self._place.rollout) or state["workers"] != self._world.size:
            log.warning("other workers generate than in the checkpoint: what these had generated ahead is drawn again")
            return saved["loader"]
        own = store.load_worker_state(self._checkpoint, self._world.rank) if self._role == "rollout" else None
        if own is not None:
            self._ahead = restore(own, store.load_worker_tensors(self._checkpoint, self._world.rank))
        return saved["loader_ahead"]

    def _restore_random_state(self, saved: RngState, new_seed: int) -> None:
        """The saved state, or where another device saved it a fresh one that does not begin as the run did."""
        if saved.backend == self._backend.name:
            self._backend.set_rng_state(saved)
            return
        here, there = self._backend.name, saved.backend
        log.warning("the checkpoint is of device %s: the generators of %s are seeded anew, not restored", there, here)
        self._backend.seed(new_seed)

    def _export(self) -> None:
        """The trained actor as a Hugging Face directory, ``RUN_DIR/model``, and its adapter in ``RUN_DIR/adapter``."""
        if self._role != "rollout":
            weights = self._on_first(self._models.actor.named_weights())
            adapters = self._on_first(self._models.exported_adapters())
            models, lora = self._models, self._resolved.main.model.lora
            if self._world.rank == 0:
                save_pretrained(models.decoder, models.tokenizer, self._run_dir / "model", state_dict=weights)
                if adapters:
                    save_adapter(adapters, lora, self._resolved.main.model.path, self._run_dir / "adapter")
        self._world.barrier()

    def _on_first(self, named: Iterator[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Tensors, on worker 0; gathering them is a collective, keeping them is not."""
        return {name: tensor for name, tensor in named if self._world.rank == 0}


def _leftovers(context: Context) -> str | None:
    """What a stage keeps groups for."""
    if context.pool is None:
        return None
    return "dynamic_sampling" if isinstance(context.pool, GroupPool) else "rollout.partial"


def _check_leftovers(state: dict[str, Any], context: Context) -> None:
    """Refuse to go on where rows that the checkpoint holds for later steps would be lost."""
    kind = state.get("leftovers")
    if kind and kind != _leftovers(context):
        raise RequestError(f"the checkpoint holds groups of {kind} for later steps, and this run has no {kind}")
    if context.pool is not None and "generating" in state:
        raise RequestError(
            "the checkpoint is of a disaggregated placement, which dynamic_sampling and rollout.partial cannot go on "
            "from"
        )


def run_worker(resolved: Resolved, run_dir: Path, backend: Backend, place: Place, resume: bool) -> int:
    """Run the worker of a place on a loaded back end; 0, or the number of the signal that stopped the run."""
    config, rank = resolved.main, place.rank
    backend.bind(place.local_rank, config.threads_per_worker or default_threads(place.local_workers))
    # before the first collective: libraries read their switches when they make a communicator
    for unmet in backend.deterministic("on" if config.training.deterministic else "off"):
        log.warning("training.deterministic is not met in full: %s", unmet)
    collectives = Collectives.init(backend, rank, place.workers, config.timeout_s)
    started = time.perf_counter()
    try:
        stopped = RunWorker(resolved, run_dir, backend, collectives, resume).run()
    except torch.OutOfMemoryError as error:
        raise SiirlError(
            f"worker {rank} has no memory left on {backend.device()}: lower training.micro_batch_tokens or "
            f"rollout.max_sequences, or spread the weights with training.sharding=shard ({error})"
        ) from error
    log.info("worker %d ran for %.1f s", rank, time.perf_counter() - started)
    collectives.close()
    return stopped


def default_threads(local_workers: int) -> int:
    """CPU threads of each worker, so that all together use the cores once."""
    from siirl.device.host import usable_cores

    return max(1, usable_cores() // local_workers)
