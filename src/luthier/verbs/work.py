"""What one tuning holds between its stages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from luthier.core.config import Resolved
from luthier.core.events import Events
from luthier.core.types import Encoded
from luthier.data.cache import lengths_of
from luthier.data.feed import Feed
from luthier.data.load import Dataset
from luthier.verbs.rendering import Rendered

if TYPE_CHECKING:
    from torch.nn import Parameter

    from luthier.evals.preferences import Logs
    from luthier.models.spec import LoadedModel
    from luthier.training.checkpoint import Progress
    from luthier.training.forecast import Plan
    from luthier.training.learner import Settings
    from luthier.training.objectives.part import Objective
    from luthier.training.sharding import Sharded
    from luthier.training.world import World
    from luthier.verbs.tune import Tune


class Work:
    """The state of one tuning between its stages (`reading`, `encoding`, `joining`)."""

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
        self.parameters: list[tuple[str, Parameter]]
        self.rows: Sequence[Encoded]
        self.validation: Sequence[Encoded]
        self.settings: Settings
        self.before: Logs | None = None
        self.rendered: Rendered
        self.feed: Feed
        self.plan: Plan

    @property
    def config(self) -> Tune:
        return self.asked.config

    @property
    def shards(self) -> bool:
        return self.config.sharding == "full" and self.world.size > 1

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

    def advise(self, name: str, value: Any, why: str, *, shown: Any = None, quiet: bool = False) -> None:
        self.asked = self.asked.advise(**{name: value})
        if not quiet:
            self.events.choose(name, value if shown is None else shown, why)
