"""What TRL gives for its preference losses on fixed log-probabilities, and in the first step of its DPOTrainer on a tiny
model; writes trl_values.json beside this file.

Run it with a Python that has trl: python tests/parity/trl_values.py
"""

import json
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import torch
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.experimental.cpo.cpo_trainer import CPOTrainer
from trl.experimental.orpo.orpo_trainer import ORPOTrainer
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_trainer import KTOTrainer
from trl.trainer.reward_trainer import RewardTrainer

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from tiny import tiny_model  # noqa: E402

MOST = 6
SIZES = {"chosen": [3, 6, 2, 5], "rejected": [5, 1, 4, 6]}
GOOD = [True, False, False, True]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] + ':\\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %}{{ '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:\\n' }}{% endif %}"
)
ROWS = [
    ("What is the capital of France?", "Paris.", "The capital of France is the quick brown fox."),
    ("Do not forget the tickets.", "Ok, see you at seven.", "No"),
    ("房间怎么样？", "很干净。", "晚上太吵，早餐也很一般。"),
    ("One two three", "four five six", "Win a free prize now!"),
]


def accelerator() -> SimpleNamespace:
    same = {name: lambda one: one for name in ("gather", "gather_for_metrics")}
    return SimpleNamespace(device=torch.device("cpu"), **same)


def model_giving(logs_ST: torch.Tensor) -> object:
    """A model whose log-probabilities of what it is asked are these."""

    def forward(**kwargs):
        zeros = torch.zeros_like(logs_ST)
        return SimpleNamespace(log_probs=logs_ST, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())

    return forward


def masks(sizes: list[int]) -> torch.Tensor:
    """[S, 1 + MOST]: one token of a prompt, then the answer."""
    return torch.cat([torch.zeros(len(sizes), 1), torch.arange(MOST) < torch.tensor(sizes)[:, None]], 1).long()


def dpo(loss: str, beta: float, logs_ST: torch.Tensor, start_S: torch.Tensor, pairs: list[int]) -> dict:
    """The mean over `pairs`; TRL's SFT term is one over tokens, so it is asked of one pair at a time."""
    both = [*pairs, *(pair + 4 for pair in pairs)]
    logs_ST, start_S = logs_ST[both].clone().requires_grad_(), start_S[both]
    mask_ST = masks(SIZES["chosen"] + SIZES["rejected"])[both]
    types, weights = ([loss], [1.0]) if loss != "rpo" else (["sigmoid", "sft"], [1.0, 0.5])
    me = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=accelerator(),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=types,
        loss_weights=weights,
        beta=beta,
        use_weighting=False,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {
        "input_ids": torch.zeros_like(mask_ST),
        "attention_mask": torch.ones_like(mask_ST),
        "completion_mask": mask_ST,
        "ref_chosen_logps": start_S[: len(pairs)],
        "ref_rejected_logps": start_S[len(pairs) :],
    }
    value = DPOTrainer._compute_loss(me, model_giving(logs_ST), inputs, False)
    value.backward()
    # The gradient after any token of an answer is that after the answer.
    return {
        "loss_type": loss,
        "beta": beta,
        "pairs": pairs,
        "loss": float(value),
        "gradient": logs_ST.grad[:, 0].tolist(),
    }


def kto(desirable: float, logs_ST, start_S, other_S, other_start_S) -> dict:
    logs_ST = logs_ST[:4].clone().requires_grad_()
    mask_ST = masks(SIZES["chosen"])
    me = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=accelerator(),
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        calculate_KL=True,
        loss_type="kto",
        beta=0.2,
        desirable_weight=desirable,
        undesirable_weight=1.0,
        _compute_kl_logps=lambda model, batch: other_S,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {
        "input_ids": torch.zeros_like(mask_ST),
        "attention_mask": torch.ones_like(mask_ST),
        "completion_mask": mask_ST,
        "label": torch.tensor(GOOD),
        "ref_logps": start_S[:4],
        "ref_KL_logps": other_start_S,
    }
    value = KTOTrainer._compute_loss(me, model_giving(logs_ST), inputs, False)
    value.backward()
    return {"desirable": desirable, "loss": float(value), "gradient": logs_ST.grad[:, 0].tolist()}


