"""A language model made ready to write or to score, its weights packed where it can: as it was before, or loaded and kept."""

from __future__ import annotations

from luthier.core.events import Events
from luthier.engine.draft_model import check_draft
from luthier.engine.generate import choose_engine, choose_reader, uses_engine
from luthier.engine.native import let_go, refuse, say_packed
from luthier.engine.recalled import keep, recall
from luthier.engine.sampling import Execution, Sampling
from luthier.models.spec import LoadedModel


def load_stored(
    source: str,
    execution: Execution,
    events: Events,
    *,
    device: str = "auto",
    max_length: int | None = None,
    truncate: bool = False,
) -> LoadedModel:
    """The model at `source`, in the precision of its files where its weights will be packed; where it was packed before (`keep`),
    its packed weights alone. Raises as `load_model` does."""
    from luthier.models.load import find_device, load_model

    if execution != "model" and find_device(device).type == "cpu":
        found = recall(source, execution, events, max_length=max_length, truncate=truncate)
        if found is not None:
            return found
    return load_model(
        source, max_length=max_length, truncate=truncate, device=device, as_stored=execution != "model", events=events
    )


def settle_model(
    model: LoadedModel,
    execution: Execution,
    events: Events,
    *,
    sampling: Sampling | None = None,
    max_length: int | None = None,
) -> None:
    """Choose how a model that was loaded so is read, keep what was found of it for the next time, and let go of what is not
    needed from here on. With `sampling` it is said how it will write. Raises ConfigError as `choose_reader` does."""
    if model.packed_only:
        say_packed(model.native, events)
    if sampling is None:
        choose_reader(model, execution, events)
    else:
        choose_engine(model, sampling, execution, events)
    keep(model, model.spec.source, execution, events, max_length=max_length)
    let_go(model)


def take_draft(model: LoadedModel, source: str, execution: Execution, events: Events) -> None:
    """Let a smaller model guess what this one writes, and say so. Raises ConfigError where it cannot, and as `load_model`
    does."""
    if not uses_engine(model):
        refuse("auto", source)
    # How it is read is no matter of what is written.
    form: Execution = "model" if execution == "model" else "auto"
    draft = load_stored(source, form, Events(), device=str(model.device))
    check_draft(draft, model)
    settle_model(draft, form, Events(), sampling=Sampling())
    model.draft = draft
    read = "by itself" if draft.native is None else f"natively in {draft.native.form}"
    events.choose("draft", source, f"guesses what comes next, read {read}; what is written stays the same")
