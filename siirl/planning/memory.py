"""Memory of one worker, step by step and term by term, at the longest lengths the configuration allows.

`docs/cost-model.md` has the formulas with their sources. All figures are bytes on the worker's device; where it
computes in the host's memory, the rows of the batch count too.
"""

from __future__ import annotations

from siirl.dag import Step
from siirl.planning.budget import CHUNK, KEPT_CHUNKS, saved_per_token, working_set
from siirl.planning.job import Job
from siirl.planning.shape import Numbers
from siirl.planning.traffic import batch_bytes, moved_bytes
from siirl.rollout.blocks import BLOCK

Terms = dict[str, float]

TERMS = ("weights", "optimiser", "gradients", "rollout", "kv cache", "activations", "head", "buffers")

# Bytes of a parameter's states; of 8 bits with a float32 scale for 256.
STATES = {"adamw": 8.0, "adamw8bit": 2 + 2 * 4 / 256, "sgd": 0.0}
# Elements of a bucket of gradients: `siirl/training/sharding.py`.
BUCKET = 64 * 2**20


def memory_of(job: Job, step: Step) -> Terms:
    """Bytes on a worker while it runs a step, by term; terms of no bytes are left out."""
    terms = _resident(job)
    if step.op in ("log_prob", "value", "update") and not job.cluster.device.unified:
        terms.pop("rollout", None)  # it sleeps
    for name, size in _of_step(job, step).items():
        terms[name] = terms.get(name, 0.0) + size
    return {name: terms[name] for name in TERMS if terms.get(name)}


def _of_step(job: Job, step: Step) -> Terms:
    if step.kind == "redistribute":
        return {"buffers": moved_bytes(job, step).staged}
    if step.op in ("rollout", "evaluate"):
        return _rollout(job)
    if step.op in ("log_prob", "value") and step.model:
        return _forward(job, step.model)
    if step.op == "update" and step.model:
        return _update(job, step.model)
    if step.op == "sync_weights" and (job.sharded or job.training.tensor > 1):
        shape = job.actor
        return {"buffers": 4.0 * max(shape.embedding_parameters, shape.hidden_size * shape.intermediate_size)}
    return {}


