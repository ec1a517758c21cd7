"""How likely given tokens are by rows of logits: the C kernel of likely.h, and its twin in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from luthier.native.layers import kernel, usable


def log_shares(logits_RV: Tensor, columns: Sequence[Sequence[int]]) -> Tensor:
    """[M], in fp32 on the CPU: log softmax of each row at its columns, row after row. On a CPU what a row gives does not depend
    on those beside it. Where there are no kernels, the same in plain torch."""
    if not usable(logits_RV) or logits_RV.stride(1) != 1:
        return naive_log_shares(logits_RV, columns)
    sizes_R = torch.tensor([0, *map(len, columns)])
    first_R, at_M = sizes_R.cumsum(0), torch.tensor([one for row in columns for one in row], dtype=torch.long)
    found_M = torch.empty(len(at_M))
    kernel("log_shares", logits_RV)(
        logits_RV.data_ptr(), first_R.data_ptr(), at_M.data_ptr(), found_M.data_ptr(), *logits_RV.shape,
        logits_RV.stride(0),
    )  # fmt: skip
    return found_M


def naive_log_shares(logits_RV: Tensor, columns: Sequence[Sequence[int]]) -> Tensor:
    """The same, all rows whole."""
    device = logits_RV.device
    rows_M = torch.tensor([row for row, some in enumerate(columns) for _ in some], dtype=torch.long, device=device)
    at_M = torch.tensor([one for row in columns for one in row], dtype=torch.long, device=device)
    return logits_RV.float().log_softmax(-1)[rows_M, at_M].cpu()
