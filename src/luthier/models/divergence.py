"""How far a student's next tokens are from a teacher's, straight from the hidden states of both, in chunks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from luthier.models.cross_entropy import CHUNK, collect, scale_gradients, start_gradients
from luthier.models.output import AnyHead, Head


@dataclass(frozen=True, slots=True)
class Aim:
    """What the student is to come near: (1 - hard) x temperature^2 x divergence + hard x cross-entropy.

    `beta` 0: KL(teacher | student), forward (Hinton et al. 2015, arXiv:1503.02531); 1: KL(student | teacher), reverse
    (MiniLLM, Gu et al. 2023, arXiv:2306.08543); between: the generalised Jensen-Shannon divergence of GKD (Agarwal et
    al. 2023, arXiv:2306.13649), beta KL(teacher | M) + (1 - beta) KL(student | M) with M = beta teacher + (1 - beta)
    student. Both distributions are taken at `temperature`; its square keeps gradients of one size (Hinton).
    """

    beta: float = 0.0
    temperature: float = 1.0
    hard: float = 0.0

    def losses(self, student_NV: Tensor, teacher_NV: Tensor, target_N: Tensor) -> Tensor:
        """[N], from fp32 logits. Where one side has more rows of padding behind the vocabulary, they are left out."""
        common = min(student_NV.shape[1], teacher_NV.shape[1])
        student_NV, teacher_NV = student_NV[:, :common], teacher_NV[:, :common]
        log_q_NV = F.log_softmax(student_NV / self.temperature, -1)
        log_p_NV = F.log_softmax(teacher_NV / self.temperature, -1)
        if self.beta == 0:
            apart_N = (log_p_NV.exp() * (log_p_NV - log_q_NV)).sum(-1)
        elif self.beta == 1:
            apart_N = (log_q_NV.exp() * (log_q_NV - log_p_NV)).sum(-1)
        else:
            middle_NV = torch.logaddexp(log_p_NV + math.log(self.beta), log_q_NV + math.log1p(-self.beta))
            to_teacher_N = (log_p_NV.exp() * (log_p_NV - middle_NV)).sum(-1)
            to_student_N = (log_q_NV.exp() * (log_q_NV - middle_NV)).sum(-1)
            apart_N = self.beta * to_teacher_N + (1 - self.beta) * to_student_N
        apart_N = apart_N * self.temperature**2
        if not self.hard:
            return apart_N
        return (1 - self.hard) * apart_N + self.hard * F.cross_entropy(student_NV, target_N, reduction="none")


def divergence_loss(
    head: AnyHead,
    hidden_NE: Tensor,
    teacher: AnyHead,
    taught_ND: Tensor,
    target_N: Tensor,
    weight_N: Tensor,
    aim: Aim,
) -> Tensor:
    """Sum of weight x `aim.losses` in fp32, from the states of student and teacher that predict the targets.

    Logits of a chunk of tokens are made, for both, and dropped; the teacher gets no gradient.
    """
    if isinstance(head, Head):
        loss: Tensor = LinearDivergence.apply(  # type: ignore[no-untyped-call]
            hidden_NE, head.weight_VE, head.bias_V, head, teacher, taught_ND, target_N, weight_N, aim
        )
        return loss
    total = hidden_NE.new_zeros((), dtype=torch.float32)
    rows = _rows(head.module.config.vocab_size)
    for chunk in zip(*(torch.split(one, rows) for one in (hidden_NE, taught_ND, target_N, weight_N))):
        # Made again on the way back: only the states are kept.
        total = total + checkpoint(_chunk_loss, head, teacher, aim, *chunk, use_reentrant=False)
    return total


def naive_divergence_loss(
    head: AnyHead,
    hidden_NE: Tensor,
    teacher: AnyHead,
    taught_ND: Tensor,
    target_N: Tensor,
    weight_N: Tensor,
    aim: Aim,
) -> Tensor:
    """The same from all logits at once: the reference."""
    return _chunk_loss(head, teacher, aim, hidden_NE, taught_ND, target_N, weight_N)


def _rows(vocabulary: int) -> int:
    return max(32, CHUNK // (4 * vocabulary))


def _chunk_loss(
    head: AnyHead, teacher: AnyHead, aim: Aim, hidden_NE: Tensor, taught_ND: Tensor, *gold: Tensor
) -> Tensor:
    target_N, weight_N = gold
    with torch.no_grad():
        teacher_NV = teacher.logits(taught_ND).float()
    return (aim.losses(head.logits(hidden_NE).float(), teacher_NV, target_N) * weight_N).sum()


class LinearDivergence(torch.autograd.Function):
    """`naive_divergence_loss` of a student with a matrix head, in chunks of tokens, its gradients made on the way."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NE: Tensor,
        weight_VE: Tensor,
        bias_V: Tensor | None,
        head: Head,
        teacher: AnyHead,
        taught_ND: Tensor,
        target_N: Tensor,
        weight_N: Tensor,
        aim: Aim,
    ) -> Tensor:
        wanted = ctx.needs_input_grad[:3]
        grad_hidden_NE, grad_weight_VE, grad_bias_V = start_gradients(wanted, hidden_NE, weight_VE, bias_V)
        learning = any(wanted)
        total = hidden_NE.new_zeros((), dtype=torch.float32)
        rows = _rows(len(weight_VE))
        for start in range(0, len(hidden_NE), rows):
            part = slice(start, start + rows)
            chunk_CE = hidden_NE[part]
            teacher_CV = teacher.logits(taught_ND[part]).float()
            product_CV = F.linear(chunk_CE, weight_VE, bias_V).float()
            with torch.set_grad_enabled(learning):
                product_CV.requires_grad_(learning)
                student_CV = head.finish(product_CV)
                loss = (aim.losses(student_CV, teacher_CV, target_N[part]) * weight_N[part]).sum()
            total += loss.detach()
            if learning:
                (grad_CV,) = torch.autograd.grad(loss, product_CV)
                grad_CV = grad_CV.to(weight_VE.dtype)
                collect(grad_CV, chunk_CE, weight_VE, start, grad_hidden_NE, grad_weight_VE, grad_bias_V)
        ctx.save_for_backward(grad_hidden_NE, grad_weight_VE, grad_bias_V)
        ctx.weight_dtype = weight_VE.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (*scale_gradients(ctx, grads[0]), *(None,) * 6)
