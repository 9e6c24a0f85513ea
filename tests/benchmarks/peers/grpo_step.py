"""Seconds of a GRPO step of TRL on given prompts, as JSON on the last line. It runs in the environment of `make peers`.

    .peers/bin/python tests/benchmarks/peers/grpo_step.py WANTED.json

WANTED.json is written by bench_grpo.py. Nothing of the product is imported here.
"""

import json
import sys
import time
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer


class Clock(TrainerCallback):
    """Notes when every step begins and ends: generation, rewards, forward, backward and the optimiser's step."""

    def __init__(self):
        self.seconds, self.begun = [], 0.0

    def on_step_begin(self, *_, **__):
        self.begun = time.perf_counter()

    def on_step_end(self, *_, **__):
        self.seconds.append(time.perf_counter() - self.begun)


def main(path):
    """Train for `steps` steps and print the seconds of each, and the mean length of a completion."""
    wanted = json.loads(Path(path).read_text())
    torch.set_num_threads(wanted["threads"])
    tokenizer = AutoTokenizer.from_pretrained(wanted["model"], padding_side="left")
    if tokenizer(wanted["prompts"])["input_ids"] != wanted["prompt_tokens"]:
        raise SystemExit("TRL would read other prompt tokens from these texts")
    lengths = []

    def right(completions, answer, completion_ids, **_):
        lengths.extend(map(len, completion_ids))
        return [float(str(one).rstrip().endswith(gold)) for one, gold in zip(completions, answer, strict=True)]

    clock, traces = Clock(), len(wanted["prompts"]) * wanted["group"]
    settings = GRPOConfig(
        output_dir=wanted["out"],
        use_cpu=True,
        bf16=False,  # the model has the type that is wanted
        max_steps=wanted["steps"],
        per_device_train_batch_size=wanted["micro_batch"],
        gradient_accumulation_steps=traces // wanted["micro_batch"],
        num_generations=wanted["group"],
        max_completion_length=wanted["max_new_tokens"],
        **wanted["sampling"],
        learning_rate=wanted["learning_rate"],
        beta=0.0,
        gradient_checkpointing=False,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
    )
    lora = LoraConfig(r=16, lora_alpha=32, target_modules=wanted["targets"], task_type="CAUSAL_LM")
    model = AutoModelForCausalLM.from_pretrained(wanted["model"], dtype=getattr(torch, wanted["dtype"]))
    rows = Dataset.from_dict({"prompt": wanted["prompts"], "answer": wanted["answers"]})
    trainer = GRPOTrainer(model, right, settings, rows, processing_class=tokenizer, peft_config=lora, callbacks=[clock])
    trainer.train()
    print(json.dumps({"seconds": clock.seconds, "length": sum(lengths) / len(lengths)}))


if __name__ == "__main__":
    main(sys.argv[1])
