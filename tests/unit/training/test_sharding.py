"""What sharding decides before processes meet: how groups of weights compute, and what a model without weights is told."""

import copy
import json

import pytest
import torch

from luthier.core.errors import ConfigError, ModelError
from luthier.core.types import Encoded
from luthier.models.adapters import ADAPTERS
from luthier.models.fuse import fuse, fused_parts
from luthier.models.load import is_whole, load_model
from luthier.models.output import head_of
from luthier.models.packed import hidden_states
from luthier.models.precision import cast_weights
from luthier.models.save import save_model
from luthier.training.checkpoint import digest_of
from luthier.training.draws import part_draws
from luthier.training.hollow import believe, can_be_hollow, describe, fill, fill_buffers
from luthier.training.objectives import OBJECTIVES
from luthier.training.sharded_checkpoints import ShardedCheckpoints
from luthier.training.sharding import _widen
from luthier.training.validation import validate
from luthier.training.world import World
from tiny import tiny_loaded, tiny_model


def half(adapter: dict):
    model = tiny_loaded("llama")
    ADAPTERS.parse(adapter).apply(model)
    cast_weights(model, "bfloat16")
    return model


def test_what_learns_in_fp32_beside_a_base_in_bf16_computes_in_fp32():
    dora = half({"kind": "dora", "rank": 2}).network.model.layers[0]
    assert _widen(dora).param_dtype is None
    assert dora.self_attn.q_proj.lora_a.dtype == torch.float32 and dora.self_attn.q_proj.weight.dtype == torch.bfloat16
    whole = half({"kind": "full"}).network.model.layers[0]
    assert _widen(whole).param_dtype == torch.bfloat16 and whole.mlp.up_proj.weight.dtype == torch.float32
    both = half({"kind": "dora", "rank": 2, "targets": ["q_proj"], "also": ["up_proj"]}).network.model.layers[0]
    with pytest.raises(ConfigError, match="DoRA's magnitudes"):
        _widen(both)


def test_a_copy_with_virtual_tokens_has_its_own():
    pytest.importorskip("peft")
    model = tiny_loaded("llama")
    ADAPTERS.parse({"kind": "peft", "method": "prompt_tuning", "options": {"num_virtual_tokens": 3}}).apply(model)
    other = copy.deepcopy(model.network)
    with torch.no_grad():
        for one in model.network.get_input_embeddings().learned.parameters():
            one.zero_()
    assert not model.network.get_input_embeddings().vectors().any()
    assert other.get_input_embeddings().vectors().abs().sum() > 0


def test_only_what_writes_between_steps_needs_the_whole_model():
    made = {
        "distil": {"kind": "distil", "teacher": "mini"},
        "grpo": {"kind": "grpo", "rewards": "exact_match"},
    }
    draws = {name: OBJECTIVES.parse(made.get(name, name)).draws for name in OBJECTIVES.names()}
    assert [name for name, one in draws.items() if one] == ["grpo", "kto"]
    assert OBJECTIVES.parse({**made["distil"], "on_policy": 0.5}).draws


def test_draws_of_a_follower_are_those_of_its_step_wherever_the_run_began():
    second, leader = World(1, 2), World(0, 2)
    part_draws(second, 7, 3)
    first = torch.rand(3)
    torch.rand(5)
    part_draws(second, 7, 3)
    assert torch.equal(torch.rand(3), first)
    part_draws(World(2, 3), 7, 3)
    assert not torch.equal(torch.rand(3), first)
    torch.manual_seed(1)
    going = torch.rand(3)
    torch.manual_seed(1)
    part_draws(leader, 7, 3)
    assert torch.equal(torch.rand(3), going)


class Told(World):
    """A follower that hears what `leader` holds, in the order in which it is asked."""

    def __init__(self, values):
        super().__init__(1, 2)
        self.values = iter(values)

    def spread(self, tree):
        return next(self.values)


class Telling(World):
    """A leader that notes what it tells."""

    def __init__(self):
        super().__init__(0, 2)
        self.values = []

    def spread(self, tree):
        self.values.append(tree)
        return tree


