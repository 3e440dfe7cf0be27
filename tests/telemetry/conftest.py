"""A realistic run directory, and headless Chromium driven over its debugging pipe."""

from __future__ import annotations

import json
import math
import os
import random
import select
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = """
    --headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
    --disable-component-update --disable-sync --hide-scrollbars --remote-debugging-pipe
"""

NODES = ("data", "rollout", "reward", "advantage", "redistribute.1", "update", "sync", "evaluate")
SECONDS = (0.01, 0.9, 0.12, 0.004, 0.05, 0.6, 0.02, 0.2)


class Browser:
    """One headless Chromium with one page open at a time."""

    def __init__(self, profile: Path) -> None:
        assert CHROMIUM is not None
        commands_out, self._commands = os.pipe()
        self._answers, answers_in = os.pipe()
        # The browser reads commands from descriptor 3 and writes answers to 4.
        shell = f'exec "$0" "$@" 3<&{commands_out} 4>&{answers_in}'
        command = ["/bin/bash", "-c", shell, CHROMIUM, *FLAGS.split(), f"--user-data-dir={profile}", "about:blank"]
        log = (profile.parent / "chromium.log").open("wb")
        self._process = subprocess.Popen(command, pass_fds=(commands_out, answers_in), stdout=log, stderr=log)
        os.close(commands_out)
        os.close(answers_in)
        self._number = 0
        self._pending = b""
        self._session: str | None = None
        self._target: str | None = None
        self.complaints: list[str] = []
        self.requests: list[str] = []

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send one command and return its answer."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer["error"]
                return answer["result"]

    def open(self, page: Path) -> None:
        """Load a file and wait until it is drawn; console messages, exceptions and requests are collected."""
        self._session = None
        if self._target:
            self.call("Target.closeTarget", targetId=self._target)
        self.complaints.clear()
        self.requests.clear()
        self._target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=self._target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.resize(1280, 900)
        self.prefer("light")
        self.call("Page.navigate", url=page.resolve().as_uri())
        deadline = time.monotonic() + 30
        while not self.run("location.protocol === 'file:' && document.readyState === 'complete'"):
            assert time.monotonic() < deadline, "the page did not load"
        self.settle()

    def resize(self, width: int, height: int) -> None:
        """Set the size of the window, in CSS pixels."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def prefer(self, scheme: str) -> None:
        """Set the colour scheme that the user prefers: `dark` or `light`."""
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def settle(self) -> None:
        """Wait until what was asked for is on the screen."""
        self.run("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done(0))))")

    def run(self, expression: str) -> Any:
        """Return the value of a JavaScript expression."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def each(self, selector: str, expression: str) -> list[Any]:
        """Return the value of an expression over `node` for every element that the selector finds."""
        return self.run(f"[...document.querySelectorAll({json.dumps(selector)})].map((node) => {expression})")

    def texts(self, selector: str) -> list[str]:
        """Return the text of every element that the selector finds."""
        return self.each(selector, "node.textContent")

    def enter(self, selector: str, value: str) -> None:
        """Give an input or a select a value, as a user does."""
        events = "for (const name of ['input', 'change']) node.dispatchEvent(new Event(name));"
        self.each(selector, f"{{ node.value = {json.dumps(value)}; {events} }}")

    def key(self, name: str) -> None:
        """Press a key, such as `ArrowLeft`."""
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=name, code=name)

    def hover(self, x: float, y: float) -> None:
        """Move the mouse to a place of the window."""
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        self.settle()

    def close(self) -> None:
        """End the browser."""
        self._session = None
        self.call("Browser.close")
        self._process.wait(20)
        os.close(self._commands)
        os.close(self._answers)

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._pending:
            assert select.select([self._answers], [], [], 60)[0], "the browser does not answer"
            data = os.read(self._answers, 1 << 20)
            assert data, "the browser ended"
            self._pending += data
        whole, self._pending = self._pending.split(b"\0", 1)
        message = json.loads(whole)
        method, params = message.get("method"), message.get("params", {})
        if method in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
            self.complaints.append(json.dumps(params)[:1000])
        if method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        return message


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("the page is opened in Chromium, which is not installed here")
    browser = Browser(tmp_path_factory.mktemp("chromium") / "profile")
    yield browser
    browser.close()


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a run directory as a run with a warm-up leaves it."""

    def make(
        steps: int = 60, warmup: int = 40, workers: int = 2, extra_samples: list[dict[str, Any]] | None = None
    ) -> Path:
        run_dir = tmp_path / "arithmetic-quickstart"
        (run_dir / "samples").mkdir(parents=True)
        (run_dir / "traces").mkdir()
        chance = random.Random(0)
        stages = {"warmup.0": warmup, "main": steps}
        lines = [
            _metrics(stage, step, stages[stage], chance) for stage in stages for step in range(1, stages[stage] + 1)
        ]
        _write_lines(run_dir / "metrics.jsonl", lines)
        _write_lines(run_dir / "samples" / "warmup.0_step_000010.jsonl", _samples("warmup.0", 10, chance))
        for step in range(10, steps + 1, 10):
            _write_lines(run_dir / "samples" / f"step_{step:06d}.jsonl", _samples("main", step, chance))
        if extra_samples:
            _write_lines(run_dir / "samples" / f"step_{steps + 1:06d}.jsonl", extra_samples)
        for rank in range(workers):
            _write_lines(run_dir / "traces" / f"worker_{rank:03d}.jsonl", _events(stages, rank, chance))
        (run_dir / "plan.json").write_text(json.dumps(_plan(workers)))
        (run_dir / "config.yaml").write_text(CONFIG)
        summary = {
            "status": "finished",
            "device": "cpu",
            "workers": workers,
            "model": "tiny:qwen3:64:2:128",
            "seconds": 142.7,
        }
        (run_dir / "summary.json").write_text(json.dumps(summary))
        return run_dir

    return make


CONFIG = """name: arithmetic-quickstart
seed: 0
device: cpu
workers: 2
model:
  path: tiny:qwen3:64:2:128
