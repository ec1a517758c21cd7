"""The server keeps to its own description: no crash, no answer that is not described, no address without a key."""

import os
import subprocess
import sys

import pytest

from luthier.faces.server.keys import SCOPES, add_key
from running import Running

pytestmark = pytest.mark.e2e
# Requests that get past the first checks: of a model that is served, and for few tokens.
HOOKS = """
import schemathesis

@schemathesis.hook
def map_body(context, body):
    if isinstance(body, dict):
        if "model" in body and isinstance(body["model"], str):
            body["model"] = "mini"
        for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
            if isinstance(body.get(name), int) and body[name] > 8:
                body[name] = 8
    return body
"""


def test_schemathesis_finds_nothing(tmp_path):
    keys = tmp_path / "keys.json"
    key = add_key(keys, "all", SCOPES)
    served = Running("mini", "--keys", str(keys), runs=tmp_path / "runs")
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
