"""Classes from a language model: every label is scored after the text, in one pass, and nothing is written."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from luthier.core.errors import ConfigError
from luthier.core.events import Events
from luthier.core.types import Message, Prediction
from luthier.engine.labelling import Labelling
from luthier.engine.scoring import Score, Scorer
from luthier.models.spec import LoadedModel
from luthier.text.labels import Ask, LabelRenderer, Shots

# Texts without content, as in Zhao et al. 2021: a label's probabilities after them are averaged.
EMPTY = ("N/A", "[MASK]", "")


class Labeller:
    """Gives texts one of several labels, with the probability of each.

    The probability of a label is its share among the labels: softmax of the log-probabilities of the label as the model's
    whole answer. `scorer` finds them, with an adapter beside the model where it was made for one. Raises ConfigError for worked
    examples with another label, ModelError for models other than decoders.
    """

    def __init__(
        self,
        model: LoadedModel,
        labels: Sequence[str],
        labelling: Labelling | None = None,
        *,
        shots: Shots = (),
        raw: bool = False,
        events: Events | None = None,
        scorer: Scorer | None = None,
    ):
        self.labels, self.labelling, self.events = tuple(labels), labelling or Labelling(), events
        for text, label in shots:
            if label not in self.labels:
                raise ConfigError(
                    f"shots: the label {label!r} of {text[:40]!r} is not among the labels {', '.join(self.labels)}; mend it, "
                    "or add it to labels"
                )
        self._scorer = scorer or Scorer(model)
        instruction = self.labelling.instruction
        ask = Ask(self.labels, ask_for(self.labels) if instruction is None else instruction, shots, raw)
        self._renderer = LabelRenderer(model.renderer, ask)
        self._prior_C: NDArray[np.float64] | None = None
        self.read = 0
        """Tokens of the texts, with what stands before them; those of labels aside."""

    def predict(
        self,
        items: Sequence[tuple[str, str | Sequence[Message]]],
        on_progress: Callable[[int, int], None] | None = None,
    ) -> list[Prediction]:
        """A prediction for each text or conversation, which comes with its id, in order. Raises DataError."""
        if self.labelling.calibrate and self._prior_C is None:
            shares_3C = _shares(self._log_probs([("labelling.calibrate", text) for text in EMPTY]))
            self._prior_C = np.log(shares_3C.mean(0))
        cut = self._renderer.cut
        logs_NC = self._log_probs(items, on_progress)
        if self._prior_C is not None:
            logs_NC = logs_NC - self._prior_C
        if self.events is not None and self._renderer.cut > cut:
            self.events.warn("texts were cut at their end to fit the context", self._renderer.cut - cut)
        return [
            Prediction(
                id,
                self.labels[int(shares_C.argmax())],
                probabilities=dict(zip(self.labels, shares_C.tolist())),
                input=item if isinstance(item, str) else "\n".join(turn.content for turn in item),
            )
            for (id, item), shares_C in zip(items, _shares(logs_NC))
        ]

    def _log_probs(
        self,
        items: Sequence[tuple[str, str | Sequence[Message]]],
        on_progress: Callable[[int, int], None] | None = None,
    ) -> NDArray[np.float64]:
        """[N, C]: the log-probability of each label, or its mean over the label's tokens."""
        asked = [self._renderer.render(item, id) for id, item in items]
        self.read += sum(len(prompt) for prompt, _ in asked)
        scored = self._scorer.score(asked, on_progress=on_progress, events=self.events)
        return np.array([[self._value(one) for one in scores] for scores in scored])

    def _value(self, score: Score) -> float:
        return score.per_token if self.labelling.per_token else score.log_prob


def ask_for(labels: Sequence[str]) -> str:
    """The instruction where none is given."""
    return f"Which of these labels fits the text: {', '.join(labels)}? Answer with the label alone."


def _shares(logs_NC: NDArray[np.float64]) -> NDArray[np.float64]:
    """[N, C]: the softmax of each row."""
    shares_NC = np.exp(logs_NC - logs_NC.max(1, keepdims=True))
    whole_NC: NDArray[np.float64] = shares_NC / shares_NC.sum(1, keepdims=True)
    return whole_NC
