"""Whole steps of GRPO, as `siirl train` runs them, against a script that does the same by hand.

A step: 10 prompts of arithmetic with 4 responses of 8 tokens each; rewards in a process beside, as in any run; one
update. The script generates, scores, normalises within groups and updates in one function, without a plan, a batch, a
reward process or metrics; with two workers it averages gradients over them.
"""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path

import torch

from siirl.bench import plain, setting
from siirl.bench.counters import Counted, count, total
from siirl.bench.measure import Measure, Rate
from siirl.bench.world import World
from siirl.config.loader import Resolved, Stage
from siirl.config.schema import Config
from siirl.device.backend import Backend
from siirl.device.collectives import Collectives
from siirl.model.decoder import Decoder
from siirl.model.load import load_model
from siirl.model.tokenizer import decode, encode_prompt
from siirl.worker.run import RunWorker

MODEL = "tiny:qwen3:128:2:99"
PROMPTS, GROUP, NEW_TOKENS, PROMPT = 10, 4, 8, 4
LR = 1e-8  # the work of a step stays what it is


def recipe(workers: int) -> Config:
    """All pairs of digits make ten steps of an epoch, so no step has a prompt twice."""
    return Config.model_validate(
        {
            "workers": workers,
            "model": {"path": MODEL},
            "data": {
                "source": "arithmetic:addition?digits=1",
                "prompts_per_step": PROMPTS,
                "max_prompt_tokens": PROMPT,
            },
            "rollout": {"group_size": GROUP, "max_new_tokens": NEW_TOKENS, "ignore_eos": True},
            "training": {"steps": 10**9, "lr": LR},
            "evaluation": {"at_end": False},
            "logging": {"tensorboard": False, "trace": False, "samples_every": 0},
        }
    )


class Steps:
    """One worker's steps, its own and the script's; its files go to a directory that ends with the process."""

    def __init__(self, backend: Backend, collectives: Collectives) -> None:
        self._backend, self._collectives, self._stack = backend, collectives, ExitStack()
        directory = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
        resolved = Resolved(Path("bench"), (Stage("main", recipe(collectives.size)),))
        run = RunWorker(resolved, directory, backend, collectives, resume=False)
        self._worker, _, self._number = self._stack.enter_context(run.open_stage(0))
        self._script = Script(backend, collectives)

    def candidate(self) -> None:
        """A step of the recipe."""
        self._number += 1
        self._worker.run_step(self._number)
        self._worker.reduce_metrics()

    def reference(self) -> None:
        """A step of the script."""
        self._script.step()

    def counted(self) -> Counted:
        """The counters of the third step: the first makes the optimiser's state."""
        self.candidate()
        self.candidate()
        return count(self.candidate, self._backend)

    def close(self) -> None:
        self._stack.close()


class Script:
    """A step by hand, on this worker's share of the prompts."""

    def __init__(self, backend: Backend, collectives: Collectives) -> None:
        loaded = load_model(MODEL)
        assert isinstance(loaded.model, Decoder)
        self._tokenizer, self._device = loaded.tokenizer, backend.device()
        self._model = plain.PlainDecoder(loaded.model.to(self._device))
        self._trainer = plain.PlainTrainer(self._model, LR, collectives)
        questions = range(collectives.rank, PROMPTS, collectives.size)
        prompts = [encode_prompt(self._tokenizer, f"{n}+{n}=") for n in questions for _ in range(GROUP)]
        self._answers = [f"{n + n:02d}" for n in questions for _ in range(GROUP)]
        self._prompts_BL = torch.tensor(prompts, device=self._device)
        self._lengths_B = torch.full((len(prompts),), NEW_TOKENS, device=self._device)

    def step(self) -> None:
        tokens_BL = plain.generate(self._model, self._prompts_BL, NEW_TOKENS, forbidden=setting.END)
        texts = [decode(self._tokenizer, ids) for ids in tokens_BL[:, PROMPT:].tolist()]
        rewards = torch.tensor([float(text == answer) for text, answer in zip(texts, self._answers, strict=True)])
        groups = rewards.view(-1, GROUP)
        scaled = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-6)
        with torch.no_grad():
            old = self._trainer.log_probs(tokens_BL, PROMPT)
        self._trainer.update(tokens_BL, PROMPT, self._lengths_B, old, scaled.flatten().to(self._device))


RATE = Rate(PROMPTS * GROUP * (PROMPT + NEW_TOKENS), "tokens")
AGAINST = "a step by hand in plain PyTorch"


def bench_one_worker(measure_wall: Measure, backend: Backend) -> None:
    steps = Steps(backend, Collectives.single())
    found = steps.counted()
    measure_wall(steps.candidate, steps.reference, RATE, against=AGAINST, pairs=20, counted=lambda: found)
    steps.close()


def bench_two_workers(measure_wall: Measure, backend: Backend) -> None:
    setting.need_devices(backend, 2)
    with World(backend, 2, Steps) as world:
        found = total(world.call("counted"))
        measure_wall(
            lambda: world.call("candidate"),
            lambda: world.call("reference"),
            RATE,
            against=AGAINST,
            pairs=20,
            counted=lambda: found,
        )
