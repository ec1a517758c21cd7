"""The native decoder as it is compiled for other processors than this one: the same tests, in registers of their width."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TESTS = ("tests/unit/native/test_decoder.py", "tests/unit/native/test_cached.py", "tests/unit/native/test_packing.py")


@pytest.mark.e2e
@pytest.mark.skipif(platform.machine() != "x86_64" or shutil.which("gcc") is None, reason="compiles for x86-64 by gcc")
@pytest.mark.parametrize(
    ("processor", "instructions"), [("x86-64", "SSE2"), ("x86-64-v2", "SSE2"), ("x86-64-v3", "AVX2")]
)
def test_the_decoder_holds_on_a_processor_that_has_less(tmp_path, processor, instructions):
    compiler = tmp_path / "compiler"
    compiler.write_text(f'#!/bin/bash\nexec gcc "${{@/-march=native/-march={processor}}}"\n')
    compiler.chmod(0o755)
    told = {**os.environ, "CC": str(compiler), "LUTHIER_CACHE": str(tmp_path / "cache")}
    said = "from luthier.native.library import kernels; print(kernels())"
    found = subprocess.run([sys.executable, "-c", said], env=told, capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stdout.strip() == instructions
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", *TESTS]
    done = subprocess.run(command, env=told, capture_output=True, text=True, check=False, cwd=ROOT)
    last = done.stdout.strip().splitlines()[-1]
    assert done.returncode == 0 and "passed" in last and "skipped" not in last, done.stdout[-3000:]
