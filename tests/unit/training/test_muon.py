"""Muon against torch's: the matrices step as torch.optim.Muon's, everything else as AdamW's."""

import torch
from torch.nn import Parameter

from luthier.training.optimizers import OPTIMIZERS
from luthier.training.optimizers.muon import orthogonalize


def test_singular_values_come_near_one():
    for shape in ((32, 8), (8, 32), (16, 16)):
        found = torch.linalg.svdvals(orthogonalize(torch.randn(shape), 5))
        assert float(found.min()) > 0.5 and float(found.max()) < 1.3, shape


def test_singular_vectors_are_kept():
    matrix = torch.randn(12, 6)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    core = left.T @ orthogonalize(matrix, 5) @ right.T
    assert torch.allclose(core, torch.diag(core.diag()), atol=1e-4)


def test_other_weights_move_as_by_adamw():
    torch.manual_seed(1)
    start, gradients = torch.randn(10, 4), [torch.randn(10, 4) for _ in range(5)]
    ours, theirs = Parameter(start.clone()), Parameter(start.clone())
    muon = OPTIMIZERS.parse({"kind": "muon", "weight_decay": 0.1, "beta2": 0.95})
    one = muon.build([("model.embed_tokens.weight", ours)], 0.01)
    other = torch.optim.AdamW([theirs], lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)
    for gradient in gradients:
        for parameter, optimizer in ((ours, one), (theirs, other)):
            parameter.grad = gradient.clone()
            optimizer.step()
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-6)


def test_matrices_move_as_by_torch_muon():
    torch.manual_seed(2)
    start, gradients = torch.randn(24, 16), [torch.randn(24, 16) for _ in range(5)]
    ours, theirs = Parameter(start.clone()), Parameter(start.clone())
    one = OPTIMIZERS.parse({"kind": "muon", "weight_decay": 0.1}).build([("layers.0.mlp.weight", ours)], 0.01)
    other = torch.optim.Muon([theirs], lr=0.01, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for gradient in gradients:
        for parameter, optimizer in ((ours, one), (theirs, other)):
            parameter.grad = gradient.clone()
            optimizer.step()
    moved, apart = (theirs - start).detach().norm(), (ours - theirs).detach().norm()
    assert float(apart / moved) < 0.02  # torch iterates in bfloat16
