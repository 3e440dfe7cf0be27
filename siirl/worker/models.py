"""The models of a worker: the actor with its rollout engine, the critic, the reference."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

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
from siirl.model.tokenizer import decode, encode_texts, eos_ids
from siirl.rollout.checksum import weights_checksum
from siirl.rollout.contract import Begun, Completions, RolloutEngine
from siirl.rollout.engine import NativeEngine
from siirl.rollout.graphs import recorder
from siirl.rollout.probe import BOUNDS, Answers, Probe, compare
from siirl.rollout.sampling import Sampling
from siirl.training.fsdp import TrainingEngine
from siirl.training.mesh import Mesh

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
            self._shared = role == "all" and self.actor.whole and shareable
        self._rollout = None if role == "training" else self._rollout_engine()
        self.reloadable_reference = True

    def __getitem__(self, name: str) -> TrainingEngine:
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

    def rollout_weights(self) -> list[tuple[str, torch.Tensor]]:
        """Tensors like those that the rollout engine takes, by name; the built-in engine's own."""
        device, dtype = self._backend.device(), self.rollout_dtype
        return [(name, weight.detach().to(device, dtype)) for name, weight in self.decoder.named_parameters()]

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
        if "reference" in wanted:
            self.reloadable_reference = first or config.model.reference is not None
            module = self._copy_of_actor(config.model.reference)
            self.engines["reference"] = self._engine(module, "reference")
            self.engines["reference"].begin(config, None)
        if "critic" in wanted:
            critic = ValueModel(self._copy_of_actor(config.model.critic))
            self.engines["critic"] = self._engine(critic, "critic")
            lr = config.training.lr if config.training.critic_lr is None else config.training.critic_lr
            self.engines["critic"].begin(config, lr)
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
        checksum = weights_checksum(self.actor.named_weights(), self.rollout_dtype)
        self.take_weights(self.actor.named_weights(), checksum, self.answers())

    def answers(self) -> Answers:
        """The actor's answers to the parity probe. A collective where it is sharded."""
        return Answers(*self.actor.greedy(self.probe.prompts, self.probe.tokens))

    def take_weights(self, named: Iterable[tuple[str, torch.Tensor]], checksum: int, expected: Answers) -> None:
        """Give this worker's rollout engine weights of the next version, and check that it computes with them.

        Args:
            named: the weights.
            checksum: of the weights, as training holds them, in the engine's dtype.
            expected: training's answers to the parity probe.

        Raises:
            SiirlError: the engine holds other weights, is at another version, or answers otherwise.
        """
        self.version += 1
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
            found |= {f"{name}.model.{key}": p.detach() for key, p in engine.model.named_parameters()}
            if engine.optimizer is not None:
                found |= {
                    f"{name}.optimizer.{key}": t for key, t in optimizer_tensors(engine.model, engine.optimizer).items()
                }
        return found

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
