"""The whole way once, on real data: profile, tune, judge, use, report. What `make quickstart` runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from luthier.core.config import resolve
from luthier.core.events import Sink
from luthier.core.record import Record
from luthier.core.types import Prediction
from luthier.verbs.tune import Tune, tune_model

MESSAGES = (
    "Hey, are we still on for lunch tomorrow at noon?",
    "WINNER! You have been selected for a 1000 pound prize. Call 09061701461 now to claim. T&Cs apply.",
    "Sorry I missed your call, I was in a meeting. Ring you tonight.",
)

SETTINGS: dict[str, Any] = {
    "model": "mini",
    "objective": "classify",
    "data": {"train": "sms_spam", "split": {"method": "stratified", "validation": 0.1, "test": 0.2}},
    "epochs": 4,
}


def profile() -> dict[str, Any]:
    """What the shipped data are like."""
    from luthier.core.events import Events
    from luthier.data.load import Data, load_examples
    from luthier.data.profile import profile_examples

    return profile_examples(load_examples("sms_spam", Data(train="sms_spam"), Events()))


def quickstart(*, sinks: Sequence[Sink] = (), name: str | None = None) -> tuple[Record, list[Prediction]]:
    """Tune `mini` on the shipped SMS spam data, judge it on a held-out fifth, and classify three new messages."""
    from luthier.engine.pooled import predict

    values = SETTINGS | ({"name": name} if name else {})
    record, model = tune_model(resolve(Tune, values=values), sinks=sinks)
    return record, predict(model, [(message, None) for message in MESSAGES])
