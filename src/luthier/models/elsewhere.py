"""A model whose weights are on another machine: what it reads and how it ends, without a network."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from luthier.core.errors import ConfigError
from luthier.core.events import Events
from luthier.models.origin import find_origin, read_tokenizer
from luthier.models.purpose import choose_length, make_renderer
from luthier.models.rendering import check_rendering
from luthier.models.sources import lasting_name
from luthier.models.spec import NATURAL_TASK, LoadedModel, ModelSpec


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
    origin = find_origin(source)
    saved, adapter, config = origin.saved, origin.adapter, origin.config
    task = saved.task if saved else NATURAL_TASK[origin.kind]
    if task != "causal":
        raise ConfigError(
            f"backend: {source} is made to {task}, and a server elsewhere writes with language models alone; leave `backend` out"
        )
    tokenizer = read_tokenizer(origin)
    spec = ModelSpec(
        source=source,
        kind=origin.kind,
        family=config.model_type,
        task=task,
        learned=saved.learned if saved else None,
        max_length=choose_length(max_length, saved, config, tokenizer),
        adapter={"kind": str(adapter.get("peft_type"))} if adapter is not None else None,
        base=lasting_name(origin.base_name) if adapter is not None else None,
    )
    if saved is not None and isinstance(origin.place, Path):
        check_rendering(origin.place, source, tokenizer, saved)
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
