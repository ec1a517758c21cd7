"""/v1/classify, /v1/score and /v1/rerank"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field, model_validator

from luthier.faces.server.answered import check_turns
from luthier.faces.server.answering import while_here
from luthier.faces.server.chat import Turn, turns_of
from luthier.faces.server.drawing import Body
from luthier.faces.server.embeddings import MOST, ReadUsage, read_usage
from luthier.faces.server.refusals import RESPONSES, Refusal
from luthier.faces.server.server import TheKey, TheServer
from luthier.faces.server.writing import read

routes = APIRouter(tags=["reading"], responses=RESPONSES)
Two = Annotated[list[str], Field(min_length=2, max_length=2)]
Texts = Annotated[list[str], Field(min_length=1, max_length=MOST)]


class Shot(Body):
    """A worked example: a text, and its label."""

    text: str
    label: str


class ClassifyRequest(Body):
    """Texts to classify, or to give a number: one, or many; each alone, or with a second one; or a conversation.

    A classifier has labels of its own; a language model chooses among those that are given here, and writes nothing.
    """

    model: str
    input: str | Texts | Annotated[list[Two], Field(min_length=1, max_length=MOST)] | None = None
    messages: Annotated[list[Turn], Field(min_length=1)] | None = None
    """A conversation instead of texts, for a language model."""
    labels: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=2, max_length=512)] | None = None
    """What a language model chooses among."""
    instruction: str | None = None
    """What stands before the text; by default a question that names the labels."""
    shots: list[Shot] = Field([], max_length=256)
    """Worked examples, which stand before the text."""
    raw: bool = False
    """Without the chat template: the label follows the text."""
    per_token: bool = False
    """Compare labels by the mean instead of the sum over their tokens."""
    calibrate: bool = False
    """Divide a label's probability by the one that it has where there is no text."""

    @model_validator(mode="after")
    def _check(self) -> ClassifyRequest:
        if (self.input is None) == (self.messages is None):
            raise ValueError("give input, a text or many, or else messages, a conversation")
        if self.labels is None:
            for name in ("messages", "instruction", "shots", "raw", "per_token", "calibrate"):
                if getattr(self, name):
                    raise ValueError(f"{name} goes with labels, among which a language model chooses")
            return self
        if len(set(self.labels)) < len(self.labels):
            raise ValueError("a label stands there twice; take one out")
        if not all(one.strip() for one in self.labels):
            raise ValueError("a label is empty; give it a name")
        if self.raw and self.messages is not None:
            raise ValueError("labels after plain text (raw) go with a text, not with messages")
        return self

    def asked(self, tenant: str) -> tuple[str, dict[str, Any]]:
        """What is to be done, and all that it takes."""
        if self.labels is None:
            return "classify", {"inputs": [self.input] if isinstance(self.input, str) else self.input, "tenant": tenant}
        turns = turns_of(self.messages or ())
        check_turns(turns)
        inputs = [self.input] if isinstance(self.input, str) else self.input or [turns]
        if any(isinstance(one, list) for one in self.input or () if not isinstance(self.input, str)):
            raise Refusal(400, "input: a language model labels one text at a time; put the two into one", param="input")
        return "label", {
            "inputs": inputs, "labels": self.labels, "shots": [(one.text, one.label) for one in self.shots], "raw": self.raw,
            "labelling": {
                "instruction": self.instruction, "per_token": self.per_token, "calibrate": self.calibrate,
            },
        }  # fmt: skip


class Class(BaseModel):
    """What a model says of a text: a `label` (or several `labels`) and the probability of each; or a `value`."""

    index: int
    label: str | None = None
    labels: list[str] | None = None
    probabilities: dict[str, float] | None = None
    value: float | None = None


class Classes(BaseModel):
    object: Literal["list"] = "list"
    model: str
    data: list[Class]
    usage: ReadUsage


