"""A step through an encoder-decoder: sources are read whole, answers a token each, every text wherever it is."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor

from luthier.engine.likeliest import most_likely
from luthier.models.prepared import Prepared
from luthier.models.slots import Slots, begin, go_on, way_of, writes_by_slots
from luthier.models.spec import LoadedModel

# Sources are read side by side while no more than this share of them is padding.
PADDED = 0.25
# Of a model's own generation settings, those that `engine.choose` does not follow.
BEYOND = (
    "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "encoder_repetition_penalty", "min_length", "min_new_tokens",
    "suppress_tokens", "begin_suppress_tokens", "forced_decoder_ids", "sequence_bias", "exponential_decay_length_penalty",
)  # fmt: skip


class Crossed:
    """Reads the texts of an encoder-decoder in steps; a text goes by the first block of its table."""

    def __init__(self, model: LoadedModel):
        self.model, self._opening = model, opening_of(model)
        self._slots = Slots(way_of(model, self._opening) or "masked")
        self._weights = Prepared(model)

    def read(
        self,
        ids: Sequence[int],
        tables: Sequence[Sequence[int]],
        before: Sequence[int],
        lengths: Sequence[int],
        rows: Sequence[int],
        *,
        likeliest: bool = False,
        adapters: Sequence[int] = (),
    ) -> Tensor:
        """Of each text, end to end in `ids`: its source where none of it was read before, else one token of its answer. The
        logits after the last of each [R, V] in fp32, or with `likeliest` the likeliest token after it [R], -1 where its
        logit is no number."""
        if not lengths:
            return torch.empty(0)
        model, module = self.model, self.model.module
        stops = list(accumulate(lengths))
        keys = [table[0] for table in tables]
        texts = [ids[stop - length : stop] for stop, length in zip(stops, lengths)]
        new = [at for at, read in enumerate(before) if not read]
        old = [at for at, read in enumerate(before) if read]
        states: list[Tensor] = []
        training = module.training
        if training:
            module.eval()
        try:
            with self._weights.used():
                # First: it reads nothing twice where it goes wrong and is tried again.
                parts = [[new[at] for at in part] for part in _alike([lengths[at] for at in new])]
                for part in parts:
                    states_SE, cache = begin(model, [texts[at] for at in part], self._opening)
                    self._slots.put([keys[at] for at in part], cache, [lengths[at] for at in part])
                    states.append(states_SE)
                if old:
                    states.append(go_on(model, self._slots, [keys[at] for at in old], [texts[at][0] for at in old]))
            place = {stops[at] - 1: row for row, at in enumerate([*chain(*parts), *old])}
            chosen = [place[row] for row in rows]
            states_RE = states[0] if len(states) == 1 else torch.cat(states)
            if chosen != list(range(len(states_RE))):
                states_RE = states_RE[chosen]
            logits_RV = self._weights.logits(states_RE)
            return most_likely(logits_RV) if likeliest else logits_RV
        finally:
            if training:
                module.train()

    def drop(self, block: int) -> None:
        """Let go of the text whose first block this is."""
        self._slots.drop(block)

    def copy(self, source: int, target: int) -> None:
        """The text whose first block is `source` once more, as that of `target`: texts of an encoder-decoder share nothing."""
        self._slots.copy(source, target)


def _alike(lengths: Sequence[int]) -> list[list[int]]:
    """Places of `lengths` in parts that may be read side by side."""
    parts: list[list[int]] = []
    for at in sorted(range(len(lengths)), key=lambda at: -lengths[at]):
        if parts:
            whole = lengths[parts[-1][0]] * (len(parts[-1]) + 1)
            if sum(lengths[one] for one in parts[-1]) + lengths[at] >= whole * (1 - PADDED):
                parts[-1].append(at)
                continue
        parts.append([at])
    return parts


def opening_of(model: LoadedModel) -> tuple[int, ...]:
    """What every answer of an encoder-decoder is made to begin with, which is no part of it: the token that its decoder
    starts from, and the language that some are told so."""
    own: Any = model.module.generation_config
    start = getattr(model.module.config, "decoder_start_token_id", None)
    start = own.decoder_start_token_id if start is None else start
    start = own.bos_token_id if start is None else start
    forced = own.forced_bos_token_id
    return tuple(int(one) for one in (start, forced) if one is not None)


def why_padded(model: LoadedModel) -> str | None:
    """Why an encoder-decoder's answers must come from transformers' own loop; None where they need not."""
    own: Any = model.module.generation_config
    idle = {"encoder_repetition_penalty": 1.0}
    asked = [name for name in BEYOND if getattr(own, name, None) not in (None, 0, [], {}, idle.get(name))]
    if asked:
        return f"the model's own settings ask for {asked[0]}"
    if not opening_of(model):
        return "the model does not say what its decoder starts from"
    if not writes_by_slots(model, opening_of(model)):
        return f"{model.spec.family} models do not go on with texts at several places side by side"
    return None


def never_of(model: LoadedModel) -> tuple[tuple[int, ...], ...]:
    """Tokens, one after the other, that a model's own settings ban."""
    if model.spec.kind != "encoder-decoder":
        return ()
    own: Any = model.module.generation_config
    return tuple(tuple(form) for form in own.bad_words_ids or ())


def early_of(model: LoadedModel) -> bool | str:
    """When a search ends by a model's own settings, as transformers has it (`early_stopping`): True with as many answers as
    there are beams, False where no better one is likely to come, "never" where none can."""
    own: Any = model.module.generation_config
    return own.early_stopping or False
