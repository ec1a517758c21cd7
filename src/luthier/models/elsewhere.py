"""A model whose weights are on another machine: what it reads and how it ends, without a network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from luthier.core.errors import ConfigError
from luthier.core.events import Events
from luthier.models.adapters.peft_files import read_adapter_config
from luthier.models.facts import kind_of
from luthier.models.load import base_of, load_tokenizer, read_config
from luthier.models.purpose import choose_length, make_renderer
from luthier.models.rendering import check_rendering
from luthier.models.sources import knock, lasting_name, resolve_source
from luthier.models.spec import NATURAL_TASK, LoadedModel, ModelSpec, read_spec


class Elsewhere(nn.Module):
    """Stands where the network would, and knows how many tokens there are."""

    def __init__(self, vocabulary: int):
        super().__init__()
        self.embeddings = nn.Embedding(vocabulary, 1, device="meta")

    def get_input_embeddings(self) -> nn.Module:
        """As those of transformers."""
        return self.embeddings


def load_elsewhere(
    source: str, *, max_length: int | None = None, truncate: bool = False, events: Events | None = None
) -> LoadedModel:
    """The tokenizer, template and spec of a language model, read as `load_model` reads them; no weights are needed.

    Raises ModelError as `load_model` does, and ConfigError for models that are no decoders or not made to write.
    """
    place = resolve_source(source)
    saved = read_spec(place) if isinstance(place, Path) else None
    adapter = read_adapter_config(place) if isinstance(place, Path) else None
    base, base_name = place, source
    if adapter is not None:
        base_name = (saved.base if saved else None) or str(adapter.get("base_model_name_or_path") or "")
        base = base_of(source, base_name)
    hub: dict[str, Any] = knock(base) if isinstance(base, str) else {}
    config = read_config(base, hub)
    kind = kind_of(config)
    task = saved.task if saved else NATURAL_TASK[kind]
    if task != "causal":
        raise ConfigError(
            f"backend: {source} is made to {task}, and a server elsewhere writes with language models alone; leave `backend` out"
        )
    whole = adapter is None or saved is not None or (isinstance(place, Path) and (place / "tokenizer.json").is_file())
    tokenizer = load_tokenizer(place if whole else base, hub)
    spec = ModelSpec(
        source=source,
        kind=kind,
        family=config.model_type,
        task=task,
        learned=saved.learned if saved else None,
        max_length=choose_length(max_length, saved, config, tokenizer),
        adapter={"kind": str(adapter.get("peft_type"))} if adapter is not None else None,
        base=lasting_name(base_name) if adapter is not None else None,
    )
    if saved is not None and isinstance(place, Path):
        check_rendering(place, source, tokenizer, saved)
    spec, renderer = make_renderer(
        tokenizer,
        spec,
        saved.template if saved else None,
        template="auto",
        truncate=truncate,
        learn="all",
        events=events,
    )
    vocabulary = max(len(tokenizer), int(getattr(config.get_text_config(), "vocab_size", 0)))
    return LoadedModel(Elsewhere(vocabulary).eval(), tokenizer, spec, renderer)
