"""Our own optimisers beside their papers' formulas, written out one line a line, in double precision."""

import math

import pytest
import torch
from torch.nn import Parameter

from luthier.training.optimizers import OPTIMIZERS
from luthier.training.optimizers.adamw8bit import BLOCK, decode, dynamic_map, encode

STEPS, RATE, DECAY = 6, 0.01, 0.1
MATRIX, TABLE = "layers.0.mlp.weight", "model.embed_tokens.weight"


def gradients(shape):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(STEPS)]


def run(kind, shape, name=MATRIX, rates=(RATE,) * STEPS, **settings):
    """(start, end, engine, parameter) after moving one weight by `gradients`."""
    torch.manual_seed(2)
    start = torch.randn(shape, dtype=torch.float64)
    parameter = Parameter(start.clone())
    engine = OPTIMIZERS.parse({"kind": kind, "weight_decay": DECAY, **settings}).build([(name, parameter)], RATE)
    for rate, gradient in zip(rates, gradients(shape)):
        engine.param_groups[0]["lr"] = rate
        parameter.grad = gradient.clone()
        engine.step()
    return start, parameter.detach(), engine, parameter


def adam(low, mean, square, step, beta1=0.9, beta2=0.999, eps=1e-8):
    mean = beta1 * mean + (1 - beta1) * low
    square = beta2 * square + (1 - beta2) * low**2
    return (mean / (1 - beta1**step)) / ((square / (1 - beta2**step)).sqrt() + eps), mean, square