def first_step(other_start: bool, beta: float) -> dict:
    """Loss and gradient norm of the first step, as the trainer logs them."""
    path, start = tiny_model("llama"), tiny_model("llama", seed=1)
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template, tokenizer.pad_token = TEMPLATE, tokenizer.eos_token
    turns = [
        {
            "prompt": [{"role": "user", "content": prompt}],
            "chosen": [{"role": "assistant", "content": chosen}],
            "rejected": [{"role": "assistant", "content": rejected}],
        }
        for prompt, chosen, rejected in ROWS
    ]
    arguments = trl.DPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=len(ROWS),
        max_steps=1,
        learning_rate=1e-6,
        beta=beta,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
    )
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    trainer = trl.DPOTrainer(
        model,
        ref_model=AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32) if other_start else None,
        args=arguments,
        train_dataset=Dataset.from_list(turns),
        processing_class=tokenizer,
    )
    total = sum(float(one.double().abs().sum()) for one in model.parameters())
    trainer.train()
    first = trainer.state.log_history[0]
    kept = {name: first[name] for name in ("loss", "grad_norm", "logps/chosen", "logps/rejected")}
    return {"other_start": other_start, "beta": beta, "weights": total, **kept}


def main() -> None:
    torch.manual_seed(0)
    mask_ST = masks(SIZES["chosen"] + SIZES["rejected"])[:, 1:]
    logs_ST = -3 * torch.rand(8, MOST, dtype=torch.float64) * mask_ST
    start_S = logs_ST.sum(1) + torch.randn(8, dtype=torch.float64)
    other_S = -5 * torch.rand(4, dtype=torch.float64)
    other_start_S = other_S - torch.tensor([0.5, -0.25, 1.0, 0.75], dtype=torch.float64)
    means_S = logs_ST.sum(1) / mask_ST.sum(1)
    rewards_S, margin = torch.randn(8, dtype=torch.float64), torch.tensor([0.0, 0.5, 1.0, 0.25])
    orpo = ORPOTrainer.odds_ratio_loss(SimpleNamespace(beta=0.25, accelerator=accelerator()), means_S[:4], means_S[4:])[
        0
    ]
    cpo = {"beta": 2.0, "label_smoothing": 0.0, "alpha": 0.0, "accelerator": accelerator()}
    simpo = CPOTrainer.cpo_loss(SimpleNamespace(**cpo, loss_type="simpo", simpo_gamma=1.0), means_S[:4], means_S[4:])[0]
    smooth = CPOTrainer.cpo_loss(
        SimpleNamespace(**{**cpo, "beta": 0.3, "label_smoothing": 0.1}, loss_type="sigmoid"),
        *(logs_ST.sum(1) - start_S).chunk(2),
    )[0]
    judge = SimpleNamespace(
        model=SimpleNamespace(training=False),
        args=SimpleNamespace(center_rewards_coefficient=0.01),
        accelerator=accelerator(),
        _metrics={"eval": defaultdict(list)},
        _total_train_tokens=0,
    )
    scores = SimpleNamespace(logits=rewards_S[:, None])
    reward = RewardTrainer.compute_loss(judge, lambda **kwargs: scores, {"margin": margin})
    values = {
        "trl": trl.__version__,
        "torch": torch.__version__,
        "template": TEMPLATE,
        "rows": ROWS,
        "sizes": SIZES,
        "good": GOOD,
        "logs": logs_ST.sum(1).tolist(),
        "start": start_S.tolist(),
        "other": other_S.tolist(),
        "other_start": other_start_S.tolist(),
        "rewards": rewards_S.tolist(),
        "margin": margin.tolist(),
        "dpo": [
            dpo(loss, beta, logs_ST, start_S, [0, 1, 2, 3])
            for loss in ("sigmoid", "ipo", "hinge")
            for beta in (0.1, 0.5)
        ]
        + [dpo("rpo", 0.1, logs_ST, start_S, [pair]) for pair in range(4)],
        "smoothed": smooth.tolist(),
        "orpo": orpo.tolist(),
        "simpo": simpo.tolist(),
        "kto": [kto(desirable, logs_ST, start_S, other_S, other_start_S) for desirable in (1.0, 1.5)],
        "reward": float(reward),
        "first_step": [first_step(False, 0.1), first_step(True, 0.1), first_step(True, 0.5)],
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