class Relating(Body):
    """How two texts belong together, where a language model is asked: it has no score of its own."""

    labels: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=2, max_length=2)] | None = None
    """Two answers of a language model, such as ["yes", "no"]: the score is the probability of the first as its next word, as a
    share of that of both. By default as classifier_from_token in its config.json says."""
    instruction: str | None = None
    """What is looked for; by default passages that answer a web search query."""
    template: str | None = None
    """What the model is asked, with {query}, {document} and perhaps {instruction}; by default as Qwen's rerankers are."""
    raw: bool = False
    """Without the chat template: the label follows the text as it stands."""
    by: Literal["vectors"] | None = None
    """The cosine of vectors, from a language model whose files do not say that it is made for them."""

    @model_validator(mode="after")
    def _check_way(self) -> Self:
        if self.by is not None and self.judging is not None:
            raise ValueError(f"{next(iter(self.judging))} goes with labels, not with vectors; leave one of the two out")
        return self

    @property
    def judging(self) -> dict[str, Any] | None:
        """What is said of labels; None where nothing is."""
        names = ("labels", "instruction", "template", "raw")
        return {name: getattr(self, name) for name in names if getattr(self, name)} or None

    def asked(self, pairs: Sequence[tuple[str, str]], tenant: str) -> dict[str, Any]:
        """All that relating pairs takes."""
        return {"pairs": pairs, "judging": self.judging, "by": self.by, "tenant": tenant}


class ScoreRequest(Relating):
    """Pairs of texts: one with each of many, or two lists of the same length. For labels the first is the query."""

    model: str
    text_1: str | Texts
    text_2: str | Texts

    @model_validator(mode="after")
    def _check(self) -> ScoreRequest:
        if not isinstance(self.text_1, str) and len(self.text_1) != len(self._second):
            raise ValueError(f"text_1 has {len(self.text_1)} texts, and text_2 {len(self._second)}")
        return self

    @property
    def _second(self) -> list[str]:
        return [self.text_2] if isinstance(self.text_2, str) else self.text_2

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Each with its other."""
        first = [self.text_1] * len(self._second) if isinstance(self.text_1, str) else self.text_1
        return list(zip(first, self._second))


class Scored(BaseModel):
    index: int
    object: Literal["score"] = "score"
    score: float


class Scores(BaseModel):
    object: Literal["list"] = "list"
    model: str
    data: list[Scored]
    usage: ReadUsage


class RerankRequest(Relating):
    """A question, and documents to put in order."""

    model: str
    query: str
    documents: Texts
    top_n: Annotated[int, Field(ge=1)] | None = None
    return_documents: bool = False


class Document(BaseModel):
    text: str


class Ranked(BaseModel):
    index: int
    relevance_score: float
    document: Document | None = None


class Ranking(BaseModel):
    """The documents, the most relevant first."""

    model: str
    results: list[Ranked]
    usage: ReadUsage


@routes.post("/v1/classify", response_model=Classes)
async def classify(body: ClassifyRequest, request: Request, server: TheServer, key: TheKey) -> Classes:
    """What a classifier, regressor or reward model says of texts; or which of the given labels a language model chooses."""
    served = server.shelf.find(body.model)
    do, asked = body.asked(key.name)
    work = read(request, served, do, asked)
    found = await while_here(request, work, server.settings.timeout)
    data = []
    for at, one in enumerate(found["answers"]):
        output, shares = one["output"], one["probabilities"]
        if isinstance(output, str):
            data.append(Class(index=at, label=output, probabilities=shares))
        elif isinstance(output, list):
            data.append(Class(index=at, labels=output, probabilities=shares))
        else:
            data.append(Class(index=at, value=output))
    return Classes(model=served.name, data=data, usage=read_usage(found["usage"]))


@routes.post("/v1/score", response_model=Scores)
async def score(body: ScoreRequest, request: Request, server: TheServer, key: TheKey) -> Scores:
    """How pairs of texts belong together: the number of a model that reads both, the probability of a label that a language
    model gives, or the cosine of their vectors."""
    served = server.shelf.find(body.model)
    work = read(request, served, "relate", body.asked(body.pairs, key.name))
    found = await while_here(request, work, server.settings.timeout)
    data = [Scored(index=at, score=value) for at, value in enumerate(found["scores"])]
    return Scores(model=served.name, data=data, usage=read_usage(found["usage"]))


@routes.post("/v1/rerank", response_model=Ranking)
async def rerank(body: RerankRequest, request: Request, server: TheServer, key: TheKey) -> Ranking:
    """Documents in the order of their relevance to a question, scored as by /v1/score."""
    served = server.shelf.find(body.model)
    pairs = [(body.query, one) for one in body.documents]
    work = read(request, served, "relate", body.asked(pairs, key.name))
    found = await while_here(request, work, server.settings.timeout)
    order = sorted(range(len(pairs)), key=lambda at: (-found["scores"][at], at))[: body.top_n]
    results = [
        Ranked(
            index=at,
            relevance_score=found["scores"][at],
            document=Document(text=body.documents[at]) if body.return_documents else None,
        )
        for at in order
    ]
    return Ranking(model=served.name, results=results, usage=read_usage(found["usage"]))
