"""The tensors of a model's safetensors file as numpy, without torch: bf16 becomes fp32."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np


def read_tensors(model: Path) -> Iterator[tuple[str, np.ndarray]]:
    """(name, values) of each; the format is a length, a JSON header and the bytes (huggingface/safetensors)."""
    with open(model / "model.safetensors", "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        start = file.tell()
        for name, facts in header.items():
            if name == "__metadata__":
                continue
            first, last = facts["data_offsets"]
            file.seek(start + first)
            data = file.read(last - first)
            if facts["dtype"] == "BF16":
                values = (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32)
            else:
                values = np.frombuffer(data, {"F32": np.float32, "F16": np.float16}[facts["dtype"]])
            yield name, values.reshape(facts["shape"])