def split_parameters(job: Job, model: str) -> tuple[float, float]:
    """Parameters of a model on the fullest worker: of the dense part, of experts.

    Tensor parallelism cuts matrices, pipeline parallelism layers (the first stage has the embedding, the last the
    head), expert parallelism experts; FSDP2's shards are not counted here.
    """
    shape, layout = job.shapes[model], job.training
    if not job.megatron:
        spread = shape.num_layers * shape.expert_parameters
        return job.held(model) - spread / layout.expert, spread / layout.expert
    layers = -(-shape.num_layers // layout.pipeline)
    head = shape.hidden_size if model == "critic" else shape.embedding_parameters
    ends = shape.embedding_parameters + (shape.head_parameters if model != "critic" else shape.hidden_size)
    ends = ends if layout.pipeline == 1 else max(shape.embedding_parameters, head)
    dense = (layers * shape.shared_layer_parameters + ends) / layout.tensor
    experts = layers * shape.expert_parameters / (layout.tensor * layout.expert)
    return dense, experts


def _resident(job: Job) -> Terms:
    """What stays on the device through a step: weights, optimiser states, the rollout engine's copy."""
    terms: Terms = {"weights": 0.0, "optimiser": 0.0}
    states = STATES[job.config.training.optimizer]
    for model in job.resident:
        trained = model in job.trained
        if job.megatron:
            # bf16 weights 2; the distributed optimiser keeps float32 masters and two moments, 12 / data
            dense, experts = split_parameters(job, model)
            terms["weights"] += job.itemsize * (dense + experts)
            if trained:
                copies = job.training.data * job.training.context
                spread = dense / copies + experts / max(1, copies / job.training.expert)
                terms["optimiser"] += (states + (4 if job.itemsize < 4 else 0)) * spread
            continue
        if job.on_host:
            continue
        parts = job.replicas if job.sharded else 1
        terms["weights"] += 4 * (job.held(model) + job.adapters(model)) / parts
        terms["optimiser"] += states * job.held_trainable(model) / parts * trained
    if job.generates and not job.shared_weights:
        terms["rollout"] = job.itemsize * job.actor.parameters / job.rollout.tensor
    if job.cluster.device.unified:
        terms["buffers"] = batch_bytes(job)
    return terms


def cache_rows(job: Job) -> tuple[int, int]:
    """Longest sequences decoded together on one worker, and blocks of its cache: `NativeEngine._state`."""
    rollout, config = job.config.rollout, job.config
    longest = config.data.max_prompt_tokens + rollout.max_new_tokens + rollout.draft_tokens
    rows = min(rollout.max_sequences, job.prompts(job.rollout.data) * job.group)
    row = -(-longest // BLOCK) + 1
    block = BLOCK * job.actor.cache_bytes(job.itemsize) / job.rollout.tensor
    room = int(rollout.cache_fraction * job.cluster.memory(job.workers) // block)
    blocks = max(row, min(rows * row, room))
    return blocks // row, blocks


def _rollout(job: Job) -> Terms:
    shape = job.actor
    rows, blocks = cache_rows(job)
    prompts = min(job.config.rollout.chunk_tokens, job.prompts(job.rollout.data) * job.config.data.max_prompt_tokens)
    logits = rows * shape.vocab_size * (job.itemsize + 3 * 4)  # logits, and softmax, sum and noise in float32
    packed = (
        job.cluster.device.unified and job.config.rollout.engine == "native"
    )  # weights as a host's kernels read them
    return {
        "rollout": float(job.itemsize * shape.parameters * packed),
        "kv cache": blocks * BLOCK * shape.cache_bytes(job.itemsize) / job.rollout.tensor,
        "activations": _working_set(job, "actor", max(rows, prompts)) / job.rollout.tensor,
        "head": logits,
    }


def micro_tokens(job: Job) -> int:
    """Tokens of the largest micro-batch on a worker."""
    config = job.config
    longest = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    samples = config.data.prompts_per_step * job.group / config.algorithm.mini_batches / job.training.data
    return min(job.budget, max(1, round(samples)) * longest)


def micro_batches(job: Job) -> int:
    """Micro-batches of one mini-batch on a worker, when all samples are of mean length."""
    config = job.config
    samples = config.data.prompts_per_step * job.group / config.algorithm.mini_batches / job.training.data
    tokens = samples * (job.lengths.prompt + job.lengths.mean_response)
    return max(1, -(-round(tokens) // job.budget))


def _inner(job: Job) -> int:
    """Workers that share one micro-batch's tokens or heads."""
    return job.training.tensor * job.training.context


def _working_set(job: Job, model: str, tokens: float) -> float:
    return tokens * working_set(job.shapes[model], job.itemsize)


def _logits(job: Job, model: str, *, backward: bool) -> float:
    """Chunks of logits in float32, those kept, and the float32 gradient of the projection."""
    shape = job.shapes[model]
    elements = micro_tokens(job) / _inner(job) * shape.vocab_size / job.training.tensor
    chunk = min(elements, CHUNK)
    if model == "critic":
        return 0.0
    if not backward:
        return 4 * 3 * chunk
    kept = elements if elements <= KEPT_CHUNKS * CHUNK else 0.0
    projection = 0 if job.adapted else 4 * shape.embedding_parameters
    return 4 * (3 * chunk + kept) + projection / job.training.tensor


def _gathered(job: Job, model: str) -> float:
    """What FSDP2 holds whole: embedding, last norm and head through a pass, and two layers at a time."""
    shape = job.shapes[model]
    root = shape.embedding_parameters + shape.head_parameters * (model != "critic") + shape.hidden_size
    return (root + 2 * shape.layer_parameters) / job.training.tensor * job.itemsize if job.sharded else 0.0


def _copies(job: Job) -> bool:
    """Whether bfloat16 passes make copies of float32 weights."""
    return job.itemsize < 4 and not job.sharded and not job.megatron


def _matrices(job: Job, model: str) -> float:
    """Elements of all matrices that a worker multiplies with."""
    shape = job.shapes[model]
    experts = shape.num_layers * shape.expert_parameters / job.training.expert
    used = 3 * shape.num_layers * shape.experts_per_token * shape.hidden_size * shape.expert_size
    head = shape.embedding_parameters if model != "critic" else 0
    return (shape.active_matrices - used + experts + head) / job.training.tensor


def _forward(job: Job, model: str) -> Terms:
    return {
        "activations": _working_set(job, model, micro_tokens(job)) / _inner(job),
        "head": _logits(job, model, backward=False),
        "weights": _gathered(job, model) + (job.itemsize * _matrices(job, model) if _copies(job) else 0.0),
    }


def saved_bytes(job: Job, model: str) -> float:
    """Activations of one micro-batch that wait for the backward pass on the fullest worker."""
    shape, layout, training = job.shapes[model], job.training, job.config.training
    numbers: Numbers = "float32" if job.itemsize == 4 else "bfloat16"
    tokens = micro_tokens(job) / _inner(job)
    if not job.megatron:
        return tokens * saved_per_token(shape, numbers, training, shape.num_layers, job.cluster.device.unified)
    # with a pipeline the first stage holds as many micro-batches as there are stages: all layers of one in sum
    layers = shape.num_layers
    if layout.pipeline > 1:
        layers = -(-shape.num_layers // layout.pipeline) * min(layout.pipeline, micro_batches(job))
    return tokens * (layers * shape.saved_bytes(numbers) + 4 * 4 * shape.hidden_size)


def _update(job: Job, model: str) -> Terms:
    shape, config = job.shapes[model], job.config
    parameters = job.held_trainable(model)
    weights = _gathered(job, model) + (job.itemsize * _matrices(job, model) if _copies(job) else 0.0)
    if job.megatron:
        gradients = 4 * sum(split_parameters(job, model))
    elif job.sharded:
        # gradients wait whole, in float32, until the last micro-batch's backward pass reduces and scatters them
        layer = job.adapters(model) / shape.num_layers if job.adapted else shape.layer_parameters / job.training.tensor
        whole = parameters if micro_batches(job) > 1 else 2 * layer
        gradients = 4 * whole + 4 * parameters / job.replicas * (not job.on_host)
    else:
        gradients = 4 * parameters + (4 * min(parameters, BUCKET) if job.replicas > 1 else 0)
    terms = {
        "weights": weights,
        "gradients": gradients,
        "activations": saved_bytes(job, model) + _working_set(job, model, micro_tokens(job)) / _inner(job),
        "head": _logits(job, model, backward=True),
    }
    if config.training.optimizer == "adamw" and not job.cluster.device.unified and not job.on_host:
        # the batched form of AdamW has one intermediate of the parameters' size
        terms["optimiser"] = 4 * parameters / (job.replicas if job.sharded else 1) * (not job.megatron)
    return terms
