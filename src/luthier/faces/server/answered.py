"""Whether what tools gave answers the calls of a conversation: a result that answers none would be read as if somebody had
asked for it, and a call without an answer as if there were none. OpenAI's and Anthropic's APIs refuse both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from luthier.faces.server.blocks import BlockTurn, ToolResult, ToolUse
from luthier.faces.server.inputs import InputCall, InputCallOutput, InputItem
from luthier.faces.server.refusals import Refusal


class Calls:
    """The calls of a conversation that wait for an answer. `answer`: what that is, in the words of an API."""

    def __init__(self, answer: str):
        self._answer = answer
        self._open: dict[str, str] = {}
        """The place of each, by its id."""
        self._nameless: list[str] = []
        """Places of those without an id, which are answered in order."""
        self._answered: set[str] = set()

    def make(self, id: str | None, place: str) -> None:
        """A call is made. Raises Refusal for an id that another has."""
        if id is None:
            self._nameless.append(place)
            return
        if id in self._open:
            raise _refusal(place, f"{id!r} is the id of two calls; give each its own")
        self._answered.discard(id)
        self._open[id] = place

    def take(self, id: str | None, place: str) -> None:
        """A call is answered. Raises Refusal where there is no such call, or where it was answered before."""
        if id is None and not self._nameless:
            raise _refusal(place, "is required: the id of the call that is answered")
        if id is None:
            self._nameless.pop(0)
            return
        if id in self._answered:
            raise _refusal(place, f"{id!r} is answered twice; leave one of the answers out")
        if id not in self._open:
            raise _refusal(place, f"{id!r} answers no call before it; send the call too, or leave the answer out")
        del self._open[id]
        self._answered.add(id)

    def close(self) -> None:
        """No answer may come any more. Raises Refusal for a call without one."""
        self._answered.clear()
        for id, place in self._open.items():
            raise _refusal(place, f"the call {id!r} has no answer; send {self._answer}")
        for place in self._nameless:
            raise _refusal(place, f"the call has no answer; send {self._answer}")


def check_turns(turns: Sequence[Mapping[str, Any]], *, whole: bool = True) -> None:
    """Of a chat: answers follow the turn that made the calls. Its last calls may wait where it is not `whole`. Raises Refusal."""
    calls = Calls("a message of role tool with its tool_call_id right after the assistant's")
    for at, turn in enumerate(turns):
        if turn["role"] == "tool":
            calls.take(turn.get("tool_call_id"), f"messages.{at}.tool_call_id")
            continue
        calls.close()
        for number, call in enumerate(turn.get("tool_calls") or ()):
            calls.make(call.get("id"), f"messages.{at}.tool_calls.{number}")
    if whole:
        calls.close()


def check_blocks(turns: Sequence[BlockTurn]) -> None:
    """Of Anthropic's API: answers stand in the user's turn after the assistant's, each of which may be in pieces. Raises
    Refusal."""
    calls = Calls("a tool_result with its tool_use_id in the message after it")
    for at, turn in enumerate(turns):
        if turn.role == "assistant" and at and turns[at - 1].role == "user":
            calls.close()
        for number, block in enumerate(turn.content):
            if isinstance(block, ToolUse):
                calls.make(block.id, f"messages.{at}.content.{number}")
            elif isinstance(block, ToolResult):
                calls.take(block.tool_use_id, f"messages.{at}.content.{number}.tool_use_id")
    calls.close()


def check_items(items: Sequence[InputItem], kept: int) -> None:
    """Of /v1/responses: answers come anywhere after their calls. The first so many `kept` items were not sent, but are those of
    the response that is gone on from. Raises Refusal."""
    calls = Calls("a function_call_output with its call_id")
    for at, item in enumerate(items):
        place = f"input.{at - kept}" if at >= kept else "previous_response_id"
        if isinstance(item, InputCall):
            calls.make(item.call_id, place)
        elif isinstance(item, InputCallOutput):
            calls.take(item.call_id, f"{place}.call_id" if at >= kept else place)
    calls.close()


def _refusal(place: str, why: str) -> Refusal:
    return Refusal(400, f"{place}: {why}", param=place)
