"""Linear layers whose low-rank matrices start as the principal part of the weight, and whose base keeps the rest."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from luthier.models.adapters.inject import LoraLinear, widened
from luthier.models.quantised.linear import AnyLinear, Form, QuantisedLinear

# Directions drawn beyond those wanted, and passes over the weight, of the fast decomposition; up to EXACT x EXACT the
# exact one is as fast.
SPARE, PASSES, EXACT = 16, 8, 256


class PissaLinear(LoraLinear):
    """LoRA of which A and B start as the principal singular vectors of W; the base keeps W - scale B0 A0.

    PiSSA: Meng et al. 2024, arXiv:2404.02948. `start` (A0, B0) continues from known ones; without, they are computed. In a
    `form`, what the base keeps is quantised after the principal part was taken out (QPiSSA, section 4 there).
    """

    def __init__(
        self,
        base: AnyLinear,
        rank: int,
        alpha: float,
        *,
        dropout: float = 0.0,
        rslora: bool = False,
        start: tuple[Tensor, Tensor] | None = None,
        form: Form | None = None,
    ):
        super().__init__(base, rank, alpha, dropout=dropout, rslora=rslora)
        a_RI, b_OR = start or principal(widened(self.matrix.detach()), rank)
        if start is None:
            a_RI, b_OR = a_RI / self.scale**0.5, b_OR / self.scale**0.5
        self.lora_start_a: Tensor
        self.lora_start_b: Tensor
        self.register_buffer("lora_start_a", a_RI.float().contiguous())
        self.register_buffer("lora_start_b", b_OR.float().contiguous())
        with torch.no_grad():
            self.lora_a.copy_(self.lora_start_a)
            self.lora_b.copy_(self.lora_start_b)
        if form is None:
            self.subtract()
        else:
            self.base = QuantisedLinear(base, form, self._rest()).train(base.training)

    @torch.no_grad()
    def subtract(self) -> None:
        """Take the principal part out of a base that holds it whole."""
        rest = self._rest()
        self.weight.copy_(rest.T if isinstance(self.base, Conv1D) else rest)

    @torch.no_grad()
    def _rest(self) -> Tensor:
        return widened(self.matrix) - (self.lora_start_b @ self.lora_start_a) * self.scale

    def difference(self) -> tuple[Tensor, Tensor]:
        """(A [2 rank, in], B [out, 2 rank]) whose product is what was learned on top of the whole W: B A - B0 A0."""
        a_RI = torch.cat([self.lora_a.detach(), self.lora_start_a])
        b_OR = torch.cat([self.lora_b.detach(), -self.lora_start_b], 1)
        return a_RI, b_OR


@torch.no_grad()
def principal(weight_OI: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(A [rank, in], B [out, rank]) whose product is the best approximation of `weight_OI` of that rank.

    The singular values are shared evenly between the two. Large weights are decomposed by random projections (Halko et
    al. 2011, arXiv:0909.4061), drawn the same each time.
    """
    if max(weight_OI.shape) <= EXACT or 4 * (rank + SPARE) >= min(weight_OI.shape):
        left_OR, values_R, right_RI = torch.linalg.svd(weight_OI, full_matrices=False)
        left_OR, values_R, right_RI = left_OR[:, :rank], values_R[:rank], right_RI[:rank]
    else:
        devices = [weight_OI.device] if weight_OI.is_cuda else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(0)
            found = torch.svd_lowrank(weight_OI, q=rank + SPARE, niter=PASSES)
        left_OR, values_R, right_RI = found[0][:, :rank], found[1][:rank], found[2][:, :rank].T
    roots_R = values_R.sqrt()
    return roots_R[:, None] * right_RI, left_OR * roots_R
