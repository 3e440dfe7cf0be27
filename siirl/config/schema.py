"""The configuration's schema: one small class per section, every key typed, bounded and described.

Importing this module imports no torch.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """Base of every section: unknown keys are errors, values are checked on assignment too."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, allow_inf_nan=False)


LoRATarget = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class LoRAConfig(Section):
    """Adapters of low rank beside frozen weights, for the actor and the critic: [LoRA](lora.md)."""

    rank: NonNegative = Field(0, description="of the adapters; 0: all weights are trained")
    alpha: PositiveFloat = Field(32.0, description="an adapter is multiplied by alpha / rank")
    rslora: bool = Field(False, description="by alpha / √rank instead")
    targets: list[LoRATarget] = Field(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        min_length=1,
        description="linear layers with an adapter",
    )


class ModelConfig(Section):
    """The policy, and what the reference and the critic start from."""

    path: str = Field("tiny:qwen3:64:2:128", description="a directory, a hub id, gguf:…, package://… or tiny:…")
    reference: str | None = Field(None, description="path of the reference model; the actor's start when absent")
    critic: str | None = Field(None, description="path of the critic's backbone; the actor's start when absent")
    trust_remote_code: bool = Field(False, description="run Python code that comes with a checkpoint")
    initializer_range: PositiveFloat = Field(0.02, description="standard deviation of `tiny:` weights")
    lora: LoRAConfig = Field(default_factory=LoRAConfig)


class DataConfig(Section):
    """Prompts: where they come from and how many make a step."""

    source: str = Field("arithmetic:addition", description="a file, a hub id, arithmetic:… or reasoning-gym:…")
    held_out: NonNegative = Field(0, description="rows kept out of training, for evaluation")
    eval_source: str | None = Field(None, description="a separate source for evaluation; excludes `held_out`")
    prompts_per_step: Positive = Field(64, description="prompts of one step over all workers")
    max_prompt_tokens: Positive = Field(1024, description="a row with a longer prompt cannot be used")
    prompt_key: str = Field("prompt", description="column with the prompt text or the list of chat messages")
    answer_key: str = Field("answer", description="column with the expected answer")
    system_prompt: str | None = Field(None, description="a first message where the prompt has no system message")
    prompt_template: str = Field("{prompt}", description="text around the prompt before the chat template")
    response_template: str = Field("{answer}", description="the target text of supervised training")
    chat_template: bool | None = Field(None, description="use the tokenizer's chat template; default: when it has one")
    shuffle: bool = Field(True, description="draw the rows of each epoch in a seeded order")
    limit: Positive | None = Field(None, description="read at most so many rows")
    label_noise: Fraction = Field(0.0, description="share of supervised targets replaced by another row's answer")
    on_error: Literal["stop", "skip"] = Field("stop", description="what a row that cannot be used does")
    transport: Literal["auto", "collectives", "shared_memory"] = Field(
        "auto", description="how rows move between workers; auto: through shared memory where all are on one host"
    )
    overlap: bool = Field(True, description="record samples while rows move between workers")


class AlgorithmConfig(Section):
    """Constants of the formulas, by their names in the papers; a pipeline file sets its own defaults."""

    advantage: str = Field("grpo", description="registered advantage estimator")
    policy_loss: str = Field("ppo_clip", description="registered policy loss")
    norm_adv_by_std: bool = Field(True, description="GRPO: divide by the group's standard deviation; False is Dr.GRPO")
    whiten_advantages: bool = Field(False, description="normalise advantages over the global batch")
    gamma: Fraction = Field(1.0, description="discount of GAE")
    lam: Fraction = Field(1.0, description="lambda of GAE")
    clip_low: NonNegativeFloat = Field(0.2, description="the ratio is clipped below 1 - clip_low")
    clip_high: NonNegativeFloat = Field(0.2, description="the ratio is clipped above 1 + clip_high")
    dual_clip: float | None = Field(None, gt=1, description="c of dual-clip PPO, a bound for negative advantages")
    loss_agg: Literal["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"] = (
        "token-mean"
    )
    entropy_coef: float = Field(0.0, description="coefficient of the entropy bonus in the loss")
    kl_coef: NonNegativeFloat = Field(0.0, description="coefficient of the KL term in the loss")
    kl_estimator: Literal["k1", "k2", "k3"] = Field("k3", description="of the KL term in the loss")
    kl_reward_coef: NonNegativeFloat = Field(0.0, description="coefficient of the KL penalty in the reward")
    kl_reward_estimator: Literal["k1", "k2", "k3"] = Field("k1", description="of the KL penalty in the reward")
    kl_controller: Literal["fixed", "adaptive"] = Field("fixed", description="how kl_reward_coef moves")
    kl_target: PositiveFloat = Field(6.0, description="adaptive controller: KL per sequence it steers to")
    kl_horizon: PositiveFloat = Field(10_000.0, description="adaptive controller: samples over which it moves")
    value_clip: NonNegativeFloat | None = Field(0.2, description="range of the clipped value loss; null: no clipping")
    value_coef: NonNegativeFloat = Field(1.0, description="factor of the critic's loss")
    oversample: float = Field(1.0, ge=1, description="dynamic sampling: prompts generated for each missing group")
    max_rounds: Positive = Field(10, description="dynamic sampling: rounds after which a step takes what there is")
    old_log_probs: Literal["recompute", "trust", "correct"] = Field(
        "recompute", description="recompute: by training; trust: rollout's, while they agree; correct: by ratio too"
    )
    trust_bound: NonNegativeFloat = Field(0.1, description="trust: largest difference of a log-prob, in nats")
    trust_every: Positive = Field(10, description="trust: every so many steps the difference is measured")
    correction: Literal["tis", "mis"] = Field("tis", description="importance sampling: tis truncates, mis masks")
    correction_level: Literal["token", "sequence", "geometric"] = Field(
        "token", description="ratio of a token, a response's product of them, or their geometric mean"
    )
    correction_low: NonNegativeFloat | None = Field(None, description="mis: smaller ratios are masked; null: none")
    correction_high: PositiveFloat = Field(2.0, description="larger ratios are truncated to it, or masked")
    mini_batches: Positive = Field(1, description="updates per pass over a step's samples")
    epochs: Positive = Field(1, description="passes over a step's samples")