def same(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


def test_lion():
    w, found, _, _ = run("lion", (5, 3))
    m = torch.zeros_like(w)
    for g in gradients((5, 3)):
        c = 0.9 * m + 0.1 * g
        w = w - RATE * (torch.sign(c) + DECAY * w)
        m = 0.99 * m + 0.01 * g
    same(found, w)


def test_schedule_free_with_a_warm_up():
    rates = [RATE * min(1, (step + 1) / 3) for step in range(STEPS)]
    w, at_y, engine, parameter = run("schedule_free", (5, 3), rates=rates)
    z, x, square, total = w, w, 0.0, 0.0
    for step, (g, rate) in enumerate(zip(gradients((5, 3)), rates), 1):
        y = 0.1 * z + 0.9 * x
        square = 0.999 * square + 0.001 * g**2
        z = z - rate * g / ((square / (1 - 0.999**step)).sqrt() + 1e-8) - rate * DECAY * y
        total += rate**2
        c = rate**2 / total
        x = (1 - c) * x + c * z
    same(at_y, 0.1 * z + 0.9 * x)
    engine.eval()
    same(parameter.detach(), x)
    engine.eval()
    engine.train()
    engine.train()
    assert torch.equal(parameter, at_y)


@pytest.mark.parametrize("name", [MATRIX, TABLE])
@pytest.mark.parametrize("shape", [(6, 10), (10, 6)])
@pytest.mark.parametrize("settings", [{"rank": 3, "refresh": 4}, {"rank": 1, "scaling": "tensor"}, {"rank": 99}])
def test_apollo(name, shape, settings):
    w, found, engine, parameter = run("apollo", shape, name, **settings)
    tall, last = shape[0] > shape[1], math.inf
    mean = square = 0.0
    for step, g in enumerate(gradients(shape), 1):
        if name == TABLE:
            move, mean, square = adam(g, mean, square, step)
            w = w - RATE * (move + DECAY * w)
            continue
        g = g.T if tall else g
        rank = min(settings["rank"], 6)
        turn = (step - 1) // settings.get("refresh", 200)
        drawn = torch.randn(rank, 6, generator=torch.Generator().manual_seed(turn))
        low = (drawn / math.sqrt(rank)).double() @ g
        move, mean, square = adam(low, mean, square, step)
        if settings.get("scaling") == "tensor":
            update = g * move.norm() / low.norm() * math.sqrt(6 / rank)
        else:
            columns = [g[:, at] * move[:, at].norm() / low[:, at].norm() for at in range(10)]
            update = torch.stack(columns, 1) * math.sqrt(6 / rank)
        if update.norm() > 1.01 * last:
            update = update / update.norm() * 1.01 * last
        last = float(update.norm())
        w = w - RATE * ((update.T if tall else update) + DECAY * w)
    same(found, w)
    if name == MATRIX and "refresh" in settings:
        assert engine.state[parameter]["mean"].shape == (3, 10)


@pytest.mark.parametrize("shape", [(6, 10), (10, 6)])
def test_galore(shape):
    w, found, engine, parameter = run("galore", shape, rank=3, refresh=4)
    tall = shape[0] > shape[1]
    mean = square = 0.0
    for step, g in enumerate(gradients(shape), 1):
        g = g.T if tall else g
        if (step - 1) % 4 == 0:
            # A singular vector's sign is free. Moments stay where they were when directions change, as in the paper's
            # code, so here the signs are those that the engine found.
            directions = torch.linalg.svd(g)[0][:, :3].flip(1)
            if step == 1 or step == 5:
                mine = torch.linalg.eigh(g @ g.T)[1][:, -3:]
                directions = directions * (directions * mine).sum(0).sign()
        move, mean, square = adam(directions.T @ g, mean, square, step)
        update = 0.25 * directions @ move
        w = w - RATE * ((update.T if tall else update) + DECAY * w)
    same(found, w)
    assert engine.state[parameter]["mean"].shape == (3, 10)


def test_apollo_steps_are_about_as_large_as_adamw_s():
    """What the factor sqrt(rows / rank) is for: one learning rate serves both."""
    for settings in ({"rank": 16}, {"rank": 1, "scaling": "tensor"}):
        start, found, _, _ = run("apollo", (64, 200), **settings)
        _, adamw, _, _ = run("adamw", (64, 200))
        assert 0.5 < float((found - start).norm() / (adamw - start).norm()) < 1.5


def test_the_dynamic_map():
    for signed in (True, False):
        values = dynamic_map(signed)
        assert len(values) == 256 and torch.equal(values, values.sort().values) and len(values.unique()) == 256
        assert float(values[-1]) == 1 and float((values == 0).sum()) == 1
    # The decade below 1 in 64 even parts (128 without a sign), and each below it in half as many.
    signed, plain = dynamic_map(True), dynamic_map(False)
    assert float(signed[-2]) == pytest.approx(1 - 0.9 / 128) and float(plain[-2]) == pytest.approx(1 - 0.9 / 256)
    assert float(signed[128]) == pytest.approx(0.55e-6) and float(plain[1]) == pytest.approx(0.325e-6)
    assert int(((signed > 0.01) & (signed < 0.1)).sum()) == 32 and int(((plain > 0.01) & (plain < 0.1)).sum()) == 64
    assert torch.equal(-signed[:127].flip(0), signed[128:255])


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_the_nearest(signed):
    torch.manual_seed(1)
    values = torch.randn(8 * BLOCK) * torch.logspace(-9, 3, 8).repeat_interleave(BLOCK)
    values[BLOCK : 2 * BLOCK] = 0
    values = values if signed else values.abs()
    codes, peaks = torch.zeros(len(values), dtype=torch.uint8), torch.zeros(8)
    encode(values, codes, peaks, signed=signed)
    assert torch.equal(peaks, values.view(8, BLOCK).abs().amax(1))
    share = (values.view(8, BLOCK) / peaks.clamp(min=1e-30)[:, None]).view(-1)
    best = (share[:, None] - dynamic_map(signed)).abs().amin(1)
    found = (share - decode(codes, torch.ones(8), signed=signed)).abs()
    # Half precision moves a value by 2^-11 of it at most, towards the border and from it.
    assert float((found - best - share.abs() * 2**-10).max()) <= 2**-23
    assert torch.equal(decode(codes, peaks, signed=signed)[BLOCK : 2 * BLOCK], torch.zeros(BLOCK))


@pytest.mark.parametrize("transposed", [False, True])
def test_adamw8bit_is_adamw_with_rounded_moments(transposed):
    """The formula with moments put through the nearest code after each step; several pieces, a last block part full."""
    torch.manual_seed(4)
    shape = (300, 251)
    w = torch.randn(shape)
    parameter = Parameter(w.clone().T.contiguous().T if transposed else w.clone())
    assert parameter.is_contiguous() != transposed
    engine = OPTIMIZERS.parse({"kind": "adamw8bit", "weight_decay": DECAY}).build([(MATRIX, parameter)], RATE)
    mean, square = torch.zeros(shape), torch.zeros(shape)

    def rounded(values, signed):
        flat = torch.zeros(-(-values.numel() // BLOCK) * BLOCK)
        flat[: values.numel()] = values.flatten()
        peaks = flat.view(-1, BLOCK).abs().amax(1, keepdim=True)
        share = (flat.view(-1, BLOCK) / peaks).half().float()
        table = dynamic_map(signed)
        codes = torch.bucketize(share, (table[1:] + table[:-1]) / 2)
        return (table[codes] * peaks).flatten()[: values.numel()].view(shape)

    for step in range(1, 4):
        gradient = torch.randn(shape) * torch.logspace(-4, 0, shape[1])
        parameter.grad = gradient.clone()
        engine.step()
        move, mean, square = adam(gradient, mean, square, step)
        w = w - RATE * (move + DECAY * w)
        mean, square = rounded(mean, True), rounded(square, False)
    # A value that rounding in another order puts on the other side of a border is rare, and its step is still near.
    apart = (parameter.detach() - w).abs()
    assert float((apart > 1e-6).float().mean()) < 1e-3 and float(apart.max()) < RATE / 2
    held = sum(one.numel() * one.element_size() for one in engine.state[parameter].values() if torch.is_tensor(one))
    assert held < 2.1 * w.numel()


def test_adamw8bit_keeps_embeddings_and_small_tensors_precise():
    parameters = [(TABLE, Parameter(torch.randn(80, 64))), ("layers.0.norm.weight", Parameter(torch.randn(64)))]
    engine = OPTIMIZERS.parse("adamw8bit").build(parameters, RATE)
    other = OPTIMIZERS.parse("adamw").build([(n, Parameter(p.detach().clone())) for n, p in parameters], RATE)
    mirrored = [one for group in other.param_groups for one in group["params"]]
    for _ in range(4):
        for (_, ours), theirs in zip(parameters, mirrored):
            ours.grad = torch.randn_like(ours)
            theirs.grad = ours.grad.clone()
        engine.step()
        other.step()
    for (_, ours), theirs in zip(parameters, mirrored):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_fused_adamw_is_plain_adamw():
    torch.manual_seed(5)
    start = torch.randn(40, 30)
    ours, theirs = Parameter(start.clone()), Parameter(start.clone())
    one = OPTIMIZERS.parse({"kind": "adamw", "weight_decay": DECAY}).build([(MATRIX, ours)], RATE)
    other = torch.optim.AdamW([theirs], lr=RATE, weight_decay=DECAY, foreach=False, fused=False)
    assert one.defaults["fused"]
    for _ in range(8):
        ours.grad = torch.randn_like(start)
        theirs.grad = ours.grad.clone()
        one.step()
        other.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
