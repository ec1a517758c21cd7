"""A command's imports: what is left out, what still works, and that the two ways of looking for models find the same."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import transformers
import transformers.modeling_utils
from transformers.utils import import_utils

from luthier.models.lean import import_lean, models_structure

LEFT_OUT = ("torch._inductor", "torch.distributed.tensor", "torch.onnx", "mpmath", "scipy.stats", "sklearn", "pandas")

LEAN = """
from luthier.models.lean import import_lean
assert import_lean()
"""
TUNE = """
import json, sys
import luthier
found = {}
def note(event):
    if event["event"] == "step":
        found.setdefault("losses", []).append(event["loss"])
        found.setdefault("modules", sorted(sys.modules))
rows = [{"messages": [{"role": "user", "content": f"number {at}"}, {"role": "assistant", "content": "yes"}]} for at in range(12)]
luthier.tune(model="mini", data={"train": rows}, objective="sft", steps=2, batch_size=4, baselines=False, sinks=[note])
"""

AFTER = f"""{LEAN}
import sys
import torch
import torch.optim
from importlib.util import find_spec
assert find_spec("sympy").origin and find_spec("torch._dynamo").origin
assert "sympy" in sys.modules and not hasattr(sys.modules["sympy"], "__file__")
# The compiler is there for those who ask, and its symbols are the real ones.
double = torch.compile(lambda x: x * 2 + 1, backend="eager", dynamic=True)
assert double(torch.ones(3)).tolist() == [3.0] * 3
assert double(torch.ones(5)).tolist() == [3.0] * 5
import sympy
import torch._dynamo.utils
assert sympy.Basic.__module__.startswith("sympy") and torch._dynamo.__file__
from torch.fx.experimental.symbolic_shapes import ShapeEnv, expect_true
assert expect_true.__module__ == "torch.fx.experimental.symbolic_shapes"
from transformers.masking_utils import TransformGetItemToIndex
with TransformGetItemToIndex():
    pass
# As PEFT asks for it.
assert torch.distributed.tensor.DTensor and not hasattr(torch.distributed, "nothing")
print("fine")
"""


def run(code: str, where: Path) -> str:
    environment = {**os.environ, "LUTHIER_RUNS": str(where)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip().splitlines()[-1]


def test_a_first_step_needs_neither_compiler_nor_algebra_nor_statistics(tmp_path):
    found = json.loads(run(f"{LEAN}{TUNE}print(json.dumps(found))", tmp_path))
    assert [name for name in found["modules"] if name.startswith(LEFT_OUT)] == []
    whole: dict[str, Any] = {}
    exec(TUNE, whole)  # here transformers is imported whole
    assert found["losses"] == whole["found"]["losses"]


def test_the_compiler_works_when_it_is_asked_for(tmp_path):
    assert run(AFTER, tmp_path) == "fine"


def test_nothing_is_left_out_where_transformers_is_imported_already():
    assert "transformers.modeling_utils" in sys.modules
    assert not import_lean()


def test_models_are_found_as_transformers_finds_them():
    models = Path(transformers.__file__).parent / "models"
    whole = import_utils.define_import_structure(models, "models")
    assert models_structure(whole) == import_utils.define_import_structure(str(models / "__init__.py"))
