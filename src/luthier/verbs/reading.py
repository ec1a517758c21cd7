"""The first stage of a tuning: its data read, its model loaded, its adapter in place."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from luthier.choice import defaults
from luthier.core.errors import ConfigError
from luthier.data.load import load_data
from luthier.training.objectives import OBJECTIVES
from luthier.verbs.settings import check_sources

if TYPE_CHECKING:
    from luthier.training.objectives.part import Objective
    from luthier.verbs.work import Work


def read(work: Work) -> None:
    """Read the data and load the model for the objective."""
    import torch

    from luthier.models.load import find_device, load_model
    from luthier.models.memory import keep_freed_memory

    config, events = work.config, work.events
    threads = work.world.threads(config.threads)
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(config.seed)
    keep_freed_memory()
    events.stage("reading the data")
    work.dataset = load_data(config.data, events)
    if config.objective == "auto":
        from luthier.models.load import read_kind

        name, why = defaults.choose_objective(work.dataset.train[0], read_kind(config.model))
        work.advise("objective", OBJECTIVES.parse(name), why, shown=name)
    objective: Objective = work.config.objective
    check_sources(work.dataset, objective)
    objective.check_examples(work.dataset.train)
    if work.dataset.stream is not None and objective.refers:
        raise ConfigError(
            f"objective {objective.kind!r} measures every row against the model as it was before the first step, so it "
            "needs all rows at hand; set data.stream: false"
        )
    work.objective = objective.prepare(work.dataset.train, events)
    events.stage(f"loading the model {config.model}")
    wanted: dict[str, Any] = {
        **objective.load_options(work.dataset.train),
        "template": config.template,
        "max_length": config.max_length,
        "truncate": config.truncate,
    }
    if wanted["task"] in ("classify", "regress"):
        wanted["pooling"] = config.pooling
    form = _choose_form(work)
    device = work.world.device(config.device)
    work.hollow = _reads_once(work, form)
    if work.given is not None:
        from luthier.models.wrap import fit_model

        work.model = fit_model(work.given, events=events, **wanted)
        if form in ("int8", "nf4"):
            from luthier.models.quantised.network import quantise_loaded

            if config.adapter.reads_base and work.model.spec.quantize == "none":
                work.model.spec = work.model.spec.model_copy(update={"quantize": form})
            else:
                quantise_loaded(work.model, form, events)  # type: ignore[arg-type]
    else:
        work.model = load_model(
            config.model,
            from_scratch=config.from_scratch,
            learn=config.learn,
            device="meta" if work.hollow and not work.world.leads else device,
            # In full: what an earlier tuning rounded to bfloat16 would stay rounded in one that computes in fp32.
            dtype="float32",
            quantize=form,  # type: ignore[arg-type]
            unquantised=config.adapter.reads_base,
            events=events,
            **wanted,
        )
    work.objective.check_model(work.model.spec)
    work.objective.adapt(work.model, work.dataset.train)
    fresh = work.model.spec.adapter is None
    config.adapter.apply(work.model)
    if fresh and config.adapter.reads_base and work.model.spec.quantize != "none":
        from luthier.models.quantised.network import tell_size

        tell_size(work.model.network, events)
    work.parameters = list(config.adapter.trainable(work.model))
    _settle(work)
    work.objective.ready(work.model, find_device(device) if work.hollow else work.model.device, events)
    if work.world.size == 1:  # else it is kept once all hold the same (`joining.begin`)
        work.objective.keep_start(work.model, events)
    if work.shards:
        from luthier.training.sharding import check_sharding

        check_sharding(config.optimizer)


def _choose_form(work: Work) -> str:
    """The form to hold the base in; a whole one where its weights learn or the adapter is merged."""
    config, adapter = work.config, work.config.adapter
    if config.quantize in ("int8", "nf4"):
        if not adapter.quantises:
            raise ConfigError(
                f"quantize: the adapter {adapter.kind!r} needs the base's own weights, which {config.quantize} cannot "
                "hold; choose adapter lora, dora or pissa, or leave quantize out"
            )
        if config.from_scratch:
            raise ConfigError("quantize: random weights learn nothing under an adapter; leave out from_scratch")
    return config.quantize if adapter.quantises or config.quantize != "auto" else "none"


def _reads_once(work: Work, form: str) -> bool:
    """Whether the first process alone reads the weights, and the others get their parts from it."""
    if not work.shards or work.given is not None:
        return False
    from luthier.models.load import is_whole
    from luthier.training.hollow import can_be_hollow

    once = can_be_hollow(work.config.adapter, form) and is_whole(work.config.model)
    why = "the others get their parts from it" if once else "the adapter or the form of the base needs all weights"
    work.events.choose("weights read by", "the first process" if once else "each process", why)
    return once


def _settle(work: Work) -> None:
    """Decide what trials on the weights decide; a process without weights hears it from the first."""
    if not work.hollow:
        _choose_precision(work)
        return
    from luthier.models.precision import cast_weights
    from luthier.training.hollow import believe, describe

    if work.world.leads:
        _choose_precision(work)
        work.world.tell("precision", work.model.spec.precision)
        work.world.tell("model", describe(work.model))
        return
    precision: Any = work.world.hear("precision")
    work.advise("precision", precision, "")
    cast_weights(work.model, precision)
    believe(work.model, work.world.hear("model"))


def _choose_precision(work: Work) -> None:
    from luthier.models.facts import count_parameters
    from luthier.models.fuse import fuse
    from luthier.models.packed import packs
    from luthier.models.precision import cast_weights, choose_precision

    if work.config.precision == "auto":
        count = count_parameters(work.model.module)
        frozen = sum(parameter.numel() for _, parameter in work.parameters) < count / 2
        chosen, why = choose_precision(work.model.device, frozen_base=frozen, parameters=count)
        work.advise("precision", chosen, why)
    cast_weights(work.model, work.config.precision)  # type: ignore[arg-type]
    if packs(work.model, work.events):
        fuse(work.model, work.events)
