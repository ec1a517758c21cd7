"""What TRL gives for GRPO's loss and the generalised JSD on fixed numbers; writes trl_grpo_values.json beside this file.

Run it with a Python that has trl: python tests/parity/trl_grpo_values.py
"""

import json
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import torch
import trl
from trl.experimental.gkd.gkd_trainer import GKDTrainer
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.utils import nanstd

MOST = 5
LENGTHS = [2, 5, 3, 1, 4, 4]
GROUP = 3
REWARDS = [1.0, 0.0, 0.25, 0.5, 2.0, 0.5]


def grpo(
    loss_type: str,
    beta: float,
    scale: bool,
    now_SM: torch.Tensor,
    start_SM: torch.Tensor,
    written_SM: torch.Tensor | None = None,
) -> dict:
    """The loss, and its gradient after the log-likelihood of each token that was written; with `written_SM` that of a
    second iteration (num_iterations: 2), at weights that are no longer those that wrote."""
    now_SM = now_SM.clone().requires_grad_()
    mask_SM = (torch.arange(MOST) < torch.tensor(LENGTHS)[:, None]).long()
    rewards = torch.tensor(REWARDS, dtype=torch.float64).view(-1, GROUP)
    advantages = rewards - rewards.mean(1, keepdim=True)
    if scale:
        advantages = advantages / (nanstd(rewards, dim=1)[:, None] + 1e-4)
    off = dict.fromkeys(
        ("aux_loss_enabled", "use_vllm", "_entropy_bonus_enabled", "use_adaptive_entropy", "tools"), False
    )
    accelerator = SimpleNamespace(
        num_processes=1, gather=lambda one: one, gather_for_metrics=lambda one: one, reduce=lambda one, reduction: one
    )
    me = SimpleNamespace(
        **off,
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (now_SM, torch.zeros_like(now_SM), None),
        model=SimpleNamespace(training=True),
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
        accelerator=accelerator,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="token",
        beta=beta,
        loss_type=loss_type,
        num_iterations=1 if written_SM is None else 2,
        epsilon_low=0.2,
        epsilon_high=0.2 if written_SM is None else 0.28,
        current_gradient_accumulation_steps=1,
        max_completion_length=MOST,
        _metrics={"train": defaultdict(list)},
    )
    inputs = {
        "prompt_ids": torch.zeros(len(LENGTHS), 1, dtype=torch.long),
        "prompt_mask": torch.ones(len(LENGTHS), 1, dtype=torch.long),
        "completion_ids": torch.zeros(len(LENGTHS), MOST, dtype=torch.long),
        "completion_mask": mask_SM,
        "advantages": advantages.flatten(),
        "ref_per_token_logps": start_SM,
        "num_items_in_batch": mask_SM.sum(),
    }
    if written_SM is not None:
        inputs["old_per_token_logps"] = written_SM
    loss = GRPOTrainer._compute_loss(me, None, inputs)
    loss.backward()
    return {
        "loss_type": loss_type,
        "beta": beta,
        "scale": scale,
        "loss": float(loss.detach()),
        "gradient": [now_SM.grad[row, :length].tolist() for row, length in enumerate(LENGTHS)],
    }


def jsd(beta: float, temperature: float, student_NV: torch.Tensor, teacher_NV: torch.Tensor) -> dict:
    """The sum over tokens, and its gradient after the student's logits."""
    student_NV = student_NV.clone().requires_grad_()
    loss = GKDTrainer.generalized_jsd_loss(
        student_NV[None], teacher_NV[None], beta=beta, temperature=temperature, reduction="sum"
    )
    loss.backward()
    found = {"loss": float(loss.detach()), "gradient": student_NV.grad.tolist()}
    return {"beta": beta, "temperature": temperature, **found}


def main() -> None:
    torch.manual_seed(0)
    now_SM, start_SM = (-torch.rand(len(LENGTHS), MOST, dtype=torch.float64) * 3 for _ in range(2))
    student_NV, teacher_NV = torch.randn(2, 4, 6, dtype=torch.float64)
    # Ratios from about a half to two: some within the bounds, some beyond either.
    written_SM = now_SM + (torch.rand(len(LENGTHS), MOST, dtype=torch.float64) - 0.5) * 1.4
    kinds = [
        (loss_type, beta, scale)
        for loss_type in ("grpo", "dapo", "dr_grpo")
        for beta in (0.0, 0.1)
        for scale in (True, False)
    ]
    values = {
        "trl": trl.__version__,
        "torch": torch.__version__,
        "most": MOST,
        "rewards": REWARDS,
        "group": GROUP,
        "now": [now_SM[row, :length].tolist() for row, length in enumerate(LENGTHS)],
        "start": [start_SM[row, :length].tolist() for row, length in enumerate(LENGTHS)],
        "student": student_NV.tolist(),
        "teacher": teacher_NV.tolist(),
        "grpo": [grpo(*one, now_SM, start_SM) for one in kinds],
        "written": [written_SM[row, :length].tolist() for row, length in enumerate(LENGTHS)],
        "grpo_again": [grpo(*one, now_SM, start_SM, written_SM) for one in kinds],
        "jsd": [
            jsd(beta, temperature, student_NV, teacher_NV)
            for beta in (0.0, 0.1, 0.5, 1.0)
            for temperature in (1.0, 2.0)
        ],
    }
    path = Path(__file__).with_suffix(".json")
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
