"""Every error raised on purpose: what happened, where, and what to do next."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LuthierError(Exception):
    """Base of all deliberate errors. The command line prints the message alone and exits with `exit_code`."""

    exit_code = 2


class ConfigError(LuthierError, ValueError):
    """The request is wrong: an unknown key, a wrong type, an impossible combination."""


class DataError(LuthierError, ValueError):
    """The data cannot be used as asked: file, row and column are named."""


class ModelError(LuthierError, ValueError):
    """A model, tokenizer or adapter cannot be found, loaded or combined."""


class RenderingError(ModelError):
    """A model reads text otherwise than it was tuned to: another template, other special tokens, other ids."""


class RunError(LuthierError, RuntimeError):
    """A run directory is missing, taken, locked or damaged."""


class TrainingError(LuthierError, RuntimeError):
    """Training was stopped because going on would waste time: non-finite loss, weights that do not move."""

    exit_code = 3


class ServerError(LuthierError, RuntimeError):
    """A server elsewhere cannot be reached, refuses what is asked, or gives an answer that is none."""


class MissingExtra(LuthierError, ImportError):
    """An optional dependency is needed; the message names the extra that brings it."""

    def __init__(self, package: str, extra: str, purpose: str):
        super().__init__(f"{purpose} needs the package {package!r}: pip install 'luthier[{extra}]'")


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """A suggestion for a misspelt word: the nearest of `options`, or all of them."""
    options = sorted(options)
    close = difflib.get_close_matches(word, options, n=3, cutoff=0.6)
    return f"did you mean {' or '.join(map(repr, close))}?" if close else f"choose from: {', '.join(options)}"
