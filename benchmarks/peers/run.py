"""One run of one system in a fresh process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from peers.environment import peer_python


def run_system(name: str, script: str, options: dict[str, object], flavours: dict[str, str]) -> dict[str, Any]:
    """What benchmarks/peers/<script>_luthier.py, or _trl.py in the peers' environment, printed last, which is JSON."""
    python = sys.executable if name == "luthier" else peer_python("trl")
    path = Path(__file__).parent / f"{script}_{'luthier' if name == 'luthier' else 'trl'}.py"
    asked = json.dumps({**options, "flavour": flavours.get(name, name)})
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"LUTHIER_RUNS": folder, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        done = subprocess.run([python, str(path), asked], capture_output=True, text=True, check=False, env=environment)
    if done.returncode != 0:
        raise SystemExit(f"{name} failed:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found
