"""Each way of breaking a device is noticed by the check, and at the level, whose promise it breaks.

Every check that is asked here passes for the unbroken device, as the last test of this file says: a check that always
fails would catch everything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from siirl.device.backend import Backend
from siirl.validation import device_training, world
from siirl.validation.checks import all_checks
from siirl.validation.report import Result
from siirl.validation.run import prepared, run_check
from siirl.validation.subject import Subject
from siirl_cpu import CpuBackend
from siirl_kernels import implementation, registry
from tests.rollout.recording import broken as replays_nothing
from tests.rollout.recording import call_again
from tests.validation import devices, stage_0, wrong_engines, wrong_kernels, wrong_workers

ASKED: set[str] = set()


def loaded(kind: type[Backend]) -> Backend:
    backend = kind()
    backend.load()
    return backend


def ask(subject: Subject, check_id: str) -> Result:
    """One check's result, by its id."""
    level, _, rest = check_id.partition(".")
    name = rest.partition("[")[0]
    check = next(check for check in all_checks() if (check.level, check.name) == (level, name))
    values = dict(check.expand(subject))[check_id]
    return run_check(subject, check, check_id, values, [])


def breaks(subject: Subject, check_id: str, says: str) -> None:
    ASKED.add(check_id)
    result = ask(subject, check_id)
    assert result.status == "failed", f"{check_id} is {result.status}: nobody noticed"
    assert says in result.sentence, result.sentence


STAGE_0 = [
    (stage_0.ProbeImportsTorch, "L0.stage_0", "imports torch"),
    (stage_0.ProbeChangesTheEnvironment, "L0.stage_0", "changes os.environ"),
    (stage_0.FewerDevicesEachTime, "L0.probe", "it changes from"),
    (stage_0.EnvironmentGrows, "L0.bootstrap_env", "once set, it wants other values"),
    (stage_0.NoReference, "L0.contract", "not in the reference"),
    (stage_0.NamedInTheFramework, "L0.vendor_words", "siirl/"),
]

STAGE_1 = [
    (devices.StateNotRestored, "L1.rng_round_trip", "after its state came back"),
    (devices.ForeignStateTaken, "L1.foreign_rng_state", "taken over"),
    (devices.GeneratorSharedWithTheHost, "L1.rng_isolation", "moved though the device has its own"),
    (devices.SeedIgnored, "L1.seed", "elements differ"),
    (devices.MemoryNeverFalls, "L1.memory_accounting", "bytes were freed"),
    (devices.PeakIsOfNow, "L1.memory_peak", "came and went"),
    (devices.EventsInDisorder, "L1.streams_and_events", "20 ms passed between two events"),
    (devices.HalfNotClaimed, "L1.dtype_claims", "computes in float16 within"),
    (devices.GraphsClaimed, "L1.graphs", "what a replay computes"),
    (devices.DeterminismNotSwitched, "L1.determinism", "PyTorch is not told"),
    (devices.CanonicalTransposes, "L1.canonical_layout", "elements differ"),
    (devices.AutocastOfEverything, "L1.autocast", "int32 is taken for possible"),
]


@pytest.mark.parametrize(("kind", "check_id", "says"), STAGE_0 + STAGE_1, ids=lambda x: getattr(x, "__name__", ""))
def test_a_broken_back_end(kind: type[Backend], check_id: str, says: str) -> None:
    backend = loaded(kind)
    with prepared(loaded(CpuBackend), "smoke") as subject:
        subject.backend = backend
        breaks(subject, check_id, says)


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        (devices.without_bfloat16, "no kernel for bfloat16"),
        (devices.products_in_half, "error in float32, roundoffs is"),
    ],
)
def test_a_dtype_that_is_claimed_and_does_not_work(
    broken: Callable[[], AbstractContextManager[None]], says: str
) -> None:
    with prepared(loaded(CpuBackend), "smoke") as subject, broken():
        breaks(subject, "L1.dtype_claims", says)