@pytest.mark.parametrize("family", ["llama", "gemma", "gpt2", "bert", "modernbert", "deberta-v2", "t5", "marian"])
def test_a_shape_filled_with_the_leaders_weights_is_the_leaders_model(family):
    host = torch.device("cpu")
    real, shape = tiny_loaded(family), load_model(str(tiny_model(family)), device="meta")
    lora = ADAPTERS.parse({"kind": "lora", "rank": 2})
    for model in (real, shape):
        lora.apply(model)
    fuse(real)
    assert all(one.is_meta for one in shape.module.parameters())
    believe(shape, describe(real))
    assert fused_parts(shape) == fused_parts(real) and (shape.packs, shape.shares) == (real.packs, real.shares)
    assert type(head_of(shape)) is type(head_of(real))
    leader = Telling()
    fill_buffers(real.module, leader, host, given=True)
    fill(real.module, leader, host, given=True)
    told = Told(leader.values)
    fill_buffers(shape.module, told, host, given=False)
    fill(shape.module, told, host, given=False)
    ids_N = torch.arange(9) + 5
    assert torch.equal(hidden_states(shape, ids_N, [4, 5]), hidden_states(real, ids_N, [4, 5]))
    learning = [[name for name, one in model.module.named_parameters() if one.requires_grad] for model in (real, shape)]
    assert learning[0] == learning[1]


def test_a_shape_that_differs_is_refused():
    shape = load_model(str(tiny_model("llama")), device="meta")
    told = describe(tiny_loaded("qwen2"))
    with pytest.raises(ModelError, match="built from its config alone"):
        believe(shape, told)


def test_what_looks_at_weights_is_read_by_every_process(tmp_path):
    fits = {name: can_be_hollow(ADAPTERS.parse(name), "none") for name in ADAPTERS.names()}
    assert fits == {"full": True, "freeze": True, "lora": True, "dora": True, "pissa": False, "peft": False}
    assert not can_be_hollow(ADAPTERS.parse("lora"), "nf4")
    assert not can_be_hollow(ADAPTERS.parse({"kind": "lora", "tokens": ["x"]}), "none")
    model = tiny_loaded("llama")
    ADAPTERS.parse("lora").apply(model)
    save_model(model, tmp_path / "adapter")
    assert is_whole(str(tiny_model("llama"))) and not is_whole(str(tmp_path / "adapter"))


def test_a_tensor_that_the_leader_has_not_is_refused():
    real, shape = tiny_loaded("llama"), load_model(str(tiny_model("llama")), device="meta")
    shape.network.register_buffer("own", torch.empty(3, device="meta"))
    leader = Telling()
    fill_buffers(real.module, leader, torch.device("cpu"), given=True)
    with pytest.raises(ModelError, match=r"own: the first process holds no such tensor"):
        fill_buffers(shape.module, Told(leader.values), torch.device("cpu"), given=False)


class First:
    """The first of two processes; the other finds its file damaged."""

    rank, size, leads = 0, 2, True

    def any(self, mine: bool) -> bool:
        return True


def test_a_checkpoint_that_another_process_finds_damaged_is_passed_over(tmp_path):
    path = tmp_path / "step-1"
    path.mkdir()
    (path / "rank-0000-of-0002.safetensors").write_bytes(b"rows")
    (path / "state.pt").write_bytes(b"torn")
    manifest = {one.name: digest_of(one) for one in path.iterdir()} | {"state.pt": "another"}
    (path / "manifest.json").write_text(json.dumps(manifest))
    assert ShardedCheckpoints(tmp_path, world=First(), parameters=[]).read("step-1") is None


def test_processes_agree_on_the_passes_of_a_validation_before_the_first():
    """One that asked only when it is through would wait for another that waits for it in a layer."""
    model, asked = tiny_loaded("llama"), []
    objective = OBJECTIVES.parse("sft")

    class Second(World):
        def __init__(self):
            super().__init__(1, 3)

        def most(self, value: int) -> int:
            asked.append("most")
            return value + 2

        def sum(self, *values: float) -> list[float]:
            return list(values)

        def gather(self, value):
            return [value]

        def spread(self, tree):
            return tree

    def measure(batch):
        asked.append("pass")
        return objective.measure(model, batch)

    rows = [Encoded(str(at), tuple(range(4, 12)), (0.0, *[1.0] * 7)) for at in range(6)]
    validate(model, objective, rows, tokens=64, world=Second(), measure=measure, even=True)
    assert asked == ["most", "pass", "pass", "pass"]
