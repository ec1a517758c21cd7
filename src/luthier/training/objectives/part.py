"""The Part that an objective is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from luthier.core.catalog import Part
from luthier.core.errors import DataError
from luthier.core.events import Events
from luthier.core.types import Chat, Encoded, Example, Feedback, Labelled, Pair, Preference, Task, Text
from luthier.data.batches import Batch, collate

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from luthier.models.spec import LoadedModel, ModelSpec
    from luthier.text.render import Renderer


@dataclass(slots=True)
class Loss:
    """A sum over everything that counts in a batch, and the weight it is a sum of. Never an average."""

    sum: Tensor
    weight: float


Total: TypeAlias = Callable[..., list[float]]
"""Adds numbers up over the processes of a run: total(1.0, 2.0) gives both sums, the same in each process."""
Tally: TypeAlias = dict[str, tuple[float, float]]
"""Numbers by name, each as a sum and the count it is a sum of. Never an average: processes add theirs up."""


def alone(*numbers: float) -> list[float]:
    """The Total of a process that is the only one."""
    return list(numbers)


CONVERSIONS = {
    Text: "plain text fits `pretrain`",
    Chat: "conversations fit `sft`",
    Labelled: "labelled texts fit `classify` (class names) or `regress` (numbers)",
    Pair: "pairs fit `sft` on a decoder-only model and `seq2seq` on an encoder-decoder",
    Preference: "chosen and rejected answers fit `dpo`, `orpo`, `simpo` and `reward`",
    Feedback: "answers with a verdict fit `kto`",
}


class Objective(Part):
    """What is learned from which examples. Stateless: everything a batch needs is in the batch."""

    wants: ClassVar[tuple[type, ...]]
    """The kinds of example it can learn from."""
    task: ClassVar[Task | None] = None
    """What the model must be loaded for; None: what it was made for."""
    metric: ClassVar[tuple[str, int]] = ("loss", -1)
    """The validation number that picks the best checkpoint, and whether more (+1) or less (-1) of it is better."""

    idle: ClassVar[bool] = False
    """Whether a step may hold nothing to learn, and so leave the weights where they are."""

    refers: ClassVar[bool] = False
    """Whether rows are measured against the model as it was before the first step."""

    def check_model(self, spec: ModelSpec) -> None:
        """Raises ConfigError when a model of this kind cannot learn this, naming what fits."""

    def load_options(self, train: Sequence[Example]) -> dict[str, Any]:
        """What the model must be loaded with: the task, and what of its head depends on the training rows."""
        return {"task": self.task}

    def adapt(self, model: LoadedModel, train: Sequence[Example]) -> None:
        """Note in the loaded model what it must remember of the training rows."""

    def ready(self, model: LoadedModel, device: torch.device, events: Events) -> None:
        """Take what encoding and measuring need beside the model (a teacher, rewards), on the `device` that it learns on:
        a model that has its shape only is not there yet. Raises ConfigError for what does not fit it."""

    def keep_start(self, model: LoadedModel, events: Events) -> None:
        """Keep what is needed of the weights as they are before the first step: where they are shared out, each process
        of its part."""

    def prepare(self, train: Sequence[Example], events: Events) -> Objective:
        """A copy with what has to be read off the training rows filled in (class weights, mean and scale)."""
        return self

    def learned(self) -> str:
        """What the model is said to have learned: this, or the objective that this is another way to."""
        return self.kind

    def encode(self, examples: Sequence[Example], model: LoadedModel, events: Events) -> list[Encoded]:
        """Examples as the model sees them. Raises DataError that counts and names the rows that cannot be."""
        raise NotImplementedError(f"{type(self).__name__} must define encode()")

    def beside(self) -> str:
        """What encoding depends on beside the examples, the settings and the model that learns: a name for it."""
        return ""

    def refer(self, rows: Sequence[Encoded], model: LoadedModel, events: Events, keep: Path) -> list[Encoded]:
        """The rows with what the model says of them before the first step, for objectives that hold on to it; kept in the
        directory `keep`, so that a run that goes on reads the same."""
        return list(rows)

    def draw(
        self, rows: Sequence[Encoded], model: LoadedModel, seed: tuple[int, ...], total: Total = alone
    ) -> Sequence[Encoded]:
        """The rows of one step as they are learned: for objectives in which the model itself writes or reads them first.

        `rows` are the share of this process, which may be none; what concerns all rows of the step goes through `total`,
        which every process must call as often.
        """
        return rows

    def stand_in(self, rows: Sequence[Encoded], model: LoadedModel) -> Sequence[Encoded]:
        """Rows such as `draw` makes of these at their longest, without asking the model: for a forecast of memory."""
        return rows

    def prompts(self, rows: Sequence[Encoded]) -> tuple[Sequence[int], int]:
        """Of the answers that the model may write for these rows between two steps: the tokens before each, and most
        tokens of one."""
        return (), 0

    def companions(self) -> Sequence[LoadedModel]:
        """The models that run beside the one that learns in `measure`."""
        return ()

    def repeats(self) -> int:
        """Steps that learn from the same drawn rows before others are drawn."""
        return 1

    @property
    def draws(self) -> bool:
        """Whether `draw` runs the model: one that is shared out is made whole for it."""
        return type(self).draw is not Objective.draw

    def tally(self, rows: Sequence[Encoded]) -> Tally:
        """What of a step's rows, as drawn, is worth keeping beside its loss."""
        return {}

    def observe(self, scores: Tensor) -> Tally:
        """What of the scores that `measure` gave of a step's batch is worth keeping beside its loss."""
        return {}

    def batch(self, rows: Sequence[Encoded], model: LoadedModel, seed: tuple[int, ...]) -> Batch:
        """Rows end to end; `seed` is for objectives that draw at random (masking)."""
        return collate(rows)

    def measure(self, model: LoadedModel, batch: Batch) -> tuple[Loss, Tensor | None]:
        """The loss of a batch, and the scores that validation metrics are computed from (or None)."""
        raise NotImplementedError(f"{type(self).__name__} must define measure()")

    def metrics(self, scores: Tensor, gold: Tensor, model: LoadedModel) -> dict[str, float]:
        """Validation metrics beside the loss, from all scores [N, C] and gold."""
        return {}

    def examine(self, model: LoadedModel, rows: Sequence[Encoded], *, tokens: int) -> dict[str, float] | None:
        """The numbers of a validation (`loss` among them) where they are not the loss of the rows and its metrics."""
        return None

    def check_examples(self, examples: Sequence[Example]) -> None:
        """Raises DataError when an example is not of a kind that this objective learns from."""
        for example in examples:
            if not isinstance(example, self.wants):
                wanted = " or ".join(kind.__name__ for kind in self.wants)
                raise DataError(
                    f"{example.id}: objective {self.kind!r} learns from {wanted} rows, this is {type(example).__name__}; "
                    f"{CONVERSIONS[type(example)]}; or map the columns with `columns:`"
                )


