"""The models of a worker: the actor with its rollout engine, the critic, the reference."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, SupportsInt, cast

import torch

from siirl.checkpoint.optimizer import optimizer_tensors
from siirl.config.schema import Config
from siirl.dag.plan import Role
from siirl.device.backend import Backend
from siirl.device.collectives import Collectives
from siirl.errors import RequestError, SiirlError
from siirl.model.critic import ValueModel
from siirl.model.fallback import AnyDecoder
from siirl.model.load import Loaded, load_model
from siirl.model.lora import adapt
from siirl.model.tokenizer import decode, encode_texts, eos_ids
from siirl.rollout.checksum import Checksum
from siirl.rollout.contract import Begun, Completions, RolloutEngine
from siirl.rollout.engine import NativeEngine
from siirl.rollout.graphs import recorder
from siirl.rollout.probe import BOUNDS, Answers, Probe, compare
from siirl.rollout.sampling import Sampling
from siirl.training.budget import share_memory
from siirl.training.fsdp import TrainingEngine
from siirl.training.mesh import Mesh
from siirl.training.shared_reference import SharedReference
from siirl.worker.adapters import Merger, Named, adapters_state, check_adapters_state, sent_parts

# vLLM is started for sequences of at least so many tokens: probes use prompts of their own
_VLLM_LENGTH = 128


class Models:
    """Loads, holds and names the models; the actor lives through all stages, the others through one.

    A worker that only generates has no training engine, and one that only trains no rollout engine.

    Args:
        config: of the run's main stage.
        backend: of this worker.
        collectives: of the workers with this role.
        role: of this worker.
        mesh: of the workers that train; None for data parallel only, or where this worker does not train.
    """

    def __init__(
        self,
        config: Config,
        backend: Backend,
        collectives: Collectives,
        role: Role = "all",
        mesh: Mesh | None = None,
    ) -> None:
        self._config, self._backend, self._collectives, self._role = config, backend, collectives, role
        self._mesh = mesh
        loaded = self._load(config.model.path)
        self._lora = config.model.lora
        if self._lora.rank and role != "rollout":
            adapt(loaded.model, self._lora, config.seed)
        self.tokenizer, self.decoder = loaded.tokenizer, loaded.model
        self.eos_ids = eos_ids(loaded.tokenizer, loaded.model.config)
        self.engines: dict[str, TrainingEngine] = {}
        self.rollout_dtype: torch.dtype = getattr(torch, config.training.dtype)
        self.probe = Probe.of(
            loaded.model.config.vocab_size, config.seed, config.data.max_prompt_tokens, config.rollout.max_new_tokens
        )
        self.version = 0
        self._shared = False
        if role != "rollout":
            self.engines["actor"] = self._engine(loaded.model, "actor")
            shareable = config.rollout.engine == "native" and config.training.dtype == "float32"
            self._shared = role == "all" and self.actor.spread.whole and shareable and not self._lora.rank
        self._rollout = None if role == "training" else self._rollout_engine()
        self.merger = (
            Merger(self.decoder, self._lora, backend.device(), self.rollout_dtype) if role == "rollout" else None
        )
        self.reloadable_reference = True
        self._shared_reference: SharedReference | None = None
        self._reloadable: dict[str, bool] = {}
        self._adapters = False

    def __getitem__(self, name: str) -> TrainingEngine:
        if name == "reference" and self._shared_reference is not None:
            return cast(TrainingEngine, self._shared_reference)  # log-probs are all that a reference is asked for
        return self.engines[name]

    @property
    def actor(self) -> TrainingEngine:
        return self.engines["actor"]

    @property
    def rollout(self) -> RolloutEngine:
        """The rollout engine, awake."""
        assert self._rollout is not None, "a worker that only trains does not generate"
        self._rollout.wake()
        return self._rollout

    def rest_rollout(self, weights_follow: bool) -> None:
        """Let training have the memory of this worker's rollout engine.

        Args:
            weights_follow: :meth:`sync_rollout` comes before the engine generates again, so it may drop its own.
        """
        if self._role == "all" and self._rollout is not None:
            self._rollout.sleep(2 if weights_follow else 1)

    def begin_stage(self, config: Config, wanted: Iterable[str], first: bool) -> None:
        """Make the models a stage's plan names; the actor starts a new optimiser.

        Args:
            config: of the stage.
            wanted: names in the plan.
            first: no stage has run before, so the actor's weights are those of its file.
        """
        if self._role == "rollout":
            return
        self.engines = {"actor": self.actor}
        self.actor.begin(config, config.training.lr)
        self._adapters = config.model.lora.rank > 0
        self._reloadable = {"actor": first, "critic": first or config.model.critic is not None}
        shared = self._adapters and config.model.reference is None
        self._shared_reference = SharedReference(self.actor) if shared else None
        if shared:
            self.reloadable_reference = True
        elif "reference" in wanted:
            self.reloadable_reference = first or config.model.reference is not None
            module = self._copy_of_actor(config.model.reference)
            self.engines["reference"] = self._engine(module, "reference")
            self.engines["reference"].begin(config, None)
        if "critic" in wanted:
            backbone = self._copy_of_actor(config.model.critic)
            if self._adapters:
                adapt(backbone, self._lora, config.seed + 1)
            self.engines["critic"] = self._engine(ValueModel(backbone), "critic")
            lr = config.training.lr if config.training.critic_lr is None else config.training.critic_lr
            self.engines["critic"].begin(config, lr)
        share_memory(self.engines, config, self._backend)
        self.sync_rollout()

    def sync_rollout(self) -> None:
        """Give this worker's rollout engine, if it has one, the actor's weights.

        Where both compute with the same tensors nothing moves, and only the version does.
        """
        if self._role != "all":
            return
        if self._shared:
            self.version += 1
            self.rollout.update_weights((), self.version)
            return
        answers, checksum = self.answers(), Checksum(self.rollout_dtype)
        self.take_weights(checksum.pairs(self.actor.named_weights(self.rollout_dtype)), checksum, answers)

    def answers(self) -> Answers:
        """The actor's answers to the parity probe. A collective where it is sharded."""
        return Answers(*self.actor.greedy(self.probe.prompts, self.probe.tokens))

    def take_weights(self, named: Iterable[tuple[str, torch.Tensor]], checksum: SupportsInt, expected: Answers) -> None:
        """Give this worker's rollout engine weights of the next version, and check that it computes with them.

        Args:
            named: the weights; between workers of their own, those that adapters adapt and the adapters.
            checksum: of the weights, as training holds them, in the engine's dtype.
            expected: training's answers to the parity probe.

        Raises:
            SiirlError: the engine holds other weights, is at another version, or answers otherwise.
        """
        self.version += 1
        if self.merger is not None and self._lora.rank:
            named, checksum = self.merger.merged(named, self.version, checksum)
        self.rollout.update_weights(named, self.version, checksum)
        done = self.generate(self.probe.prompts, self.probe.sample_ids, self.probe.sampling, 1, 0)
        bound = self._config.rollout.probe_bound
        compare(expected, done, BOUNDS[self.rollout_dtype] if bound is None else bound)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sample_ids: torch.Tensor,
        sampling: Sampling,
        group_size: int,
        seed: int,
        begun: Sequence[Begun | None] = (),
        enough: int | None = None,
    ) -> Completions:
        """See :class:`siirl.rollout.contract.RolloutEngine`.

        Raises:
            SiirlError: the responses are not of the newest weights that the engine was given.
        """
        done = self.rollout.generate(prompts, sample_ids, sampling, group_size, seed, begun, enough)
        if done.version != self.version:
            raise SiirlError(
                f"weights of version {self.version} did not arrive: the rollout engine is at version {done.version}"
            )
        return done

    def decode(self, ids: list[int]) -> str:
        """Text of tokens, without special tokens."""
        return decode(self.tokenizer, ids)

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, without special tokens."""
        return encode_texts(self.tokenizer, [text])[0]

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor of a checkpoint by name; views of the live ones, so that filling them restores the models."""
        found: dict[str, torch.Tensor] = {}
        for name, engine in self.engines.items():
            if name == "reference" and self.reloadable_reference:
                continue
            kept = dict(engine.model.named_parameters())
            if self._reloadable.get(name):
                kept = {key: p for key, p in kept.items() if p.requires_grad}
            found |= {f"{name}.model.{key}": p.detach() for key, p in kept.items()}
            if engine.optimizer is not None:
                found |= {
                    f"{name}.optimizer.{key}": t for key, t in optimizer_tensors(engine.model, engine.optimizer).items()
                }
        return found

    def sent_names(self) -> list[str]:
        """Names of all weights that are sent to workers that generate, in their order."""
        moving, frozen = sent_parts(self.actor, self._lora, base=True)
        return [name for part in (frozen or (), moving) for name, _ in part]

    def sent_weights(self, base: bool) -> tuple[Named, Named | None]:
        """See :func:`siirl.worker.adapters.sent_parts`; ``base``: a stage begins."""
        return sent_parts(self.actor, self._lora, base or not self._adapters)

    def exported_adapters(self) -> Named:
        """The actor's adapters, where what they adapt are the weights of its file. A collective where it is sharded."""
        if self._adapters and self._reloadable["actor"]:
            yield from self.actor.parts(adapters=True)

    def adapters_state(self) -> dict[str, Any] | None:
        """See :func:`siirl.worker.adapters.adapters_state`."""
        trained = {name: engine for name, engine in self.engines.items() if engine.optimizer is not None}
        kept = {name: engine for name, engine in trained.items() if self._adapters and self._reloadable[name]}
        return adapters_state(kept, self._lora)

    def check_adapters_state(self, saved: dict[str, Any] | None) -> None:
        """See :func:`siirl.worker.adapters.check_adapters_state`."""
        check_adapters_state(saved, self.adapters_state())

    def _load(self, path: str) -> Loaded:
        model = self._config.model
        return load_model(
            path,
            seed=self._config.seed,
            initializer_range=model.initializer_range,
            trust_remote_code=model.trust_remote_code,
        )

    def _engine(self, module: AnyDecoder | ValueModel, name: str) -> TrainingEngine:
        return TrainingEngine(module, self._config.training, self._backend, self._collectives, name, self._mesh)

    def _copy_of_actor(self, path: str | None) -> AnyDecoder:
        """A model of its own: from ``path``, else with the weights the actor has now."""
        if path is not None:
            other = self._load(path)
            if other.tokenizer.get_vocab() != self.tokenizer.get_vocab():
                raise RequestError(f"model '{path}' has another vocabulary than the actor '{self._config.model.path}'")
            return other.model
        module = self._load(self._config.model.path).model
        own = dict(module.named_parameters())
        with torch.no_grad():
            for name, weight in self.actor.named_weights():
                own[name].copy_(weight)
        return module

    def _rollout_engine(self) -> RolloutEngine:
        memory = self._backend.memory()
        share = self._collectives.size if memory.unified else 1
        cache_bytes = int(self._config.rollout.cache_fraction * memory.total / share)
        if self._config.rollout.engine == "vllm":
            return self._vllm_engine(cache_bytes)
        module = self.decoder
        if not self._shared:
            if self._role == "all":
                module = self._load(self._config.model.path).model
            module = module.to(self._backend.device(), self.rollout_dtype).requires_grad_(False)
        return NativeEngine(
            module,
            self.eos_ids,
            self.decode,
            self._config.rollout.max_sequences,
            cache_bytes,
            self._config.rollout.chunk_tokens,
            own_weights=not self._shared,
            capture=recorder(self._backend, self._config.rollout.graphs),
            record_routing=self._config.rollout.router_replay,
        )

    def _vllm_engine(self, cache_bytes: int) -> RolloutEngine:
        from siirl.rollout.vllm import VllmEngine, VllmSize

        rollout, data = self._config.rollout, self._config.data
        least = min(_VLLM_LENGTH, self.decoder.config.max_positions)
        longest = max(data.max_prompt_tokens + rollout.max_new_tokens, least)
        size = VllmSize(longest, rollout.max_sequences, cache_bytes)
        return VllmEngine(self.decoder, self.eos_ids, self.decode, self._backend, self.rollout_dtype, size)
