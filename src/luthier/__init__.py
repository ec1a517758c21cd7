"""Luthier 琴匠: one workshop for the whole life of a fine-tuned language model.

Two sizes of the same thing. Five lines:

    from luthier import load, fine_tune, inference
    model, tokenizer = load("mini")
    model = fine_tune(model, tokenizer, train_data, val_data, learning_rate=0.001, epochs=3)
    print(inference(model, tokenizer, "The quick brown fox jumps over the lazy dog."))

and the verbs, which return the record of a run: `luthier.tune(model=..., data=..., objective=...)`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from luthier.verbs.evaluate import evaluate as evaluate
    from luthier.verbs.generate import generate as generate
    from luthier.verbs.generate import inference as inference
    from luthier.verbs.generate import load as load
    from luthier.verbs.index import index as index
    from luthier.verbs.merge import merge as merge
    from luthier.verbs.report import report as report
    from luthier.verbs.tune import fine_tune as fine_tune
    from luthier.verbs.tune import tune as tune

__version__ = "0.1.0"

# Public names and where they live; nothing is imported before it is asked for, so `import luthier` costs no torch.
_NAMES = {
    "load": "luthier.verbs.generate",
    "inference": "luthier.verbs.generate",
    "fine_tune": "luthier.verbs.tune",
    "tune": "luthier.verbs.tune",
    "evaluate": "luthier.verbs.evaluate",
    "generate": "luthier.verbs.generate",
    "index": "luthier.verbs.index",
    "merge": "luthier.verbs.merge",
    "report": "luthier.verbs.report",
}
__all__ = ["__version__", *_NAMES]


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'luthier' has no attribute {name!r}; it offers {', '.join(_NAMES)}")
    return getattr(import_module(_NAMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
