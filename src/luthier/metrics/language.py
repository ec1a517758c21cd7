"""How surprised a language model is."""

from __future__ import annotations

import math
from collections.abc import Sequence

from luthier.core.types import Estimate
from luthier.metrics.statistics import as_floats, ratio


def perplexity(nll: Sequence[float], tokens: Sequence[float]) -> Estimate:
    """exp(total nats / total tokens), with a bootstrap interval over the texts. Compare only on the same tokenizer."""
    found = ratio(as_floats(nll), as_floats(tokens))
    return Estimate(_exp(found.value), _exp(found.low), _exp(found.high), found.n, found.method)


def bits_per_byte(nll: Sequence[float], sizes: Sequence[float]) -> Estimate:
    """Total bits / total UTF-8 bytes, with a bootstrap interval over the texts. Comparable between tokenizers."""
    return ratio(as_floats(nll) / math.log(2), as_floats(sizes))


def _exp(value: float) -> float:
    return math.exp(min(value, 700.0))  # the largest exponent of a double
