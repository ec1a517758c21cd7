"""Use a model: one text, a file, a pipe; and the three names of the five-line program."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from luthier.core.config import Config, Resolved, resolve
from luthier.core.errors import ConfigError
from luthier.core.events import Events, Sink
from luthier.engine.backend import Backend, refuse_here
from luthier.engine.labelling import Labelling, Labels
from luthier.engine.sampling import Execution, Sampling
from luthier.verbs.answering import answer, answer_parts, make_labeller, open_index
from luthier.verbs.asked import read_items
from luthier.verbs.rows import append_rows, read_done, take_guesses
from luthier.verbs.shots import load_shots, with_shots, writes
from luthier.verbs.together import join_writers, with_seed

if TYPE_CHECKING:
    from luthier.models.spec import LoadedModel
    from luthier.training.world import World

EMPTY = "empty, since the model ended at once; that is what it learned where training texts end in such a place"


class Generate(Config):
    """What to run through a model, and in which form the answers come."""

    model: str = "mini"
    """A shipped model, a hub id, a directory, or run:<id>."""
    prompt: str | None = None
    """One text."""
    input: Path | None = None
    """A file of rows: text, prompt or messages (jsonl, csv, txt ...)."""
    output: Path | None = None
    """Where the answers to `input` go, a JSON line each. Rows that stand there already are skipped."""
    shots: Path | None = None
    """A file of examples to put before each prompt: prompt and completion, messages, or text and label."""
    raw: bool = False
    """Go on from the text as it stands, without the chat template."""
    format: Literal["text", "json", "jsonl"] = "text"
    """How one answer is printed."""
    sampling: Sampling = Sampling()
    """How answers are written."""
    labels: Labels = ()
    """A language model gives each text one of these labels instead of writing (on the command line: spam,ham)."""
    labelling: Labelling = Labelling()
    """How it is asked for a label, and how labels are compared."""
    index: str | None = None
    """An index that questions are answered from, as `luthier index` makes one: its name, run:<id>, or a folder. An answer then
    names its sources, and where the index holds too little it says that it does not know."""
    passages: int = Field(5, gt=0)
    """How many passages of the index stand before a question, at most."""
    max_length: int | None = Field(None, gt=1)
    """Longest row in tokens; by default the model's context."""
    truncate: bool = False
    """Cut texts that are too long for a classifier instead of refusing them."""
    batch_size: int = Field(16, gt=0)
    """Rows at a time; where a language model writes, answers that run side by side: one that is done makes room for the
    next row."""
    device: str = "auto"
    """Where to compute: auto, cpu, cuda ..."""
    execution: Execution = "auto"
    """How a language model is read while it writes or scores labels, on a CPU: by itself (model), or by the native decoder
    with its weights in bfloat16, int8 or int4. auto: int8 where it changes next to nothing (measured at loading, and said),
    else bfloat16, else model; small models always by themselves."""
    draft: str | None = None
    """A smaller model with the same tokenizer, which guesses what the language model writes; that changes the time alone."""
    backend: Backend | None = None
    """A server that holds the weights and writes in place of this machine: its address, or a table of settings. `model` then
    gives tokenizer and template alone."""

    @model_validator(mode="after")
    def _check(self) -> Generate:
        if self.backend is not None:
            refuse_here(self.device, self.execution, self.draft)
            if self.labels:
                raise ValueError("labels are scored by the weights, which a backend holds; leave labels or backend out")
        if self.prompt is not None and self.input is not None:
            raise ValueError("give one prompt or an input file, not both")
        if self.output is not None and self.input is None:
            raise ValueError("output goes with input, a file of rows; a single answer is printed")
        if self.labelling != Labelling() and not self.labels:
            raise ValueError("labelling goes with labels; name the labels to choose from")
        if self.passages != 5 and self.index is None:
            raise ValueError("passages goes with index; name the index to answer from")
        if self.index is not None and (self.labels or self.sampling.structure is not None):
            raise ValueError("answers from an index are text with citations; leave labels and structure out, or index")
        if self.labels and self.sampling != Sampling():
            raise ValueError("sampling has no effect where labels are scored and nothing is written; leave it out")
        return self


