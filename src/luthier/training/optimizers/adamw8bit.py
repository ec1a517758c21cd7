"""AdamW whose two moments are kept in 8 bits, block by block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import Parameter

from luthier.training.optimizers.adam import AdamW
from luthier.training.optimizers.engine import EMBEDDINGS, Engine, move_as_adamw
from luthier.training.optimizers.part import NO_SCALES

BLOCK = 256
# Tensors of fewer values keep their moments in fp32: they weigh nothing, and norms and biases feel rounding most.
SMALL = 4096
# Values worked on at once (whole blocks), so that what lies between codes and weights stays in the processor's cache.
AT_ONCE = 2**16


class AdamW8bit(AdamW):
    """Dettmers et al. 2022 (arXiv:2110.02861): each block of 256 values is stored as its largest and one byte a value, on a
    scale that is fine near zero; the arithmetic is AdamW's, in fp32. 2 bytes beside each weight instead of 8.

    Embeddings, as in the paper, and tensors under 4096 values keep moments in fp32. Plain torch, on any device. Deviation:
    a value is rounded to half precision before its nearest code is looked up.
    """

    kind: ClassVar[str] = "adamw8bit"
    elementwise: ClassVar[bool] = False
    slots: ClassVar[float] = 0.5

    small: int = Field(SMALL, ge=0)
    """Tensors of fewer values keep their moments in fp32."""

    def build(
        self, parameters: Sequence[tuple[str, Parameter]], learning_rate: float, scales: Mapping[str, float] = NO_SCALES
    ) -> torch.optim.Optimizer:
        settings = {"betas": (self.beta1, self.beta2), "eps": self.eps}
        precise = [
            (name, one)
            for name, one in parameters
            if one.numel() < self.small or any(table in name for table in EMBEDDINGS)
        ]
        chosen = {id(one) for _, one in precise}
        coarse = [(name, one) for name, one in parameters if id(one) not in chosen]
        return AdamW8bitEngine(
            [
                {**group, **settings, "coarse": which}
                for members, which in ((coarse, True), (precise, False))
                for group in self.group(members, learning_rate, scales)
            ]
        )


class AdamW8bitEngine(Engine):
    """Groups with `coarse` keep codes and block maxima, the others fp32 moments."""

    def move(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if not group["coarse"]:
            move_as_adamw(parameter, gradient, state, group)
            return
        if not state:
            blocks = -(-parameter.numel() // BLOCK)
            state["step"] = 0
            for name in ("mean", "square"):
                # A maximum of zero makes every value zero, whatever its code.
                state[f"{name}_codes"] = torch.zeros(blocks * BLOCK, dtype=torch.uint8, device=parameter.device)
                state[f"{name}_peaks"] = torch.zeros(blocks, device=parameter.device)
        state["step"] += 1
        (beta1, beta2), step = group["betas"], state["step"]
        flat_N = parameter.view(-1) if parameter.is_contiguous() else parameter.reshape(-1)
        parts = zip(
            flat_N.split(AT_ONCE),  # type: ignore[no-untyped-call]
            gradient.reshape(-1).split(AT_ONCE),  # type: ignore[no-untyped-call]
            *(state[name].split(AT_ONCE) for name in ("mean_codes", "square_codes")),
            *(state[name].split(AT_ONCE // BLOCK) for name in ("mean_peaks", "square_peaks")),
        )
        for weight_N, gradient_N, mean_codes, square_codes, mean_peaks, square_peaks in parts:
            size = len(weight_N)
            mean_N = decode(mean_codes, mean_peaks, signed=True)
            square_N = decode(square_codes, square_peaks, signed=False)
            mean_N[:size].lerp_(gradient_N, 1 - beta1)
            square_N[:size].mul_(beta2).addcmul_(gradient_N, gradient_N, value=1 - beta2)
            encode(mean_N, mean_codes, mean_peaks, signed=True)
            encode(square_N, square_codes, square_peaks, signed=False)
            root_N = square_N[:size].div_(1 - beta2**step).sqrt_().add_(group["eps"])
            weight_N.mul_(1 - group["lr"] * group["weight_decay"])
            weight_N.addcdiv_(mean_N[:size], root_N, value=-group["lr"] / (1 - beta1**step))
        if not parameter.is_contiguous():
            parameter.copy_(flat_N.view_as(parameter))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """torch gives every loaded state the dtype of its parameter; codes are bytes."""
        super().load_state_dict(state_dict)
        for state in self.state.values():
            for name in ("mean_codes", "square_codes"):
                if name in state:
                    state[name] = state[name].to(torch.uint8)


def dynamic_map(signed: bool) -> Tensor:
    """The 256 values between -1 (or 0) and 1 that a byte stands for, rising.

    Leading zeros of the byte count powers of ten below 1; what follows the first one divides that decade evenly, so that
    large values have the finest steps and small ones the widest range (the paper's section 2.2; the bit that holds the sign
    divides finer where there is none).
    """
    values = [0.0, 1.0]
    for zeros in range(7):
        parts = 2 ** (6 - zeros + (not signed))
        decade = [(0.1 + 0.9 * (at + 0.5) / parts) * 10.0**-zeros for at in range(parts)]
        values += [*decade, *(-value for value in decade)] if signed else decade
    return torch.tensor(sorted(values))


def decode(codes: Tensor, peaks: Tensor, *, signed: bool) -> Tensor:
    """The values of `codes` [blocks x 256] under the largest of each block."""
    values, _ = _tables(signed, codes.device)
    return (values.index_select(0, codes.int()).view(-1, BLOCK) * peaks[:, None]).view(-1)


def encode(values_N: Tensor, codes: Tensor, peaks: Tensor, *, signed: bool) -> None:
    """Write the codes nearest to `values_N`, and the largest of each block, into `codes` and `peaks`."""
    _, nearest = _tables(signed, codes.device)
    blocks = values_N.view(-1, BLOCK)
    torch.amax(blocks.abs() if signed else blocks, 1, out=peaks)
    share = blocks / peaks.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    torch.index_select(nearest, 0, share.half().view(-1).view(torch.int16).int() + 2**15, out=codes)


@cache
def _tables(signed: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """(the value of each code, the nearest code of each half-precision number by its bits)."""
    values = dynamic_map(signed)
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16).float().nan_to_num()
    nearest = torch.bucketize(numbers, (values[1:] + values[:-1]) / 2).to(torch.uint8)
    return values.to(device), nearest.to(device)
