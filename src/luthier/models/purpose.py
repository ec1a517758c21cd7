"""What a loaded network is made to do: its task, its head, its length, and how text becomes its tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from luthier.core.errors import ConfigError, ModelError
from luthier.core.events import Events
from luthier.core.types import Task
from luthier.models.facts import context_of
from luthier.models.heads import Pooled, dropout_of
from luthier.models.spec import Kind, ModelSpec, Pooling
from luthier.text.render import Renderer
from luthier.text.template import Template, choose_template

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from luthier.models.origin import Origin

DEFAULT_LENGTH = 512
TASKS: dict[Kind, tuple[Task, ...]] = {
    "decoder": ("causal", "classify", "regress"),
    "encoder": ("masked", "classify", "regress"),
    "encoder-decoder": ("seq2seq", "classify", "regress"),
}


def check_task(task: Task, kind: Kind, source: str) -> Task:
    """`task`, or ConfigError when a model of this kind cannot do it."""
    if task not in TASKS[kind]:
        fits = next(other for other, tasks in TASKS.items() if task in tasks)
        raise ConfigError(
            f"{source}: this is a model of the kind {kind}, which cannot be loaded for {task!r} "
            f"(only for {', '.join(TASKS[kind])}); {task!r} needs a model of the kind {fits}"
        )
    return task


def choose_length(asked: int | None, saved: ModelSpec | None, config: PreTrainedConfig, tokenizer: Any) -> int:
    """The longest row in tokens: what is asked, else what was saved, else the context. Raises ConfigError beyond it."""
    context = context_of(config)
    if asked is not None:
        if context is not None and asked > context:
            raise ConfigError(
                f"max_length: {asked} tokens do not fit the model's context of {context}; ask for {context} or less"
            )
        return asked
    if saved is not None:
        return saved.max_length
    stated = tokenizer.model_max_length
    limits = [limit for limit in (context, stated) if limit is not None and limit < 10**9]
    return int(min(limits, default=DEFAULT_LENGTH))


def begin_spec(origin: Origin, task: Task, tokenizer: Any, max_length: int | None) -> ModelSpec:
    """What is known of a model by its config, its tokenizer and what was saved with it. Raises ConfigError as `choose_length`
    does."""
    return ModelSpec(
        source=origin.source,
        kind=origin.kind,
        family=origin.config.model_type,
        task=task,
        learned=origin.saved.learned if origin.saved else None,
        max_length=choose_length(max_length, origin.saved, origin.config, tokenizer),
    )


def choose_pooling(asked: Pooling | Literal["auto"], saved: ModelSpec | None, kind: Kind) -> Pooling:
    """How a text becomes one vector: as asked, as saved, else the last token of a decoder and the mean of an encoder."""
    if asked != "auto":
        return asked
    if saved is not None and saved.task in ("classify", "regress"):
        return saved.pooling
    return "last" if kind == "decoder" else "mean"


def add_head(
    network: Any, tokenizer: Any, spec: ModelSpec, saved: ModelSpec | None, labels: tuple[str, ...], multi_label: bool
) -> tuple[nn.Module, ModelSpec]:
    """A pooling head for classify and regress, and the spec with what it means; the network itself for other tasks."""
    if spec.task not in ("classify", "regress"):
        return network, spec
    outputs = 1
    if spec.task == "classify":
        if not labels and saved is not None and saved.task == "classify":
            labels, multi_label = saved.labels, saved.multi_label
        if len(labels) < 2:
            raise ModelError(f"{spec.source}: to classify, the model must be told its classes: two labels or more")
        spec = spec.model_copy(update={"labels": labels, "multi_label": multi_label})
        outputs = len(labels)
    elif saved is not None and saved.task == "regress":
        spec = spec.model_copy(update={"target_mean": saved.target_mean, "target_scale": saved.target_scale})
    segments = "token_type_ids" in tokenizer.model_input_names and getattr(network.config, "type_vocab_size", 0) > 1
    module = Pooled(
        network,
        outputs,
        spec.pooling,
        dropout=dropout_of(network.config),
        separator=tokenizer.sep_token_id if segments else None,
    )
    return module, spec


def keeps_head(spec: ModelSpec, saved: ModelSpec | None) -> bool:
    """Whether the head saved with a model still means what is asked now."""
    return (
        saved is not None
        and saved.task == spec.task
        and (saved.labels, saved.multi_label) == (spec.labels, spec.multi_label)
    )


def make_renderer(
    tokenizer: Any,
    spec: ModelSpec,
    held: dict[str, str] | None,
    *,
    template: str,
    truncate: bool,
    learn: Literal["all", "last"],
    events: Events | None,
    conversations: bool = False,
) -> tuple[ModelSpec, Renderer]:
    """The renderer of a model, and its spec with the template and the stop tokens. `held` is the template saved with it.

    A template is for decoders that generate or read `conversations`; other models take texts as they are.
    """
    chosen: Template | None = None
    if spec.task == "causal" or (conversations and spec.kind == "decoder"):
        if held is not None and template == "auto":
            chosen = Template(**held)
        else:
            own = tokenizer.chat_template
            chosen, why = choose_template(tokenizer, template)
            if events is not None:
                events.choose("template", chosen.name, why)
                if held is not None and chosen.source != held["source"]:
                    events.warn(
                        f"the template changes to {chosen.name!r}; the model comes with {held['name']!r}, and what it learned "
                        "in that may be lost"
                    )
                elif held is None and isinstance(own, str) and chosen.source != own:
                    events.warn(f"the template {chosen.name!r} is used in place of the tokenizer's own, as asked for")
        if chosen.source:
            tokenizer.chat_template = chosen.source
    renderer = Renderer(
        tokenizer, kind=spec.kind, template=chosen, max_length=spec.max_length, truncate=truncate, learn=learn
    )
    shown = {"name": chosen.name, "source": chosen.source} if chosen is not None else None
    stops = tuple(renderer.stop_ids) if spec.task in ("causal", "seq2seq") else ()
    return spec.model_copy(update={"template": shown, "stop_ids": stops}), renderer
