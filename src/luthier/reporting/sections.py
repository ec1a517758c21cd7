"""What the page says, as plain values: read from the files of a run, nothing computed anew but orders and words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from luthier.core.events import read_events
from luthier.core.record import Record
from luthier.core.types import Estimate
from luthier.reporting.charts import draw_interval, draw_lines, shade

# Smaller is better for these; for all others more is better.
ERRORS = {"mse", "mae", "perplexity", "bits_per_byte", "loss"}
FIRST = ("macro_f1", "preference_accuracy", "spearman", "bleu", "bits_per_byte", "perplexity", "accuracy")
SHOWN_EXAMPLES = 10
LARGEST_MATRIX = 20
LONGEST_TEXT = 600


def main_metric(record: Record) -> str | None:
    """The metric that sums the run up."""
    return next((name for name in FIRST if name in record.metrics), next(iter(record.metrics), None))


def say_verdict(record: Record) -> str:
    """One sentence: how good, and whether that is more than a plain baseline."""
    if record.state == "failed":
        return f"This run failed: {record.error}"
    if record.state == "interrupted":
        return f"This run was interrupted; go on with: luthier {record.verb} --resume run:{record.id}"
    name = main_metric(record)
    if name is None:
        steps = record.numbers.get("steps")
        return (
            f"Finished after {steps} steps. Nothing was held out, so nothing was judged."
            if steps
            else "Nothing was judged."
        )
    found = record.metrics[name]
    said = f"{label(name)} {show(found)} on {found.n:,} held-out rows"
    said = said[0].upper() + said[1:]
    rivals = {rival: values[name] for rival, values in record.baselines.items() if name in values}
    if not rivals:
        return said + "."
    sign = -1 if name in ERRORS else 1
    rival = max(rivals, key=lambda one: sign * rivals[one].value)
    other = rivals[rival]
    near = found.low if sign > 0 else found.high
    if sign * near > sign * other.value:
        return f"{said}: clearly better than the best plain baseline ({rival}, {other.value:.4f})."
    if sign * found.value > sign * other.value:
        return f"{said}: better than the best plain baseline ({rival}, {other.value:.4f}), but within the error bar."
    return f"{said}: not better than a plain baseline ({rival}, {other.value:.4f}). The baseline is cheaper."


# Written here, so no mistake in it need be explained; the one in C takes a fifth of the time.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read_settings(path: Path) -> list[dict[str, Any]]:
    """Every setting with its value and origin."""
    file = path / "resolved.yaml"
    table = yaml.load(file.read_text(encoding="utf-8"), Loader=_LOADER) if file.exists() else {}
    return [{"path": name, **row} for name, row in (table or {}).items()]


def draw_curves(path: Path, record: Record) -> list[Any]:
    """Loss in training and validation, the validation metrics, and the learning rate."""
    file = path / "events.jsonl"
    events = list(read_events(file)) if file.exists() else []
    steps = {event["step"]: event for event in events if event["event"] == "step"}
    looks = {event["step"]: event for event in events if event["event"] == "validate"}
    best = record.numbers.get("best_step")
    losses = {
        "training": [(step, event["loss"]) for step, event in sorted(steps.items())],
        "validation": [(step, event["loss"]) for step, event in sorted(looks.items())],
    }
    skipped = {"event", "time", "step", "best", "judged_by", "loss"}
    names = [name for event in looks.values() for name in event if name not in skipped]
    of_sources = [name for name in dict.fromkeys(names) if name.startswith("loss/")]
    names = [name for name in names if name not in of_sources]
    for name in of_sources:
        losses[name.removeprefix("loss/")] = [(step, one[name]) for step, one in sorted(looks.items()) if name in one]
    metrics = {
        label(name): [(step, event[name]) for step, event in sorted(looks.items()) if name in event]
        for name in dict.fromkeys(names)
    }
    rates = {"learning rate": [(step, event["learning_rate"]) for step, event in sorted(steps.items())]}
    tallies = {step: event.get("tally", {}) for step, event in sorted(steps.items())}
    # One chart each: shares, rewards and lengths have no scale in common.
    counted = [
        draw_lines(
            {name: [(step, one[name]) for step, one in tallies.items() if name in one]}, title=label(name).capitalize()
        )
        for name in dict.fromkeys(name for one in tallies.values() for name in one)
    ]
    return [
        chart
        for chart in (
            draw_lines(losses, title="Loss", mark=best),
            draw_lines(metrics, title="Validation metrics", mark=best),
            *counted,
            draw_lines(rates, title="Learning rate"),
        )
        if chart
    ]


def compare_results(record: Record) -> list[dict[str, Any]]:
    """A row a metric: the model and each baseline, with bars on one scale."""
    rows = []
    order = sorted(record.metrics, key=lambda name: FIRST.index(name) if name in FIRST else len(FIRST))
    for name in order:
        entries = {"this model": record.metrics[name]}
        entries |= {rival: values[name] for rival, values in record.baselines.items() if name in values}
        bounds = (min(one.low for one in entries.values()), max(one.high for one in entries.values()))
        cells = [
            {
                "who": who,
                "value": f"{one.value:.4f}",
                "range": f"{one.low:.4f} to {one.high:.4f}",
                "bar": draw_interval(one.value, one.low, one.high, bounds),
            }
            for who, one in entries.items()
        ]
        found = record.metrics[name]
        rows.append({"name": label(name), "less": name in ERRORS, "cells": cells, "n": found.n, "method": found.method})
    return rows


def read_confusion(path: Path) -> dict[str, Any] | None:
    """The confusion matrix with its shades, None where there is none or it is too large to read."""
    found = read_json(path / "artefacts" / "details.json").get("confusion")
    if not found or len(found["labels"]) > LARGEST_MATRIX:
        return None
    rows: list[dict[str, Any]] = []
    for name, counts in zip(found["labels"], found["counts"]):
        cells = [
            {"count": count, "shade": shade(count, sum(counts)), "right": at == len(rows)}
            for at, count in enumerate(counts)
        ]
        rows.append({"label": name, "cells": cells})
    return {"labels": found["labels"], "rows": rows}


def pick_examples(path: Path) -> dict[str, Any]:
    """Ten predictions that are right and ten that are wrong, the surest mistakes first; numbers by their error."""
    rows = read_lines(path / "artefacts" / "predictions.jsonl")
    rows = [row for row in rows if row.get("gold") is not None]
    if not rows:
        return {}
    for row in rows:
        row["input"] = cut(row.get("input") or "")
        shares = row.get("probabilities") or {}
        row["sure"] = shares.get(row["output"]) if isinstance(row["output"], str) else None
        row["output_shown"], row["gold_shown"] = show_answer(row["output"]), show_answer(row["gold"])
    if isinstance(rows[0]["gold"], int | float):
        for row in rows:
            row["error"] = abs(row["output"] - row["gold"])
        ordered = sorted(rows, key=lambda row: row["error"])
        return {
            "right": ordered[:SHOWN_EXAMPLES],
            "wrong": ordered[::-1][:SHOWN_EXAMPLES],
            "names": ("Closest", "Farthest"),
        }
    right = [row for row in rows if same(row["output"], row["gold"])]
    wrong = sorted((row for row in rows if not same(row["output"], row["gold"])), key=lambda row: -(row["sure"] or 0))
    order = ", the surest first" if any(row["sure"] is not None for row in wrong) else ""
    names = (f"Right ({len(right):,})", f"Wrong ({len(wrong):,}){order}")
    return {"right": right[:SHOWN_EXAMPLES], "wrong": wrong[:SHOWN_EXAMPLES], "names": names}


def read_samples(path: Path) -> list[dict[str, Any]]:
    """A few training rows as the model saw them, tokens with their weights."""
    samples = read_lines(path / "artefacts" / "samples.jsonl")[:3]
    for sample in samples:
        sample["tokens"], sample["more"] = sample["tokens"][:400], max(0, len(sample["tokens"]) - 400)
    return samples


def label(name: str) -> str:
    """A metric's name for people."""
    known = {"bleu": "BLEU", "chrf": "chrF", "mse": "MSE", "mae": "MAE", "roc_auc": "ROC-AUC", "f1": "F1"}
    known |= {"spearman": "Spearman", "pearson": "Pearson"}
    return known.get(name, name.replace("_", " ").replace(" f1", " F1"))


def show(found: Estimate) -> str:
    """A value with its interval."""
    return f"{found.value:.4f} [{found.low:.4f}, {found.high:.4f}]"


def show_time(seconds: float) -> str:
    """Seconds as people say them."""
    whole = round(seconds)
    if whole < 90:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"


def show_answer(answer: Any) -> str:
    if isinstance(answer, float):
        return f"{answer:.3f}"
    return cut(", ".join(map(str, answer)) if isinstance(answer, list) else str(answer)) or "(empty)"


def same(one: Any, other: Any) -> bool:
    if isinstance(one, list) and isinstance(other, list):
        return set(one) == set(other)
    return str(one).strip() == str(other).strip()


def cut(text: str) -> str:
    return text if len(text) <= LONGEST_TEXT else text[:LONGEST_TEXT] + " ..."


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file of the run, or nothing where it is absent."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def read_lines(path: Path) -> list[dict[str, Any]]:
    """A JSON-lines file of the run, or nothing where it is absent."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
