"""A model to files that reload bit-equal."""

from __future__ import annotations

import errno
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from luthier.core.errors import ModelError
from luthier.models.adapters import ADAPTERS
from luthier.models.heads import Pooled
from luthier.models.quiet import quiet
from luthier.models.spec import HEAD_FILE, SPEC_FILE, LoadedModel
from luthier.text.golden import write_golden


def save_model(loaded: LoadedModel, directory: Path, *, dtype: str | None = None) -> None:
    """Write the model to `directory` (made if need be): config, weights, tokenizer with the chat template in use,
    generation settings with the stop tokens, the head of a classifier, `luthier.json`, and `golden.json`: how it reads
    fixed texts.

    With an adapter attached only the adapter is written, in PEFT's format. `dtype` ("bfloat16") rounds the weights on
    the disk; the model in memory stays as it is. Raises OSError when the place cannot be written.
    """
    try:
        _write(loaded, directory, dtype)
    except SafetensorError as err:
        # A full disk comes out of safetensors as its own error.
        raise OSError(errno.EIO, str(err), str(directory)) from None


def _write(loaded: LoadedModel, directory: Path, dtype: str | None) -> None:
    if loaded.spec.quantize != "none" and loaded.spec.adapter is None:
        raise ModelError(
            f"{loaded.spec.source}: its weights are held in {loaded.spec.quantize} for tuning an adapter, and are not written "
            "without one; load it with quantize: none to save it whole"
        )
    directory.mkdir(parents=True, exist_ok=True)
    if loaded.spec.adapter is not None:
        ADAPTERS.parse(loaded.spec.adapter).save(loaded, directory)
    else:
        _save_network(loaded, directory, dtype)
    if isinstance(loaded.module, Pooled):
        head = {name: tensor.detach().cpu().contiguous() for name, tensor in loaded.module.head.state_dict().items()}
        save_file(head, directory / HEAD_FILE, metadata={"format": "pt"})
    with quiet():
        loaded.tokenizer.save_pretrained(directory)
    (directory / SPEC_FILE).write_text(loaded.spec.model_dump_json(indent=2), encoding="utf-8")
    write_golden(loaded.renderer, directory)


def _save_network(loaded: LoadedModel, directory: Path, dtype: str | None) -> None:
    network = loaded.network
    generation = getattr(network, "generation_config", None)
    if generation is not None and loaded.spec.stop_ids:
        stops = list(loaded.spec.stop_ids)
        generation.eos_token_id = stops[0] if len(stops) == 1 else stops
    held, kept = network.dtype, None
    if dtype is not None and getattr(torch, dtype) != held:
        kept = {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}
        network.to(getattr(torch, dtype))
    try:
        with quiet():
            network.save_pretrained(directory)
    finally:
        if kept is not None:
            network.to(held)
            network.load_state_dict(kept)