@pytest.mark.parametrize(("capture", "status"), [(call_again, "passed"), (replays_nothing, "failed")])
def test_a_device_that_records_decode_steps(
    capture: Callable[..., Any], status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with prepared(loaded(CpuBackend), "smoke") as subject:
        assert ask(subject, "L4.recorded_decoding").status == "skipped"
        claimed = replace(subject.backend.capabilities(), graph_capture="inference")
        monkeypatch.setattr(subject.backend, "capabilities", lambda: claimed)
        monkeypatch.setattr(subject.backend, "capture", capture)
        result = ask(subject, "L4.recorded_decoding")
    assert result.status == status, result.sentence
    assert status == "passed" or "responses that differ" in result.sentence


def test_recomputed_dropout_that_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What PyTorch does on a device whose module does not say that it is initialised."""

    def careless(*arguments: Any, **options: Any) -> Any:
        return checkpoint(*arguments, preserve_rng_state=False, **options)

    monkeypatch.setattr(device_training, "checkpoint", careless)
    with prepared(loaded(CpuBackend), "smoke") as subject:
        breaks(subject, "L1.checkpointed_dropout", "error of gradients is")


def test_modules_that_move_by_making_new_parameters() -> None:
    """What PyTorch does on a device whose tensors cannot take the place of a host's."""
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with prepared(loaded(CpuBackend), "smoke") as subject:
            breaks(subject, "L1.parameters_move", "makes a new parameter")
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


KERNELS = [
    (
        wrong_kernels.mask_transposed,
        "packed_attention",
        "accuracy[packed_attention-native-float32]",
        "of what is allowed",
    ),
    (
        wrong_kernels.sequences_leak,
        "packed_attention",
        "accuracy[packed_attention-native-float32]",
        "of what is allowed",
    ),
    (wrong_kernels.one_unit_off, "rms_norm", "accuracy[rms_norm-native-bfloat16]", "as a whole"),
    (wrong_kernels.eps_forgotten, "rms_norm", "accuracy[rms_norm-native-float32]", "of what is allowed"),
    (wrong_kernels.returns_float32, "rms_norm", "accuracy[rms_norm-native-bfloat16]", "returns torch.float32"),
    (wrong_kernels.wrong_gradient, "swiglu", "accuracy[swiglu-native-float32]", "backward 0"),
    (
        wrong_kernels.temperature_ignored,
        "linear_log_prob",
        "accuracy[linear_log_prob-native-float32]",
        "temperature 0.7",
    ),
    (wrong_kernels.entropy_of_base_2, "linear_log_prob", "accuracy[linear_log_prob-native-float32]", "forward 1"),
    (wrong_kernels.sees_later_tokens, "paged_attention", "accuracy[paged_attention-native-float32]", "prompts"),
    (wrong_kernels.bias_forgotten, "linear", "accuracy[linear-native-float32]", "with a bias"),
    (wrong_kernels.log_prob_at_temperature_1, "categorical", "accuracy[categorical-native-float32]", "temperature 0.7"),
    (wrong_kernels.sums_by_rows, "linear", "batch_invariance[linear-invariant]", "row "),
    (wrong_kernels.random_last_bits, "swiglu", "repeatability[swiglu-native]", "elements differ"),
    (wrong_kernels.writes_into_its_argument, "swiglu", "arguments_stay[swiglu-native]", "gate: "),
    (wrong_kernels.depends_on_the_batch, "rope", "batch_invariance[rope-native]", "row 0"),
    (wrong_kernels.even_alone, "swiglu", "honest_predicate[swiglu-native]", "the width must be even"),
]


@pytest.fixture
def own_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(registry, "_ops", {name: dict(functions) for name, functions in registry._ops.items()})
    monkeypatch.setattr(registry, "_predicates", dict(registry._predicates))
    yield
    monkeypatch.undo()
    registry.bind([])


@pytest.mark.usefixtures("own_registry")
@pytest.mark.parametrize(("kernel", "op", "name", "says"), KERNELS, ids=[row[0].__name__ for row in KERNELS])
def test_a_broken_kernel(kernel: Callable[..., Any], op: str, name: str, says: str) -> None:
    backend = loaded(CpuBackend)  # first: what it brings would take the kernel's place
    implementation(op, "invariant" if "-invariant" in name else "native")(kernel)
    with prepared(backend, "smoke") as subject:
        breaks(subject, f"L2.{name}", says)


@pytest.mark.usefixtures("own_registry")
@pytest.mark.parametrize(
    ("predicate", "says"),
    [(wrong_kernels.takes_nothing, "takes no case of its op"), (wrong_kernels.answers_in_turn(), "it answers ")],
    ids=["takes nothing", "answers in turn"],
)
def test_a_dishonest_predicate(predicate: Callable[..., bool], says: str) -> None:
    implementation("swiglu", "native", supports=predicate)(wrong_kernels.REFERENCE["swiglu"])
    with prepared(loaded(CpuBackend), "smoke") as subject:
        breaks(subject, "L2.honest_predicate[swiglu-native]", says)


@pytest.mark.usefixtures("own_registry")
def test_another_kernel_than_the_order_says() -> None:
    implementation("swiglu", "native")(wrong_kernels.REFERENCE["swiglu"])
    with prepared(loaded(CpuBackend), "smoke") as subject:
        registry.bind(subject.backend.kernel_order(), {"swiglu": "torch"})
        breaks(subject, "L2.bound_table", "swiglu is bound to torch, first in order is native")


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
    """Two workers for all of this file."""
    with prepared(loaded(CpuBackend), "smoke") as subject:
        yield subject


WORKERS = [
    ("the maximum is the minimum", "L3.all_reduce[max]", "elements differ"),
    ("a mean that forgets to divide", "L3.all_reduce[mean]", "elements differ"),
    ("a reduction that is not in place", "L3.all_reduce[sum]", "in place"),
    ("the last of an odd number is lost", "L3.library[all_reduce-float32]", "1 elements on worker"),
    ("the group is ignored", "L3.groups", "groups [[0], [1]]"),
    ("segments in another order", "L3.all_to_all", "segments of"),
    ("always from worker 0", "L3.broadcast[float32]", "from worker 1"),
    ("ranks in reverse", "L3.gathers", "ints on worker 0"),
    ("gradients are not summed", "L3.data_parallel[replicate]", "relative error of the weights' change"),
    ("a checkpoint in half precision", "L3.checkpoint", "elements differ"),
    ("a worker dies", "L3.broadcast[float32]", "died with exit status 7"),
    ("a worker hangs", "L3.all_to_all", "hangs: workers [0, 1] gave no answer within 4 s"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "check_id", "says"), WORKERS, ids=[row[0] for row in WORKERS])
def test_a_broken_collective(
    workers: Subject, name: str, check_id: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    workers.world.run(wrong_workers.break_it, name)
    if name == "a worker hangs":
        monkeypatch.setattr(world, "DEADLINE_S", 4.0)
    breaks(workers, check_id, says)
    monkeypatch.undo()
    workers.world.run(wrong_workers.mend)
    assert ask(workers, check_id).status == "passed"


@pytest.mark.slow
def test_a_dtype_that_the_library_is_said_to_move(workers: Subject) -> None:
    sound, workers.backend = workers.backend, loaded(devices.MoreDtypesMoved)
    try:
        breaks(workers, "L3.library[all_reduce-int16]", "worker 0 raised")
    finally:
        workers.backend = sound


ENGINES = [
    ("stale weights after a sync", "L4.weights_become_visible", "those of the old weights"),
    ("the old version after a sync", "L4.weights_become_visible", "the versions are 0 and 0"),
    ("weights in another layout", "L4.weights_become_visible", "the plain loop has"),
    ("weights that nobody confirms", "L4.weights_are_confirmed", "an update is taken though"),
    ("a checksum of every other number", "L4.weights_checksum_agrees[float32]", "the sign of a number is not"),
    ("end tokens are not seen", "L4.endings", "goes on behind its end token"),
    ("a group's last block that is not copied", "L4.batch_independence", "responses that differ"),
    ("drawn too cold", "L4.frequencies", "chi-squared over its degrees of freedom"),
    ("log-probs without the temperature", "L4.log_probs_agree[float32]", "difference at temperature 0.7"),
    ("a cache kept asleep", "L4.sleep_frees_memory[2]", "share of weights and cache still in use"),
    ("weights kept asleep", "L4.sleep_frees_memory[2]", "share of weights and cache still in use"),
    ("woken without its weights", "L4.sleep_frees_memory[2]", "an engine whose weights were dropped generates"),
    ("one abort of many", "L4.abort", "the reasons are"),
    ("all aborted for some", "L4.abort", "the reasons are"),
    ("advantages not by the deviation", "L5.golden_rollouts", "actor/loss of step 1 off by"),
    ("gradients one per cent too large", "L5.golden_rollouts", "actor/grad_norm of step 1 off by"),
]


@pytest.mark.parametrize(("name", "check_id", "says"), ENGINES, ids=[row[0] for row in ENGINES])
def test_a_broken_engine(name: str, check_id: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for owner, attribute, replacement in wrong_engines.PATCHES[name]:
        monkeypatch.setattr(owner, attribute, replacement)
    with prepared(loaded(CpuBackend), "smoke") as subject:
        breaks(subject, check_id, says)


@pytest.mark.usefixtures("own_registry")
def test_the_unbroken_device_passes_all_of_them(tmp_path: Path) -> None:
    for op, function in wrong_kernels.REFERENCE.items():
        implementation(op, "native")(function)
    asked = {row[1] for row in (*STAGE_0, *STAGE_1, *ENGINES)} | {f"L2.{row[2]}" for row in KERNELS} | ASKED
    with prepared(loaded(CpuBackend), "smoke") as subject:
        for check_id in sorted(asked):
            if not check_id.startswith("L3"):  # each of these is asked again once it is mended
                result = ask(subject, check_id)
                assert result.status == "passed", (check_id, result.sentence)
