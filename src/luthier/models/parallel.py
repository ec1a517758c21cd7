"""A language model shared out over processes, each with its part of every layer: the plans are transformers' (tensor parallelism,
Shoeybi et al. 2019, arXiv:1909.08053)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from luthier.core.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def check_shared(source: str, config: PreTrainedConfig, parts: int, *, writes: bool, whole: bool) -> None:
    """Raises ModelError for a model that cannot be shared out over so many processes: one that is no decoder and `writes` no
    text, one that is not loaded `whole` from its files as they are, or whose family or numbers of heads do not allow it."""

    def refuse(why: str) -> ModelError:
        return ModelError(f"{source}: {parts} processes cannot share it: {why}")

    inner = config.get_text_config()
    if not writes:
        raise refuse("only a decoder-only language model is shared out; start it in one process")
    if not whole:
        raise refuse(
            "an adapter or a quantised base is not shared out; merge the adapter (luthier merge), or start it in one process"
        )
    if not getattr(inner, "base_model_tp_plan", None):
        raise refuse(
            f"transformers has no plan for {config.model_type} models; choose another model, or start it in one process"
        )
    heads = int(inner.num_attention_heads)
    for name, count in (("heads", heads), ("heads of keys and values", _kept_heads(inner, heads))):
        if count % parts:
            raise refuse(f"it has {count} {name}; start so many processes that this is a multiple of them")


def _kept_heads(config: PreTrainedConfig, heads: int) -> int:
    return int(getattr(config, "num_key_value_heads", None) or heads)


def shared_out(parts: int) -> dict[str, Any]:
    """How transformers loads a model that so many processes share; nothing where there is one."""
    if parts == 1:
        return {}
    from transformers.distributed.configuration_utils import DistributedConfig

    return {"distributed_config": DistributedConfig(tp_size=parts, tp_plan="auto")}


def is_shared(module: Any) -> bool:
    """Whether other processes hold parts of this module's layers, as transformers shares them out."""
    return (getattr(module, "_tp_size", None) or 1) > 1


def agree(found: Tensor) -> Tensor:
    """What the first process found, in every one: rounding must not part them."""
    dist.broadcast(found, 0)
    return found


def check_device(asked: torch.device) -> None:
    """Raises ModelError where transformers would share a model out over other devices than `asked`."""
    there = torch.accelerator.current_accelerator()
    if there is not None and there.type != asked.type:
        raise ModelError(
            f"device: a model is shared out over {there.type} devices where there are any, not over {asked.type}; leave device "
            "out"
        )
