"""Passages found for questions by words, by meaning and by both; questions without an answer refused; answers.

    python benchmarks/retrieval.py FOLDER [--quick] [--encoder SOURCE] [--model SOURCE]

FOLDER holds `qa/` and `classification/` as JSON lines: CMRC 2018 (Chinese) and XQuAD (English, Chinese) with id, title, context,
question and answers, and BANKING77 with text and label. Each context is a file, cut as `luthier index` does by default. Half of
the titles are left out of the index, so that their questions have no answer in it. A question is found at the rank of the first
passage of its own file (`recall@1`, `recall@5`, `mrr` of the first hundred); of BANKING77 every training row is a question of an
FAQ with its intent as a numbered answer, and a test row is found at the first with its intent.

`words` is BM25, `meaning` the encoder, `both` the fusion of the two whatever the encoder can read, and `search` what Luthier
does: meaning is left out where the encoder cannot read the index's own sentences. `refused` are answerable questions that are
refused, `caught` the unanswerable ones that are. The share of half sentences to refuse (0.75) was chosen on the other half of the
titles, with this half left out, and that halves of FAQ rows do not judge the encoder, on a tenth of BANKING77's test rows. Of
BANKING77 half of the intents are left out for `refused` and `caught`. Answers: `best_sentence` is the sentence of the first
passage that shares most words with the question by BM25, no model; `model` what a language model writes from the first passages,
by SQuAD's F1 (characters in Chinese, as CMRC 2018); `right_file_whole` is the paragraph itself as an answer, for comparison.
`follow_ups` are two turns, looked up by the last alone and as `luthier chat --index` does. Intervals are 95 %. Writes
benchmarks/results/retrieval.json; the last line printed is the same object.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from luthier.core.errors import DataError
from luthier.core.events import Events
from luthier.core.types import Estimate, Message
from luthier.metrics.scorers.answers import TokenF1
from luthier.metrics.statistics import as_floats, mean, paired_difference, wilson
from luthier.retrieval.answer import Retrieved, retrieve_all
from luthier.retrieval.bm25 import index_words
from luthier.retrieval.build import build_index
from luthier.retrieval.embed import Encoder, load_encoder, name_encoder
from luthier.retrieval.prompt import fit_prompt, ways_of
from luthier.retrieval.scores import Scored, rank, score_all
from luthier.retrieval.search import Index, compares_meaning, fuse_ranks, open_index
from luthier.retrieval.sentences import split_sentences

HERE = Path(__file__).parent
SETS = {
    "cmrc2018_zh": "qa/cmrc2018_zh.jsonl.gz",
    "xquad_en": "qa/xquad_en.jsonl.gz",
    "xquad_zh": "qa/xquad_zh.jsonl.gz",
}
DEPTH = 100


def read(path: Path) -> list[dict[str, Any]]:
    content = path.read_bytes()
    text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8")
    return [json.loads(line) for line in text.split("\n") if line]


def share(hits: Sequence[bool]) -> dict[str, Any]:
    return shown(wilson(sum(hits), len(hits)))


def shown(found: Estimate) -> dict[str, Any]:
    return {"value": round(found.value, 4), "low": round(found.low, 4), "high": round(found.high, 4), "n": found.n}


def ranks_of(ranking: Sequence[int], right_N: np.ndarray, groups_N: np.ndarray) -> int:
    """The rank from 1 of the first right passage, those of one group counted once; 0 where none is."""
    seen: dict[int, None] = {}
    for place in ranking:
        if right_N[place]:
            return len(seen) + 1
        seen[int(groups_N[place])] = None
    return 0


def judge(found: Sequence[int]) -> dict[str, Any]:
    return {
        "recall@1": share([one == 1 for one in found]),
        "recall@5": share([0 < one <= 5 for one in found]),
        "mrr": shown(mean(as_floats([1 / one if one else 0.0 for one in found]))),
    }


def rankings(index: Index, question: str, scored: Scored) -> dict[str, list[int]]:
    words = [int(at) for at in rank(scored.bm25_N, DEPTH) if scored.bm25_N[at] > 0]
    made = {"words": words}
    if scored.cosine_N is not None:
        made["meaning"] = [int(at) for at in rank(scored.cosine_N, DEPTH)]
        made["both"] = [place for place, _ in fuse_ranks([words, made["meaning"]])]
    made["search"] = made["both"] if compares_meaning(index, question) else words
    return made


def compare_ways(
    index: Index, questions: Sequence[str], right: Sequence[np.ndarray], groups_N: np.ndarray
) -> dict[str, Any]:
    stored = index.stored
    found: dict[str, list[int]] = {}
    for question, right_N, scored in zip(
        questions, right, score_all(stored.words, stored.vectors_NE, index.encoder, questions)
    ):
        for way, ranking in rankings(index, question, scored).items():
            found.setdefault(way, []).append(ranks_of(ranking, right_N, groups_N))
    made: dict[str, Any] = {way: judge(ranks) for way, ranks in found.items()}
    if "both" in found:
        first = {way: as_floats([one == 1 for one in ranks]) for way, ranks in found.items()}
        made["recall@1_search_minus_words"] = shown(paired_difference(first["search"], first["words"]))
        made["recall@1_both_minus_words"] = shown(paired_difference(first["both"], first["words"]))
    return made


def compare_turns(
    index: Index, rows: Sequence[dict[str, Any]], right: Sequence[np.ndarray], groups_N: np.ndarray
) -> dict[str, Any]:
    """Found within the first five by the last of two turns alone, and as `retrieve_all` looks two turns up: the two halves of a
    question, and a question after one about something else."""
    draw, turns = random.Random(0), dict[str, list[tuple[str, str]]]()
    for row in rows:
        question = row["question"]
        middle = question.find(" ", len(question) // 2) if " " in question else len(question) // 2
        turns.setdefault("halves", []).append((question[:middle], question[middle:]))
        turns.setdefault("another_before", []).append((draw.choice(rows)["question"], question))
    made: dict[str, Any] = {}
    for name, pairs in turns.items():
        usable = [at for at, pair in enumerate(pairs) if all(one.strip() for one in pair)]
        for way in ("last_turn", "both_turns"):
            asked = [
                (last,) if way == "last_turn" else ways_of((Message("user", before), Message("user", last)))
                for before, last in (pairs[at] for at in usable)
            ]
            files = [[int(one.passage.file[:5]) for one in found.sources] for found in retrieve_all(index, asked)]
            hits = [bool(right[at][np.isin(groups_N, of)].any()) for at, of in zip(usable, files)]
            made.setdefault(name, {})[f"recall@5_{way}"] = share(hits)
    return made


def best_sentence(found: Retrieved) -> str:
    """No model: the sentence of the first passage that shares most with the question by BM25."""
    text = found.sources[0].passage.text
    sentences = [text[start:end] for start, end in split_sentences(text)]
    return sentences[int(index_words(sentences).score(found.question).argmax())]


def write_answers(source: str, asked: Sequence[Retrieved]) -> tuple[list[str], dict[str, Any]]:
    """What a model writes from the passages, and how it cites."""
    from luthier.engine.generate import choose_engine, generate
    from luthier.engine.sampling import Sampling
    from luthier.models.load import load_model
    from luthier.retrieval.answer import finish

    model, sampling = load_model(source, as_stored=True), Sampling(max_tokens=48)
    choose_engine(model, sampling, "auto", Events())
    limit = model.spec.max_length - sampling.max_tokens

    def fits(prompt: str) -> bool:
        return len(model.tokenizer(prompt)["input_ids"]) + 32 <= limit

    fitted: list[tuple[int, str, Any]] = []
    for at, one in enumerate(asked):
        try:
            fitted.append((at, *fit_prompt(one.question, one.sources, fits)))
        except DataError:
            continue  # counted below, and answered with nothing
    written = generate(model, [prompt for _, prompt, _ in fitted], sampling)
    made = [finish(found.text, sources) for found, (_, _, sources) in zip(written, fitted)]
    texts = [""] * len(asked)
    for (at, _, _), one in zip(fitted, made):
        texts[at] = one.text
    said = {"citations_that_exist": sum(len(one.cited) for one in made), "taken_out": sum(one.removed for one in made)}
    return texts, {**said, "questions_without_room_for_a_passage": len(asked) - len(made)}


def judge_answers(texts: Sequence[str], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    scorer = TokenF1()
    scores = [max(scorer.score(text, gold) for gold in row["golds"]) for text, row in zip(texts, rows)]
    return shown(mean(as_floats(scores)))


def run_documents(rows: list[dict[str, Any]], encoder: Encoder | None, options: argparse.Namespace) -> dict[str, Any]:
    """One set of questions about paragraphs."""
    files: dict[str, str] = {}
    for row in rows:
        row["file"] = files.setdefault(row["context"], f"{len(files):05d}.txt")
        row["golds"] = (
            row["answers"]["text"] if isinstance(row["answers"], dict) else [as_text(one) for one in row["answers"]]
        )
        row["held"] = int(hashlib.md5(row["title"].encode()).hexdigest(), 16) % 2 == 0
    with tempfile.TemporaryDirectory() as folder:
        docs = Path(folder) / "docs"
        docs.mkdir()
        for row in rows:
            if not row["held"]:
                (docs / row["file"]).write_text(row["context"], encoding="utf-8")
        path = Path(folder) / "index"
        built = build_index(path, [docs], encoder=encoder)
        index = open_index(path, encoder=encoder)
        passages = index.stored.all_passages()
        files_N = np.array([int(one.file[:5]) for one in passages])
        known = [row for row in rows if not row["held"]]
        right = [files_N == int(row["file"][:5]) for row in known]
        made: dict[str, Any] = {"files": built.files, "passages": built.passages}
        made["measured"] = {name: one.model_dump() for name, one in index.stored.meta.measured.items()}
        made["ways"] = compare_ways(index, [row["question"] for row in known], right, files_N)
        made["follow_ups"] = compare_turns(index, known, right, files_N)
        found = retrieve_all(index, [row["question"] for row in rows])
        made["abstention"] = {
            "refused": share([not one.known for one, row in zip(found, rows) if not row["held"]]),
            "caught": share([not one.known for one, row in zip(found, rows) if row["held"]]),
        }
        asked = [(one, row) for one, row in zip(found, rows) if not row["held"] and one.sources]
        made["answer_f1"] = {
            "best_sentence": judge_answers([best_sentence(one) for one, _ in asked], [row for _, row in asked]),
            "right_file_whole": judge_answers([row["context"] for _, row in asked], [row for _, row in asked]),
        }
        if options.model is not None:
            part = random.Random(0).sample(asked, min(len(asked), options.answers))
            texts, said = write_answers(options.model, [one for one, _ in part])
            made["answer_f1"]["model"] = judge_answers(texts, [row for _, row in part])
            made["answer_f1"]["best_sentence_on_the_same"] = judge_answers(
                [best_sentence(one) for one, _ in part], [row for _, row in part]
            )
            made["citations"] = said
        return made


def as_text(answer: Any) -> str:
    return str(answer["text"]) if isinstance(answer, dict) else str(answer)


def run_intents(train: list[dict[str, Any]], test: list[dict[str, Any]], encoder: Encoder | None) -> dict[str, Any]:
    """BANKING77 as an FAQ; for questions without an answer half of its intents are left out of another index."""
    intents = {label: at for at, label in enumerate(sorted({row["label"] for row in train}))}
    with tempfile.TemporaryDirectory() as folder:
        index = index_intents(Path(folder) / "all", train, intents, encoder)
        groups_N = np.array([int(one.text.split()[1]) for one in index.stored.all_passages()])
        # Each row is an entry, so ranks count rows.
        places_N = np.arange(len(groups_N))
        right = [groups_N == intents[row["label"]] for row in test]
        found = {"entries": len(groups_N), "intents": len(intents)}
        found["measured"] = {name: one.model_dump() for name, one in index.stored.meta.measured.items()}
        found["ways"] = compare_ways(index, [row["text"] for row in test], right, places_N)
        half = [row for row in train if intents[row["label"]] % 2]
        asked = retrieve_all(
            index_intents(Path(folder) / "half", half, intents, encoder), [row["text"] for row in test]
        )
        found["abstention"] = {
            name: share([not one.known for one, row in zip(asked, test) if intents[row["label"]] % 2 == side])
            for name, side in (("refused", 1), ("caught", 0))
        }
        return found


def index_intents(path: Path, rows: list[dict[str, Any]], intents: dict[str, int], encoder: Encoder | None) -> Index:
    """An index of questions with the number of their intent as the answer."""
    path.mkdir()
    faq = [{"question": row["text"], "answer": f"Answer {intents[row['label']]}"} for row in rows]
    (path / "faq.jsonl").write_text("\n".join(map(json.dumps, faq)), encoding="utf-8")
    build_index(path / "index", [path / "faq.jsonl"], encoder=encoder)
    return open_index(path / "index", encoder=encoder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where qa/ and classification/ are")
    parser.add_argument("--quick", action="store_true", help="a part of each set; nothing is written")
    parser.add_argument("--encoder", default="auto")
    parser.add_argument("--model", help="a language model that answers, too")
    parser.add_argument("--answers", type=int, default=100, help="how many questions the model answers")
    options = parser.parse_args()
    encoder = load_encoder(options.encoder)
    result: dict[str, Any] = {"benchmark": "retrieval", "encoder": name_encoder(encoder), "model": options.model}
    for name, path in SETS.items():
        every = read(options.folder / path)
        # CMRC 2018 has a few questions without a word.
        rows = [row for row in every if row["question"].strip()]
        empty = len(every) - len(rows)
        if options.quick:
            titles = sorted({row["title"] for row in rows})[:24]
            rows = [row for row in rows if row["title"] in titles]
        result[name] = {"questions_left_out_as_empty": empty, **run_documents(rows, encoder, options)}
        print(json.dumps({name: result[name]}), flush=True)
    train = read(options.folder / "classification/banking77_train.jsonl.gz")
    test = read(options.folder / "classification/banking77_test.jsonl")
    if options.quick:
        train, test = train[::20], test[::10]
    result["banking77"] = run_intents(train, test, encoder)
    if not options.quick:
        (HERE / "results" / "retrieval.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
