"""transformers.Trainer to its first step, written as its documentation shows."""

import json
import sys
import tempfile

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)


class Note(TrainerCallback):
    def on_step_end(self, *args, **kwargs):
        print("FIRST-STEP", flush=True)


class Rows(torch.utils.data.Dataset):
    def __init__(self, path, tokenizer):
        with open(path, encoding="utf-8") as lines:
            texts = [tokenizer.apply_chat_template(json.loads(line)["messages"], tokenize=False) for line in lines]
        self.rows = [tokenizer(text) for text in texts]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, at):
        return self.rows[at]


model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(folder, per_device_train_batch_size=8, max_steps=4, report_to=[], save_strategy="no")
    collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    Trainer(
        model, arguments, train_dataset=Rows(sys.argv[2], tokenizer), data_collator=collate, callbacks=[Note()]
    ).train()
