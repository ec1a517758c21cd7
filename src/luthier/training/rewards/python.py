"""A reward that the user wrote."""

from __future__ import annotations

import importlib.util
import inspect
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import PrivateAttr

from luthier.core.errors import ConfigError, TrainingError, did_you_mean
from luthier.training.rewards.part import Answer, Reward

GIVEN = ("output", "gold", "prompt", "meta")


class Python(Reward):
    """A function of your own: `def reward(output, gold): return 1.0 if gold in output else 0.0`.

    It may take any of output, gold, prompt (texts) and meta (the row's other columns), by name, and returns a number.
    Its file runs as any program of yours does.
    """

    kind: ClassVar[str] = "python"

    function: str
    """Where it is: FILE.py:NAME."""
    _call: Callable[[Answer], float] | None = PrivateAttr(None)

    @property
    def name(self) -> str:
        return self.function.rpartition(":")[2]

    def ready(self, device: torch.device) -> None:
        function = load_function(self.function, "rewards.function")
        taken = inspect.signature(function).parameters.values()
        if any(one.kind is one.VAR_KEYWORD for one in taken):
            names: tuple[str, ...] = GIVEN
        else:
            names = tuple(one.name for one in taken if one.default is one.empty or one.name in GIVEN)
        strange = [name for name in names if name not in GIVEN]
        if strange:
            raise ConfigError(
                f"rewards.function: {self.function} asks for {strange[0]!r}; a reward is given output, gold, prompt and "
                f"meta by name: {did_you_mean(strange[0], GIVEN)}"
            )

        def call(answer: Answer) -> float:
            return function(**{name: getattr(answer, name) for name in names})  # type: ignore[no-any-return]

        self._call = call

    def score(self, answers: Sequence[Answer]) -> list[float]:
        assert self._call is not None  # ready() comes first
        found = []
        for answer in answers:
            try:
                value = self._call(answer)
            except Exception as err:
                raise TrainingError(
                    f"the reward {self.function} failed on the answer {answer.output[:80]!r}: {type(err).__name__}: {err}"
                ) from err
            if not isinstance(value, int | float) or not math.isfinite(value):
                raise TrainingError(
                    f"the reward {self.function} returned {value!r} for the answer {answer.output[:80]!r}; "
                    "it must return a finite number"
                )
            found.append(float(value))
        return found


def load_function(where: str, setting: str) -> Callable[..., Any]:
    """The function called NAME in FILE.py, given as FILE.py:NAME. Raises ConfigError, beginning with `setting`."""
    file, _, name = where.rpartition(":")
    if not file.endswith(".py") or not name.isidentifier():
        raise ConfigError(f"{setting}: {where!r} does not say where the function is; write FILE.py:NAME")
    path = Path(file).expanduser()
    if not path.is_file():
        raise ConfigError(f"{setting}: {file}: no such file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as err:
        raise ConfigError(f"{setting}: {file} cannot be run: {type(err).__name__}: {err}") from err
    function = getattr(module, name, None)
    if not callable(function):
        known = [one for one, value in vars(module).items() if inspect.isfunction(value)]
        hint = did_you_mean(name, known) if known else "it holds none"
        raise ConfigError(f"{setting}: {file} holds no function {name!r}; {hint}")
    return function  # type: ignore[no-any-return]
