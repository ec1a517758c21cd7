"""luthier doctor"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

from luthier.core.errors import ModelError
from luthier.core.record import collect_versions, describe_machine
from luthier.core.run import runs_root
from luthier.faces.cli.chinese import pad, say
from luthier.faces.cli.flags import Parser, make_parser
from luthier.faces.cli.results import print_json

if TYPE_CHECKING:
    from luthier.models.hardware import Hardware

EXTRAS = {"parquet": ("pyarrow", "parquet files"), "hub-data": ("datasets", "data sets of the hub"),
          "sentencepiece": ("sentencepiece", "tokenizers made with it"),
          "structure": ("llguidance", "answers of a given form")}  # fmt: skip
# Under this, a run of a small model may not fit.
LITTLE_DISK = 2 * 10**9


def parser() -> Parser:
    made = make_parser("doctor", "What this machine has, which extras are usable, and what is missing.")
    made.add_argument("model", nargs="?", help="say too how this model writes here, and why")
    made.add_argument("--json", action="store_true", help="print the findings as JSON")
    return made


def run(arguments: Sequence[str]) -> int:
    found = parser().parse(arguments)
    facts = examine()
    if found.model is not None:
        facts["model"] = examine_model(found.model)
    if found.json:
        print_json(facts)
        return 0
    machine, hardware = facts["machine"], facts["hardware"]
    memory = f"{machine['memory_bytes'] / 1e9:.1f} GB" if machine["memory_bytes"] else say("unknown")
    print(
        say(
            f"machine           {machine['processor']}, {machine['cores']} cores, {memory} of memory, {machine['system']}"
        )
    )
    for name, value in hardware.items():
        print(f"{name:<18}{value}")
    print(say("versions          " + ", ".join(f"{name} {number}" for name, number in facts["versions"].items())))
    print(say(f"kernels           {facts['kernels']}"))
    print(say(f"decoder           {facts['decoder']}"))
    for extra, state in facts["extras"].items():
        print(pad(say("extra"), 18) + f"{extra}: {say(state)}")
    for name, value in facts["hub"].items():
        print(f"hub               {name}: {say(value)}")
    runs = facts["runs"]
    state = say("writable" if runs["writable"] else "NOT WRITABLE")
    print(say(f"runs              {runs['path']}: {state}, {runs['free_bytes'] / 1e9:.1f} GB free"))
    for name, (value, why) in facts.get("model", {}).items():
        print(pad(say("model"), 18) + f"{name}: {say(value)} ({say(why)})")
    print()
    print(say("\n".join(facts["troubles"]) or "Everything that tuning and judging need is here."))
    return 0


class Runs(TypedDict):
    """Where runs go."""

    path: str
    writable: bool
    free_bytes: int


class Findings(TypedDict):
    """What was found, as plain values; `troubles` are sentences with what to do."""

    machine: dict[str, Any]
    hardware: Hardware
    versions: dict[str, str]
    kernels: str
    decoder: str
    extras: dict[str, str]
    hub: dict[str, str]
    runs: Runs
    troubles: list[str]
    model: NotRequired[dict[str, tuple[str, str]]]


def examine() -> Findings:
    """Every finding but those of a model."""
    from luthier.models.hardware import describe_hardware

    root = runs_root().absolute()
    nearest = next(path for path in (root, *root.parents) if path.exists())
    free = shutil.disk_usage(nearest).free
    runs: Runs = {"path": str(root), "writable": os.access(nearest, os.W_OK), "free_bytes": free}
    extras = {}
    for extra, (package, purpose) in EXTRAS.items():
        extras[extra] = (
            _version(package) if find_spec(package) else f"missing ({purpose}): pip install 'luthier[{extra}]'"
        )
    hub = {name: os.environ.get(name, "not set") for name in ("HF_ENDPOINT", "HF_HUB_OFFLINE", "HF_HOME")}
    troubles = []
    if not runs["writable"]:
        troubles.append(f"Runs cannot be written to {nearest}: set LUTHIER_RUNS to a writable place.")
    if free < LITTLE_DISK:
        troubles.append(
            f"Only {free / 1e9:.1f} GB are free at {nearest}: a run keeps a model and up to three checkpoints."
        )
    if not (Path(__file__).parents[2] / "assets" / "mini" / "model.safetensors").exists():
        troubles.append("The shipped model is missing from the package: install it anew.")
    return {
        "machine": describe_machine(),
        "hardware": describe_hardware(),
        "versions": collect_versions(),
        "kernels": _kernels(),
        "decoder": _decoder(),
        "extras": extras,
        "hub": hub,
        "runs": runs,
        "troubles": troubles,
    }


def _kernels() -> str:
    """Whether layers run in compiled kernels on this processor, and why not."""
    from luthier.native.build import NoLibrary, load_library

    try:
        return f"compiled for this processor, {load_library().threads()} threads"
    except NoLibrary as why:
        return f"none, torch does it all, slower: {why}"


def _decoder() -> str:
    """By what language models are read while they write, where they can be."""
    from luthier.native.build import NoLibrary
    from luthier.native.library import kernels

    try:
        return f"native, by {kernels()}"
    except NoLibrary as why:
        return f"none, models are read by torch, slower: {why}"


def examine_model(source: str) -> dict[str, tuple[str, str]]:
    """What is chosen for a language model that writes here, each with its reason. Raises ModelError."""
    from luthier.core.events import Event, Events
    from luthier.engine.generate import choose_engine
    from luthier.engine.sampling import Sampling
    from luthier.models.load import load_model

    # As `luthier generate` loads it.
    model = load_model(source, as_stored=True)
    if model.spec.task not in ("causal", "seq2seq"):
        raise ModelError(f"{source}: this model is made to {model.spec.task} and writes no text; name a language model")
    found: dict[str, tuple[str, str]] = {}

    def keep(event: Event) -> None:
        if event["event"] == "choice":
            found[event["name"]] = event["value"], event["why"]

    choose_engine(model, Sampling(), "auto", Events(sinks=[keep]))
    return found


def _version(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"{package} (version unknown)"
