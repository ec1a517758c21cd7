"""The items of an answer in /v1/responses, and the events that tell of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

from pydantic import BaseModel, JsonValue

from luthier.faces.server.answering import new_id
from luthier.faces.server.citing import Annotation, Citation
from luthier.text.called import Part


class OutputText(BaseModel):
    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[Annotation] = []
    logprobs: list[JsonValue] = []
    removed_citations: int | None = None
    """Citations that named no passage and were taken out; null where nothing was searched."""


class OutputMessage(BaseModel):
    """What the assistant says."""

    type: Literal["message"] = "message"
    id: str
    role: Literal["assistant"] = "assistant"
    status: Literal["in_progress", "completed", "incomplete"]
    content: list[OutputText]


class OutputCall(BaseModel):
    """A call that it makes."""

    type: Literal["function_call"] = "function_call"
    id: str
    call_id: str
    name: str
    arguments: str
    status: Literal["in_progress", "completed", "incomplete"]


class SearchHit(BaseModel):
    """A passage that was found."""

    file_id: str
    filename: str
    score: float
    text: str
    attributes: dict[str, str | float]
    """Where it stands, and its scores by words (bm25) and by meaning (cosine)."""


class SearchCall(BaseModel):
    """That indexes were searched."""

    type: Literal["file_search_call"] = "file_search_call"
    id: str
    queries: list[str]
    status: Literal["in_progress", "completed"] = "completed"
    results: list[SearchHit] | None = None
    known: bool | None = None
    """Whether what was found is enough to answer from."""
    read: int | None = None
    """How many of the passages the model was given; there was no room in its context for more."""


Output: TypeAlias = OutputMessage | OutputCall | SearchCall


def status_of(finish: str) -> Literal["completed", "incomplete"]:
    """Of an item, by how its text ended."""
    return "incomplete" if finish == "length" else "completed"


class Items:
    """The items of an answer as they come, and the events that tell of them."""

    def __init__(self, call_id: Callable[[], str] = lambda: new_id("call")) -> None:
        self._call_id = call_id
        self.output: list[Output] = []

    @property
    def said(self) -> bool:
        """Whether there is more than what was searched."""
        return any(not isinstance(one, SearchCall) for one in self.output)

    @property
    def speaks(self) -> bool:
        """Whether a text is open."""
        return bool(self.output) and isinstance(self.output[-1], OutputMessage)

    def say(self, text: str) -> None:
        """More of the text that is open, without an event."""
        last = self.output[-1]
        assert isinstance(last, OutputMessage)
        last.content[0].text += text

    def text_delta(self, text: str) -> dict[str, Any]:
        """The event of more of the text that is open."""
        return self._event("response.output_text.delta", content_index=0, delta=text, logprobs=[])

    def search(self, call: SearchCall) -> list[dict[str, Any]]:
        """Events of a search, which is over before anything is written."""
        self.output.append(
            call.model_copy(update={"status": "in_progress", "results": None, "known": None, "read": None})
        )
        added = self._item("response.output_item.added")
        steps = [self._event(f"response.file_search_call.{step}") for step in ("in_progress", "searching", "completed")]
        self.output[-1] = call
        return [added, *steps, self._item("response.output_item.done")]

    def cite(self, citations: Sequence[Citation], removed: int) -> list[dict[str, Any]]:
        """Events of citations in the text so far."""
        last = self.output[-1]
        if not isinstance(last, OutputMessage):
            return []
        part, found = last.content[0], []
        part.removed_citations = removed
        for one in citations:
            part.annotations.append(one.annotation())
            at = len(part.annotations) - 1
            found.append(
                self._event(
                    "response.output_text.annotation.added", content_index=0, annotation_index=at,
                    annotation=part.annotations[at].model_dump(),
                )
            )  # fmt: skip
        return found

    def take(self, part: Part) -> list[dict[str, Any]]:
        """Events of a part of the answer."""
        if part.kind == "text":
            found = [] if self.speaks else self._open_text()
            self.say(part.text)
            return [*found, self.text_delta(part.text)]
        if part.kind == "name":
            found = self.close("completed")
            made = OutputCall(
                id=new_id("fc"), call_id=self._call_id(), name=part.text, arguments="", status="in_progress"
            )
            self.output.append(made)
            return [*found, self._item("response.output_item.added")]
        last = self.output[-1]
        assert isinstance(last, OutputCall)
        last.arguments += part.text
        return [self._event("response.function_call_arguments.delta", delta=part.text)]

    def close(self, status: Literal["completed", "incomplete"]) -> list[dict[str, Any]]:
        """Events of the end of the last item."""
        if not self.output:
            return []
        last = self.output[-1]
        if last.status != "in_progress":
            return []
        last.status = status
        if isinstance(last, OutputCall):
            done = self._event("response.function_call_arguments.done", name=last.name, arguments=last.arguments)
            return [done, self._item("response.output_item.done")]
        assert isinstance(last, OutputMessage)
        part = last.content[0]
        return [
            self._event("response.output_text.done", content_index=0, text=part.text, logprobs=[]),
            self._event("response.content_part.done", content_index=0, part=part.model_dump()),
            self._item("response.output_item.done"),
        ]

    def _open_text(self) -> list[dict[str, Any]]:
        found = self.close("completed")
        made = OutputMessage(id=new_id("msg"), status="in_progress", content=[])
        self.output.append(made)
        added = self._item("response.output_item.added")
        made.content.append(OutputText(text=""))
        part = self._event("response.content_part.added", content_index=0, part=made.content[0].model_dump())
        return [*found, added, part]

    def _event(self, kind: str, /, **fields: Any) -> dict[str, Any]:
        return {"type": kind, "item_id": self.output[-1].id, "output_index": len(self.output) - 1, **fields}

    def _item(self, name: str) -> dict[str, Any]:
        return {"type": name, "output_index": len(self.output) - 1, "item": self.output[-1].model_dump()}
