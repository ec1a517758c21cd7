"""The C kernels equal plain torch, forward and backward; without a compiler all goes on in torch."""

import os
import subprocess
import sys

import pytest
import torch

from luthier.native import layers
from luthier.native.build import NoLibrary, load_library

TOLERANCE = {torch.float32: {"rtol": 1e-5, "atol": 1e-5}, torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2}}


def library():
    try:
        return load_library()
    except NoLibrary as why:
        pytest.skip(f"no library: {why}")


def compare(ours, plain, inputs, dtype):
    torch.testing.assert_close(ours, plain, **TOLERANCE[dtype])
    grad = torch.randn_like(ours)
    pairs = zip(torch.autograd.grad(ours, inputs, grad), torch.autograd.grad(plain, inputs, grad))
    for mine, theirs in pairs:
        size = max(1.0, float(theirs.float().abs().max()))
        torch.testing.assert_close(mine / size, theirs / size, **TOLERANCE[dtype])


def made(dtype, *shape):
    return torch.randn(*shape).to(dtype).requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shift", [0.0, 1.0])
@pytest.mark.parametrize("rows, width", [(1, 1), (3, 17), (130, 96)])
def test_norm(dtype, shift, rows, width):
    library()
    torch.manual_seed(0)
    x, weight = made(dtype, rows, width), made(dtype, width)
    ours = layers.RMSNorm.apply(x, weight, 1e-5, shift)
    compare(ours, layers.naive_rms_norm(x, weight, 1e-5, shift), (x, weight), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1,), (13, 7), (130, 96)])
def test_gated_unit(dtype, shape):
    library()
    torch.manual_seed(0)
    gate, up = made(dtype, *shape), made(dtype, *shape)
    compare(layers.SwiGLU.apply(gate, up), layers.naive_swiglu(gate, up), (gate, up), dtype)
    far = torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4]).to(dtype)
    one = torch.ones_like(far)
    torch.testing.assert_close(layers.SwiGLU.apply(far, one), layers.naive_swiglu(far, one))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads, size", [(1, 2), (3, 16), (9, 64)])
def test_rotation(dtype, heads, size):
    library()
    torch.manual_seed(0)
    x, angle = made(dtype, 13, heads, size), torch.randn(13, size // 2)
    cosine, sine = (torch.cat([one, one], -1).to(dtype) for one in (angle.cos(), angle.sin()))
    compare(layers.Rotate.apply(x * 1, cosine, sine), layers.naive_rotate(x, cosine, sine), (x,), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows, width", [(1, 2), (5, 33), (50, 1000)])
def test_loss_and_its_gradient(dtype, rows, width):
    library()
    torch.manual_seed(0)
    logits = (torch.randn(rows, width) * 5).to(dtype)
    target, weight = torch.randint(0, width, (rows,)), torch.rand(rows)
    mine, theirs = logits.clone(), logits.clone()
    ours = layers.cross_entropy_(mine, target, weight)
    torch.testing.assert_close(ours, layers.naive_cross_entropy_(theirs, target, weight), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mine, theirs, **TOLERANCE[dtype])


def test_what_is_no_number_stays_visible():
    library()
    bad = torch.tensor([[1.0, float("nan"), 2.0], [1.0, float("inf"), 2.0]])
    for dtype in (torch.float32, torch.bfloat16):
        loss = layers.cross_entropy_(bad.to(dtype), torch.tensor([0, 0]), torch.ones(2))
        assert not torch.isfinite(loss).any()
        assert layers.RMSNorm.apply(bad.to(dtype), torch.ones(3, dtype=dtype), 1e-6, 0.0)[0].isnan().all()


def test_rows_do_not_depend_on_their_neighbours():
    library()
    torch.manual_seed(0)
    x, weight = torch.randn(64, 96).bfloat16(), torch.randn(96).bfloat16()
    whole = layers.RMSNorm.apply(x, weight, 1e-5, 0.0)
    for at in (0, 31, 63):
        assert torch.equal(layers.RMSNorm.apply(x[at : at + 1], weight, 1e-5, 0.0)[0], whole[at])


def test_without_a_compiler_training_goes_on(tmp_path):
    code = """
import torch
from luthier.native.build import NoLibrary, load_library
from luthier.native.layers import usable
try:
    load_library()
except NoLibrary as why:
    print(why)
print(usable(torch.zeros(2)))
"""
    environment = {**os.environ, "PATH": "/nowhere", "LUTHIER_CACHE": str(tmp_path)}
    environment.pop("CC", None)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout == "there is no C compiler; install gcc or clang\nFalse\n"


def test_a_broken_compiler_is_said(tmp_path, monkeypatch):
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\necho 'x.c:1: error: cannot' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    load_library.cache_clear()
    try:
        with pytest.raises(NoLibrary, match=r"cc failed: x.c:1: error: cannot"):
            load_library()
    finally:
        load_library.cache_clear()
