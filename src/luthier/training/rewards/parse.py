"""Rewards as they are written in settings, and what each is called among the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from luthier.core.catalog import Part
from luthier.metrics.scorers import SCORERS
from luthier.training.rewards import REWARDS
from luthier.training.rewards.part import Reward


def parse_reward(value: Any) -> Reward:
    """A reward by its name or settings; a scorer's name is the reward for that score. Raises ConfigError."""
    if isinstance(value, str):
        value = {"kind": value}
    if isinstance(value, Mapping) and value.get("kind") in SCORERS.names():
        scorer = {name: inner for name, inner in value.items() if name != "weight"}
        value = {"kind": "scorer", "scorer": scorer, **{name: value[name] for name in ("weight",) if name in value}}
    return REWARDS.parse(value)


def as_list(value: Any) -> Any:
    """One reward as a list of one."""
    return [value] if isinstance(value, str | Mapping | Part) else value


def distinct(names: Sequence[str]) -> list[str]:
    """Names with a number behind those that came before."""
    return [name if name not in names[:at] else f"{name}_{names[:at].count(name) + 1}" for at, name in enumerate(names)]
