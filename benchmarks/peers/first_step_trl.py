"""TRL's SFTTrainer to its first step, written as its documentation shows."""

import sys
import tempfile

from datasets import load_dataset
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer


class Note(TrainerCallback):
    def on_step_end(self, *args, **kwargs):
        print("FIRST-STEP", flush=True)


with tempfile.TemporaryDirectory() as folder:
    rows = load_dataset("json", data_files=sys.argv[2], split="train", cache_dir=folder)
    arguments = SFTConfig(
        folder, per_device_train_batch_size=8, max_steps=4, report_to=[], save_strategy="no", use_cpu=True
    )
    SFTTrainer(sys.argv[1], args=arguments, train_dataset=rows, callbacks=[Note()]).train()
