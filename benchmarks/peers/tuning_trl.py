"""The peers' side of benchmarks/tuning.py, by flavour:

- default: TRL's SFTTrainer as its documentation starts it
- packed: the leanest and fastest TRL on a processor that we found: bf16 weights, packing, its default checkpointing
- padded: TRL with bf16 weights, no packing and no checkpointing
- trainer: transformers' Trainer with peft, bf16 weights
- trainer-fp32: the same with fp32 weights, computing in bf16 by autocast
"""

import json
import resource
import sys
import tempfile
import time

import torch
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

options = json.loads(sys.argv[1])
flavour = options["flavour"]
times: list[float] = []
tokens: list[int] = []
losses: list[float] = []


class Note(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        times.append(time.perf_counter())

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            losses.append(float(logs["loss"]))
            tokens.append(int(float(logs.get("num_tokens", counted[0]))))


counted = [0]
tokenizer = AutoTokenizer.from_pretrained(options["model"])
dtype = torch.float32 if flavour in ("default", "trainer-fp32") else torch.bfloat16
model = AutoModelForCausalLM.from_pretrained(options["model"], dtype=dtype)
lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
wanted = lora if options["method"] == "lora" else None


def tokenize(row):
    """For Trainer: the answer is learned, the question is context."""
    whole = tokenizer.apply_chat_template([*row["prompt"], *row["completion"]], tokenize=True)["input_ids"]
    asked = len(tokenizer.apply_chat_template(row["prompt"], tokenize=True, add_generation_prompt=True)["input_ids"])
    return {"input_ids": whole, "labels": [-100] * asked + whole[asked:]}


with tempfile.TemporaryDirectory() as folder:
    rows = load_dataset("json", data_files=options["data"], split="train", cache_dir=folder)
    rows = rows.map(
        lambda row: {"prompt": row["messages"][:1], "completion": row["messages"][1:]}, remove_columns=["messages"]
    )
    common = {
        "per_device_train_batch_size": 1 if flavour == "packed" else options["batch_size"],
        "max_steps": options["steps"],
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
    }
    if flavour.startswith("trainer"):
        rows = rows.map(tokenize, remove_columns=["prompt", "completion"])
        pad = DataCollatorForSeq2Seq(tokenizer)

        def collate(batch):
            counted[0] += sum(len(row["input_ids"]) for row in batch)
            return pad(batch)

        whole = get_peft_model(model, wanted) if wanted else model
        arguments = TrainingArguments(folder, bf16=True, **common)
        Trainer(whole, arguments, train_dataset=rows, data_collator=collate, callbacks=[Note()]).train()
    else:
        best = {
            "default": {},
            "packed": {"packing": True, "max_length": 1024, "bf16": True},
            "padded": {"packing": False, "gradient_checkpointing": False, "bf16": True},
        }
        arguments = SFTConfig(folder, **best[flavour], **common)
        SFTTrainer(
            model,
            args=arguments,
            train_dataset=rows,
            processing_class=tokenizer,
            peft_config=wanted,
            callbacks=[Note()],
        ).train()
warm = options["warm"]
steps = [(times[at] - times[at - 1], tokens[at] - tokens[at - 1]) for at in range(warm, len(times))]
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"steps": steps, "losses": losses, "peak_bytes": peak}))
