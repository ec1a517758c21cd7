"""A module and a tokenizer that came from elsewhere, or from an earlier step, as a LoadedModel fit for a purpose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch

from luthier.core.errors import ConfigError, ModelError
from luthier.core.events import Events
from luthier.core.types import Task
from luthier.models.facts import kind_of
from luthier.models.heads import Pooled
from luthier.models.load import AUTO_CLASSES
from luthier.models.purpose import add_head, check_task, choose_length, choose_pooling, keeps_head, make_renderer
from luthier.models.spec import NATURAL_TASK, LoadedModel, ModelSpec


def wrap_model(module: Any, tokenizer: Any) -> LoadedModel:
    """The LoadedModel behind a module that `load` gave, or one made around a plain transformers model.

    Raises ModelError when the module is neither.
    """
    known = getattr(module, "luthier", None)
    if isinstance(known, LoadedModel):
        return known
    config = getattr(module, "config", None)
    if config is None or not hasattr(module, "base_model"):
        raise ModelError(f"{type(module).__name__}: expected a model from luthier.load, or a transformers model")
    kind = kind_of(config)
    task = NATURAL_TASK[kind]
    factory = AUTO_CLASSES[task]
    # transformers says that it is None, as it is of the class that these are made from.
    if not isinstance(module, factory._model_mapping[type(config)]):  # type: ignore[index]
        raise ModelError(
            f"{type(module).__name__}: a plain transformers model must come from {factory.__name__}; "
            "for another purpose use luthier.load"
        )
    spec = ModelSpec(
        source=str(getattr(config, "_name_or_path", "") or type(module).__name__),
        kind=kind,
        family=config.model_type,
        task=task,
        max_length=choose_length(None, None, config, tokenizer),
        pooling=choose_pooling("auto", None, kind),
    )
    spec, renderer = make_renderer(tokenizer, spec, None, template="auto", truncate=False, learn="all", events=None)
    return LoadedModel(module, tokenizer, spec, renderer)


def fit_model(
    given: LoadedModel,
    *,
    task: Task | None = None,
    labels: Sequence[str] = (),
    multi_label: bool = False,
    pooling: Literal["auto", "last", "mean", "first"] = "auto",
    template: str = "auto",
    max_length: int | None = None,
    truncate: bool = False,
    learn: Literal["all", "last"] = "all",
    conversations: bool = False,
    events: Events | None = None,
) -> LoadedModel:
    """The same weights for another purpose: a classifier grows a head on the body of a language model.

    `task` None keeps what it does. A head that means the same is kept. Raises ConfigError when the kind cannot do the
    task, or when a language model is asked of a body whose language head is gone.
    """
    old, tokenizer = given.spec, given.tokenizer
    task = check_task(task or old.task, old.kind, old.source)
    pooled = task in ("classify", "regress")
    if not pooled and task != old.task:
        raise ConfigError(
            f"{old.source}: this model was loaded for {old.task!r}, and has no head for {task!r}; load it anew"
        )
    config = given.network.config
    spec = old.model_copy(
        update={
            "task": task,
            "max_length": choose_length(max_length, old, config, tokenizer),
            "pooling": choose_pooling(pooling, old, old.kind),
            "labels": (),
            "multi_label": False,
        }
    )
    module: torch.nn.Module = given.module
    if pooled:
        body = given.network if isinstance(given.module, Pooled) else given.network.base_model
        module, spec = add_head(body, tokenizer, spec, old, tuple(labels), multi_label)
        if isinstance(module, Pooled) and isinstance(given.module, Pooled) and keeps_head(spec, old):
            module.head.load_state_dict(given.module.head.state_dict())
        module.eval()
    held = old.template if task == old.task or conversations else None
    spec, renderer = make_renderer(
        tokenizer,
        spec,
        held,
        template=template,
        truncate=truncate,
        learn=learn,
        events=events,
        conversations=conversations or (task == "regress" and old.learned == "reward"),
    )
    return LoadedModel(module, tokenizer, spec, renderer)
