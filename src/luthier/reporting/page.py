"""One self-contained page a run: no network, no scripts, readable on a phone and on paper."""

from __future__ import annotations

from functools import cache
from importlib import resources
from pathlib import Path

from jinja2 import Environment, Template

from luthier.core.run import read_record, write_atomically
from luthier.reporting import sections


def write_report(path: Path) -> Path:
    """Write `report.html` into the run directory `path` from the files there, and return its path.

    Raises RunError when the record is damaged or the page cannot be written.
    """
    record = read_record(path)
    details = sections.read_json(path / "artefacts" / "details.json")
    text = _page().render(
        record=record,
        time=sections.show_time(record.seconds),
        verdict=sections.say_verdict(record),
        settings=sections.read_settings(path),
        profile=sections.read_json(path / "artefacts" / "profile.json"),
        curves=sections.draw_curves(path, record),
        results=sections.compare_results(record),
        confusion=sections.read_confusion(path),
        details=details,
        examples=sections.pick_examples(path),
        samples=sections.read_samples(path),
    )
    target = path / "report.html"
    write_atomically(target, text)
    return target


@cache
def _page() -> Template:
    """Compiled once, for searches and comparisons write many."""
    source = (resources.files("luthier.reporting") / "page.html.jinja").read_text(encoding="utf-8")
    return Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(source)
