"""Messages classified by a language model that scores labels, beside transformers' `generate` and reading what it wrote.

    python benchmarks/labels.py [--quick] [--shape 15m|135m|0.6b]

1,000 text messages of the shipped SMS data, spam or ham, through a model of a known shape with random weights in bf16; ours is
what `luthier evaluate` classifies with: the native decoder in the form that it chooses itself (`form`), packed when the model
is loaded. `bfloat16` is ours with weights in bf16, `module` ours by transformers' modules, both on the first part alone. `zero`
puts an instruction before each message, `few` four worked examples too. The peer gets the same prompts, those of like length
together, padded to the left, at the best of three batch sizes, each tried on 64 of them; it writes greedily as many tokens as
the longest label with its end has, the least that an answer needs, and the label is looked for in the text. `sixteen` lets it
write 16, as one does where a model may say more, on the first part alone. Weights are random, so what is written seldom ends
before. Both render and tokenise their prompts inside the time. The
messages come in parts, each through ours and then through the peer, in one process: rows a second are medians over the parts,
`ratio` is one over the other. Writes benchmarks/results/labels.json; the last line printed is the same object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from shapes import make_model

from luthier.core.events import Events
from luthier.core.types import Labelled
from luthier.data.load import Data, load_examples
from luthier.engine.labels import Labeller, ask_for
from luthier.engine.native import prepare
from luthier.engine.padded import write
from luthier.engine.sampling import Execution, Sampling
from luthier.models.load import load_model
from luthier.models.memory import keep_freed_memory
from luthier.models.spec import LoadedModel
from luthier.native.packed import Packed
from luthier.text.labels import Ask, LabelRenderer, Shots

HERE = Path(__file__).parent
LABELS = ("ham", "spam")
SIZES = (16, 32, 64)


def read_rows(count: int) -> tuple[list[str], list[tuple[str, str]]]:
    """Messages, and four worked examples that are not among them."""
    rows = [one for one in load_examples("sms_spam", Data(train="sms_spam"), Events()) if isinstance(one, Labelled)]
    shots = [(one.text, str(one.label)) for label in LABELS for one in [row for row in rows if row.label == label][:2]]
    shown = {text for text, _ in shots}
    return [one.text for one in rows if one.text not in shown][:count], shots


def run_ours(model: LoadedModel, texts: list[str], shots: Shots) -> float:
    """Rows a second."""
    started = time.perf_counter()
    found = Labeller(model, LABELS, shots=shots).predict([(str(at), text) for at, text in enumerate(texts)])
    assert len(found) == len(texts) and all(one.output in LABELS for one in found)
    return len(texts) / (time.perf_counter() - started)


def run_peer(model: LoadedModel, texts: list[str], shots: Shots, size: int, tokens: int) -> float:
    started = time.perf_counter()
    ask = Ask(LABELS, ask_for(LABELS), shots)
    rows = sorted((model.renderer.prompt(ask.about(text)) for text in texts), key=len)
    said = []
    for start in range(0, len(rows), size):
        for ids in write(model, rows[start : start + size], Sampling(max_tokens=tokens)):
            text = model.renderer.decode(ids)
            said.append(next((label for label in LABELS if label in text.lower()), None))
    assert len(said) == len(texts)
    return len(texts) / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the 15m shape, 64 rows")
    parser.add_argument("--shape", default="135m")
    options = parser.parse_args()
    shape, count, parts = ("15m", 64, 2) if options.quick else (options.shape, 1000, 5)
    build = HERE.parent / "build" / "benchmarks"
    build.mkdir(parents=True, exist_ok=True)
    keep_freed_memory()
    model = load_model(str(make_model(shape, build)), dtype="bfloat16")
    packed: dict[str, Packed | None] = {"module": None}
    executions: list[tuple[str, Execution]] = [("ours", "auto"), ("bfloat16", "bfloat16")]
    for name, execution in executions:
        model.native = None
        prepare(model, execution, Events())
        packed[name] = model.native
    form = "model" if packed["ours"] is None else packed["ours"].form
    texts, four = read_rows(count)
    ways: dict[str, dict[str, float]] = {"ours": {}, "peer": {}, "sixteen": {}, "bfloat16": {}, "module": {}}
    facts: dict[str, dict[str, float]] = {}
    for name, shots in (("few", four), ("zero", [])):
        renderer = LabelRenderer(model.renderer, Ask(LABELS, ask_for(LABELS), shots))
        rendered = [renderer.render(text, "") for text in texts]
        longest = max(len(one) for _, labels in rendered for one in labels)
        for model.native in packed.values():
            run_ours(model, texts[:32], shots)
        rates = {size: run_peer(model, texts[:64], shots, size, longest) for size in SIZES}
        size = max(rates, key=lambda size: rates[size])
        found: dict[str, list[float]] = {way: [] for way in ways}
        for start in range(0, count, count // parts):
            part = texts[start : start + count // parts]
            model.native = packed["ours"]
            found["ours"].append(run_ours(model, part, shots))
            found["peer"].append(run_peer(model, part, shots, size, longest))
            if not start:
                found["sixteen"].append(run_peer(model, part, shots, size, 16))
                for way in ("bfloat16", "module"):
                    model.native = packed[way]
                    found[way].append(run_ours(model, part, shots))
        for way, some in found.items():
            ways[way][name] = round(statistics.median(some), 2)
        facts[name] = {
            "prompt_tokens": round(statistics.mean(len(prompt) for prompt, _ in rendered), 1),
            "answer_tokens": longest,
            "peer_batch": size,
        }
    result = {
        "benchmark": "labels",
        "shape": shape,
        "rows": len(texts),
        "labels": LABELS,
        "form": form,
        "unit": "rows/s",
        "parts": parts,
        "threads": torch.get_num_threads(),
        "peer_is": "transformers' generate, padded, the best of three batch sizes, and the label looked for in the text",
        "prompts": facts,
        **ways,
        "ratio": {name: round(ways["ours"][name] / ways["peer"][name], 2) for name in facts},
        "ratio_to_sixteen": {name: round(ways["ours"][name] / ways["sixteen"][name], 2) for name in facts},
    }
    if shape == "135m":
        (HERE / "results" / "labels.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
