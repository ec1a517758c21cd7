"""A record's results as a table for the terminal."""

from __future__ import annotations

import json
import sys

from luthier.core.record import Record
from luthier.core.run import runs_root
from luthier.core.types import Estimate
from luthier.faces.cli.chinese import pad, say

SHOWN = (
    *(
        "preference_accuracy",
        "likelihood_accuracy",
        "macro_f1",
        "accuracy",
        "f1",
        "roc_auc",
        "likelihood_auc",
        "spearman",
        "pearson",
        "mse",
    ),
    *("bleu", "chrf", "rougeL", "exact_match", "token_f1", "perplexity", "bits_per_byte"),
)


def print_record(record: Record, *, as_json: bool) -> None:
    """The record on stdout: as JSON, or the main metrics beside the baselines and where everything is."""
    if as_json:
        print(record.model_dump_json(indent=2))
        return
    names = [name for name in SHOWN if name in record.metrics][:5]
    rows = {say("this model"): record.metrics, **record.baselines}
    if names:
        print()
        print(f"{'':<12}" + "".join(f"{name:<28}" for name in names))
        for who, found in rows.items():
            print(pad(who, 12) + "".join(f"{show(found.get(name)):<28}" for name in names))
        n = record.metrics[names[0]].n
        print(say(f"(95 % intervals, {n:,} held-out rows)"))
    path = runs_root() / record.id
    print(say(f"\nrun:{record.id} is in {path}; its page is {path / 'report.html'}"))


def show(found: Estimate | None) -> str:
    """0.9731 [0.9602, 0.9838]"""
    return "-" if found is None else str(found)


def print_json(value: object) -> None:
    """Any plain value on stdout, readable in every script."""
    json.dump(value, sys.stdout, indent=2, ensure_ascii=False, default=str)
    print()
