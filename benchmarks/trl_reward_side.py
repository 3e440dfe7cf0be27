"""TRL's GRPOTrainer on the task of vs_trl_reward.py, in TRL's own environment; prints one JSON object last.

python trl_reward_side.py WORK.json, where WORK.json says: model (a Hugging Face directory), prompts (texts, in order),
answers, prompts_per_step, group_size, max_new_tokens, steps, updates, lr, seed, threads, goal, window.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any


def score(prompt: str, response: str, sample: dict[str, Any]) -> float:
    """The reward of both sides: 1 for the very answer."""
    return float(response == sample["answer"])


def run(work: dict[str, Any], scratch: Path) -> dict[str, Any]:
    """Train until the goal or for the steps asked for: when each generation had its reward, and what it was."""
    import torch
    import transformers
    import trl
    from datasets import Dataset

    torch.set_num_threads(work["threads"])
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(work["model"], padding_side="left")
    model = transformers.AutoModelForCausalLM.from_pretrained(work["model"], dtype=torch.float32)
    samples, updates = work["prompts_per_step"] * work["group_size"], work["updates"]
    rewards: list[float] = []
    seconds: list[float] = []

    class Watch(transformers.TrainerCallback):
        """Seconds from the start of training to the end of each generation's last update."""

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self.begun = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step % updates:
                return
            seconds.append(time.perf_counter() - self.begun)
            recent = rewards[-work["window"] :]
            if len(recent) == work["window"] and sum(recent) / len(recent) >= work["goal"]:
                control.should_training_stop = True

    def reward(prompts: list[str], completions: list[str], answer: list[str], **kwargs: Any) -> list[float]:
        found = [
            score("", completion, {"answer": right}) for completion, right in zip(completions, answer, strict=True)
        ]
        rewards.append(sum(found) / len(found))
        return found

    trainer = trl.GRPOTrainer(
        model=model,
        processing_class=tokenizer,
        reward_funcs=[reward],
        train_dataset=Dataset.from_dict({"prompt": work["prompts"], "answer": work["answers"]}),
        callbacks=[Watch()],
        args=trl.GRPOConfig(
            output_dir=str(scratch),
            use_cpu=True,
            bf16=False,
            max_steps=work["steps"] * updates,
            per_device_train_batch_size=samples // updates,
            steps_per_generation=updates,
            num_generations=work["group_size"],
            max_completion_length=work["max_new_tokens"],
            temperature=1.0,
            top_k=0,
            learning_rate=work["lr"],
            lr_scheduler_type="constant",
            weight_decay=0.0,
            max_grad_norm=1.0,
            beta=0.0,
            num_iterations=1,
            loss_type="dapo",  # a mean over the tokens of an update
            gradient_checkpointing=False,
            shuffle_dataset=False,
            seed=work["seed"],
            logging_steps=10,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        ),
    )
    trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
    trainer.train()
    return {"seconds": seconds, "rewards": rewards, "trl": trl.__version__}


if __name__ == "__main__":
    path = Path(sys.argv[1])
    print(json.dumps(run(json.loads(path.read_text()), path.parent)))
