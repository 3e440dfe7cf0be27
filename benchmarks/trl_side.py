"""TRL's GRPOTrainer on the work of vs_trl.py, in TRL's own environment; the last line printed is one JSON object.

python trl_side.py WORK.json, where WORK.json says: model (a Hugging Face directory), prompts (texts, in order),
answers, prompts_per_step, group_size, max_new_tokens, steps, lr, seed, threads, dtype. Under torchrun its processes
share each step's samples.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import resource
import sys
import time
from pathlib import Path
from typing import Any


def score(prompt: str, response: str, sample: dict[str, Any]) -> float:
    """The reward of both sides: 1 when the last number of the response is the answer, 0.1 for any other number."""
    numbers = re.findall(r"-?[0-9]+", response)
    return 1.0 if numbers and numbers[-1] == sample["answer"] else 0.1 if numbers else 0.0


def digest(prompt_ids: list[list[int]]) -> str:
    """SHA-256 of all prompts' token ids, to show that both sides saw the same."""
    return hashlib.sha256(json.dumps(prompt_ids).encode()).hexdigest()


def run(work: dict[str, Any], scratch: Path) -> dict[str, Any]:
    """Train for the steps asked for; seconds, tokens and reward of each."""
    import torch
    import transformers
    import trl
    from datasets import Dataset

    torch.set_num_threads(work["threads"])
    # as tokenizer.json says; AutoTokenizer gives every model of type qwen2 the text splitting of Qwen's own
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(work["model"])
    model = transformers.AutoModelForCausalLM.from_pretrained(work["model"], dtype=torch.float32)
    ends = model.generation_config.eos_token_id
    suppressed = sorted({tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None})
    samples, processes = work["prompts_per_step"] * work["group_size"], int(os.environ.get("WORLD_SIZE", "1"))

    class Clock(transformers.TrainerCallback):
        """From one step's end to the next, so that nothing a step does is left out."""

        def __init__(self) -> None:
            self.ends: list[float] = []
            self.logs: list[dict[str, float]] = []

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self.ends.append(time.perf_counter())

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.ends.append(time.perf_counter())

        def on_log(self, *args: Any, logs: dict[str, float], **kwargs: Any) -> None:
            if "completions/mean_length" in logs:
                self.logs.append({key: float(value) for key, value in logs.items()})

    def reward(prompts: list[str], completions: list[str], answer: list[str], **kwargs: Any) -> list[float]:
        rows = zip(prompts, completions, answer, strict=True)
        return [score(prompt, completion, {"answer": expected}) for prompt, completion, expected in rows]

    clock = Clock()
    trainer = trl.GRPOTrainer(
        model=model,
        processing_class=tokenizer,
        reward_funcs=[reward],
        train_dataset=Dataset.from_dict({"prompt": work["prompts"], "answer": work["answers"]}),
        callbacks=[clock],
        args=trl.GRPOConfig(
            output_dir=str(scratch),
            use_cpu=True,
            ddp_backend="gloo" if processes > 1 else None,
            bf16=work["dtype"] == "bfloat16",
            max_steps=work["steps"],
            # the whole step in one pass: TRL's fastest way
            per_device_train_batch_size=samples // processes,
            num_generations=work["group_size"],
            max_completion_length=work["max_new_tokens"],
            generation_kwargs={"eos_token_id": None, "suppress_tokens": suppressed},
            temperature=1.0,
            top_k=0,
            learning_rate=work["lr"],
            lr_scheduler_type="constant",
            weight_decay=0.0,
            max_grad_norm=1.0,
            beta=0.0,  # no KL term, no reference model
            num_iterations=1,
            loss_type="grpo",
            gradient_checkpointing=False,
            shuffle_dataset=False,
            seed=work["seed"],
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        ),
    )
    trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
    trainer.train()

    totals = [0.0, *(log["num_tokens"] for log in clock.logs)]
    responses = [round(log["completions/mean_length"] * samples) for log in clock.logs]
    tokens = [round(after - before) for before, after in zip(totals, totals[1:], strict=False)]
    return {
        "step_s": [after - before for before, after in zip(clock.ends, clock.ends[1:], strict=False)],
        "prompt_tokens": [both - response for both, response in zip(tokens, responses, strict=True)],
        "response_tokens": responses,
        "reward_mean": [log["reward"] for log in clock.logs],
        "prompts_sha256": digest(tokenizer(work["prompts"]).input_ids),
        "host_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "versions": {"trl": trl.__version__, "transformers": transformers.__version__, "torch": torch.__version__},
    }


if __name__ == "__main__":
    path = Path(sys.argv[1])
    found = run(json.loads(path.read_text()), path.parent)
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(found))
