"""How well a document answers a query, from a language model: the probability of one label against another as its next word,
and nothing is written. So the rerankers are used that were tuned as language models (Zhang et al. 2025, arXiv:2506.05176)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from luthier.core.config import Config
from luthier.core.errors import ConfigError, DataError, ModelError
from luthier.core.types import Message
from luthier.engine.scoring import Scorer
from luthier.models.spec import LoadedModel

# Where a label stands while what is around it is looked at.
HERE = "\uf8f0label\uf8f0"
# What Qwen's rerankers were tuned on.
SYSTEM = (
    "Judge whether the Document meets the requirements based on the Query and the Instruct provided. "
    'Note that the answer can only be "{}" or "{}".'
)
USER = "<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {document}"
INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"
PLACES = ("{instruction}", "{query}", "{document}")


class Judging(Config):
    """How a pair is put to the model."""

    labels: tuple[str, str]
    """The label whose probability is the score, and the other one."""
    instruction: str | None = None
    """What is looked for; by default passages that answer the query."""
    template: str | None = None
    """In place of the system's and the user's turn: one of the user with {query}, {document} and, where there is one,
    {instruction}."""
    raw: bool = False
    """Without the chat template: a label follows the text as it stands."""


class Judge:
    """Scores pairs of a query and a document from 0 to 1: the probability of the first label's tokens after the prompt, as a
    share of that of both labels. Where a chat template takes no system turn, its sentence stands before the user's text.

    Raises ConfigError for a template without its places or labels that begin alike to the end, and DataError for what does not
    fit.
    """

    def __init__(self, model: LoadedModel, judging: Judging, scorer: Scorer | None = None):
        self._renderer, self._judging, self._scorer = model.renderer, judging, scorer or Scorer(model)
        template = judging.template
        if judging.labels[0] == judging.labels[1]:
            raise ConfigError(f"labels: {judging.labels[0]!r} stands there twice; name the other one")
        if template is not None and not all(place in template for place in PLACES[1:]):
            raise ConfigError(
                "template: it needs places for the query and the document, their names in braces; put them in"
            )
        if judging.instruction is not None and template is not None and PLACES[0] not in template:
            raise ConfigError(
                "instruction: the template has no place for it, its name in braces; put it in, or leave one out"
            )
        plain = judging.raw or model.renderer.template is None or model.renderer.template.name == "raw"
        self._plain, self._system = plain, template is None
        if not plain and self._system and not self._takes_system():
            self._system = False
        self.read = 0
        """Tokens of the prompts."""

    def score(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """Of each query with its document."""
        asked = [self._encode(query, document) for query, document in pairs]
        self.read += sum(len(prompt) for prompt, _ in asked)
        found = self._scorer.score(asked)
        return [1 / (1 + math.exp(min(700.0, no.log_prob - yes.log_prob))) for yes, no in found]

    def _encode(self, query: str, document: str) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
        """The ids of the prompt, and those of each label after it."""
        text = self._text(query, document)
        rows = [self._renderer.tokens(text + label) for label in self._judging.labels]
        starts = [next((at for at, end in enumerate(ends) if end > len(text)), len(ends)) for _, ends in rows]
        first, other = (ids for ids, _ in rows)
        shared = next((at for at in range(min(starts)) if first[at] != other[at]), min(starts))
        if not shared or not all(len(ids) > shared for ids, _ in rows):
            raise DataError("labels: they have no tokens of their own after the text; choose other labels")
        return first[:shared], [ids[shared:] for ids, _ in rows]

    def _text(self, query: str, document: str) -> str:
        """All that stands before a label, as `Renderer.tokens` takes it."""
        system, user = self._asked(query, document)
        if self._plain:
            return f"{system}\n\n{user}\n" if system else user
        if system and not self._system:
            turns = [Message("user", f"{system}\n\n{user}")]
        else:
            turns = [*([Message("system", system)] if system else []), Message("user", user)]
        head, body = self._renderer.split([*turns, Message("assistant", HERE)], "input")
        # Some templates put an empty thought before what is said.
        return head + body.partition(HERE)[0]

    def _asked(self, query: str, document: str) -> tuple[str, str]:
        """What the system says, and what the user does."""
        judging = self._judging
        values = {"instruction": judging.instruction or INSTRUCTION, "query": query, "document": document}
        if self._plain:
            # In turns of users the renderer sees to it.
            values = {name: self._renderer.guarded_text(value) for name, value in values.items()}
        # A text may spell a place, so they are filled at once.
        pieces, user = (judging.template or USER), ""
        while pieces:
            at, place = min(((pieces.find(one), one) for one in PLACES if one in pieces), default=(len(pieces), ""))
            user += pieces[:at] + (values[place[1:-1]] if place else "")
            pieces = pieces[at + len(place) :]
        return ("" if judging.template is not None else SYSTEM.format(*judging.labels)), user

    def _takes_system(self) -> bool:
        try:
            text, _ = self._renderer.render((Message("system", HERE), Message("user", "a")), opened=True)
        except DataError:
            return False
        return HERE in text


def own_labels(model: LoadedModel) -> tuple[str, str] | None:
    """The labels by which a model's config.json says that it judges (`classifier_from_token`, as vLLM reads it: the negative one
    first), the one whose probability is the score first; None where it says nothing. Raises ModelError for anything else."""
    stated: Any = getattr(model.config, "classifier_from_token", None)
    if stated is None:
        return None
    if (
        not isinstance(stated, list | tuple)
        or len(stated) != 2
        or not all(isinstance(one, str) and one for one in stated)
    ):
        raise ModelError(
            f"{model.spec.source}: config.json gives classifier_from_token as {stated!r}, and two labels are meant, such as "
            '["no", "yes"]'
        )
    return stated[1], stated[0]
