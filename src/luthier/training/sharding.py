"""A model whose weights, gradients and optimiser state are shared out over the processes: FSDP2.

Zhao et al. 2023 (arXiv:2304.11277), after ZeRO stage 3 (Rajbhandari et al. 2020, arXiv:1910.02054), in torch's
`fully_shard`: each weight is cut along its rows, a layer is whole only while it computes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import Parameter

from luthier.core.errors import ConfigError, ModelError
from luthier.data.batches import Batch
from luthier.models.heads import Pooled
from luthier.models.layers import layers_of
from luthier.models.output import Head, OwnHead, head_of
from luthier.models.packed import shares
from luthier.models.spec import LoadedModel
from luthier.training.hollow import fill, fill_buffers
from luthier.training.objectives.part import Loss, Objective
from luthier.training.optimizers.part import Optimizer
from luthier.training.world import World


def check_sharding(optimizer: Optimizer) -> None:
    """Raises ConfigError for an optimiser that cannot work on parts of weights."""
    if not optimizer.elementwise:
        raise ConfigError(
            f"sharding: the optimiser {optimizer.kind!r} needs whole matrices, and each process would hold only its rows of "
            "them; use adamw, adam, sgd, lion or schedule_free, or sharding: none"
        )


class Sharded:
    """`model` with its weights shared out, in place, until `gather` makes it whole again.

    What learns is kept in fp32; a model in bfloat16 computes in that, and its gradients are added up in fp32. A frozen
    weight keeps its precision. Weights outside the layers (embeddings, last norm, head) are whole from the beginning
    of a pass to its end, so that an objective may read the head as in any other model.
    """

    def __init__(self, model: LoadedModel, world: World, device: torch.device, *, hollow: bool = False):
        """`hollow`: only the leader's `model` has weights, and gives them out layer by layer."""
        layers = list(layers_of(model.network))
        if not layers:
            raise ModelError(f"{model.spec.family}: no list of layers was found to share out; use sharding: none")
        self._model, self._world = model, world
        self._dtypes = {name: one.dtype for name, one in model.module.named_parameters()}
        # Found out while the model still runs by itself: later, a process whose rows do not ask would not take part.
        shares(model)
        if not isinstance(model.module, Pooled):
            head_of(model)
        given = world.leads or not hollow
        if hollow:
            fill_buffers(model.module, world, device, given=given)
        self._plain = _without_weights(model.module)
        self._empty = dict(self._plain.named_parameters())
        mesh = init_device_mesh(device.type, (world.size,))
        for layer in layers:
            if hollow:
                fill(layer, world, device, given=given)
            fully_shard(layer, mesh=mesh, mp_policy=_widen(layer))
        if hollow:
            fill(model.module, world, device, given=given)
        if isinstance(model.module, Pooled):
            fully_shard(model.module.head, mesh=mesh)  # computes in fp32
        self._root = _Root(model.module)
        fully_shard(self._root, mesh=mesh, mp_policy=_widen(model.module))
        self._plain_head = model.head
        if model.head is not None:
            layer, head = model.head
            inner = self._plain.get_output_embeddings()  # type: ignore[operator]
            if isinstance(head, Head):
                assert isinstance(layer, nn.Linear)
                # Not the whole ones, which would stay in memory.
                model.head = (layer, replace(head, weight_VE=layer.weight, bias_V=layer.bias))
                self._plain_head = (inner, replace(head, weight_VE=inner.weight, bias_V=inner.bias))
            else:
                self._plain_head = (inner, OwnHead(self._plain))

    def measure(self, objective: Objective, model: LoadedModel, batch: Batch) -> tuple[Loss, Tensor | None]:
        """The objective's measure of a batch. All processes must make as many of these, with gradient or without."""

        def act() -> tuple[Tensor, float, Tensor | None]:
            loss, seen = objective.measure(model, batch)
            return loss.sum, loss.weight, seen

        total, weight, seen = self._root(act)
        if not torch.is_grad_enabled():
            self._close()
        return Loss(total, weight), seen

    def _close(self) -> None:
        """Let go of what a pass without gradient left whole."""
        for module in self._root.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Inside, every process holds the whole model, in the precision that it computes in: for what writes or reads with
        it between two passes. Gradients, what learns in fp32 and the optimiser's state stay shared out. All processes
        must enter together."""
        held = self._model.module, self._model.head
        self._plain.train(held[0].training)
        self._put(self._collect())
        self._model.module, self._model.head = self._plain, self._plain_head
        try:
            yield
        finally:
            self._model.module, self._model.head = held
            self._put(self._empty)

    def gather(self) -> None:
        """Make the model whole again in the leader, one weight at a time; in the others it stays without weights."""
        whole = self._collect(everywhere=False)
        if self._world.leads:
            self._put(whole)
        self._model.module, self._model.head = self._plain, None

    @torch.no_grad()
    def _collect(self, everywhere: bool = True) -> dict[str, Parameter]:
        """The whole weights by name; of those that are not the leader's nothing stays, unless `everywhere`."""
        self._close()
        whole: dict[str, Parameter] = {}
        for name, parameter in self._model.module.named_parameters():
            kept = parameter.detach().to(self._dtypes[name])
            full = kept.full_tensor() if isinstance(kept, DTensor) else kept
            if everywhere or self._world.leads:
                whole[name] = Parameter(full, requires_grad=parameter.requires_grad)
        return whole

    def _put(self, parameters: Mapping[str, Parameter]) -> None:
        """Put `parameters` into the plain copy, by name; tied ones stay tied."""
        new = {id(one): parameters[name] for name, one in self._plain.named_parameters()}
        for module in self._plain.modules():
            for name, one in module._parameters.items():
                if one is not None:
                    module._parameters[name] = new[id(one)]


class _Root(nn.Module):
    """The outermost module: runs what it is given while the weights outside the layers are whole."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, act: Any) -> Any:
        return act()


def _widen(module: nn.Module) -> MixedPrecisionPolicy:
    """Bring what learns in `module`, and is not shared out yet, to fp32; returns how it is to compute.

    Weights that learn in bfloat16 compute in it. What learns in fp32 beside a frozen base in bfloat16 (an adapter) computes
    in fp32, as it would in one process. Raises ConfigError for DoRA beside weights that learn in bfloat16.
    """
    learning = [
        (name, one) for name, one in module.named_parameters() if one.requires_grad and not isinstance(one, DTensor)
    ]
    half = any(one.dtype == torch.bfloat16 for _, one in learning)
    if half and any(name.endswith("lora_magnitude") for name, _ in learning):
        raise ConfigError(
            "sharding: in bfloat16, DoRA's magnitudes cannot be shared out together with the whole weights of adapter.also; "
            "set precision: float32, leave adapter.also out, or use sharding: none"
        )
    for _, one in learning:
        one.data = one.data.float()
    return MixedPrecisionPolicy(torch.bfloat16, torch.float32) if half else MixedPrecisionPolicy()


def _without_weights(module: nn.Module) -> nn.Module:
    """A copy of `module` whose parameters hold no memory; tied ones stay tied."""
    empty = {
        id(one): Parameter(torch.empty_like(one, device="meta"), requires_grad=one.requires_grad)
        for one in module.parameters()
    }
    return copy.deepcopy(module, empty)
