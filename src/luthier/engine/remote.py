"""Text out of a model whose weights a server holds, by prompts rendered here: it reads them as it was tuned to."""

from __future__ import annotations

import math
import zlib
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from luthier.core.errors import ConfigError, ServerError, did_you_mean
from luthier.core.events import Events
from luthier.core.types import Completion, TokenLog
from luthier.engine.backend import Backend
from luthier.engine.client import Client
from luthier.engine.logs import BEFORE, added
from luthier.engine.pieces import complete, find_stop, pieces
from luthier.engine.sampling import Sampling
from luthier.engine.terms import check_terms, ends_of, room_of
from luthier.models.elsewhere import load_elsewhere
from luthier.models.spec import LoadedModel

COMPLETIONS = "/v1/completions"
# Requests that are made ready, for each one that may be out: a slow answer holds up what is handed on, not the others.
AHEAD = 8
# vLLM has no infinity in its JSON either.
NEVER = -9999.0
# What the completions of vLLM do not know, and what to do instead.
UNKNOWN = {
    "typical_p": "leave it out, or leave `backend` out",
    "banned": "give the tokens -100 in logit_bias, or leave `backend` out",
    "length_penalty": "leave it out, or leave `backend` out",
    "beams": "leave it out, or leave `backend` out",
    "shown_ids": "leave it out, or leave `backend` out",
    "after": "leave it out, or leave `backend` out",
    "structure": "leave it out, or leave `backend` out",
}


@dataclass(frozen=True, slots=True)
class Server:
    """A server that writes with `name`; what is to be said of its answers goes to `events`."""

    client: Client
    name: str
    events: Events


def load_served(
    source: str, backend: Backend, *, max_length: int | None = None, truncate: bool = False, events: Events
) -> LoadedModel:
    """The model `source` without its weights, written with by the server, which is asked whether it has them.

    Raises ServerError where it cannot be reached or serves another model, ConfigError and ModelError as `load_elsewhere`.
    """
    model = load_elsewhere(source, max_length=max_length, truncate=truncate, events=events)
    client = Client(backend)
    card = _find_card(client, model)
    limit = card.get("max_model_len")
    if isinstance(limit, int) and limit < model.spec.max_length:
        if max_length is not None:
            raise ConfigError(
                f"max_length: {max_length} tokens are asked for, and the server takes {limit}; ask for less"
            )
        events.choose("max_length", limit, f"the server takes no more; the model could read {model.spec.max_length}")
        model.spec = model.spec.model_copy(update={"max_length": limit})
        model.renderer.max_length = limit
    name = str(card["id"])
    events.choose("backend", backend.kind, f"{name} at {client.url} writes; prompts are rendered here")
    model.server = Server(client, name, events)
    return model


def write(
    model: LoadedModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    keys: Sequence[object] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Completion]:
    """An answer to each prompt (token ids), in order, as `engine.generate.generate` gives them."""
    found = []
    for answer in write_each(model, prompts, sampling, keys):
        found.append(answer)
        if on_progress is not None:
            on_progress(len(found), len(prompts))
    return found


def write_each(
    model: LoadedModel, prompts: Sequence[Sequence[int]], sampling: Sampling, keys: Sequence[object] | None = None
) -> Iterator[Completion]:
    """The same one by one, each as soon as it and all before it are there. What is drawn depends on the seed and the key."""
    server: Server = model.server
    check_terms(model, sampling)
    bodies = [
        (ids, body_of(model, ids, sampling, key))
        for ids, key in zip(prompts, range(len(prompts)) if keys is None else keys, strict=True)
    ]
    waiting: deque[tuple[Sequence[int], Future[Any]]] = deque()
    before = server.client.again.copy()
    try:
        with server.client.threads() as pool:
            for ids, body in bodies:
                if len(waiting) >= AHEAD * server.client.backend.concurrency:
                    first, answer = waiting.popleft()
                    yield _completion(model, first, sampling, answer.result())
                waiting.append((ids, pool.submit(server.client.ask, COMPLETIONS, body)))
            while waiting:
                first, answer = waiting.popleft()
                yield _completion(model, first, sampling, answer.result())
    finally:
        _tell_again(server, before)


