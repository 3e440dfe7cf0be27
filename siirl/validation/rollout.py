"""L4: the built-in engine on the device, against a loop that computes every token anew on the host."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from siirl.data.batch import Batch, Ragged
from siirl.device.collectives import Collectives
from siirl.errors import SiirlError
from siirl.model.decoder import Decoder, PackedAttention
from siirl.rollout.contract import ABORTED, LENGTH, STOP, Completions, SleepLevel
from siirl.rollout.engine import NativeEngine
from siirl.rollout.sampling import Sampling
from siirl.validation import tiny
from siirl.validation.checks import Broken, check, require
from siirl.validation.subject import Subject
from siirl_kernels import bind
from siirl_kernels.packing import PackedSequences

PROMPTS = [[5, 6, 7], [9], [11, 12, 13, 14, 15, 16, 17], [20, 21], [40, 41, 42, 43]]
GROUP = 3
TOKENS = 20
# Logits whose two largest are nearer than this may be told apart either way.
MARGIN = 1e-3
# Largest difference of a log-prob, and the mean's, that rollout and training may have.
AGREEMENT = {"float32": (1e-4, 1e-5), "bfloat16": (0.3, 0.03)}


@dataclass(frozen=True)
class Token:
    """One token of the plain loop: its id, its log-prob, and by how much it is the likeliest."""

    id: int
    log_prob: float
    margin: float


@contextmanager
def reference_kernels(subject: Subject) -> Iterator[None]:
    """The references alone, for computing on the host."""
    bind([])
    try:
        yield
    finally:
        bind(subject.backend.kernel_order())


@torch.no_grad()
def plain_greedy(model: Decoder, prompt: Sequence[int], count: int, forbidden: Sequence[int] = ()) -> list[Token]:
    """Decode greedily on the host without cache or batch: one whole forward pass per token."""
    tokens, found = list(prompt), []
    for _ in range(count):
        sequence = PackedSequences((len(tokens),), torch.device("cpu"))
        hidden = model(torch.tensor(tokens), sequence.positions, PackedAttention(sequence))
        log_p = torch.log_softmax(model.logits(hidden[-1:])[0].double(), dim=-1)
        allowed = log_p.index_fill(0, torch.tensor(forbidden, dtype=torch.int64), -torch.inf)
        best = allowed.topk(2)
        chosen = int(best.indices[0])
        found.append(Token(chosen, float(log_p[chosen]), float(best.values[0] - best.values[1])))
        tokens.append(chosen)
    return found


def engine(subject: Subject, model: Decoder | None = None, dtype: torch.dtype = torch.float32) -> NativeEngine:
    module = (model or tiny.decoder()).to(subject.backend.device(), dtype)
    return NativeEngine(module, [tiny.EOS], lambda ids: " ".join(map(str, ids)))


def generate(
    made: NativeEngine, sampling: Sampling, prompts: Sequence[Sequence[int]] = PROMPTS, group: int = 1
) -> Completions:
    ids = torch.arange(len(prompts) * group) * 7 + 3
    return made.generate(prompts, ids, sampling, group, seed=0)


def _compare(done: Completions, plain: Sequence[Sequence[Token]]) -> float:
    """Require the plain loop's tokens up to where two are equally likely; the largest difference of a log-prob."""
    worst, compared = 0.0, 0
    for row, (ids, log_probs, tokens) in enumerate(
        zip(done.response_ids.rows(), done.log_probs.rows(), plain, strict=True)
    ):
        for place, (found, log_prob, token) in enumerate(zip(ids.tolist(), log_probs.tolist(), tokens, strict=True)):
            if token.margin < MARGIN:
                break
            require(found == token.id, f"prompt {row}, token {place} is {found}, the plain loop has {token.id}")
            worst, compared = max(worst, abs(log_prob - token.log_prob)), compared + 1
    require(compared > TOKENS, f"{compared} tokens are far enough from a tie to compare")
    return worst


@check("L4", "greedy decoding with cache and batch gives the tokens of a plain loop on the host")
def greedy_parity(subject: Subject) -> None:
    with reference_kernels(subject):
        plain = [plain_greedy(tiny.decoder(), prompt, TOKENS, [tiny.EOS]) for prompt in PROMPTS]
    done = generate(engine(subject), Sampling(TOKENS, temperature=0.0, ignore_eos=True))
    subject.measure("largest difference of a log-prob", _compare(done, plain), 1e-4)


@check("L4", "new weights are what the next response is drawn with, and the version says so")
def weights_become_visible(subject: Subject) -> None:
    made, other = engine(subject), tiny.decoder(seed=8)
    sampling = Sampling(TOKENS, temperature=0.0, ignore_eos=True)
    before = generate(made, sampling)
    made.update_weights(((name, p.detach().to(subject.backend.device())) for name, p in other.named_parameters()), 5)
    after = generate(made, sampling)
    require(
        (before.version, after.version) == (0, 5), f"the versions are {before.version} and {after.version}, not 0 and 5"
    )
    require(
        not torch.equal(before.response_ids.values, after.response_ids.values),
        "the responses are those of the old weights",
    )
    with reference_kernels(subject):
        plain = [plain_greedy(other, prompt, TOKENS, [tiny.EOS]) for prompt in PROMPTS]
    subject.measure("largest difference of a log-prob", _compare(after, plain), 1e-4)