class RolloutParallelConfig(Section):
    """Degrees of parallelism of generation; groups of workers that generate together are data parallel."""

    tensor: Positive = 1

    def degrees(self) -> dict[str, int]:
        """The degrees beside data parallel, by name."""
        return {"tensor": self.tensor}


class RolloutConfig(Section):
    """Generation of responses."""

    engine: Literal["native", "vllm"] = Field("native", description="native is the built-in one")
    # a sample id has 20 bits for the response
    group_size: int = Field(8, gt=0, le=2**20, description="responses per prompt")
    max_new_tokens: Positive = Field(256, description="longest response")
    temperature: NonNegativeFloat = Field(1.0, description="0: greedy")
    top_p: float = Field(1.0, gt=0, le=1, description="draw from the likeliest tokens that reach this probability")
    top_k: NonNegative = Field(0, description="draw from the so many likeliest tokens; 0: off")
    min_p: Fraction = Field(0.0, description="leave out tokens less likely than this share of the likeliest one's")
    ignore_eos: bool = Field(False, description="never draw an end token: every response has max_new_tokens")
    stop: list[str] = Field(default_factory=list, description="strings that end a response")
    stop_ids: list[NonNegative] = Field(default_factory=list, description="tokens that end one, beside the end tokens")
    min_new_tokens: NonNegative = Field(0, description="no end token is drawn before so many")
    repetition_penalty: PositiveFloat = Field(1.0, description="divides logits of tokens seen before; 1: off")
    presence_penalty: float = Field(0.0, description="taken from logits of tokens in the response")
    frequency_penalty: float = Field(0.0, description="the same, times how often they are there")
    bad_words: list[str] = Field(default_factory=list, description="texts that no response contains")
    draft_tokens: NonNegative = Field(
        0, description="tokens guessed ahead from what followed the last ones before; responses stay the same; 0: off"
    )
    draft_match: Positive = Field(3, description="last tokens that must have stood together before for a guess")
    cache_fraction: float = Field(0.3, gt=0, le=1, description="the cache's share of the memory that a worker may use")
    chunk_tokens: Positive = Field(8192, description="prompt tokens computed beside one token of every response")
    max_sequences: Positive = Field(512, description="sequences decoded together on one worker")
    graphs: bool = Field(True, description="record the decode step where the device can, and replay it")
    batch_invariant: bool = Field(
        False, description="bits of a token do not depend on the batch: rollout's log-probs are training's, bit for bit"
    )
    router_replay: bool = Field(
        False, description="mixture of experts: training sends each token to the experts that rollout sent it to"
    )
    partial: Fraction = Field(
        0.0, description="more prompts in flight, as a share of a step's; the longest responses go on in the next step"
    )
    probe_bound: NonNegativeFloat | None = Field(
        None, description="after a weight sync: largest difference of a log-prob from training's; null: by dtype"
    )
    workers: Positive | None = Field(None, description="disaggregated: workers that generate; default: half of all")
    max_staleness: NonNegative = Field(
        0, description="disaggregated: steps that generation runs ahead of training; 0: on-policy"
    )
    parallel: RolloutParallelConfig = Field(default_factory=RolloutParallelConfig)


class ParallelConfig(Section):
    """Degrees of parallelism of training; data: null means all workers that are left."""

    data: Positive | None = Field(None, description="null: all workers that are left")
    tensor: Positive = Field(1, description="workers that compute the same tokens with a part of every layer each")
    sequence: bool = Field(True, description="with tensor: norms and residuals of a part of the tokens each")
    context: Positive = Field(1, description="workers that compute a part of the tokens of the same samples each")
    context_mode: Literal["ulysses", "ring"] = Field(
        "ulysses", description="attention between them: ulysses deals out the heads; ring passes keys and values round"
    )
    pipeline: Positive = 1
    expert: Positive = Field(1, description="data-parallel workers that hold a part of each layer's experts each")

    def degrees(self) -> dict[str, int]:
        """The degrees beside data parallel, by name."""
        return {name: getattr(self, name) for name in ("tensor", "context", "pipeline", "expert")}