def stream(model: LoadedModel, ids: Sequence[int], sampling: Sampling) -> Iterator[str]:
    """The answer in pieces, as `engine.generate.stream` gives them. Leaving the iterator hangs up."""
    server: Server = model.server
    check_terms(model, sampling)
    body = {**body_of(model, ids, sampling, 0), "stream": True}
    before = server.client.again.copy()
    try:
        with closing(_choices(server.client, body)) as choices:
            first = next(choices)
            if _ids_of(model, first) is None:
                yield from (str(one["text"]) for one in chain((first,), choices) if one["text"])
                return
            tokens = (token for one in chain((first,), choices) for token in _ids_of(model, one) or ())
            yield from pieces(model, tokens, sampling)
    finally:
        _tell_again(server, before)


def body_of(model: LoadedModel, ids: Sequence[int], sampling: Sampling, key: object) -> dict[str, Any]:
    """What is asked of the server. Raises ConfigError for settings that it does not know."""
    for name, instead in UNKNOWN.items():
        if getattr(sampling, name) != Sampling.model_fields[name].default:
            raise ConfigError(f"{name}: the completions of vLLM know no such setting; {instead}")
    # All is said: what is left out the server takes from generation_config.json beside the weights, not from its defaults.
    body: dict[str, Any] = {
        "model": model.server.name,
        "prompt": list(ids),
        "add_special_tokens": False,
        "max_tokens": room_of(model, ids, sampling),
        "min_tokens": sampling.min_tokens,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k or -1,
        "top_p": 1.0 if sampling.top_p is None else sampling.top_p,
        "min_p": sampling.min_p or 0.0,
        "repetition_penalty": sampling.repetition_penalty,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "n": sampling.n,
        "stop": list(sampling.stop),
        "stop_token_ids": list(ends_of(model, sampling)),
        "ignore_eos": sampling.ignore_stop,
        "include_stop_str_in_output": False,
        "skip_special_tokens": True,
        "return_token_ids": True,
    }
    if sampling.logit_bias:
        body["logit_bias"] = {str(token): value for token, value in sampling.logit_bias.items()}
    if sampling.seed is not None:
        # Of one seed alone, equal prompts would draw equal answers.
        body["seed"] = zlib.crc32(repr((sampling.seed, key)).encode())
    if sampling.logprobs is not None:
        body |= {"logprobs": sampling.logprobs, "return_tokens_as_token_ids": True}
    if sampling.prompt_logprobs:
        body["prompt_logprobs"] = 0
    return body


def _find_card(client: Client, model: LoadedModel) -> dict[str, Any]:
    """What the server says of the model that is to write."""
    found = client.ask("/v1/models", patient=False)
    listed = found.get("data") if isinstance(found, dict) else None
    if not isinstance(listed, list) or not all(isinstance(one, dict) and "id" in one for one in listed):
        raise ServerError(f"{client.url}: the server does not list its models; check that backend.url is that of vLLM")
    cards = {str(one["id"]): one for one in listed}
    name = client.backend.model
    if name is None and len(cards) == 1:
        (name,) = cards
    if name is None:
        raise ServerError(
            f"{client.url}: the server has {len(cards)} models; name the one to write with in backend.model: {', '.join(cards)}"
        )
    if name not in cards:
        raise ServerError(
            f"{client.url}: the server has no model {name!r}; {did_you_mean(name, cards)} (backend.model); an adapter is served "
            "by vllm serve BASE --enable-lora --lora-modules NAME=DIR"
        )
    card, base = cards[name], model.spec.base
    root = str(card.get("root"))
    if base is not None and base in (root, str(Path(root).expanduser().absolute())):
        raise ServerError(
            f"{client.url}: {name} is {base} alone, without what {model.spec.source} learned; serve the adapter "
            "(--enable-lora --lora-modules NAME=DIR) or the merged model, and name it in backend.model"
        )
    return dict(card)


def _choices(client: Client, body: dict[str, Any]) -> Generator[dict[str, Any]]:
    """The pieces of the one answer that is streamed."""
    finish = None
    with closing(client.stream(COMPLETIONS, body)) as events:
        for event in events:
            listed = event.get("choices") if isinstance(event, dict) else None
            # The last event may hold the usage alone.
            for choice in listed if isinstance(listed, list) else [None]:
                if not isinstance(choice, dict) or not isinstance(choice.get("text"), str):
                    raise _strange(client, "a piece without text")
                finish = choice.get("finish_reason") or finish
                yield choice
    _check_finish(client, finish)


