"""What a teacher's scores teach: classes by their distribution, numbers by their distance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from luthier.core.errors import DataError
from luthier.core.events import Events
from luthier.core.types import Encoded, Example, Labelled, Text
from luthier.engine.pooled import score_rows
from luthier.models.divergence import Aim
from luthier.models.spec import LoadedModel
from luthier.training.objectives.classify import Classify
from luthier.training.objectives.part import encode_rows
from luthier.training.objectives.regress import Regress


def encode_taught(
    examples: Sequence[Example], model: LoadedModel, teacher: LoadedModel, name: str, events: Events
) -> list[Encoded]:
    """Rows as the student reads them. Their gold is what the teacher scores (C numbers, in the student's order of the
    classes), the row's own gold (a class, a number, or C times 0 or 1), and 1 where it has one, else 0.

    The teacher reads each row once, with its own tokenizer. Raises DataError for a gold that the teacher cannot give.
    """
    read: list[Encoded] = []

    def encode(example: Labelled | Text) -> Encoded:
        pair = example.pair if isinstance(example, Labelled) else None
        own = _own_gold(example, model, name)
        row = model.renderer.labelled(example.text, pair, id=example.id)
        read.append(teacher.renderer.labelled(example.text, pair, id=example.id))
        return replace(row, id=example.id, weights=(), gold=own, weight=float(example.meta.get("weight", 1.0)))

    rows = encode_rows(examples, encode, events, renderer=model.renderer)
    _tell_lost(read, teacher, events)
    events.stage(f"reading {len(rows)} rows with the teacher")
    scores_SC = score_rows(teacher, read)
    if teacher.spec.task == "classify":
        scores_SC = scores_SC[:, [teacher.spec.labels.index(label) for label in model.spec.labels]]
    return [
        replace(row, gold=(*scores_C, *row.gold))  # type: ignore[misc]
        for row, scores_C in zip(rows, scores_SC.tolist())
    ]


def taught_losses(scores_SC: Tensor, gold_SG: Tensor, aim: Aim, model: LoadedModel) -> Tensor:
    """[S]: (1 - hard) x what `aim` says of the distance to the teacher + hard x the loss of the row's own gold; the
    first alone, whole, where a row has none. `gold_SG` as `encode_taught` lays it out.

    One of several classes: temperature^2 x the divergence of the softmaxes, and cross-entropy (Hinton et al. 2015,
    arXiv:1503.02531). Several at once: the same of each class, yes or no, averaged over the classes. Numbers: squared
    errors, in the teacher's standard deviations.
    """
    scores_SC = scores_SC.float()
    taught_SC, own_SG, has_S = split_gold(gold_SG, scores_SC.shape[1])
    soft = replace(aim, hard=0.0)
    nothing = own_SG.new_zeros(0, dtype=torch.long)
    if model.spec.task == "regress":
        soft_S = (scores_SC - taught_SC).square().squeeze(1)
        hard_S = (scores_SC - own_SG).square().squeeze(1)
    elif model.spec.multi_label:
        # Yes or no with logit z is a softmax over (0, z).
        two = [torch.stack([torch.zeros_like(one), one], -1).view(-1, 2) for one in (scores_SC, taught_SC)]
        soft_S = soft.losses(two[0], two[1], nothing).view_as(scores_SC).mean(1)
        hard_S = F.binary_cross_entropy_with_logits(scores_SC, own_SG, reduction="none").mean(1)
    else:
        soft_S = soft.losses(scores_SC, taught_SC, nothing)
        hard_S = F.cross_entropy(scores_SC, own_SG[:, 0].long(), reduction="none")
    share_S = aim.hard * has_S
    return (1 - share_S) * soft_S + share_S * hard_S


def taught_metrics(scores_NC: Tensor, gold_NG: Tensor, model: LoadedModel) -> dict[str, float]:
    """How often the student says what the teacher says (for numbers: the squared distance, in the data's unit), and the
    metrics of the rows with a gold of their own."""
    taught_NC, own_NG, has_N = split_gold(gold_NG, scores_NC.shape[1])
    spec, labelled = model.spec, has_N > 0
    if spec.task == "regress":
        found = {"mse_to_teacher": float((scores_NC - taught_NC).square().mean()) * spec.target_scale**2}
        metrics, own = Regress().metrics, own_NG[:, 0]
    elif spec.multi_label:
        found = {"agreement": float(((scores_NC > 0) == (taught_NC > 0)).float().mean())}
        metrics, own = Classify().metrics, own_NG
    else:
        found = {"agreement": float((scores_NC.argmax(1) == taught_NC.argmax(1)).float().mean())}
        metrics, own = Classify().metrics, own_NG[:, 0].long()
    return found | (metrics(scores_NC[labelled], own[labelled], model) if bool(labelled.any()) else {})


def split_gold(gold_SG: Tensor, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """(the teacher's scores [S, C], the rows' own gold [S, C] or [S, 1], whether there is one [S])."""
    return gold_SG[:, :classes], gold_SG[:, classes:-1], gold_SG[:, -1]


def _tell_lost(read: Sequence[Encoded], teacher: LoadedModel, events: Events) -> None:
    cut = [row.cut for row in read if row.cut]
    if cut:
        events.warn(
            f"texts cut to the teacher's context of {teacher.spec.max_length} tokens ({sum(cut)} lost)", len(cut)
        )
    unknown = sum(teacher.renderer.unknown_id in row.ids for row in read)
    if unknown:
        events.warn("rows hold characters that the teacher's tokenizer does not know; they are lost to it", unknown)


def _own_gold(example: Labelled | Text, model: LoadedModel, name: str) -> tuple[float, ...]:
    spec = model.spec
    label = example.label if isinstance(example, Labelled) else None
    width = len(spec.labels) if spec.multi_label else 1
    if label is None:
        return (0.0,) * (width + 1)
    if spec.task == "regress":
        if not isinstance(label, float):
            raise DataError(f"{example.id}: the teacher {name} gives numbers, and the row has the label {label!r}")
        return (label - spec.target_mean) / spec.target_scale, 1.0
    if isinstance(label, tuple) and not spec.multi_label:
        raise DataError(f"{example.id}: the teacher {name} gives one class, and the row has a list of them")
    held = label if isinstance(label, tuple) else (str(label),)
    for one in held:
        if one not in spec.labels:
            raise DataError(
                f"{example.id}: the teacher {name} does not know the class {one!r}, only {', '.join(spec.labels)}"
            )
    if spec.multi_label:
        return *(float(one in held) for one in spec.labels), 1.0
    return float(spec.labels.index(held[0])), 1.0
