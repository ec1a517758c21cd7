"""A model that torchrun's processes share, from the command line: the answers of one process, printed once."""

import os
import subprocess
import sys

import pytest

from tiny import tiny_model

pytestmark = pytest.mark.e2e
TEXTS = "The quick brown fox\nOne two three\nsee you at seven\n"


def run(*command, text=TEXTS):
    # On a GPU what is written is not the same to the last bit.
    where = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", *command]
    return subprocess.run(command, input=text, capture_output=True, text=True, timeout=300, env=where)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_torchrun_writes_what_one_process_writes(family):
    asked = ["generate", str(tiny_model(family)), "--raw", "--max-tokens", "20", "--execution", "model"]
    alone = run("luthier", *asked)
    shared = run("torch.distributed.run", "--nproc-per-node", "2", "-m", "luthier", *asked)
    assert alone.returncode == shared.returncode == 0, shared.stderr
    assert shared.stdout == alone.stdout != ""


def test_a_refusal_is_said_once():
    found = run(
        "torch.distributed.run", "--nproc-per-node", "2", "-m", "luthier", "generate", str(tiny_model("gpt2")), "a"
    )
    assert found.returncode != 0 and found.stderr.count("transformers has no plan for gpt2 models") == 1
