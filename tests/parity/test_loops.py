"""The loop against the same thing written by hand, and against transformers.Trainer on the same batches."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from luthier.core.config import resolve
from luthier.verbs.tune import Tune, tune
from tiny import tiny_model

STEPS = 50
ROWS = [
    {
        "messages": [
            {"role": "user", "content": f"what is {at} plus {at % 7}?"},
            {"role": "assistant", "content": f"it is {at + at % 7}, of course"},
        ]
    }
    for at in range(96)
]


def our_losses(**settings) -> list[float]:
    events: list[dict] = []
    values = {
        "model": str(tiny_model("qwen2")),
        "data": {"train": ROWS, "split": {"validation": 0.0}},
        "objective": "sft",
        "steps": STEPS,
        "batch_size": 8,
        "learning_rate": 5e-4,
        "by_length": False,
        "baselines": False,
    }
    tune(resolve(Tune, values=values | settings), sinks=[events.append])
    return [event["loss"] for event in events if event["event"] == "step"]


def by_hand():
    path = Path(__file__).parents[2] / "examples" / "sft_in_60_lines.py"
    spec = importlib.util.spec_from_file_location("sft_in_60_lines", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def plain():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_model("qwen2"), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model("qwen2"))
    torch.set_num_threads(1)
    return list(by_hand().train(model, tokenizer, ROWS, STEPS))


@pytest.mark.parametrize("accumulate", [1, 8])
def test_fifty_steps_equal_the_sixty_lines(plain, accumulate):
    ours = our_losses(accumulate=accumulate)
    assert len(ours) == STEPS and ours[-1] < 0.9 * ours[0]
    assert np.abs(np.array(ours) - np.array(plain)).max() < 1e-6


def test_fifty_steps_equal_transformers_trainer(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

    sixty = by_hand()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model("qwen2"))
    rows = [sixty.encode(tokenizer, row["messages"]) for row in ROWS]
    order = [np.random.default_rng([0, epoch]).permutation(len(rows)) for epoch in range(5)]
    plan = [row for epoch in order for row in epoch][: STEPS * 8]

    class Planned(torch.utils.data.Dataset):
        def __len__(self):
            return len(plan)

        def __getitem__(self, at):
            ids, learned = rows[plan[at]]
            return {"input_ids": ids, "labels": [token if yes else -100 for token, yes in zip(ids, learned)]}

    class InOrder(Trainer):
        def _get_train_sampler(self, *args, **kwargs):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    def collate(batch):
        width = max(len(row["input_ids"]) for row in batch)
        pad = lambda key, value: torch.tensor([row[key] + [value] * (width - len(row[key])) for row in batch])  # noqa: E731
        mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in batch])
        return {"input_ids": pad("input_ids", 0), "labels": pad("labels", -100), "attention_mask": mask}

    found: list[float] = []

    class Note(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            if "loss" in logs:
                found.append(logs["loss"])

    arguments = TrainingArguments(
        str(tmp_path / "trainer"),
        per_device_train_batch_size=8,
        max_steps=STEPS,
        learning_rate=5e-4,
        weight_decay=0.01,
        lr_scheduler_type="linear",
        warmup_steps=0,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        seed=0,
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        max_grad_norm=1.0,
        optim="adamw_torch_fused",
    )
    model = AutoModelForCausalLM.from_pretrained(tiny_model("qwen2"), dtype=torch.float32)
    InOrder(model, arguments, train_dataset=Planned(), data_collator=collate, callbacks=[Note()]).train()
    # Trainer's warm-up starts at zero and ours at 1/w: the schedules are made equal by leaving the warm-up out.
    ours = our_losses(schedule={"kind": "linear", "warmup": 0})
    assert len(found) == STEPS
    assert np.abs(np.array(found) - np.array(ours)).max() < 1e-5