def generate(
    asked: Resolved[Generate] | Generate | None = None,
    *,
    sinks: Sequence[Sink] = (),
    on_text: Callable[[str], None] | None = None,
    **settings: Any,
) -> list[dict[str, Any]]:
    """Run the prompt or the input file through the model; the answers as plain dicts, in order.

    With an output file each answer is appended as soon as it and all before it are done, and a second call goes on after the last
    whole line; the list then holds what this call added. `on_text` is handed the pieces of a single written answer as
    they come. Answers of classifiers, and of language models that were given `labels`, carry the probability of each
    class; where they are asked for, written ones carry `logprobs` and `prompt_logprobs`, and `others`, further answers to the
    same prompt. Under torchrun the processes share the model: every one makes the same call and gets the same answers, and the
    first one writes the file. Raises LuthierError.
    """
    if isinstance(asked, Generate):
        asked = Resolved(asked, dict.fromkeys(asked.model_fields_set, "override"))
    config = (asked or resolve(Generate, values=settings)).config
    if config.prompt is None and config.input is None:
        raise ConfigError("there is nothing to run: give a prompt, or --input FILE")
    with join_writers(config) as world:
        return _generate(with_seed(config, world), world, Events(sinks=sinks), on_text)


def _generate(
    config: Generate, world: World | None, events: Events, on_text: Callable[[str], None] | None
) -> list[dict[str, Any]]:
    items = read_items(config.input) if config.input is not None else [("prompt", config.prompt or "")]
    events.stage(f"loading the model {config.model}")
    model = _load(config, events, world)
    shots = load_shots(model, config.model, config.shots, events)
    labeller = make_labeller(model, config, shots, events)
    grounded = open_index(model, config, events)
    streams = writes(model) and labeller is None and grounded is None and _grows(config.sampling)
    if config.prompt is not None and on_text is not None and streams:
        from luthier.engine.generate import stream

        pieces = []
        for piece in stream(
            model, with_shots(model, config.prompt, shots, config.raw), config.sampling, raw=config.raw
        ):
            pieces.append(piece)
            on_text(piece)
        _warn_empty([{"output": "".join(pieces)}], events)
        return [{"id": "prompt", "output": "".join(pieces)}]
    answers = []
    done = read_done(config.output) if config.output is not None else set()
    if world is not None:
        # Before the first one adds to it.
        done = set(world.spread(sorted(done) if world.leads else None))
    left = [(name, item) for name, item in items if name not in done]
    if done:
        events.choose("resume", f"{len(items) - len(left)} rows", f"they stand in {config.output} already")
    total, drafted, accepted = len(left), 0, 0
    for found in answer_parts(model, left, config, shots, labeller, grounded):
        if config.input is not None:
            guessed, right = take_guesses(found)
            drafted, accepted = drafted + guessed, accepted + right
        answers += found
        if config.output is not None and (world is None or world.leads):
            append_rows(config.output, found)
        events.emit("progress", name="generating", done=len(answers), total=total)
    if drafted:
        events.choose("guesses", f"{accepted} of {drafted} right", "by the text itself, and what the model learned")
    _warn_empty(answers, events)
    return answers


def answer_texts(config: Generate, texts: Sequence[str], *, sinks: Sequence[Sink] = ()) -> list[dict[str, Any]]:
    """The answers to several texts (the lines of a pipe), in order. Raises LuthierError."""
    with join_writers(config) as world:
        if world is not None:
            # A pipe has one end.
            texts = world.spread(list(texts) if world.leads else None)
        return _answer_texts(with_seed(config, world), world, texts, Events(sinks=sinks))


def _answer_texts(config: Generate, world: World | None, texts: Sequence[str], events: Events) -> list[dict[str, Any]]:
    model = _load(config, events, world)
    shots = load_shots(model, config.model, config.shots, events)
    labeller = make_labeller(model, config, shots, events)
    items = [(f"line {number}", text) for number, text in enumerate(texts, 1)]
    grounded = open_index(model, config, events)
    if grounded is not None:
        return [one for part in answer_parts(model, items, config, shots, None, grounded) for one in part]
    found = answer(model, items, config, shots, labeller)
    _warn_empty(found, events)
    return found


