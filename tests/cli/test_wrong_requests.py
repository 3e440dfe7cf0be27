"""A wrong request ends in the contract's exit status with one sentence, soon, and without a traceback."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from siirl.device import probe_all

SECONDS = 5.0
ATTEMPTS = 3  # a busy machine can make one attempt slow; a slow command is slow every time

SMALL = """
device: cpu
model: {path: "tiny:qwen3:16:1:128"}
data: {prompts_per_step: 4, max_prompt_tokens: 16}
rollout: {group_size: 2, max_new_tokens: 4}
training: {steps: 1}
"""

NODES = """
nodes:
  - {id: data, op: data, writes: [sample_id, group_id, slot, prompt_ids, row]}
  - {id: rollout, op: rollout, model: actor, reads: [prompt_ids], writes: [response_ids]}
"""


@dataclass(frozen=True)
class Wrong:
    """A command, the files around it, and what it must answer."""

    command: str
    answer: str  # a regular expression
    files: dict[str, str] = field(default_factory=dict)
    status: int = 2
    starts: bool = False  # found out only when the run has begun, which leaves its directory


WRONG = {
    "unknown verb": Wrong("trian run.yaml", "unknown verb 'trian'; did you mean 'train'"),
    "verb left out": Wrong("run.yaml", "unknown verb 'run.yaml'; the verbs are train, plan"),
    "no config": Wrong("train", "missing argument 'CONFIG'"),
    "unknown option": Wrong("train run.yaml --devise cpu", "no such option '--devise'; did you mean '--device'"),
    "option without its value": Wrong("train run.yaml --workers", "'--workers' requires an argument"),
    "no workers": Wrong("train run.yaml --workers 0", "'--workers': 0 is not in the range"),
    "unknown launcher": Wrong("train run.yaml --launcher slurm", "'slurm' is not one of 'local', 'env', 'ray'"),
    "missing file": Wrong("train runn.yaml", r"no such config file: 'runn\.yaml'; did you mean 'run\.yaml'"),
    "misspelt key": Wrong(
        "train run.yaml", r"run\.yaml:2: unknown key 'rollout\.group_sise'; did you mean 'rollout\.group_size'",
        {"run.yaml": "rollout:\n  group_sise: 8\n"},
    ),
    "misspelt key on the command line": Wrong(
        "train run.yaml rollout.group_sise=8", r"unknown key 'rollout\.group_sise'; did you mean 'rollout\.group_size'"
    ),
    "no value": Wrong("train run.yaml training.steps", "'training.steps' is not of the form KEY=VALUE"),
    "wrong type": Wrong(
        "train run.yaml", r"run\.yaml:1: training\.steps is 'many'; it must be a whole number",
        {"run.yaml": "training: {steps: many}\n"},
    ),
    "out of range": Wrong("train run.yaml rollout.top_p=1.5", r"rollout\.top_p is 1\.5; it must be a number"),
    "not YAML": Wrong("train run.yaml", r"run\.yaml:2: is not valid YAML", {"run.yaml": "seed: [1\n"}),
    "key given twice": Wrong(
        "train run.yaml", r"run\.yaml:2: key 'seed' is given twice", {"run.yaml": "seed: 1\nseed: 2\n"}
    ),
    "files that extend each other": Wrong(
        "train run.yaml", r"other\.yaml:1: extends 'run\.yaml', which extends this file again",
        {"run.yaml": "extends: other.yaml\n", "other.yaml": "extends: run.yaml\n"},
    ),
    "warm-up that sets the workers": Wrong(
        "train run.yaml", r"run\.yaml:1: a warm-up cannot set 'workers'", {"run.yaml": "warmup: [{workers: 2}]\n"}
    ),
    "unknown pipeline": Wrong("train run.yaml pipeline=grop", "no such pipeline: 'grop'; did you mean 'grpo'"),
    "unknown device": Wrong("train run.yaml --device cpi", "unknown device 'cpi'.*; did you mean 'cpu'"),
    "device that is not there": Wrong(
        "train run.yaml --device ABSENT", "device 'ABSENT' is not usable here: .+", status=3
    ),
    "device of the config that is not there": Wrong(
        "train run.yaml device=ABSENT",
        "device 'ABSENT', which the configuration names, is not usable here: .+",
        status=3,
    ),
    "cycle": Wrong(
        "train run.yaml pipeline=p.yaml", r"p\.yaml:5: node 'a': the nodes wait for each other in a cycle: a → b → a",
        {"p.yaml": NODES + "  - {id: a, op: sync_weights, model: actor, after: [b]}\n"
                           "  - {id: b, op: sync_weights, model: actor, after: [a]}\n"},
    ),
    "field that nobody writes": Wrong(
        "train run.yaml pipeline=p.yaml",
        r"p\.yaml:5: node 'reward': reads 'responses', which no node writes; did you mean 'response_ids'",
        {"p.yaml": NODES + "  - {id: reward, op: reward, writes: [reward, failed],"
                           " reads: {prompt_ids: prompt_ids, response_ids: responses, row: row}}\n"},
    ),
    "unknown op": Wrong(
        "train run.yaml pipeline=p.yaml", r"p\.yaml:5: node 'x': .*'rewart'.*did you mean 'reward'",
        {"p.yaml": NODES + "  - {id: x, op: rewart}\n"},
    ),
    "unknown key in a condition": Wrong(
        "train run.yaml pipeline=p.yaml", r"p\.yaml:5: node 'x': .*'training\.step'.*did you mean 'training\.steps'",
        {"p.yaml": NODES + "  - {id: x, op: sync_weights, model: actor, when: training.step > 3}\n"},
    ),
    "fewer prompts than workers": Wrong(
        "train run.yaml data.prompts_per_step=1 --workers 2",
        r"data\.prompts_per_step is 1, fewer than the 2 workers; set data\.prompts_per_step=2 or workers=1",
    ),
    "mini-batches that do not fit": Wrong(
        "train run.yaml algorithm.mini_batches=3", r"algorithm\.mini_batches=3 does not divide; .*mini_batches=2"
    ),
    "unknown advantage": Wrong("train run.yaml algorithm.advantage=grop", "'grop'.*; did you mean 'grpo'"),
    "adapters on layers that are cut": Wrong(
        "train run.yaml --workers 2 model.lora.rank=4 training.parallel.tensor=2", "set model.lora.rank=0 or training"
    ),
    "compiled layers that are cut": Wrong(
        "train run.yaml --workers 2 training.compile=true training.parallel.tensor=2",
        "set training.compile=false or training.parallel.tensor=1",
    ),
    "unknown policy loss": Wrong("train run.yaml algorithm.policy_loss=ppo_clop", "did you mean 'ppo_clip'"),
    "unknown reward": Wrong("train run.yaml reward.function=exact_mach", "'exact_mach'.*; did you mean 'exact_match'"),
    "missing data file": Wrong("train run.yaml data.source=rows.jsonl", r"rows\.jsonl"),
    "empty dataset": Wrong("train run.yaml data.source=rows.jsonl", r"rows\.jsonl.* (no|empty)", {"rows.jsonl": ""}),
    "row without a prompt": Wrong(
        "train run.yaml data.source=rows.jsonl", r"rows\.jsonl.*1.*'prompt'", {"rows.jsonl": '{"question": "1+1="}\n'}
    ),
    "prompt longer than the limit": Wrong(
        "train run.yaml data.source=rows.jsonl", r"data\.max_prompt_tokens",
        {"rows.jsonl": '{"prompt": "' + "1+" * 100 + '1=", "answer": "101"}\n'}, starts=True,
    ),
    "missing model": Wrong("train run.yaml model.path=./nowhere", "nowhere"),
    "unknown kind of tiny model": Wrong("train run.yaml model.path=tiny:qwen4:16:1:128", "qwen4.*did you mean 'qwen"),
    "nothing to resume": Wrong("train run.yaml --resume --run-dir nothing", "nothing"),
    "report of nothing": Wrong("report nowhere", "nowhere is not a run's directory"),
    "plan of a missing file": Wrong("plan runn.yaml", r"no such config file: 'runn\.yaml'"),
    "generate without a prompt": Wrong("generate run.yaml", "missing option '--prompt'"),
    "generate with an empty prompt": Wrong("generate run.yaml --prompt=", "--prompt is empty"),
    "generate with a missing model": Wrong("generate ./nowhere --prompt 1+1=", "nowhere"),
}  # fmt: skip


def absent_device() -> str:
    """A device that is known and not usable here; no machine has both kinds."""
    return next(name for name, probe in probe_all().items() if not probe.available)


# those that start workers have their time measured where nothing runs beside them
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.alone] * wrong.starts) for name, wrong in WRONG.items()]
)
def test_a_wrong_request_is_answered_in_one_sentence(name: str, siirl, tmp_path: Path) -> None:
    wrong = WRONG[name]
    for file, text in {"run.yaml": SMALL, **wrong.files}.items():
        (tmp_path / file).write_text(text)
    device = absent_device() if "ABSENT" in wrong.command else ""
    before = set(tmp_path.iterdir())
    for _ in range(ATTEMPTS):
        done = siirl(*wrong.command.replace("ABSENT", device).split())
        assert "Traceback" not in done.stderr + done.stdout
        assert len(done.stderr.splitlines()) == 1, done.stderr
        assert done.stderr.startswith("siirl: error: ")
        assert re.search(wrong.answer.replace("ABSENT", device), done.stderr), done.stderr
        assert done.status == wrong.status
        if done.seconds < SECONDS:
            break
    assert done.seconds < SECONDS
    assert wrong.starts or set(tmp_path.iterdir()) == before, "a refused request leaves nothing behind"


def test_the_traceback_is_there_for_who_asks(siirl) -> None:
    done = siirl("train", "nowhere.yaml", SIIRL_DEBUG="1")
    assert "Traceback" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("siirl: error: no such config file: 'nowhere.yaml'")
    assert done.status == 2
