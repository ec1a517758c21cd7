"""A model whose weights are on another machine: what it reads and how it ends, without a network."""

from __future__ import annotations

from torch import nn

from luthier.core.errors import ConfigError
from luthier.core.events import Events
from luthier.models.origin import find_origin, read_tokenizer
from luthier.models.purpose import begin_spec
from luthier.models.rendering import checked_renderer
from luthier.models.sources import lasting_name
from luthier.models.spec import NATURAL_TASK, LoadedModel


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
    spec = begin_spec(origin, task, tokenizer, max_length)
    if adapter is not None:
        held = {"adapter": {"kind": str(adapter.get("peft_type"))}, "base": lasting_name(origin.base_name)}
        spec = spec.model_copy(update=held)
    spec, renderer = checked_renderer(origin.place, tokenizer, spec, saved, truncate=truncate, events=events)
    vocabulary = max(len(tokenizer), int(getattr(config.get_text_config(), "vocab_size", 0)))
    return LoadedModel(Elsewhere(vocabulary).eval(), tokenizer, spec, renderer)
