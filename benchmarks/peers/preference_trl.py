"""TRL's side of benchmarks/preference.py, by flavour:

- default: DPOTrainer as its documentation starts it
- batched: bf16 weights, the reference computed beforehand, no checkpointing, all pairs of a step at once
- accumulated: the same, a pair at a time, so that only chosen and rejected pad one another

`padding_free` is out of order in TRL 1.16: it warns, and pads.
"""

import json
import resource
import sys
import tempfile
import time

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer

options = json.loads(sys.argv[1])
flavour, size, warm = options["flavour"], options["batch_size"], options["warm"]
times: list[float] = []
losses: list[float] = []
reference = [0.0]


class Note(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        times.append(time.perf_counter())

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            losses.append(float(logs["loss"]))


class Timed(DPOTrainer):
    def _precompute_ref_logps(self, *args, **kwargs):
        started = time.perf_counter()
        found = super()._precompute_ref_logps(*args, **kwargs)
        reference[0] += time.perf_counter() - started
        return found


tokenizer = AutoTokenizer.from_pretrained(options["model"])
dtype = torch.float32 if flavour == "default" else torch.bfloat16
model = AutoModelForCausalLM.from_pretrained(options["model"], dtype=dtype)
best = {"bf16": True, "precompute_ref_log_probs": True, "gradient_checkpointing": False}
chosen = {
    "default": {"per_device_train_batch_size": size},
    "batched": {"per_device_train_batch_size": size, **best},
    "accumulated": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": size, **best},
}[flavour]
with tempfile.TemporaryDirectory() as folder:
    arguments = DPOConfig(
        folder,
        max_steps=options["steps"],
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        **chosen,
    )
    trainer = Timed(
        model,
        args=arguments,
        train_dataset=load_dataset("json", data_files=options["ordered"], split="train", cache_dir=folder),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[Note()],
    )
    trainer.train()
    texts = ("prompt_ids", "chosen_ids", "rejected_ids")
    counts = [sum(len(row[name]) for name in texts) for row in trainer.train_dataset]
tokens = [sum(counts[at * size : (at + 1) * size]) for at in range(options["steps"])]
steps = [(times[at] - times[at - 1], tokens[at]) for at in range(warm, len(times))]
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
found = {"steps": steps, "reference": reference[0], "referred": len(counts), "losses": losses, "peak_bytes": peak}
print(json.dumps(found))