class TrainingConfig(Section):
    """Optimisation of the actor and of the critic."""

    engine: Literal["fsdp", "megatron"] = Field("fsdp", description="what trains")
    steps: Positive = Field(100, description="steps of the stage")
    optimizer: Literal["adamw", "adamw8bit", "sgd"] = Field(
        "adamw", description="adamw8bit: with states of 8 bits, by torchao (the extra adamw8bit)"
    )
    lr: NonNegativeFloat = Field(1e-6, description="peak learning rate")
    critic_lr: NonNegativeFloat | None = Field(None, description="default: lr")
    lr_schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="after the warm-up")
    lr_warmup_steps: NonNegative = Field(0, description="steps in which the rate rises linearly to lr")
    lr_min_ratio: Fraction = Field(0.0, description="where linear and cosine end, as a share of lr")
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = Field(0.0, description="of matrices; norms and biases have none")
    max_grad_norm: PositiveFloat | None = Field(1.0, description="gradients are clipped to this norm; null: not")
    router_aux_coef: NonNegativeFloat | None = Field(
        0.0, description="mixture of experts: coefficient of the load-balance loss; null: the checkpoint's"
    )
    micro_batch_tokens: Positive | Literal["auto"] = Field(
        16_384, description="distinct tokens of a forward pass, a prompt's once; auto: as many as fit in the memory"
    )
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="of the forward pass; masters are float32")
    sharding: Literal["replicate", "shard"] = Field(
        "replicate", description="shard: FSDP2; replicate: plain data parallel"
    )
    cpu_offload: bool = Field(
        False, description="with sharding: shard, keep parameters, gradients and optimiser states in the host's memory"
    )
    recompute: Literal["none", "selective", "full"] = Field(
        "none", description="activations computed again in the backward pass: none, the cheap ones, or whole layers"
    )
    offload_activations: bool = Field(False, description="activations wait for the backward pass in the host's memory")
    compile: bool = Field(False, description="compile the layers of training with torch.compile")
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    deterministic: bool = Field(True, description="ask the device for repeatable operators")


class RewardConfig(Section):
    """How responses are scored."""

    function: str = Field(
        "auto",
        description="a name, `module:function` or `file.py:function`; auto: the source's scorer or exact_match",
    )
    timeout_s: PositiveFloat = Field(10.0, description="time of one call; a call that takes longer costs its sample")
    workers: Positive = Field(1, description="reward processes per worker")
    params: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of the function")


class EnvironmentConfig(Section):
    """Multi-turn environments."""


class EvaluationConfig(Section):
    """Greedy evaluation on the held-out rows."""

    every: NonNegative = Field(0, description="steps between evaluations; 0: only at the end")
    at_end: bool = Field(True, description="after the last step")


class CheckpointConfig(Section):
    """Checkpoints: every so many steps, at the end, and when the run is asked to stop."""

    every: NonNegative = Field(0, description="steps between checkpoints; 0: none but the last")
    keep: Positive = Field(2, description="newest checkpoints that stay")
    save_last: bool = Field(True, description="write one after the last step")


class LoggingConfig(Section):
    """What a run writes beside its metrics."""

    tensorboard: bool = Field(True, description="event files")
    trace: bool = Field(True, description="a trace of every node")
    report: bool = Field(True, description="the report page")
    samples_every: NonNegative = Field(10, description="steps between sample files; 0: none")
    samples_per_step: Positive = Field(32, description="samples in a file")


class Config(Section):
    """A run. `extends` and `warmup` are resolved by the loader."""

    name: str = Field("run", description="of the run; a part of its directory's name")
    seed: NonNegative = Field(0, description="of weights made from scratch, of the data and of sampling")
    device: str = Field("auto", description="auto, or a back end's name, such as cpu")
    workers: Positive = Field(1, description="worker processes")
    placement: Literal["colocated", "disaggregated"] = Field(
        "colocated", description="colocated: every worker generates and trains; disaggregated: some do each"
    )
    threads_per_worker: Positive | None = Field(None, description="default: cores / workers")
    timeout_s: PositiveFloat = Field(600.0, description="longest wait for another worker")
    run_dir: str | None = Field(None, description="default: runs/NAME-DATE-TIME")
    model: ModelConfig = Field(default_factory=ModelConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    pipeline: str = Field("grpo", description="a shipped pipeline's name, or a file")
    algorithm: AlgorithmConfig = Field(default_factory=AlgorithmConfig)
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    reward: RewardConfig = Field(default_factory=RewardConfig)
    environment: EnvironmentConfig = Field(default_factory=EnvironmentConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    logging: LoggingConfig = Field(default_factory=LoggingConfig)
