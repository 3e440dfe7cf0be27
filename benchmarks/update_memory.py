"""Peak memory of an update beside the plain form's, which has the logits of all tokens in memory at once.

Both sides make one update of the same narrow model on the same rows, each in a process of its own; what counts is the
peak of its resident memory (VmHWM) over what it held before. The plain form is `siirl.bench.plain.PlainTrainer`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from machine import machine

from siirl.bench import setting
from siirl.bench.plain import PlainDecoder, PlainTrainer
from siirl.config.schema import Config
from siirl.data.batch import Batch, Ragged
from siirl.device import host, select
from siirl.device.backend import Backend
from siirl.device.collectives import Collectives
from siirl.telemetry.accumulator import StepMetrics
from siirl.training.fsdp import TrainingEngine
from siirl.training.losses import policy_update
from siirl_kernels import bind

PROMPT, ROW = 24, 1024
SIDES = ("siirl", "plain")
PLAIN_LOGITS = 3  # float32 tensors of tokens x vocabulary that the plain form's backward pass has at a time


def rows_of(tokens: int) -> Batch:
    """So many tokens in rows of ROW, each with a prompt of its own."""
    count, response = tokens // ROW, ROW - PROMPT
    offsets = torch.arange(count + 1)
    advantages = torch.randn(count, generator=torch.Generator().manual_seed(1)).repeat_interleave(response)
    ids = torch.arange(count)
    return Batch(
        {
            "sample_id": ids,
            "group_id": ids,
            "slot": ids,
            "prompt_ids": Ragged(setting.random_tokens(count, PROMPT).flatten(), offsets * PROMPT),
            "response_ids": Ragged(setting.random_tokens(count, response, seed=2).flatten(), offsets * response),
            "advantages": Ragged(advantages, offsets * response),
        }
    )


def side(name: str, path: str, tokens: int, recompute: str) -> dict[str, Any]:
    """One update in this process. Bytes."""
    backend = select("cpu")
    backend.bind(0, 1)
    bind(backend.kernel_order())
    batch = rows_of(tokens)
    update = _siirl(backend, path, batch, recompute) if name == "siirl" else _plain(backend, path, batch)
    host.release_free_memory()
    if not host.reset_process_peak():
        raise SystemExit("this system does not start the peak of a process's memory anew")
    before = host.process_memory()[0]
    loss = update()
    return {"before": before, "peak": host.process_memory()[1], "loss": loss}


def _siirl(backend: Backend, path: str, batch: Batch, recompute: str) -> Any:
    config = Config.model_validate(
        {
            "model": {"path": path},
            "data": {"prompts_per_step": len(batch), "max_prompt_tokens": PROMPT},
            "rollout": {"group_size": 1, "max_new_tokens": ROW},
            "algorithm": {"loss_agg": "token-mean"},
            "training": {"lr": 1e-8, "micro_batch_tokens": len(batch) * ROW, "recompute": recompute},
        }
    )
    engine = TrainingEngine(setting.decoder(backend, path), config.training, backend, Collectives.single(), "actor")
    engine.begin(config, config.training.lr)

    def update() -> float:
        metrics = StepMetrics()
        engine.update(batch, policy_update(config.algorithm), 1, metrics)
        return metrics.reduce(Collectives.single())["actor/loss"]

    return update


def _plain(backend: Backend, path: str, batch: Batch) -> Any:
    # other work on the machine must not pay for the form that is known to be large
    Path("/proc/self/oom_score_adj").write_text("1000")
    trainer = PlainTrainer(PlainDecoder(setting.decoder(backend, path)), 1e-8, Collectives.single())
    tokens, lengths = setting.padded(batch, PROMPT)
    advantages = batch.ragged("advantages").values[batch.ragged("advantages").offsets[:-1]]
    old = torch.full((len(batch), ROW - PROMPT), -float(torch.tensor(float(trainer.model.config.vocab_size)).log()))
    return lambda: trainer.update(tokens, PROMPT, lengths, old, advantages)


def compare(tokens: int, vocabulary: int, hidden: int, layers: int, recompute: str) -> dict[str, Any]:
    """Both sides, one after the other, and how many times the memory of siirl's the plain form takes."""
    needed = PLAIN_LOGITS * 4 * tokens * vocabulary
    if host.memory_available() < 1.1 * needed:
        raise SystemExit(
            f"the plain form needs about {needed / 2**30:.1f} GiB, and {host.memory_available() / 2**30:.1f} GiB are "
            "available; use fewer --tokens"
        )
    path = f"tiny:qwen3:{hidden}:{layers}:{vocabulary}"
    found: dict[str, Any] = {"tokens": tokens, "vocabulary": vocabulary, "hidden": hidden, "layers": layers}
    found["recompute"] = recompute
    for name in SIDES:
        arguments = ["--side", name, "--path", path, "--tokens", str(tokens), "--recompute", recompute]
        done = subprocess.run([sys.executable, __file__, *arguments], stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise SystemExit(f"the side {name} ended with status {done.returncode}")
        found[name] = json.loads(done.stdout.splitlines()[-1])
        found[name]["added"] = found[name]["peak"] - found[name]["before"]
    found["plain_over_siirl"] = found["plain"]["added"] / found["siirl"]["added"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[8192], help="of the update; several: one after another"
    )
    parser.add_argument("--vocabulary", type=int, default=152_064)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--recompute", choices=["none", "selective", "full"], default="none", help="of siirl's side")
    parser.add_argument("--json", type=Path, help="write the numbers there")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--path", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side:
        print(json.dumps(side(given.side, given.path, given.tokens[0], given.recompute)))
        return
    sizes = []
    print("  tokens  siirl GiB  plain GiB  plain / siirl")
    for tokens in given.tokens:
        found = compare(tokens, given.vocabulary, given.hidden, given.layers, given.recompute)
        sizes.append(found)
        added = [found[name]["added"] / 2**30 for name in SIDES]
        print(f"{tokens:8,}  {added[0]:9.2f}  {added[1]:9.2f}  {found['plain_over_siirl']:13.1f}")
    if given.json:
        given.json.write_text(json.dumps({**machine(), "torch": torch.__version__, "sizes": sizes}, indent=1) + "\n")


if __name__ == "__main__":
    main()
