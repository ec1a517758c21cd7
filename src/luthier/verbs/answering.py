"""What a model says of rows, one after another or as they come: written, labelled, classified, or from documents."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from luthier.core.errors import ConfigError, DataError
from luthier.core.events import Events
from luthier.engine.sampling import Sampling
from luthier.verbs.asked import Prompt, as_prompt, flat
from luthier.verbs.rows import as_answer, as_row
from luthier.verbs.shots import with_shots, writes

if TYPE_CHECKING:
    from luthier.engine.labels import Labeller
    from luthier.models.spec import LoadedModel
    from luthier.verbs.generate import Generate
    from luthier.verbs.grounding import Grounded


def answer_parts(
    model: LoadedModel,
    items: Sequence[tuple[str, Any]],
    config: Generate,
    shots: Sequence[tuple[str, str]],
    labeller: Labeller | None,
    grounded: Grounded | None = None,
) -> Iterator[list[dict[str, Any]]]:
    """The answers in order: where they are written one beside another as soon as those before are there, else by batches."""
    if grounded is not None:
        for start in range(0, len(items), config.batch_size):
            yield _answer_from(grounded, model, items[start : start + config.batch_size], config, shots)
        return
    names = [name for name, _ in items]
    if model.server is not None:
        from luthier.engine.remote import write_each

        keys = None if config.input is None else names
        prompts = list(_encode(model, items, config, shots))
        for name, found in zip(names, write_each(model, prompts, config.sampling, keys)):
            yield [{"id": name, **as_answer(found)}]
    elif config.input is not None and labeller is None and _flows(model, config.sampling):
        from luthier.engine.flow import room_in_order, write_in_order

        # They are encoded twice, for those of a large file are not held.
        lengths = [len(ids) for ids in _encode(model, items, config, shots)]
        room = room_in_order(model, lengths, config.sampling, config.batch_size)
        keyed = zip(names, _encode(model, items, config, shots))
        left = iter(names)
        for ready in write_in_order(model, keyed, config.sampling, room=room, streams=config.batch_size):
            yield [{"id": next(left), **as_answer(one)} for one in ready]
    else:
        for start in range(0, len(items), config.batch_size):
            yield answer(model, items[start : start + config.batch_size], config, shots, labeller)


def _encode(
    model: LoadedModel, items: Sequence[tuple[str, Any]], config: Generate, shots: Sequence[tuple[str, str]]
) -> Iterator[tuple[int, ...]]:
    """The ids to go on from. Raises DataError with the row's name."""
    for name, item in items:
        try:
            prompt = with_shots(model, as_prompt(item), shots, config.raw)
            yield model.renderer.prompt(prompt, raw=config.raw)
        except DataError as err:
            raise DataError(f"{name}: {err}") from None


def _flows(model: LoadedModel, sampling: Sampling) -> bool:
    """Whether rows can come and go while others are written."""
    from luthier.engine.generate import uses_engine

    return writes(model) and sampling.beams == 1 and uses_engine(model)


def answer(
    model: LoadedModel,
    items: Sequence[tuple[str, Any]],
    config: Generate,
    shots: Sequence[tuple[str, str]],
    labeller: Labeller | None = None,
) -> list[dict[str, Any]]:
    """The answers to some rows at once, in order. Raises LuthierError."""
    if labeller is not None:
        labelled = labeller.predict([(name, as_prompt(item)) for name, item in items])
        return [as_row(one.id, one) for one in labelled]
    if config.sampling.structure is not None and not writes(model):
        raise ConfigError(
            f"sampling.structure: {config.model} is made to {model.spec.task} and writes no text; leave it out, "
            "or use a language model"
        )
    if model.spec.task in ("classify", "regress"):
        from luthier.engine.pooled import predict

        found = predict(model, [(item, None) if isinstance(item, str) else item for _, item in items])
        return [as_row(name, one) for (name, _), one in zip(items, found)]
    if model.spec.task == "masked":
        return [{"id": name, "output": _fill(model, flat(item))} for name, item in items]
    from luthier.engine.generate import generate as write

    prompts = [with_shots(model, as_prompt(item), shots, config.raw) for _, item in items]
    # A prompt by itself draws what it draws when it is streamed.
    names = None if config.input is None else [name for name, _ in items]
    written = write(model, prompts, config.sampling, raw=config.raw, batch_size=config.batch_size, keys=names)
    return [{"id": name, **as_answer(one)} for (name, _), one in zip(items, written)]


def open_index(model: LoadedModel, config: Generate, events: Events) -> Grounded | None:
    """The index that is answered from; None where none is named."""
    if config.index is None:
        return None
    if not writes(model):
        raise ConfigError(
            f"index: {config.model} is made to {model.spec.task} and writes no text; leave --index out, or use a language model"
        )
    from luthier.verbs.grounding import Grounded

    return Grounded(config.index, config.passages, device=config.device, events=events)


def _answer_from(
    grounded: Grounded,
    model: LoadedModel,
    items: Sequence[tuple[str, Any]],
    config: Generate,
    shots: Sequence[tuple[str, str]],
) -> list[dict[str, Any]]:
    """The answers to some questions from an index, with their sources."""

    def write(asked: list[tuple[int, Any]]) -> list[dict[str, Any]]:
        return answer(model, [(items[at][0], prompt) for at, prompt in asked], config, shots)

    def complete(prompt: Prompt) -> Prompt:
        return with_shots(model, prompt, shots, config.raw)

    prompts = [as_prompt(item) for _, item in items]
    rows = grounded.answer_all(model, prompts, config.sampling.max_tokens, write, raw=config.raw, complete=complete)
    return [{"id": name, **row} for (name, _), row in zip(items, rows)]


def make_labeller(
    model: LoadedModel, config: Generate, shots: Sequence[tuple[str, str]], events: Events
) -> Labeller | None:
    """What chooses among the labels; None where none are given."""
    from luthier.engine.labels import Labeller

    if not config.labels:
        return None
    if model.spec.task == "classify":
        raise ConfigError(f"labels: {config.model} was tuned to classify, and has labels of its own; leave labels out")
    return Labeller(model, config.labels, config.labelling, shots=shots, raw=config.raw, events=events)


def _fill(model: LoadedModel, text: str) -> str:
    """The text with each mask token replaced by the likeliest token."""
    import torch

    mask = model.tokenizer.mask_token
    if mask is None or mask not in text:
        raise DataError(f"this model fills in masked tokens: put {mask} where a token is missing, or tune it first")
    ids = torch.tensor([model.renderer.prompt(text)])
    with torch.no_grad():
        best = model.module(input_ids=ids.to(model.device)).logits.argmax(-1).cpu()
    ids[ids == model.tokenizer.mask_token_id] = best[ids == model.tokenizer.mask_token_id]
    return model.renderer.decode(ids[0].tolist())
