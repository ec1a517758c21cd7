"""The stages of one tuning before and around training: read, encode, refer, join the other processes, leave them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.choice import defaults
from luthier.core.config import Resolved
from luthier.core.errors import ConfigError
from luthier.core.events import Events
from luthier.core.types import Encoded
from luthier.data.cache import lengths_of
from luthier.data.feed import Feed, HeldRows, StreamedRows
from luthier.data.load import Dataset, load_data
from luthier.data.plans import Plan as Steps
from luthier.data.preferences import holds_answers
from luthier.training.objectives import OBJECTIVES
from luthier.verbs.planning import plan_memory
from luthier.verbs.rendering import Rendered, note_rendering
from luthier.verbs.settings import check_sources, decide

if TYPE_CHECKING:
    from luthier.evals.preferences import Logs
    from luthier.models.spec import LoadedModel
    from luthier.training.checkpoint import Checkpoints, Progress
    from luthier.training.forecast import Plan
    from luthier.training.learner import Settings
    from luthier.training.objectives.part import Objective
    from luthier.training.sharding import Sharded
    from luthier.training.world import World
    from luthier.verbs.tune import Tune


class Work:
    """The state of one tuning between its stages."""

    def __init__(
        self, asked: Resolved[Tune], events: Events, model: LoadedModel | None = None, world: World | None = None
    ):
        from luthier.training.world import ALONE

        self.asked, self.events, self.given = asked, events, model
        self.world = world or ALONE
        self.sharded: Sharded | None = None
        self.hollow = False
        """Whether the model of the first process alone has weights until they are shared out."""
        self.model: LoadedModel
        self.dataset: Dataset
        self.objective: Objective
        self.settings: Settings
        self.before: Logs | None = None
        self.rendered: Rendered
        self.feed: Feed
        self.plan: Plan

    @property
    def config(self) -> Tune:
        return self.asked.config

    def read(self) -> None:
        """Read the data and load the model for the objective."""
        import torch

        from luthier.models.load import find_device, load_model
        from luthier.models.memory import keep_freed_memory

        config, events = self.config, self.events
        threads = self.world.threads(config.threads)
        if threads:
            torch.set_num_threads(threads)
        torch.manual_seed(config.seed)
        keep_freed_memory()
        events.stage("reading the data")
        self.dataset = load_data(config.data, events)
        if config.objective == "auto":
            from luthier.models.load import read_kind

            name, why = defaults.choose_objective(self.dataset.train[0], read_kind(config.model))
            self.advise("objective", OBJECTIVES.parse(name), why, shown=name)
        objective: Objective = self.config.objective
        check_sources(self.dataset, objective)
        objective.check_examples(self.dataset.train)
        if self.dataset.stream is not None and objective.refers:
            raise ConfigError(
                f"objective {objective.kind!r} measures every row against the model as it was before the first step, so it "
                "needs all rows at hand; set data.stream: false"
            )
        self.objective = objective.prepare(self.dataset.train, events)
        events.stage(f"loading the model {config.model}")
        wanted: dict[str, Any] = {
            **objective.load_options(self.dataset.train),
            "template": config.template,
            "max_length": config.max_length,
            "truncate": config.truncate,
        }
        if wanted["task"] in ("classify", "regress"):
            wanted["pooling"] = config.pooling
        form = self._choose_form()
        device = self.world.device(config.device)
        self.hollow = self._reads_once(form)
        if self.given is not None:
            from luthier.models.wrap import fit_model

            self.model = fit_model(self.given, events=events, **wanted)
            if form in ("int8", "nf4"):
                from luthier.models.quantised.network import quantise_loaded

                if config.adapter.reads_base and self.model.spec.quantize == "none":
                    self.model.spec = self.model.spec.model_copy(update={"quantize": form})
                else:
                    quantise_loaded(self.model, form, events)  # type: ignore[arg-type]
        else:
            self.model = load_model(
                config.model,
                from_scratch=config.from_scratch,
                learn=config.learn,
                device="meta" if self.hollow and not self.world.leads else device,
                # In full: what an earlier tuning rounded to bfloat16 would stay rounded in one that computes in fp32.
                dtype="float32",
                quantize=form,  # type: ignore[arg-type]
                unquantised=config.adapter.reads_base,
                events=events,
                **wanted,
            )
        self.objective.check_model(self.model.spec)
        self.objective.adapt(self.model, self.dataset.train)
        fresh = self.model.spec.adapter is None
        config.adapter.apply(self.model)
        if fresh and config.adapter.reads_base and self.model.spec.quantize != "none":
            from luthier.models.quantised.network import tell_size

            tell_size(self.model.network, events)
        self.parameters = list(config.adapter.trainable(self.model))
        self._settle()
        self.objective.ready(self.model, find_device(device) if self.hollow else self.model.device, events)
        if not self.shards:
            self.objective.keep_start(self.model, events)
            return
        from luthier.training.sharding import check_sharding

        check_sharding(config.optimizer)

    @property
    def shards(self) -> bool:
        return self.config.sharding == "full" and self.world.size > 1

    def _choose_form(self) -> str:
        """The form to hold the base in; a whole one where its weights learn or the adapter is merged."""
        config, adapter = self.config, self.config.adapter
        if config.quantize in ("int8", "nf4"):
            if not adapter.quantises:
                raise ConfigError(
                    f"quantize: the adapter {adapter.kind!r} needs the base's own weights, which {config.quantize} cannot "
                    "hold; choose adapter lora, dora or pissa, or leave quantize out"
                )
            if config.from_scratch:
                raise ConfigError("quantize: random weights learn nothing under an adapter; leave out from_scratch")
        return config.quantize if adapter.quantises or config.quantize != "auto" else "none"

    def _reads_once(self, form: str) -> bool:
        """Whether the first process alone reads the weights, and the others get their parts from it."""
        if not self.shards or self.given is not None:
            return False
        from luthier.models.load import is_whole
        from luthier.training.hollow import can_be_hollow

        once = can_be_hollow(self.config.adapter, form) and is_whole(self.config.model)
        why = "the others get their parts from it" if once else "the adapter or the form of the base needs all weights"
        self.events.choose("weights read by", "the first process" if once else "each process", why)
        return once

    def _settle(self) -> None:
        """Decide what trials on the weights decide; a process without weights hears it from the first."""
        if not self.hollow:
            self._choose_precision()
            return
        from luthier.models.precision import cast_weights
        from luthier.training.hollow import believe, describe

        if self.world.leads:
            self._choose_precision()
            self.world.tell("precision", self.model.spec.precision)
            self.world.tell("model", describe(self.model))
            return
        precision: Any = self.world.hear("precision")
        self.advise("precision", precision, "")
        cast_weights(self.model, precision)
        believe(self.model, self.world.hear("model"))

    def _choose_precision(self) -> None:
        from luthier.models.facts import count_parameters
        from luthier.models.fuse import fuse
        from luthier.models.packed import packs
        from luthier.models.precision import cast_weights, choose_precision

        if self.config.precision == "auto":
            count = count_parameters(self.model.module)
            frozen = sum(parameter.numel() for _, parameter in self.parameters) < count / 2
            chosen, why = choose_precision(self.model.device, frozen_base=frozen, parameters=count)
            self.advise("precision", chosen, why)
        cast_weights(self.model, self.config.precision)  # type: ignore[arg-type]
        if packs(self.model, self.events):
            fuse(self.model, self.events)

    def encode(self) -> None:
        """Turn the rows into tokens, and decide everything that was left to us."""
        from luthier.models.packed import shares

        events, dataset = self.events, self.dataset
        events.stage(f"encoding {len(dataset.train)} rows")
        self.rows, self.validation = self._encode_part("train"), self._encode_part("validation")
        self.rendered = note_rendering(self)
        if self.objective.refers:
            shares(self.model, events)
        self.settings = decide(self)
        self.feed = self._make_feed()
        self.plan = plan_memory(self)
        self.settings = self.plan.settings

    def _encode_part(self, part: str) -> Sequence[Encoded]:
        """The rows of the training or the validation part, source by source, each with its source's name."""
        from luthier.training.encoded import encode_once

        found = {
            name: encode_once(f"{part}/{name}", examples, self.objective, self.model, self.world, self.events)
            for name, examples in self.dataset.split_by_source(part).items()
            if examples
        }
        if set(found) <= {""}:
            return found.get("", [])
        return [replace(row, source=name) for name, rows in found.items() for row in rows]

    def _make_feed(self) -> Feed:
        config, settings, dataset = self.config, self.settings, self.dataset
        steps = math.ceil(settings.steps / self.objective.repeats())
        if dataset.stream is not None:
            return StreamedRows(
                dataset.stream,
                lambda examples, events: self.objective.encode(examples, self.model, events),
                batch_size=settings.batch_size,
                steps=steps,
                seed=config.seed,
                window=config.data.shuffle_buffer,
                shuffled=config.order == "shuffled",
                by_length=config.by_length,
            )
        plan = Steps(
            lengths_of(self.rows),
            settings.batch_size,
            steps,
            config.seed,
            config.order,
            config.by_length,
            [row.source for row in self.rows] if dataset.weights else (),
            dataset.weights,
        )
        return HeldRows(self.rows, plan)

    def drawn(self, progress: Progress) -> dict[str, Any]:
        """What was learned from: rows of each of several sources, and the passes over a stream."""
        found: dict[str, Any] = {"drawn": dict(progress.drawn)} if progress.drawn else {}
        stream = self.dataset.stream
        if stream is not None and progress.place is not None:
            passes = [mark[0] for mark in progress.place["marks"]]
            found["passes"] = dict(zip(self.dataset.weights, passes)) if stream.mixed else passes[0]
        return found

    def scales(self) -> dict[str, float]:
        """At what multiple of the learning rate each weight learns, where it is not 1."""
        from luthier.training.rates import combine, layer_scales

        names = [name for name, _ in self.parameters]
        return combine(names, self.config.adapter.scales(self.model), layer_scales(names, self.config.layer_decay))

    def begin(self) -> None:
        """Form the group of processes, now that nothing slow is left to do alone, and share out the weights if asked."""
        world = self.world
        if world.size == 1:
            if self.config.sharding == "full":
                self.events.choose("sharding", "none", "there is one process, which holds everything; set processes")
            return
        import torch

        self.events.stage(f"joining {world.size} processes")
        from luthier.models.load import find_device

        device = find_device(world.device(self.config.device)) if self.given is None else self.model.device
        world.begin(device)
        if self.hollow and self.objective.refers:
            self._share_references()
        # Heads and adapters start at random, from the same seed on machines that need not be alike.
        start = world.spread(dict(self.parameters) if world.leads else None) if not self.hollow else {}
        with torch.no_grad():
            for name, parameter in self.parameters if start else ():
                parameter.copy_(start[name])
        del start
        self.events.choose("processes", world.size, "each learns from its share of every step; gradients are added up")
        if self.shards:
            from luthier.training.sharding import Sharded

            self.parameters = []  # the whole ones, which would stay in memory
            self.sharded = Sharded(self.model, world, device, hollow=self.hollow)
            self.parameters = list(self.config.adapter.trainable(self.model))
            # A copy is made once the weights take less room, and is shared out like them.
            self.objective.keep_start(self.model, self.events)

    def gather(self) -> None:
        """Leave the group: what is left is done by the first process, with the whole model."""
        if self.sharded is not None:
            self.sharded.gather()
        self.world.end()

    def checkpoints(self, path: Path) -> Checkpoints:
        """The checkpoints of the run at `path`."""
        from luthier.training.checkpoint import Checkpoints

        if self.config.sharding == "none":
            return Checkpoints(path / "checkpoints", world=self.world)
        from luthier.training.sharded_checkpoints import ShardedCheckpoints

        return ShardedCheckpoints(path / "checkpoints", world=self.world, parameters=self.parameters)

    def numbers(self) -> dict[str, Any]:
        """Sizes of the work: rows, tokens, parameters, steps."""
        from luthier.models.facts import count_parameters

        lengths = lengths_of(self.rows)
        return {
            "steps": self.settings.steps,
            "train_rows": self.feed.rows_an_epoch,
            "validation_rows": len(self.validation),
            "test_rows": len(self.dataset.test),
            "tokens_an_epoch": None if self.dataset.stream else sum(lengths),
            "longest_row": max(lengths),
            "parameters": count_parameters(self.model.module),
            "trainable_parameters": sum(parameter.numel() for _, parameter in self.parameters),
        }

    def refer(self, path: Path) -> None:
        """Let the model say of the rows, before it learns, what the objective and the judge will hold against it.

        The first process keeps what it said in the run at `path`, where the others find it.
        """
        keep = path / "reference"
        if not self.world.leads:
            self.world.hear("referred")
            if self.hollow:
                return
        self.rows = self.objective.refer(self.rows, self.model, self.events, keep)
        self.validation = self.objective.refer(self.validation, self.model, self.events, keep)
        self.feed = self._make_feed()
        self.world.tell("referred", "")
        if not self.world.leads:
            return
        held = self.dataset.test or self.dataset.validation
        if holds_answers(held) and self.objective.task is None and (self.objective.refers or self.config.baselines):
            from luthier.evals.preferences import read_answers

            self.events.stage(f"reading {len(held)} held-out rows with the model as it starts")
            self.before = read_answers(self.model, held, self.events, "reference")

    def _share_references(self) -> None:
        """Give the rows what the leader's model said of them to those whose model could not."""
        for name in ("rows", "validation"):
            rows = getattr(self, name)
            told = self.world.spread([row.gold for row in rows] if self.world.leads else None)
            setattr(self, name, [replace(row, gold=gold) for row, gold in zip(rows, told, strict=True)])
        self.feed = self._make_feed()

    def advise(self, name: str, value: Any, why: str, *, shown: Any = None, quiet: bool = False) -> None:
        self.asked = self.asked.advise(**{name: value})
        if not quiet:
            self.events.choose(name, value if shown is None else shown, why)
