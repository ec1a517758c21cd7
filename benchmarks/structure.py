"""Whether what is written under a JSON schema satisfies it, over the JSON-Schema-Test-Suite; and what the masks cost.

    python benchmarks/structure.py [--quick] [--suite jsonschema-4.26.0.tar.gz] [--walks N]

The suite is the one in the source package of `jsonschema`; without --suite pip fetches that. Every schema of drafts 2020-12,
2019-09, 7 and 6 is either refused, with a sentence that names one of its keywords, or followed by random walks: at each place a
token drawn evenly among those that may come (in every second walk every second token is one that closes something, where one
may come), for 48 tokens, and then as fast to the end as goes. `jsonschema`, which has to be installed, judges the texts, formats
included, with numbers as decimals, since 0.07 is no multiple of 0.01 in float64. A schema is `valid` when at least one walk
ended and all that ended satisfy it, `unfinished` when none ended, `unjudged` when jsonschema cannot read it (its patterns are
Python's); `invalid` must be 0, and is an error.

The cost is measured with a model of the 135M shape with random weights and with `mini`, the smallest there is, each read by the
native decoder in the form that it chooses itself: 8 texts at once under a schema of one object, as shares of the time of all
steps: `masks`, the time in which they are found (by a thread while the model reads, where it leaves a core free); `between`, the
time in which they are laid over the logits and moved on; `added`, how much longer a step takes than one of the same texts
without a structure, in turn with those; medians of 7 repeats. Writes benchmarks/results/structure.json; the last line printed is
the same object.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from decimal import Decimal, InvalidOperation, getcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from shapes import make_model

from luthier.core.errors import ConfigError
from luthier.core.events import Events
from luthier.engine import choose, native
from luthier.engine.engine import Engine
from luthier.engine.numbers import numbers_of
from luthier.engine.sampling import Sampling
from luthier.engine.structure import Matcher, Structure, matcher_for
from luthier.models.load import load_model
from luthier.models.memory import keep_freed_memory
from luthier.models.spec import LoadedModel

HERE = Path(__file__).parent
DRAFTS = {
    "draft2020-12": "Draft202012Validator",
    "draft2019-09": "Draft201909Validator",
    "draft7": "Draft7Validator",
    "draft6": "Draft6Validator",
}
FREE, MOST = 48, 400
CLOSING = ('"', "}", "]", ",", ":")
RECORD = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 30},
        "born": {"type": "string", "format": "date"},
        "height": {"type": "number", "minimum": 0, "maximum": 3},
        "children": {"type": "array", "items": {"type": "string", "maxLength": 20}, "maxItems": 5},
    },
    "required": ["name", "born", "height", "children"],
    "additionalProperties": False,
}


def read_suite(path: Path | None) -> Iterator[tuple[str, str, str]]:
    """(draft, where, schema as text) of every case."""
    with tempfile.TemporaryDirectory() as folder:
        if path is None:
            command = ["download", "--no-deps", "--no-binary", "jsonschema", "-d", folder, "jsonschema"]
            subprocess.run([sys.executable, "-m", "pip", "--quiet", *command], check=True)
            path = next(Path(folder).glob("jsonschema-*.tar.gz"))
        with tarfile.open(path) as archive:
            for member in archive:
                parts = member.name.split("/json/tests/")
                draft = parts[-1].split("/")[0]
                file = archive.extractfile(member) if draft in DRAFTS and member.name.endswith(".json") else None
                if file is not None:
                    for at, case in enumerate(json.loads(file.read())):
                        yield draft, f"{parts[-1]}#{at}", json.dumps(case["schema"])


def judge(model: LoadedModel, draft: str, text: str, walks: int) -> tuple[str, str]:
    """(what became of it, an example or the sentence)."""
    import jsonschema

    schema = json.loads(text)
    try:
        structure = Structure.make({"json_schema": schema}, where="schema")
    except ConfigError as err:
        named = re.findall(r"`(.+?)`", str(err))
        keys = set(re.findall(r'"((?:[^"\\]|\\.)*)"\s*:', text)) | {"false"}
        return ("refused" if named and named[0] in keys else "unnamed"), str(err)
    kind = getattr(jsonschema, DRAFTS[draft])
    validator = kind(json.loads(text, parse_float=Decimal), format_checker=kind.FORMAT_CHECKER)
    ended = []
    for walk in range(walks):
        written = wander(model, structure, random.Random(f"{text} {walk}"), closing=walk % 2 == 1)
        if written is None:
            continue
        ended.append(written)
        try:
            value = json.loads(written, parse_float=number)
            mistakes = list(validator.iter_errors(value))
        except json.JSONDecodeError as err:
            return "invalid", f"{written!r}: {err}"
        except re.error as err:
            return "unjudged", str(err)
        if mistakes:
            return "invalid", f"{written!r}: {mistakes[0].message[:200]}"
    return ("valid", ended[-1]) if ended else ("unfinished", "")


def number(text: str) -> Decimal | float:
    """Exactly, but for exponents of twenty digits and more."""
    try:
        return Decimal(text)
    except InvalidOperation:
        return float(text)


def wander(model: LoadedModel, structure: Structure, draw: random.Random, closing: bool) -> str | None:
    """A text by tokens drawn evenly among those that may come; None where it did not end."""
    matcher, stops = matcher_for(model, structure), model.spec.stop_ids
    ends = closers(model)
    written: list[int] = []
    while len(written) < MOST:
        matcher.fill()
        allowed = np.flatnonzero(np.unpackbits(matcher.bits.view(np.uint8), bitorder="little")).tolist()
        late = len(written) >= FREE
        if late and set(stops) & set(allowed):
            return model.renderer.decode(written)
        near = [one for one in allowed if one in ends] if late or (closing and draw.random() < 0.5) else []
        token = draw.choice(near or allowed)
        if token in stops:
            return model.renderer.decode(written)
        written.append(token)
        if matcher.take(token):
            return model.renderer.decode(written)
    return None


def closers(model: LoadedModel) -> set[int]:
    if "closers" not in _KEPT:
        _KEPT["closers"] = {model.tokenizer.convert_tokens_to_ids(one) for one in CLOSING}
    return _KEPT["closers"]


_KEPT: dict[str, set[int]] = {}


def costs(shapes: Sequence[str], tokens: int, repeats: int) -> dict[str, dict[str, float]]:
    """`cost` of a model of each shape, or of `mini`."""
    build = HERE.parent / "build" / "benchmarks"
    build.mkdir(parents=True, exist_ok=True)
    found = {}
    for shape in shapes:
        model = load_model("mini") if shape == "mini" else load_model(str(make_model(shape, build)), dtype="bfloat16")
        native.prepare(model, "auto", Events())
        found[shape] = cost(model, tokens, repeats)
    return found


def cost(model: LoadedModel, tokens: int, repeats: int) -> dict[str, float]:
    """Milliseconds of a step with and without a structure, microseconds of the mask of one text, shares of a step."""
    model.spec = model.spec.model_copy(update={"stop_ids": ()})
    spent: Counter[str] = Counter()
    calls: Counter[str] = Counter()

    def timed(owner: Any, name: str) -> Any:
        own = getattr(owner, name)

        def run(*given: Any) -> Any:
            started, filled = time.perf_counter(), spent["fill"]
            try:
                return own(*given)
            finally:
                # A mask that is made within another call counts as a mask alone.
                inside = 0.0 if name == "fill" else spent["fill"] - filled
                spent[name] += time.perf_counter() - started - inside
                calls[name] += 1

        return patch.object(owner, name, run)

    def write(structure: dict[str, Any] | None) -> tuple[float, int]:
        engine = Engine(model, 8192)
        for at in range(8):
            sampling = Sampling(max_tokens=tokens, temperature=1.0, structure=structure)
            engine.add([5 + at, 6, 7, 8], sampling, draw=numbers_of(at))
        started, steps = time.perf_counter(), 0
        while engine.busy:
            engine.step()
            steps += 1
        return time.perf_counter() - started, steps

    found: dict[str, list[float]] = {
        name: [] for name in ("step_ms", "plain_step_ms", "mask_us", "masks", "between", "added")
    }
    with timed(Matcher, "fill"), timed(Matcher, "take"), timed(choose, "restrict"):
        for at in range(repeats + 1):
            plain, plain_steps = write(None)
            spent.clear()
            calls.clear()
            whole, steps = write({"json_schema": RECORD})
            if at:
                found["plain_step_ms"].append(1000 * plain / plain_steps)
                found["step_ms"].append(1000 * whole / steps)
                found["mask_us"].append(1e6 * spent["fill"] / calls["fill"])
                found["masks"].append(spent["fill"] / whole)
                found["between"].append((spent["take"] + spent["restrict"]) / whole)
                found["added"].append(whole / steps / (plain / plain_steps) - 1)
    return {name: float(f"{statistics.median(one):.3g}") for name, one in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="every eighth schema, two walks")
    parser.add_argument("--suite", type=Path, help="the source package of jsonschema")
    parser.add_argument("--walks", type=int, default=12)
    options = parser.parse_args()
    try:
        import jsonschema  # noqa: F401
    except ImportError:
        raise SystemExit("jsonschema judges the texts, and is not installed: pip install jsonschema") from None
    torch.set_grad_enabled(False)
    keep_freed_memory()
    getcontext().prec = 1000
    model = load_model("mini")
    cases = list(read_suite(options.suite))
    if options.quick:
        cases = cases[::8]
    counts: dict[str, Counter[str]] = {draft: Counter() for draft in DRAFTS}
    refused: Counter[str] = Counter()
    for draft, where, text in cases:
        what, said = judge(model, draft, text, 2 if options.quick else options.walks)
        counts[draft][what] += 1
        if what == "refused":
            refused[re.findall(r"`(.+?)`", said)[0]] += 1
        elif what != "valid":
            print(f"{what}: {where}: {said} {text[:300]}", file=sys.stderr)
    total = sum(counts.values(), Counter())
    result = {
        "benchmark": "structure",
        "peer_is": f"jsonschema {version('jsonschema')} as the judge",
        "walks": 2 if options.quick else options.walks,
        "schemas": len(cases),
        **{name: total[name] for name in ("valid", "refused", "unfinished", "unjudged", "unnamed", "invalid")},
        "drafts": {draft: dict(found) for draft, found in counts.items()},
        "refused_for": dict(refused.most_common()),
        "threads": torch.get_num_threads(),
        "cost": costs(["mini"] if options.quick else ["135m", "mini"], 100, 1 if options.quick else 7),
    }
    if not options.quick:
        path = HERE / "results" / "structure.json"
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result))
    if total["invalid"] or total["unnamed"]:
        raise SystemExit("some texts do not satisfy their schema, or a refusal names no keyword")


if __name__ == "__main__":
    main()