def encode_rows(
    examples: Sequence[Example],
    encode: Callable[[Any], Encoded],
    events: Events,
    *,
    renderer: Renderer | None = None,
    show: int = 3,
) -> list[Encoded]:
    """Encode each example; all rows that fail are reported together, the first few by name. Counted are rows that are cut,
    that hold text outside the vocabulary, or whose prompt `renderer` found to tokenise otherwise alone."""
    seams = renderer.mismatches if renderer is not None else 0
    spelt = 0
    rows: list[Encoded] = []
    failed: list[str] = []
    for example in examples:
        before = renderer.guarded if renderer is not None else 0
        try:
            rows.append(encode(example))
            spelt += renderer is not None and renderer.guarded > before
        except DataError as err:
            failed.append(str(err))
    if failed:
        more = f" (and {len(failed) - show} more like these)" if len(failed) > show else ""
        raise DataError(
            f"{len(failed)} of {len(examples)} rows cannot be learned from: " + "; ".join(failed[:show]) + more
        )
    cut = [row for row in rows if row.cut]
    if cut:
        lost = sum(row.cut for row in cut)
        share = lost / (lost + sum(len(row.ids) + len(row.target) for row in rows))
        events.warn(f"texts cut to the context length ({lost} tokens lost, {share:.1%} of all)", len(cut))
    if renderer is None:
        return rows
    endless = [row for row in cut if any(row.weights) and not _learns_to_stop(row, renderer)]
    if endless and len(endless) == len(rows):
        raise DataError(
            "every row is cut before its answer ends, so the model would never stop; raise max_length or shorten the texts"
        )
    if endless:
        events.warn("rows are cut before their answer ends, and do not teach the model to stop", len(endless))
    unknown = [row for row in rows if renderer.unknown_id in row.ids or renderer.unknown_id in row.target]
    if unknown:
        events.warn(
            f"rows hold characters that the tokenizer does not know ({unknown[0].id} is the first); they are lost to the model",
            len(unknown),
        )
    if renderer.mismatches > seams:
        events.warn(
            "prompts tokenise otherwise alone than before their answer, so the model learns to answer after other tokens "
            "than it will be given; end the prompt, or begin the answer, with a space or a line break",
            renderer.mismatches - seams,
        )
    if spelt:
        events.warn("turns of users or tools spell control tokens of the model; they are taken as text", spelt)
    return rows


def _learns_to_stop(row: Encoded, renderer: Renderer) -> bool:
    return any(weight and token in renderer.stop_ids for token, weight in zip(row.ids, row.weights))
