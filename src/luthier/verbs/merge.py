"""Fold an adapter into its base: a whole model that any library loads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from luthier.core.config import Config, Resolved, resolve
from luthier.core.errors import ConfigError, ModelError, RunError
from luthier.core.events import Events, Sink

if TYPE_CHECKING:
    from torch import Tensor

    from luthier.models.spec import LoadedModel

# What folding in may change of the outputs, relative to the largest: rounding in fp32.
TOLERANCE = 1e-4
TRIED = 16


class Merge(Config):
    """Which adapter to fold into its base, and where the whole model goes."""

    model: str
    """run:<id> of a tuning with an adapter, or a directory with a PEFT adapter."""
    output: Path
    """The directory to write; new or empty."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the weights on the disk; auto: that of the base's files."""


def merge(
    asked: Resolved[Merge] | Merge | None = None, *, sinks: Sequence[Sink] = (), **settings: Any
) -> dict[str, Any]:
    """Merge in fp32, check that the outputs stay, save, load again: {"path", "dtype", "difference", "rounding"}.

    `difference` is the largest change of an output that merging made, `rounding` that of the saved model, both relative
    to the largest output. Raises ModelError when merging changes more than rounding does, and nothing is written then;
    ConfigError when there is no adapter, or something is in the way.
    """
    from luthier.models.adapters.merge import merge_adapter
    from luthier.models.load import load_model
    from luthier.models.origin import read_config
    from luthier.models.save import save_model
    from luthier.models.sources import knock, resolve_source

    config = asked if isinstance(asked, Merge) else (asked or resolve(Merge, values=settings)).config
    events = Events(sinks=sinks)
    if config.output.exists() and (not config.output.is_dir() or any(config.output.iterdir())):
        raise ConfigError(f"output: {config.output} exists and is not empty; name a new directory")
    events.stage(f"loading the model {config.model}")
    loaded = load_model(config.model, dtype="float32", quantize="none", events=events)
    if loaded.spec.adapter is None:
        raise ConfigError(f"model: {config.model} holds no adapter, so there is nothing to merge")
    dtype: str = config.dtype
    if dtype == "auto":
        place = resolve_source(str(loaded.spec.base))
        stated = read_config(place, knock(place) if isinstance(place, str) else {}).dtype
        dtype = str(stated or "float32").removeprefix("torch.")
        events.choose("dtype", dtype, "the precision of the base's files")
    before = _outputs(loaded)
    events.stage("merging")
    merge_adapter(loaded)
    difference = _distance(_outputs(loaded), before)
    if not difference <= TOLERANCE:
        raise ModelError(
            f"{config.model}: the merged model differs from the adapted one by {difference:.1e} of its outputs, so nothing "
            "was written; please report it with the model's family"
        )
    events.stage(f"saving the model to {config.output}")
    try:
        save_model(loaded, config.output, dtype=dtype)
    except OSError as err:
        raise RunError(f"{config.output}: the model could not be written ({err.strerror or err})") from None
    rounding = _distance(_outputs(load_model(str(config.output), dtype="float32")), before)
    return {"path": str(config.output), "dtype": dtype, "difference": difference, "rounding": rounding}


def _outputs(loaded: LoadedModel) -> Tensor:
    """Logits or scores of one made-up text, its last tokens the newest of the vocabulary."""
    import torch

    from luthier.models.heads import Pooled

    rows = len(loaded.tokenizer)
    ids_1N = (torch.arange(TRIED, device=loaded.device)[None] * 5 + 3) % min(rows, 1000)
    ids_1N[0, -2:] = torch.arange(rows - 2, rows, device=loaded.device)
    with torch.no_grad():
        if isinstance(loaded.module, Pooled):
            return loaded.module(ids_1N, torch.ones_like(ids_1N)).float()  # type: ignore[no-any-return]
        both = {"decoder_input_ids": ids_1N} if loaded.spec.kind == "encoder-decoder" else {}
        return loaded.module(input_ids=ids_1N, **both).logits.float()  # type: ignore[no-any-return]


def _distance(now: Tensor, before: Tensor) -> float:
    return float((now - before).abs().max() / before.abs().max())
