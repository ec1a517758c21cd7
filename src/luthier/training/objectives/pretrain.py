"""Learn a language from plain text: the next token, or the masked one."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field
from torch import Tensor

from luthier.core.errors import ConfigError, DataError
from luthier.core.events import Events
from luthier.core.types import Encoded, Example, Text
from luthier.data.batches import Batch, best_fit, collate
from luthier.models.cross_entropy import token_loss
from luthier.models.output import head_of
from luthier.models.packed import hidden_states
from luthier.models.spec import LoadedModel, ModelSpec
from luthier.training.objectives.causal import causal_loss
from luthier.training.objectives.part import Loss, Objective

# Tokenising in slices keeps the memory of a large corpus flat.
SLICE = 512


class Pretrain(Objective):
    """Predict the next token (decoder-only) or the masked tokens (encoder).

    Documents, each closed by the end-of-text token (or framed by the encoder's own special tokens), are cut to the
    context length, and packed by best fit into rows of that length, in which each attends to itself alone; or, joined,
    they run on and are cut wherever a row is full, as in GPT-2's pretraining. The first token of a document, or of a
    row, is given, not learned. Masking
    is BERT's (Devlin et al. 2019, arXiv:1810.04805): of the chosen tokens 80 % become the mask token, 10 % a random
    one, 10 % stay; the choice is drawn anew each epoch, and is the same for every validation.
    """

    kind: ClassVar[str] = "pretrain"
    wants: ClassVar[tuple[type, ...]] = (Text,)

    mask: float = Field(0.15, gt=0, lt=1)
    """Share of tokens to predict, for encoders."""
    documents: Literal["apart", "joined"] = "apart"
    """Apart: packed whole, each attends to itself alone. Joined: end to end, cut into rows, each sees what is before it."""

    def check_model(self, spec: ModelSpec) -> None:
        if spec.task not in ("causal", "masked"):
            raise ConfigError(
                f"objective 'pretrain' is for decoder-only models and encoders; {spec.source} is made to {spec.task}: "
                "use 'seq2seq' for an encoder-decoder, or start from a base model"
            )

    def encode(self, examples: Sequence[Example], model: LoadedModel, events: Events) -> list[Encoded]:
        self.check_examples(examples)
        tokenizer, length = model.tokenizer, model.spec.max_length
        causal = model.spec.task == "causal"
        first, end = model.renderer.first_ids, tokenizer.eos_token_id
        if causal and end is None:
            raise DataError(
                "the tokenizer has no end-of-text token, so documents would run together; set its eos_token"
            )
        pieces: list[list[int]] = []
        owners: list[str] = []
        for start in range(0, len(examples), SLICE):
            part = [example for example in examples[start : start + SLICE] if isinstance(example, Text)]
            texts = [example.text for example in part]
            found = tokenizer(texts, add_special_tokens=not causal, verbose=False)["input_ids"]
            for example, ids in zip(part, found):
                # With the tokenizer's own beginning, which is where a text is gone on from.
                document = ids if not causal else [*first, *ids, end] if ids else []
                # Pieces overlap by one token, so that every token but a document's first is predicted once.
                step = length - 1 if causal else length
                if self.documents == "joined":
                    pieces.append(document)
                    owners.append(example.id)
                    continue
                cut = [document[at : at + length] for at in range(0, len(document), step)]
                kept = [piece for piece in cut if len(piece) > 1 or not causal]
                pieces += kept
                owners += [example.id] * len(kept)
        if self.documents == "joined":
            rows = _join(owners, pieces, length, causal)
        else:
            packed = best_fit([len(piece) for piece in pieces], length)
            rows = [_lay([owners[one] for one in row], [pieces[one] for one in row]) for row in packed]
        if not rows:
            raise DataError("the texts hold fewer than two tokens in all; there is nothing to predict")
        return rows

    def batch(self, rows: Sequence[Encoded], model: LoadedModel, seed: tuple[int, ...]) -> Batch:
        if model.spec.task == "causal":
            return collate(rows)
        masked, originals = zip(*(mask_tokens(row, model, self.mask, seed) for row in rows))
        batch = collate(masked)
        batch.gold = collate(originals).ids_N
        return batch

    def measure(self, model: LoadedModel, batch: Batch) -> tuple[Loss, Tensor | None]:
        if model.spec.task == "causal":
            return causal_loss(model, batch), None
        assert batch.gold is not None
        places_M = batch.places_M
        states_ME = hidden_states(model, batch.ids_N, batch.lengths)[places_M]
        loss = token_loss(head_of(model), states_ME, batch.gold[places_M], batch.weights_N[places_M])
        return Loss(loss, batch.weight), None


def _join(owners: Sequence[str], documents: Sequence[Sequence[int]], length: int, causal: bool) -> list[Encoded]:
    """Documents end to end, cut into rows of `length`; a row is named after the document that it begins in."""
    stream = [(token, float(at > 0), owner) for owner, ids in zip(owners, documents) for at, token in enumerate(ids)]
    rows = []
    for at in range(0, len(stream), length):
        ids, weights, names = zip(*stream[at : at + length])
        weights = (0.0, *weights[1:]) if causal else weights
        if sum(weights) > 0:
            rows.append(Encoded(f"{names[0]} and on, row {at // length}", ids, weights))
    return rows


def _lay(owners: Sequence[str], pieces: Sequence[Sequence[int]]) -> Encoded:
    """Pieces end to end in one row, named after the document of the first; all but the first token of each is learned."""
    name = owners[0] + (f" with {len(owners) - 1} more" if len(owners) > 1 else "")
    ids = tuple(token for piece in pieces for token in piece)
    weights = tuple(float(at > 0) for piece in pieces for at in range(len(piece)))
    return Encoded(name, ids, weights, segments=tuple(len(piece) for piece in pieces))


def mask_tokens(row: Encoded, model: LoadedModel, share: float, seed: tuple[int, ...]) -> tuple[Encoded, Encoded]:
    """(row with tokens masked and weights on them, row as it was). At least one token is chosen."""
    tokenizer = model.tokenizer
    random = np.random.default_rng([*seed, zlib.crc32(row.id.encode())])
    ids = np.array(row.ids)
    ordinary = np.flatnonzero(~np.isin(ids, tokenizer.all_special_ids))
    if len(ordinary) == 0:
        return replace(row, weights=(0.0,) * len(ids)), row
    chosen = random.permutation(ordinary)[: max(1, round(share * len(ordinary)))]
    fate = random.random(len(chosen))
    masked = ids.copy()
    masked[chosen[fate < 0.8]] = tokenizer.mask_token_id
    swapped = chosen[fate >= 0.9]
    masked[swapped] = random.integers(0, len(tokenizer), len(swapped))
    weights = np.zeros(len(ids))
    weights[chosen] = 1.0
    return replace(row, ids=tuple(masked.tolist()), weights=tuple(weights.tolist())), row
