"""L4: decode steps that are recorded and replayed, against the same steps launched operator by operator."""

from __future__ import annotations

from siirl.rollout.contract import Completions
from siirl.rollout.engine import NativeEngine
from siirl.rollout.graphs import recorder
from siirl.rollout.sampling import Sampling
from siirl.validation import tiny
from siirl.validation.checks import NotApplicable, check
from siirl.validation.rollout import GROUP, TOKENS, engine, generate
from siirl.validation.subject import Subject


@check("L4", "decode steps that are recorded draw what launched ones draw, with new weights and after sleep too")
def recorded_decoding(subject: Subject) -> None:
    capture = recorder(subject.backend, wanted=True)
    if capture is None:
        raise NotApplicable("the device records no graphs")
    module = tiny.decoder().to(subject.backend.device())
    recorded = NativeEngine(module, [tiny.EOS], lambda ids: "", own_weights=True, capture=capture)
    launched = engine(subject)
    greedy, late = Sampling(TOKENS, temperature=0.0, ignore_eos=True), Sampling(3 * TOKENS, temperature=1.5)
    for sampling in (greedy, late):
        _compare(
            subject, sampling, generate(recorded, sampling, group=GROUP), generate(launched, sampling, group=GROUP)
        )
    weights = [(name, p.detach().to(subject.backend.device())) for name, p in tiny.decoder(seed=8).named_parameters()]
    for made in (recorded, launched):
        made.update_weights(weights, 1)
    _compare(subject, late, generate(recorded, late, group=GROUP), generate(launched, late, group=GROUP))
    recorded.sleep()
    recorded.wake()
    _compare(subject, late, generate(recorded, late, group=GROUP), generate(launched, late, group=GROUP))


def _compare(subject: Subject, sampling: Sampling, done: Completions, other: Completions) -> None:
    differing, largest = 0, 0.0
    rows = zip(done.response_ids.rows(), other.response_ids.rows(), strict=True)
    for (ids, others), a, b in zip(rows, done.log_probs.rows(), other.log_probs.rows(), strict=True):
        if ids.tolist() == others.tolist():
            largest = max(largest, float((a - b).abs().max()))
        else:
            differing += 1
    # a recorded batch is padded: a draw within rounding of the edge between two tokens may fall on either side of it
    subject.measure(f"responses that differ at temperature {sampling.temperature}", differing, 1)
    subject.measure(f"largest difference of a log-prob at temperature {sampling.temperature}", largest, 1e-4)