data:
  source: arithmetic
  prompts_per_step: 32
pipeline: grpo
rollout:
  group_size: 8
  max_new_tokens: 8
training:
  steps: 60
  lr: 0.001
"""


def _write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def _metrics(stage: str, step: int, total: int, chance: random.Random) -> dict[str, Any]:
    share = step / total
    record: dict[str, Any] = {"stage": stage, "step": step}
    record |= {
        "actor/loss": 2.1 * math.exp(-3 * share) + chance.gauss(0, 0.05),
        "actor/grad_norm": chance.lognormvariate(0, 0.4),
    }
    record |= {"throughput/tokens_per_s": chance.gauss(5200, 300), "throughput/samples_per_s": chance.gauss(310, 9)}
    record |= {"time/step_s": 1.7 + chance.random(), "memory/host_peak_bytes": 812_000_000 + 1000 * step}
    if stage == "main":
        reward = 0.4 + 0.55 / (1 + math.exp(-8 * (share - 0.4))) + chance.gauss(0, 0.025)
        record |= {"reward/mean": reward, "reward/std": math.sqrt(max(0.0, reward * (1 - reward))), "reward/failed": 0}
        record |= {"actor/entropy": 0.9 * math.exp(-2 * share) + chance.gauss(0, 0.01), "actor/kl": 0.2 * share**2}
        record |= {
            "response/length_mean": 4 + chance.gauss(0, 0.2) - share,
            "actor/clip_fraction": 0.01 * chance.random(),
        }
        record |= {"rollout/logprob_diff_max": 2e-6 * (1 + chance.random()), "rollout/logprob_diff_mean": 2e-7}
        if step % 10 == 0:
            record["eval/reward_mean"] = min(1.0, reward + 0.03)
    return record


def _samples(stage: str, step: int, chance: random.Random) -> list[dict[str, Any]]:
    rows = []
    for number in range(32):
        if number % 8 == 0:
            a, b = chance.randrange(100), chance.randrange(100)
        reward = None if number == 5 else float(chance.random() < 0.6)
        response = f"{a + b}" if reward else f"Let me think.\n{a} and {b} make {a + b + chance.randrange(1, 9)}"
        row = {"stage": stage, "step": step, "sample_id": (1 << 62) + number, "prompt": f"What is {a} + {b}?\nAnswer: "}
        rows.append(row | {"response": response, "reward": reward, "answer": str(a + b)})
    return rows


def _events(stages: dict[str, int], rank: int, chance: random.Random) -> list[dict[str, Any]]:
    events, start = [], 1.7e15
    for stage, steps in stages.items():
        for step in range(1, steps + 1):
            clock = start + 137 * rank
            for node, seconds in zip(NODES, SECONDS, strict=True):
                if (
                    node == "evaluate"
                    and step % 10
                    or stage != "main"
                    and node in ("rollout", "reward", "advantage", "redistribute.1")
                ):
                    continue
                if node == "redistribute.1":  # all workers leave it together
                    duration = start + 1.25e6 - clock
                else:
                    duration = seconds * 1e6 * (0.8 + 0.4 * chance.random())
                place = {"name": node, "ph": "X", "pid": rank, "tid": 0, "ts": clock, "dur": duration}
                events.append(place | {"args": {"stage": stage, "step": step}})
                clock += duration + 500
            start += 2.5e6
    return events


def _plan(workers: int) -> dict[str, Any]:
    groups = {
        "split": "groups",
        "workers": workers,
        "data": workers,
        "tensor": 1,
        "context": 1,
        "pipeline": 1,
        "expert": 1,
    }

    def node(name: str, op: str, reads: tuple[str, ...], writes: tuple[str, ...], **more: Any) -> dict[str, Any]:
        columns = {"reads": {name: name for name in reads}, "writes": {name: name for name in writes}}
        return (
            {"kind": "node", "id": name, "op": op, "model": None, "params": {}, "every": 1, "when": None}
            | columns
            | more
        )

    steps = [
        node("data", "data", (), ("sample_id", "group_id", "slot", "prompt_ids", "row")),
        node("rollout", "rollout", ("prompt_ids",), ("response_ids", "rollout_log_probs"), model="actor"),
        node("reward", "reward", ("prompt_ids", "response_ids", "row"), ("reward", "failed")),
        node("advantage", "advantage", ("reward", "failed", "group_id", "response_ids"), ("advantages",)),
        node("samples", "record_samples", ("sample_id", "prompt_ids", "response_ids", "reward"), (), every=10),
        {"kind": "drop", "id": "drop.1", "fields": ["row", "group_id", "reward"]},
        {"kind": "redistribute", "id": "redistribute.1", "fields": ["prompt_ids", "response_ids", "advantages", "slot"],
         "source": groups, "target": groups | {"split": "tokens"}},
        node("update", "update", ("prompt_ids", "response_ids", "advantages", "rollout_log_probs"), (), model="actor"),
        node("sync", "sync_weights", (), (), model="actor"),
        node("evaluate", "evaluate", (), (), model="actor", when="step % 10 == 0"),
    ]  # fmt: skip
    plans = [{"rank": rank, "steps": steps} for rank in range(workers)]
    return {
        "workers": workers,
        "pipeline": "grpo",
        "stages": [
            {"stage": "warmup.0", "plans": [{"rank": r, "steps": [steps[0], steps[7]]} for r in range(workers)]},
            {"stage": "main", "plans": plans},
        ],
    }