def load(source: str, **settings: Any) -> tuple[Any, Any]:
    """(model, tokenizer) of a shipped model, a hub id, a directory or run:<id>: a torch module and its tokenizer.

    What else Luthier knows of it (template, labels) travels on the module as `.luthier`. Raises ModelError.
    """
    from luthier.models.load import load_model

    loaded = load_model(source, **settings)
    setattr(loaded.module, "luthier", loaded)  # noqa: B010
    return loaded.module, loaded.tokenizer


def inference(model: Any, tokenizer: Any, text: str | Sequence[str], **sampling: Any) -> Any:
    """What a model says of a text, or of each of several.

    Written text of a language model, a class name of a classifier, a number of a regressor. A base model goes on from
    the text; one tuned on conversations answers it. `sampling`: the settings of Sampling (temperature, max_tokens ...).
    """
    from luthier.models.wrap import wrap_model

    loaded = wrap_model(model, tokenizer)
    texts = [text] if isinstance(text, str) else list(text)
    config = Generate.make(
        {"model": loaded.spec.source or "model", "sampling": sampling, "raw": not _answers_turns(loaded)}
    )
    if config.sampling.beyond_text is not None:
        raise ConfigError(f"{config.sampling.beyond_text}: this gives one text alone; use luthier.generate")
    found = [one["output"] for one in answer(loaded, [(str(at), one) for at, one in enumerate(texts)], config, ())]
    empty = sum(one == "" for one in found)
    if empty:
        warnings.warn(f"{empty} of {len(found)} answers: {EMPTY}", stacklevel=2)
    return found[0] if isinstance(text, str) else found


def _load(config: Generate, events: Events, world: World | None = None) -> LoadedModel:
    """The model, ready to write if it can, here, with other processes, or by a server."""
    from luthier.engine.generate import choose_engine
    from luthier.engine.loading import load_stored, settle_model, take_draft
    from luthier.engine.native import refuse
    from luthier.engine.remote import load_served
    from luthier.models.load import find_device, load_model

    lengths: dict[str, Any] = {"max_length": config.max_length, "truncate": config.truncate}
    if config.backend is not None:
        return load_served(config.model, config.backend, **lengths, events=events)
    if world is not None:
        device = world.device(config.device)
        # On a processor weights in bf16 are for one process, which packs them.
        as_stored = config.execution != "model" and not config.labels and find_device(device).type != "cpu"
        model = load_model(config.model, **lengths, device=device, as_stored=as_stored, parts=world.size, events=events)
        choose_engine(model, config.sampling, config.execution, events)
        return model
    model = load_stored(config.model, config.execution, events, device=config.device, **lengths)
    if writes(model) and not config.labels:
        settle_model(model, config.execution, events, sampling=config.sampling, max_length=config.max_length)
        if config.draft is not None:
            take_draft(model, config.draft, config.execution, events)
    elif config.labels and model.spec.task == "causal":
        refuse("auto", config.draft)
        settle_model(model, config.execution, events, max_length=config.max_length)
    else:
        refuse(config.execution, config.draft)
    return model


def _grows(sampling: Sampling) -> bool:
    from luthier.engine.generate import why_not_streamed

    return why_not_streamed(sampling) is None


def _answers_turns(model: LoadedModel) -> bool:
    """Whether a plain text should be a user's turn: tuned so here, or from elsewhere with a template of its own."""
    if model.spec.learned is not None:
        return model.spec.learned in ("sft", "dpo", "orpo", "simpo", "kto", "grpo")
    return model.spec.template is not None and model.spec.template["name"] == "own"


def _warn_empty(answers: Sequence[dict[str, Any]], events: Events) -> None:
    empty = sum(one["output"] == "" for answer in answers for one in (answer, *answer.get("others", ())))
    if empty:
        events.warn(f"answers are {EMPTY}", empty)
