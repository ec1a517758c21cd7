"""The C files beside this one to a library for this processor: compiled at first use, kept for the next."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

HERE = Path(__file__).parent
FLAGS = ("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", "-fno-math-errno", "-fno-trapping-math",
         "-fno-semantic-interposition", "-Wno-psabi")  # fmt: skip
# Sums in any order, for loops that the compiler makes vectors of; what -ffast-math would add beyond these breaks
# non-finite numbers, which must stay visible. The decoder's sums run in the order that is written down.
MORE = {"kernels": ("-fassociative-math", "-fno-signed-zeros", "-freciprocal-math"), "decoder": ()}
SECONDS = 120


class NoLibrary(Exception):
    """Why there is no library: a sentence."""


@cache
def load_library(name: str = "kernels") -> ctypes.CDLL:
    """The library of that name, compiled if need be. Raises NoLibrary: switched off, no compiler, or it failed."""
    path = library_path(name)
    if not path.exists():
        _compile([_compiler(), *FLAGS, *MORE[name], str(HERE / f"{name}.c")], path)
    try:
        return ctypes.CDLL(str(path))
    except OSError as err:
        raise NoLibrary(f"{path} cannot be loaded ({err})") from None


def library_path(name: str) -> Path:
    """Where the library of that name is, or will be: named by its sources, the compiler and the processor. Raises NoLibrary."""
    if os.environ.get("LUTHIER_NATIVE") == "off":
        raise NoLibrary("switched off by LUTHIER_NATIVE=off")
    compiler = _compiler()
    digest = hashlib.sha256(" ".join((compiler, *FLAGS, *MORE[name], _processor())).encode())
    for source in sorted([HERE / f"{name}.c", *HERE.glob("*.h")]):
        digest.update(source.read_bytes())
    return cache_directory() / f"{name}-{digest.hexdigest()[:16]}.so"


def _compiler() -> str:
    compiler = os.environ.get("CC") or next((name for name in ("cc", "gcc", "clang") if shutil.which(name)), None)
    if compiler is None or shutil.which(compiler) is None:
        raise NoLibrary("there is no C compiler; install gcc or clang")
    return compiler


def cache_directory() -> Path:
    """Where compiled libraries are kept: $LUTHIER_CACHE, else luthier/ in the user's cache."""
    own = os.environ.get("LUTHIER_CACHE")
    # expanduser, for Path.home() raises where there is no home.
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "luthier"


def _compile(command: list[str], path: Path) -> None:
    """Compile to the side and rename, so that several processes may do it at once."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            side = Path(folder) / path.name
            whole = [*command, "-o", str(side), "-lm"]
            done = subprocess.run(whole, capture_output=True, text=True, timeout=SECONDS, check=False)
            if done.returncode != 0:
                lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
                raise NoLibrary(f"{command[0]} failed: {lines[0] if lines else 'no reason given'}")
            os.replace(side, path)
    except (OSError, subprocess.TimeoutExpired) as err:
        raise NoLibrary(f"the kernels could not be compiled ({err})") from None


def _processor() -> str:
    """What -march=native depends on: a cache shared by several machines must not mix them up."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            facts = {
                line.partition(":")[2].strip() for line in lines if line.startswith(("flags", "Features", "model name"))
            }
        return " ".join(sorted(facts))
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