def _trained_log_probs(subject: Subject, done: Completions, dtype: str, temperature: float) -> Tensor:
    """What training computes for the same responses."""
    rows = [torch.tensor(prompt) for prompt in PROMPTS for _ in range(GROUP)]
    batch = Batch(
        {
            "prompt_ids": Ragged.from_lists(rows, torch.int64),
            "response_ids": done.response_ids,
            "slot": torch.arange(len(PROMPTS)).repeat_interleave(GROUP),
        }
    )
    config = tiny.settings(dtype=dtype)
    config.rollout.temperature = temperature
    config.data.prompts_per_step = len(PROMPTS)
    return tiny.engine(config, subject.backend, Collectives.single()).log_probs(batch, 1).values


def dtypes(subject: Subject) -> list[tuple[str]]:
    return [(name,) for name in AGREEMENT if name in subject.backend.capabilities().compute_dtypes]


@check("L4", "log-probs of rollout are those of training", dtypes)
def log_probs_agree(subject: Subject, dtype: str) -> None:
    for temperature in (1.0, 0.7):
        made = engine(subject, dtype=getattr(torch, dtype))
        done = generate(made, Sampling(TOKENS, temperature), group=GROUP)
        gap = (done.log_probs.values - _trained_log_probs(subject, done, dtype, temperature)).abs()
        most, mean = AGREEMENT[dtype]
        subject.measure(f"largest difference at temperature {temperature}", float(gap.max()), most)
        subject.measure(f"mean difference at temperature {temperature}", float(gap.mean()), mean)


@check("L4", "a response ends at its end token or its longest length, and its finish reason says which")
def endings(subject: Subject) -> None:
    made = engine(subject)
    done = generate(made, Sampling(TOKENS, temperature=1.5), PROMPTS * 8, GROUP)
    reasons = done.finish_reason.tolist()
    for row, (ids, reason) in enumerate(zip(done.response_ids.rows(), reasons, strict=True)):
        inside, last = tiny.EOS in ids[:-1].tolist(), int(ids[-1])
        require(0 < len(ids) <= TOKENS, f"response {row} has {len(ids)} tokens of {TOKENS}")
        require(not inside, f"response {row} goes on behind its end token")
        expected = STOP if last == tiny.EOS else LENGTH
        require(reason == expected, f"response {row} ends in token {last} with reason {reason}")
        require(expected == STOP or len(ids) == TOKENS, f"response {row} ends after {len(ids)} tokens without a reason")
    require(set(reasons) == {STOP, LENGTH}, "not both endings occur: the check sees nothing")
    never = generate(made, Sampling(TOKENS, temperature=1.5, ignore_eos=True), PROMPTS * 8, GROUP)
    require(bool((never.response_ids.values != tiny.EOS).all()), "an end token is drawn though it is to be ignored")
    require(set(never.response_ids.lengths.tolist()) == {TOKENS}, "a response is short though ends are to be ignored")


@check("L4", "a sampled response does not depend on the batch it is drawn in")
def batch_independence(subject: Subject) -> None:
    sampling = Sampling(TOKENS, temperature=1.5)  # many responses end early, and others take their places
    ids = torch.arange(len(PROMPTS) * GROUP) * 7 + 3
    together = engine(subject).generate(PROMPTS, ids, sampling, GROUP, seed=0)
    differing = 0
    for number, prompt in enumerate(PROMPTS):
        rows = slice(number * GROUP, (number + 1) * GROUP)
        alone = engine(subject).generate([prompt], ids[rows], sampling, GROUP, seed=0)
        for a, b in zip(alone.response_ids.rows(), together.response_ids.rows()[rows], strict=True):
            differing += not torch.equal(a, b)
    # a draw that lands within rounding of the edge between two tokens may fall on either side of it
    subject.measure("responses that differ", differing, 1)
    again = engine(subject).generate(PROMPTS, ids, sampling, GROUP, seed=0)
    require(torch.equal(again.response_ids.values, together.response_ids.values), "the same call draws other tokens")


@check("L4", "tokens are drawn as often as their probability says")
def frequencies(subject: Subject) -> None:
    count, temperature = 4096, 0.8
    done = engine(subject).generate([PROMPTS[0]], torch.arange(count), Sampling(1, temperature), count, seed=1)
    drawn = torch.bincount(done.response_ids.values, minlength=tiny.VOCABULARY).double()
    with reference_kernels(subject), torch.no_grad():
        model, sequence = tiny.decoder(), PackedSequences((len(PROMPTS[0]),), torch.device("cpu"))
        hidden = model(torch.tensor(PROMPTS[0]), sequence.positions, PackedAttention(sequence))
        p = torch.softmax(model.logits(hidden[-1:])[0].double() / temperature, dim=-1)
    # Pearson's chi-squared over the tokens expected five times or more, the others as one; within five deviations
    often = p * count >= 5
    expected = torch.cat((p[often] * count, (p[~often].sum() * count)[None]))
    seen = torch.cat((drawn[often], drawn[~often].sum()[None]))
    freedom = len(expected) - 1
    statistic = float(((seen - expected).square() / expected.clamp(min=1)).sum())
    subject.measure("chi-squared over its degrees of freedom", statistic / freedom, 1 + 5 * (2 / freedom) ** 0.5)