def _completion(model: LoadedModel, prompt: Sequence[int], sampling: Sampling, found: Any) -> Completion:
    client = model.server.client
    choices = found.get("choices") if isinstance(found, dict) else None
    if not isinstance(choices, list) or not all(isinstance(one, dict) for one in choices):
        raise _strange(client, "no answers")
    if len(choices) != sampling.n:
        raise _strange(client, f"{len(choices)} answers in place of {sampling.n}")
    first, *others = [
        _answer(model, prompt, sampling, one) for one in sorted(choices, key=lambda one: int(one.get("index", 0)))
    ]
    if sampling.prompt_logprobs:
        first = replace(first, prompt_logprobs=_prompt_logs(client, prompt, choices[0]))
    return replace(first, others=tuple(others))


def _answer(model: LoadedModel, prompt: Sequence[int], sampling: Sampling, choice: dict[str, Any]) -> Completion:
    server: Server = model.server
    text = choice.get("text")
    if not isinstance(text, str):
        raise _strange(server.client, "an answer without text")
    finish: Any = choice.get("finish_reason")
    _check_finish(server.client, finish)
    ids = _ids_of(model, choice)
    if ids is None:
        if sampling.logprobs is not None:
            raise _strange(server.client, "no token ids, without which logprobs say nothing")
        server.events.warn("answers came without token ids, so that their tokens are those of their text read anew")
        cut = find_stop(text, sampling.stop)
        text = text if cut is None else text[:cut]
        read = model.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return Completion(text, tuple(read), finish, len(prompt))
    answer = complete(model, ids, sampling, len(prompt))
    if _bare(answer.text) != _bare(text):
        server.events.warn(
            "answers whose tokens read otherwise here than on the server; see that both have the same tokenizer"
        )
    if finish == "stop":
        answer = replace(answer, finish="stop")
    if sampling.logprobs is not None:
        answer = replace(answer, logprobs=_logs(model, answer.ids, sampling, choice.get("logprobs")))
    return answer


def _bare(text: str) -> str:
    """Without what detokenisers do each in a way of their own: spaces at the edges, and half characters."""
    return text.replace("\ufffd", "").strip()


def _ids_of(model: LoadedModel, choice: dict[str, Any]) -> list[int] | None:
    ids = choice.get("token_ids")
    if ids is None:
        return None
    vocabulary = model.network.get_input_embeddings().weight.shape[0]
    if not isinstance(ids, list) or not all(isinstance(one, int) and 0 <= one < vocabulary for one in ids):
        raise _strange(model.server.client, f"tokens beyond the {vocabulary} of this model")
    return ids


def _logs(model: LoadedModel, ids: Sequence[int], sampling: Sampling, found: Any) -> tuple[TokenLog, ...]:
    """Servers give the model's own log-probabilities; those of the draw are known where nothing changes them."""
    same = (
        sampling.temperature == 0
        and not sampling.logit_bias
        and not sampling.min_tokens
        and (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) == (1, 0, 0)
    )

    def log(token: int, raw: float, before: Sequence[int], top: tuple[TokenLog, ...] = ()) -> TokenLog:
        raw = -math.inf if raw <= NEVER else float(raw)
        return TokenLog(token, added(model, before, token), raw, raw if same else None, top)

    logs = []
    try:
        for at, token in enumerate(ids):
            before = ids[max(0, at - BEFORE) : at]
            others = (found["top_logprobs"][at] or {}) if sampling.logprobs else {}
            ranked = sorted(others.items(), key=lambda one: -one[1])[: sampling.logprobs]
            top = tuple(log(int(name.removeprefix("token_id:")), raw, before) for name, raw in ranked)
            logs.append(log(token, found["token_logprobs"][at], before, top))
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        raise _strange(model.server.client, "logprobs that cannot be read") from None
    return tuple(logs)


def _prompt_logs(client: Client, prompt: Sequence[int], choice: dict[str, Any]) -> tuple[float, ...]:
    try:
        logs = [choice["prompt_logprobs"][at][str(prompt[at])]["logprob"] for at in range(1, len(prompt))]
        return tuple(-math.inf if one <= NEVER else float(one) for one in logs)
    except (KeyError, IndexError, TypeError):
        raise _strange(client, "prompt_logprobs that cannot be read") from None


def _check_finish(client: Client, finish: Any) -> None:
    if finish not in ("stop", "length"):
        raise ServerError(
            f"{client.url}: the server gave up an answer (finish_reason {finish!r}); its own log says why"
        )


def _strange(client: Client, what: str) -> ServerError:
    return ServerError(f"{client.url}: the server gives {what}; check that it is vLLM 0.10.2 or later, with this model")


def _tell_again(server: Server, before: dict[str, int]) -> None:
    for why, count in (server.client.again - before).items():  # type: ignore[operator]
        server.events.warn(f"requests to {server.client.url} were sent again after {why}", count)
