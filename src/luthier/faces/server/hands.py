"""What an engine's process can do with its model, by the names in which the server asks for it."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import asdict
from typing import Any

from pydantic import Field

from luthier.core.config import Config
from luthier.core.errors import ConfigError, DataError, LuthierError, ModelError
from luthier.core.events import Event, Events
from luthier.core.types import Completion, Message, TokenLog
from luthier.data.turns import read_messages
from luthier.engine.calling import structure_of_calls
from luthier.engine.door import Door, Settings
from luthier.engine.engine import Engine
from luthier.engine.generate import uses_engine
from luthier.engine.loading import load_stored, settle_model
from luthier.engine.logs import BEFORE, added
from luthier.engine.pieces import lead_of, text_of
from luthier.engine.pooler import Embedding, Pooler
from luthier.engine.sampling import Execution, Sampling
from luthier.engine.streaming import Answer, Piece
from luthier.faces.server.holding import plan_memory, room_for
from luthier.faces.server.labelled import label
from luthier.faces.server.readings import classify, embed, relate
from luthier.faces.server.searching import search
from luthier.models.spec import LoadedModel
from luthier.text.calls import find_form

Parts = AsyncIterator[dict[str, Any]]


class Order(Config):
    """Which model, and how much of it at once."""

    source: str
    execution: Execution = "auto"
    context: int | None = None
    streams: int
    waiting: int
    adapters: dict[str, str] = Field(default_factory=dict)
    """Name and source of each that was loaded beside it, for a process that is started again."""


class TooLong(DataError):
    """A prompt leaves no room in the context."""


def load(order: dict[str, Any], tell: Callable[[Event], None]) -> Hands:
    """The model that was ordered, ready to write. Raises what loading raises."""
    asked = Order.make(order, where="engine")
    events = Events(sinks=[tell])
    events.stage(f"loading {asked.source}")
    model = load_stored(asked.source, asked.execution, events, max_length=asked.context)
    return Hands(model, asked, events)


class Hands:
    """A model behind a door: one that writes, or one whose texts are read once."""

    def __init__(self, model: LoadedModel, order: Order, events: Events):
        self.model, self.form = model, None
        self.waiting, self.room = order.waiting, room_for(model, order.streams)
        """Texts, and tokens of them, that may wait at the door."""
        engine: Engine | Pooler
        if model.spec.task in ("causal", "seq2seq"):
            if not uses_engine(model):
                raise ModelError(
                    f"{model.spec.source}: {model.spec.family} models do not write text by text side by side, so they cannot "
                    "be served"
                )
            settle_model(model, order.execution, events, sampling=Sampling(), max_length=order.context)
            self.form = find_form(model.renderer)
            engine = Engine(model, self.room, streams=order.streams)
            for name, source in order.adapters.items():
                try:
                    engine.load_adapter(name, source, events)
                except LuthierError as err:
                    events.warn(f"{name}: {err}")
        else:
            engine = Pooler(model, events=events)
            events.choose("engine", "pooled", "each text is read once, beside others")
        # What a search may come to hold is kept from all others; and a scorer of an adapter holds what was planned for one.
        self.searching, self.lending = asyncio.Semaphore(1), asyncio.Semaphore(1)
        self.door = Door(engine, waiting=order.waiting, waiting_tokens=self.room)
        self.facts: dict[str, Any] = {
            "task": model.spec.task,
            "family": model.spec.family,
            "context": model.spec.max_length,
            "streams": order.streams,
            **plan_memory(model, order.streams, order.waiting, writes=isinstance(engine, Engine)),
            "engine": events.choices.get("engine", ""),
            "template": None if model.renderer.template is None else model.renderer.template.name,
            "labels": list(model.spec.labels),
            "calls": None if self.form is None else asdict(self.form),
            "warnings": dict(events.warnings),
        }

    def close(self) -> None:
        """Let the texts that are written go, and end."""
        self.door.close(drain=False)

    def do(self, message: dict[str, Any], tell: Callable[[int, str], bool] = lambda which, text: False) -> Parts:
        """The parts of the answer to a message; texts that came and nothing else go to `tell` in their place, unless it returns
        False. Raises ConfigError for what there is no name for."""
        name = message["do"]
        if name == "write":
            return self.write(message, tell)
        if name not in DOINGS:
            raise ConfigError(f"{self.called(message)} cannot {name}")
        return DOINGS[name](self, message)

    def called(self, message: dict[str, Any]) -> str:
        """The name under which the model of a message is asked for."""
        return str(message.get("model", self.model.spec.source))

    def within(self, ids: Sequence[int]) -> Sequence[int]:
        """Those ids. Raises TooLong."""
        if len(ids) > self.model.spec.max_length:
            raise TooLong(
                f"the context of this model is {self.model.spec.max_length} tokens; the text has {len(ids)}. Shorten it"
            )
        return ids

    def framed(self, text: str | Sequence[int]) -> Sequence[int]:
        """The ids of a text, or given ones, to make a vector of. Raises TooLong, and DataError for none."""
        if not isinstance(text, str):
            return self.within(text)
        return self.within(self.model.renderer.framed_ids(text))

    async def write(self, message: dict[str, Any], tell: Callable[[int, str], bool]) -> Parts:
        """Answers to a prompt: `messages` (with `tools`, `choice` and `parallel`), `text` or `ids`; in pieces where `stream`.
        What they are `expected` to be is guessed from."""
        ids = self.prompt(message)
        sampling = self.sampling(message, ids)
        if message.get("tools") and message.get("choice") != "none":
            sampling = self._with_calls(message, sampling)
        settings: Settings = {}
        for name in ("priority", "tenant", "salt", "adapter"):
            if name in message:
                settings[name] = message[name]
        if "expected" in message:
            settings["expected"] = self.model.tokenizer(message["expected"], add_special_tokens=False)["input_ids"]
        piecewise = bool(message.get("stream"))
        with self.door.begin(ids, sampling, piecewise=piecewise, **settings) as answer:
            if not piecewise:
                whole = await answer.whole()
                found: dict[str, Any] = {"answers": [_answer(one) for one in (whole, *whole.others)]}
                for one, said in zip(found["answers"], (whole, *whole.others)):
                    one |= self._stopped(sampling, said.finish, said.ids, said.text)
                    self._go_on(one.get("logs", ()), sampling)
                found["usage"] = _usage(len(ids), answer)
                if message.get("echo"):
                    found["prompt"] = self.model.tokenizer.decode(list(ids), skip_special_tokens=True)
                if whole.prompt_logprobs is not None:
                    found["prompt_logs"] = self._prompt_logs(ids, whole)
                yield {"end": found}
                return
            ids_of, said_of, begun = defaultdict[int, list[int]](list), defaultdict[int, str](str), set[int]()

            def keep(piece: Piece) -> bool:
                if sampling.stop:
                    ids_of[piece.which] += piece.ids
                    said_of[piece.which] += piece.text
                return True

            def pass_on(piece: Piece) -> bool:
                if piece.logprobs is not None:
                    return False
                return tell(piece.which, piece.text) and keep(piece)

            async for piece in answer:
                part: dict[str, Any] = {"which": piece.which, "text": piece.text}
                if answer.tap is None:
                    # The first says what was read.
                    part["usage"], answer.tap = _usage(len(ids), answer), pass_on
                keep(piece)
                if piece.logprobs is not None:
                    part["logs"] = [_log(one) for one in piece.logprobs]
                    if piece.ids and piece.which not in begun:
                        begun.add(piece.which)
                        self._go_on(part["logs"], sampling)
                if piece.finish is not None:
                    part["finish"] = piece.finish
                    part |= self._stopped(sampling, piece.finish, ids_of[piece.which], said_of[piece.which])
                yield {"piece": part}
            yield {"end": {"usage": _usage(len(ids), answer)}}

    def sampling(self, message: dict[str, Any], prompt: Sequence[int]) -> Sampling:
        """How to go on from a prompt. A text is gone on from, by all but an encoder-decoder; after a turn the next one begins."""
        goes_on = "messages" not in message and self.model.renderer.kind != "encoder-decoder"
        asked = {**message["sampling"], **({"after": tuple(prompt[-BEFORE:])} if goes_on else {})}
        return Sampling.make(asked, where="sampling")

    def _go_on(self, logs: Sequence[list[Any]], sampling: Sampling) -> None:
        """Let the first token of an answer, and those in its place, be what they add to what the answer goes on from."""
        for log in logs[:1]:
            for one in (log, *log[3]):
                one[1] = lead_of(self.model, [one[0]], sampling) + one[1]

    async def tokenize(self, message: dict[str, Any]) -> Parts:
        """The tokens of a prompt, as `write` takes it, and the text of each."""
        ids = self._ids(message)
        texts = self.model.tokenizer.convert_ids_to_tokens(list(ids))
        yield {"end": {"ids": list(ids), "texts": texts, "context": self.model.spec.max_length}}

    async def detokenize(self, message: dict[str, Any]) -> Parts:
        """The text of tokens."""
        count = len(self.model.tokenizer)
        strange = [one for one in message["ids"] if not 0 <= one < count]
        if strange:
            raise ConfigError(f"tokens: there is no token {strange[0]}; the vocabulary has {count}, from 0 on")
        yield {"end": {"text": self.model.tokenizer.decode(message["ids"], skip_special_tokens=False)}}

    async def render(self, message: dict[str, Any]) -> Parts:
        """A conversation as the model reads it."""
        text, ids = self.model.renderer.render(self._turns(message), message.get("tools") or (), opened=True)
        yield {"end": {"text": text, "ids": list(ids)}}

    async def load_adapter(self, message: dict[str, Any]) -> Parts:
        """Write with the adapter at `source` too, where texts are asked for under `name`. One that was tuned on text that the
        base is not asked with here is refused, as is all that `read_additions` refuses."""
        found = await self.door.load_adapter(message["name"], message["source"])
        if any("template" in note for note in found.notes):
            await self.door.unload_adapter(message["name"], now=True)
            raise ModelError(f"{message['source']}: {'; '.join(found.notes)}")
        yield {"end": {"layers": len(found.layers), "parameters": found.parameters, "notes": list(found.notes)}}

    async def unload_adapter(self, message: dict[str, Any]) -> Parts:
        """Write with it no longer; what is being written goes on to its end."""
        await self.door.unload_adapter(message["name"])
        yield {"end": {}}

    async def beat(self, message: dict[str, Any]) -> Parts:
        """Write one token, or read one text, before all others."""
        ids, task = self.model.renderer.framed_ids("a"), self.model.spec.task
        if task in ("causal", "seq2seq"):
            await self.door.complete(ids, Sampling(max_tokens=1), priority=1000)
        else:
            embedding = None if task in ("classify", "regress") else Embedding(pooling="mean")
            await self.door.pool(ids, embedding, priority=1000)
        yield {"end": {}}

    async def state(self, message: dict[str, Any]) -> Parts:
        """How busy the engine is."""

        def look(engine: Engine | Pooler) -> dict[str, Any]:
            found = {"running": 0, "waiting": len(engine.waiting), "blocks": 0, "blocks_held": 0}
            if isinstance(engine, Engine):
                found |= {"running": len(engine.schedule.running), "blocks": engine.blocks.count}
                found["blocks_held"] = engine.blocks.used
            return found

        yield {"end": await self.door.ask(look)}

    def _stopped(self, sampling: Sampling, finish: str, ids: Sequence[int], text: str) -> dict[str, Any]:
        """The stop text that ended an answer, if one did: it is what the tokens say after the text."""
        if finish != "stop" or not sampling.stop:
            return {}
        rest = text_of(self.model, ids, sampling)[len(text) :]
        return next(({"stopped": one} for one in sampling.stop if rest.startswith(one)), {})

    def _prompt_logs(self, ids: Sequence[int], whole: Completion) -> list[Any]:
        """Of each token of a prompt; nothing is known of the first."""
        assert whole.prompt_logprobs is not None
        texts = [added(self.model, ids[max(0, at - BEFORE) : at], token) for at, token in enumerate(ids)]
        found: list[Any] = [[ids[0], texts[0], None, []]]
        tops = whole.prompt_top or ((),) * len(whole.prompt_logprobs)
        for at, (log, top) in enumerate(zip(whole.prompt_logprobs, tops), 1):
            before = ids[max(0, at - BEFORE) : at]
            found.append(
                [ids[at], texts[at], log, [[one, added(self.model, before, one), share] for one, share in top]]
            )
        return found

    def _with_calls(self, message: dict[str, Any], sampling: Sampling) -> Sampling:
        if self.form is None:
            raise ConfigError(
                "tools: the chat template of this model writes no calls of tools that can be read again; leave tools out, or "
                "tune the model with a template that does"
            )
        if sampling.structure is not None:
            raise ConfigError("response_format and tools do not go together; set tool_choice: none, or leave one out")
        parallel = message.get("parallel", True)
        structure = structure_of_calls(self.form, message["tools"], message.get("choice", "auto"), parallel=parallel)
        held = {"structure": structure, "shown_ids": tuple(id for _, id in self.form.marks)}
        return Sampling.make({**sampling.model_dump(exclude_unset=True), **held}, where="sampling")

    def _turns(self, message: dict[str, Any]) -> Sequence[Message]:
        try:
            return read_messages(message["messages"], "messages")
        except DataError as err:
            raise DataError(f"messages: {err}") from None

    def _ids(self, message: dict[str, Any]) -> Sequence[int]:
        """However many there are."""
        renderer = self.model.renderer
        if self.model.spec.task not in ("causal", "seq2seq"):
            raise ConfigError(
                f"model: {self.called(message)} is made to {self.model.spec.task} and writes no text; choose another model"
            )
        if "messages" in message and renderer.kind == "encoder-decoder":
            return renderer.framed_ids("\n".join(turn.content for turn in self._turns(message)))
        if "messages" in message:
            if renderer.template is None:
                raise ConfigError("messages: this model has no chat template; use /v1/completions")
            turns, tools = self._turns(message), message.get("tools") or ()
            if renderer.template.name == "raw":
                return renderer.tokens("\n".join(turn.content for turn in turns))[0]
            return renderer.render(turns, tools, opened=True)[1]
        if "text" in message and renderer.kind == "encoder-decoder":
            return renderer.framed_ids(message["text"])
        if "text" in message:
            return renderer.tokens(message["text"])[0]
        count = len(self.model.tokenizer)
        ids: list[int] = message["ids"]
        strange = [one for one in ids if not 0 <= one < count]
        if strange:
            raise ConfigError(f"prompt: there is no token {strange[0]}; the vocabulary has {count}, from 0 on")
        return ids

    def prompt(self, message: dict[str, Any]) -> Sequence[int]:
        """The ids of a prompt as `write` takes it; `max_tokens` of its sampling is set where nobody says. Raises TooLong."""
        ids, context = self._ids(message), self.model.spec.max_length
        asked = message["sampling"].get("max_tokens")
        if self.model.renderer.kind == "encoder-decoder":
            # What is written has a context of its own.
            message["sampling"].setdefault("max_tokens", context)
            return self.within(ids)
        if len(ids) + (asked or 1) > context:
            written = f" and {asked} more are to be written" if asked else ""
            raise TooLong(
                f"the context of this model is {context} tokens; the prompt has {len(ids)}{written}. Shorten the prompt"
                + (", or ask for fewer" if asked else "")
            )
        if asked is None:
            message["sampling"]["max_tokens"] = context - len(ids)
        return ids


def _answer(one: Completion) -> dict[str, Any]:
    found: dict[str, Any] = {"text": one.text, "tokens": len(one.ids), "finish": one.finish}
    if one.logprobs is not None:
        found["logs"] = [_log(log) for log in one.logprobs]
    return found


def _log(log: TokenLog) -> list[Any]:
    return [log.id, log.text, log.raw, [[one.id, one.text, one.raw] for one in log.top]]


def _usage(prompt: int, answer: Answer) -> dict[str, Any]:
    return {"prompt": prompt, **asdict(answer.usage)}


DOINGS: dict[str, Callable[[Hands, dict[str, Any]], Parts]] = {
    "tokenize": Hands.tokenize,
    "detokenize": Hands.detokenize,
    "render": Hands.render,
    "embed": embed,
    "classify": classify,
    "label": label,
    "search": search,
    "relate": relate,
    "load_adapter": Hands.load_adapter,
    "unload_adapter": Hands.unload_adapter,
    "beat": Hands.beat,
    "state": Hands.state,
}
