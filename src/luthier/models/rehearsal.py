"""Passes through a model without its numbers: what they would hold in memory at most, and how much they would compute.

The weights are replaced by tensors on torch's meta device, which have shapes and no values, and the code that trains runs
as it stands. Every tensor that it makes is entered in a ledger when it is made, and struck out when it is let go. That
takes milliseconds a layer whatever the size of the batch, and nothing of the memory that it speaks of.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from luthier.models.heads import Pooled
from luthier.models.output import head_of
from luthier.models.packed import packs, shares
from luthier.models.spec import LoadedModel
from luthier.native.layers import meta_as_cpu

META = torch.device("meta")
# What an allocator holds beyond what is in use: pieces between blocks, and room for alignment.
SLACK = 1.08
aten = torch.ops.aten
NAMES = (("query", "q"), ("key", "k"), ("value", "v"))
# The matrix products: the places of the two matrices among the arguments.
PRODUCTS = {aten.mm: (0, 1), aten.bmm: (0, 1), aten.addmm: (1, 2), aten.addmm_: (1, 2), aten.baddbmm: (1, 2)}


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of the tensors that are alive, and FLOPs and bytes of the operations, while it is entered."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.held = 0
        """Bytes held now."""
        self.peak = 0
        """Most bytes held at once since the last `mark`."""
        self.flops: dict[torch.dtype, float] = {}
        """Of matrix products, by the precision of their factors."""
        self.moved = 0.0
        """Bytes read and written by all other operations."""
        self.operations = 0
        self.stand_ins: dict[int, Tensor] = {}
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def know(self, tensors: Iterable[Tensor]) -> None:
        """Do not count these."""
        for tensor in tensors:
            self._enter(tensor, 0)

    def mark(self) -> None:
        """Begin to look for the peak."""
        self.peak = self.held

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func.overloadpacket
        if packet is aten._local_scalar_dense and args[0].is_meta:
            # Nobody knows; what asks whether a mask hides nothing hears that it hides something.
            return 0.0 if args[0].dtype.is_floating_point else 0
        out = func(*args, **(kwargs or {}))
        made = [one for one in (out if isinstance(out, (tuple, list)) else (out,)) if isinstance(one, Tensor)]
        if packet in PRODUCTS:
            left, right = (args[at] for at in PRODUCTS[packet])
            self.add_product(left.dtype, 2.0 * left.numel() * right.shape[-1])
        elif not func.is_view:
            read = sum(one.nbytes for one in args if isinstance(one, Tensor))
            self.moved += read + sum(one.nbytes for one in made)
        self.operations += not func.is_view
        for one in made:
            self._enter(one, None)
        return out

    def add_product(self, dtype: torch.dtype, flops: float) -> None:
        """Count a product."""
        self.flops[dtype] = self.flops.get(dtype, 0.0) + flops

    def _enter(self, tensor: Tensor, size: int | None) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes() if size is None else size

        def strike(_: object) -> None:
            self.held -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, strike)
        self.held += size
        self.peak = max(self.peak, self.held)


class _Fused(TorchFunctionMode):
    """Scaled dot-product attention as the fused kernels hold it: what goes in, what comes out, one number a query."""

    def __init__(self, ledger: Ledger):
        super().__init__()
        self.ledger = ledger

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        asked = {**dict(zip(("q", "k", "v", "attn_mask", "dropout_p", "is_causal"), args)), **(kwargs or {})}
        q, k, v = (asked.pop(long, None) if long in asked else asked.pop(short) for long, short in NAMES)
        mask = asked.get("attn_mask")
        if asked.get("dropout_p") or (mask is not None and mask.requires_grad):
            # No kernel of the CPU's is fused then.
            return torch._scaled_dot_product_attention_math(q, k, v, **asked)[0]
        if mask is not None and mask.dtype == torch.bool:
            mask = torch.empty_like(mask, dtype=q.dtype)
        return _FusedAttention.apply(self.ledger, q, k, v, mask)  # type: ignore[no-untyped-call]


class _FusedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ledger: Ledger, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        out, sums = q.new_empty(*q.shape[:-1], v.shape[-1]), q.new_empty(q.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, sums, mask)
        ctx.ledger = ledger
        ledger.add_product(q.dtype, 4.0 * q.numel() * k.shape[-2])
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors[:3]
        ctx.ledger.add_product(q.dtype, 10.0 * q.numel() * k.shape[-2])
        return None, torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), None


@contextmanager
def rehearse(modules: Iterable[nn.Module], device: torch.device) -> Iterator[Ledger]:
    """Inside, `modules` hold no values and what is done with them on META is entered in the ledger, as on `device`.

    After it everything is as it was. Weights and buffers themselves are not counted; `ledger.stand_ins` has them by the
    id of what they stand for.
    """
    swapped: list[tuple[dict[str, Any], str, Tensor]] = []
    ledger = Ledger()
    stand_ins = ledger.stand_ins
    for module in modules:
        for part in module.modules():
            holders: tuple[dict[str, Any], ...] = (part._parameters, part._buffers)
            for held in holders:
                for name, tensor in held.items():
                    if tensor is not None:
                        swapped.append((held, name, tensor))
                        if id(tensor) not in stand_ins:
                            stand_ins[id(tensor)] = _stand_in(tensor)
    ledger.know(stand_ins.values())
    try:
        for held, name, tensor in swapped:
            held[name] = stand_ins[id(tensor)]
        with ExitStack() as entered:
            if device.type == "cpu":
                entered.enter_context(meta_as_cpu())
            entered.enter_context(_Fused(ledger))
            entered.enter_context(ledger)
            yield ledger
    finally:
        for held, name, tensor in swapped:
            held[name] = tensor


@contextmanager
def as_it_is(model: LoadedModel, *, continued: bool = True) -> Iterator[None]:
    """Find out first what is found out by looking at values, and leave the model as it was. `continued`: texts will be read
    once for several that continue them."""
    if not isinstance(model.module, Pooled):
        head_of(model)
    packs(model)
    if continued:
        shares(model)
    before, training = (model.packs, model.shares, model.head), model.module.training
    try:
        yield
    finally:
        model.packs, model.shares, model.head = before
        model.module.train(training)


def why_not(error: Exception) -> str:
    """Why nothing was predicted. Raises `error` again where it is not of the kind that tensors without values cause."""
    if not isinstance(error, AssertionError | NotImplementedError | RuntimeError | TypeError | ValueError):
        raise error
    lines = str(error).strip().splitlines()
    return f"this model does not run without values ({(lines[0] if lines else type(error).__name__)[:120]})"


def _stand_in(tensor: Tensor) -> Tensor:
    made = torch.empty_like(tensor, device=META)
    if isinstance(tensor, nn.Parameter):
        made = nn.Parameter(made, requires_grad=tensor.requires_grad)
        vars(made).update(vars(tensor))
    return made