def sleep_levels(subject: Subject) -> list[tuple[SleepLevel]]:
    return [(2,)] if subject.backend.memory().unified else [(1,), (2,)]  # weights kept on the host free none of it


def _require_refused(made: NativeEngine, state: str) -> None:
    try:
        generate(made, Sampling(1))
    except SiirlError:
        return
    raise Broken(f"an engine {state} generates")


@check("L4", "an engine that sleeps gives back its weights and its cache, and wakes as it was", sleep_levels)
def sleep_frees_memory(subject: Subject, level: SleepLevel) -> None:
    module = tiny.decoder(intermediate_size=2**15).to(subject.backend.device())
    # every token ends a response, so that room for long ones is cheap to make
    made = NativeEngine(module, range(tiny.VOCABULARY), lambda ids: "", own_weights=True)
    sampling, group = Sampling(2000, temperature=0.0), 8
    weights = {name: p.detach().to("cpu", copy=True) for name, p in module.named_parameters()}
    before = generate(made, sampling, group=group)
    assert made.cache is not None
    cache = made.cache.nbytes
    with torch.inference_mode():
        made.cache.zero_()  # memory that nothing was written to is not there yet on a host
    subject.backend.empty_cache()
    awake = subject.backend.memory()
    made.sleep(level)
    subject.backend.empty_cache()
    freed = awake.allocated - subject.backend.memory().allocated
    owned = sum(w.nbytes for w in weights.values()) + cache
    slack = 0.2 if awake.unified else 0.0
    subject.measure("share of weights and cache still in use", 1 - freed / owned, slack)
    _require_refused(made, "that sleeps")
    made.wake()
    if level == 2:
        _require_refused(made, "whose weights were dropped")
        made.update_weights(((name, w.to(subject.backend.device())) for name, w in weights.items()), 1)
    after = generate(made, sampling, group=group)
    require(torch.equal(before.response_ids.values, after.response_ids.values), "it wakes and draws other tokens")
    require(torch.equal(before.log_probs.values, after.log_probs.values), "it wakes and has other log-probs")


@check("L4", "responses that are aborted end at once, and the others as if nothing had been")
def abort(subject: Subject) -> None:
    ids = torch.arange(len(PROMPTS) * GROUP) * 7 + 3
    running, waiting = ids[1:2], ids[-GROUP:]
    sampling = Sampling(TOKENS, temperature=1.5, ignore_eos=True, stop=("a string that no response has",))
    whole = _aborted(subject, sampling, ids[:0])
    done = _aborted(subject, sampling, torch.cat((running, waiting)))
    wanted = torch.full((len(ids),), LENGTH, dtype=torch.int8)
    require(torch.equal(whole.finish_reason, wanted), f"with none aborted, the reasons are {whole.finish_reason}")
    wanted[1], wanted[-GROUP:] = ABORTED, ABORTED
    require(torch.equal(done.finish_reason, wanted), f"the reasons are {done.finish_reason.tolist()}")
    lengths = done.response_ids.lengths.tolist()
    require(lengths[1] <= 2, f"a response goes on for {lengths[1]} tokens, aborted at the first")
    require(not any(lengths[-GROUP:]), "responses begin though they were aborted before")
    pairs = zip(done.response_ids.rows(), whole.response_ids.rows(), wanted == LENGTH, strict=True)
    differing = sum(not torch.equal(a, b) for a, b, left_alone in pairs if left_alone)
    # one may lie within rounding of the edge between two tokens, in a batch of another size
    subject.measure("other responses that differ", differing, 1)
    everything = _aborted(subject, sampling, None)
    require(set(everything.finish_reason.tolist()) == {ABORTED}, "not all responses end, though all are aborted")


def _aborted(subject: Subject, sampling: Sampling, ids: Tensor | None) -> Completions:
    """Responses of two groups at a time, of which `ids` are aborted by another thread after the first token."""
    drawing, told = threading.Event(), threading.Event()

    def decode_text(tokens: list[int]) -> str:
        drawing.set()
        told.wait()
        return ""

    module = tiny.decoder().to(subject.backend.device())
    made = NativeEngine(module, [tiny.EOS], decode_text, max_sequences=2 * GROUP)

    def tell() -> None:
        drawing.wait()
        made.abort(ids)
        told.set()

    other = threading.Thread(target=tell)
    other.start()
    done = generate(made, sampling, group=GROUP)
    other.join()
    return done
