"""The server keeps to its own description: no crash, no answer that is not described, no address without a key."""

import os
import subprocess
import sys

import pytest

from luthier.faces.server.keys import SCOPES, add_key
from luthier.verbs.index import index
from running import Running

pytestmark = pytest.mark.e2e
# Requests that get past the first checks: of a model and an index that are served, and for few tokens.
HOOKS = """
import schemathesis

@schemathesis.hook
def map_body(context, body):
    if isinstance(body, dict):
        if "model" in body and isinstance(body["model"], str):
            body["model"] = "mini"
        if isinstance(body.get("index"), str):
            body["index"] = "help"
        for tool in body["tools"] if isinstance(body.get("tools"), list) else ():
            if isinstance(tool, dict) and isinstance(tool.get("vector_store_ids"), list):
                tool["vector_store_ids"] = ["help" for _ in tool["vector_store_ids"]]
        for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
            if isinstance(body.get(name), int) and body[name] > 8:
                body[name] = 8
    return body

@schemathesis.hook
def map_path_parameters(context, path_parameters):
    # Some of another name, too.
    if path_parameters and context.operation.path.startswith("/v1/vector_stores") and len(path_parameters["name"]) % 2:
        path_parameters["name"] = "help"
    return path_parameters
"""


def test_schemathesis_finds_nothing(tmp_path, runs):
    keys = tmp_path / "keys.json"
    key = add_key(keys, "all", SCOPES)
    (tmp_path / "docs.md").write_text("Goods can be returned within thirty days.", encoding="utf-8")
    index(docs=(str(tmp_path / "docs.md"),), name="help", encoder="none")
    served = Running("mini", "--indexes", "help", "--keys", str(keys), runs=runs)
    hooks = tmp_path / "hooks.py"
    hooks.write_text(HOOKS)
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{served.url}/openapi.json", "--max-examples", "40"]
    # What is refused for its meaning (a prompt too long, settings that exclude each other) no schema can say.
    command += ["--checks", "all", "--exclude-checks", "positive_data_acceptance", "-H", f"Authorization: Bearer {key}"]
    try:
        found = subprocess.run(
            command, capture_output=True, text=True, timeout=900,
            env={**os.environ, "SCHEMATHESIS_HOOKS": "hooks", "PYTHONPATH": str(tmp_path)}, cwd=tmp_path,
        )  # fmt: skip
    finally:
        assert served.stop() == 0
    assert found.returncode == 0, found.stdout[-6000:]
    assert "passed" in found.stdout
