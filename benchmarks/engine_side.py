"""One side of vs_engines.py: python engine_side.py SIDE WORK.json, SIDE being siirl, transformers or vllm.

Prints one JSON object: the seconds of each call, the tokens drawn in it, and versions. The first call, on prompts of
its own, warms up and is left out. vLLM's side needs vLLM's environment and nothing of siirl.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

Call = Callable[[list[list[int]]], int]


def siirl(work: dict[str, Any]) -> Call:
    from siirl.device import select
    from siirl.model.load import load_model
    from siirl.rollout.engine import NativeEngine
    from siirl.rollout.graphs import recorder
    from siirl.rollout.sampling import Sampling
    from siirl_kernels import bind

    backend = select(work["device"])
    backend.bind(0, 1)
    bind(backend.kernel_order())
    model = load_model(work["model"]).model.to(backend.device(), getattr(torch, work["dtype"])).requires_grad_(False)
    capture = recorder(backend, wanted=True)
    engine = NativeEngine(model, [work["eos"]], lambda ids: "", max_sequences=work["batch"], capture=capture)
    sampling = Sampling(work["new_tokens"], ignore_eos=True)

    def call(prompts: list[list[int]]) -> int:
        done = engine.generate(prompts, torch.arange(len(prompts)), sampling, 1, 0)
        backend.synchronize()
        return len(done.response_ids.values)

    return call


def transformers(work: dict[str, Any]) -> Call:
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    device = {"cpu": "cpu"}.get(work["device"], work["device"])
    model = AutoModelForCausalLM.from_pretrained(work["model"], dtype=getattr(torch, work["dtype"])).eval().to(device)
    limits = {"max_new_tokens": work["new_tokens"], "min_new_tokens": work["new_tokens"]}

    def call(prompts: list[list[int]]) -> int:
        ids = torch.tensor(prompts, device=device)
        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, pad_token_id=work["eos"], **limits
            )
        return out[:, ids.shape[1] :].cpu().numel()

    return call


def vllm(work: dict[str, Any]) -> Call:
    from vllm import LLM, SamplingParams

    longest = work["prompt_tokens"] + work["new_tokens"]
    engine = LLM(
        model=work["model"],
        skip_tokenizer_init=True,
        dtype=work["dtype"],
        max_model_len=longest,
        max_num_seqs=work["batch"],
        max_num_batched_tokens=max(8192, longest),
        kv_cache_memory_bytes=2**30,
        disable_log_stats=True,
    )
    limits = {"max_tokens": work["new_tokens"], "min_tokens": work["new_tokens"]}
    sampling = SamplingParams(temperature=1.0, logprobs=0, detokenize=False, ignore_eos=True, **limits)

    def call(prompts: list[list[int]]) -> int:
        outputs = engine.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    return call


def main() -> None:
    side, work = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
    call: Call = {"siirl": siirl, "transformers": transformers, "vllm": vllm}[side](work)
    call(work["prompts"][0])
    seconds, tokens = [], []
    for prompts in work["prompts"][1:]:
        start = time.perf_counter()
        tokens.append(call(prompts))
        seconds.append(time.perf_counter() - start)
    named = {"siirl": ("siirl",), "transformers": ("transformers",), "vllm": ()}[side]
    versions = {name: version(name) for name in (*named, "torch")}
    if side == "vllm":
        import vllm as package

        versions["vllm"] = package.__version__
    print(json.dumps({"seconds": seconds, "tokens": tokens, "versions": versions}))


if __name__ == "__main__":
    main()
