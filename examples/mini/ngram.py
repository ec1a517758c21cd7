"""An n-gram baseline: python examples/mini/ngram.py --corpus DIR --tokenizer DIR [--order 5] [--output FILE]

Interpolated modified Kneser-Ney (Chen and Goodman 1999, section 3) over the same tokens as mini's. Measures bits per UTF-8 byte
of the held-out documents: a network that does not beat this has learnt less than counting gives.

Each document is read by itself, after `order - 1` times `<|end|>`; with that, n-grams at its start need no special case.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from corpus import SPECIALS
from numpy.typing import NDArray
from tokenizer import read_texts
from tokenizers import Tokenizer

Ids = NDArray[np.int64]
Floats = NDArray[np.float64]
FALLBACK = (
    0.5,
    1.0,
    1.5,
)  # discounts where the counts of counts allow no estimate (unigrams of a BPE: hardly any is rare)


@dataclass(frozen=True, slots=True)
class Level:
    """The n-grams of one order. C contexts, N n-grams; an n-gram's key is its context's row times V plus its last token."""

    contexts_C: Ids  # packed, sorted
    totals_C: Floats  # sum of the counts after the context
    backoff_C: Floats  # weight of the next lower order
    keys_N: Ids  # sorted
    discounted_N: Floats  # count minus its discount
    discounts: tuple[float, float, float]
    estimated: bool  # False: FALLBACK


@dataclass(frozen=True, slots=True)
class NGram:
    order: int
    vocabulary: int
    levels: tuple[Level, ...]  # order 1 first


def windows(documents: list[list[int]], order: int, end: int) -> Ids:
    """(T, order): each token of each document, and the `end` after it, as the last column behind its context."""
    stream: list[int] = []
    starts: list[Ids] = []
    for ids in documents:
        starts.append(np.arange(len(stream), len(stream) + len(ids) + 1))
        stream += [end] * (order - 1) + ids + [end]
    return np.array(stream, dtype=np.int64)[np.concatenate(starts)[:, None] + np.arange(order)]


def pack(tokens_TK: Ids, vocabulary: int) -> Ids:
    """K tokens as one number in base V. Raises ValueError when that does not fit into 63 bits."""
    if vocabulary ** tokens_TK.shape[1] > 2**63:
        raise ValueError(f"{tokens_TK.shape[1]} tokens of a vocabulary of {vocabulary} do not fit: use a lower order")
    packed = np.zeros(len(tokens_TK), dtype=np.int64)
    for column in tokens_TK.T:
        packed = packed * vocabulary + column
    return packed


def estimate_discounts(counts: NDArray[np.int64]) -> tuple[tuple[float, float, float], bool]:
    """Discounts of the counts 1, 2, and 3 or more, and whether they could be estimated (equation 26 of the paper)."""
    n1, n2, n3, n4 = (int((counts == n).sum()) for n in (1, 2, 3, 4))
    if not (n1 and n2 and n3):
        return FALLBACK, False
    y = n1 / (n1 + 2 * n2)
    found = (1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3)
    return (found, True) if all(0 < d <= n for n, d in enumerate(found, 1)) else (FALLBACK, False)


def fit(documents: list[list[int]], order: int, vocabulary: int, end: int) -> NGram:
    """Count. The highest order has plain counts; a lower one counts the distinct tokens seen before the n-gram."""
    grams_TN = windows(documents, order, end)
    last_T = grams_TN[:, -1]
    levels: list[Level] = []
    occurrences = np.arange(len(grams_TN))  # the rows that count: all of them, then one for each longer n-gram
    for n in range(order, 0, -1):
        contexts_C, row_T = np.unique(pack(grams_TN[:, order - n : -1], vocabulary), return_inverse=True)
        keys_N, first_N, counts_N = np.unique(
            (row_T * vocabulary + last_T)[occurrences], return_index=True, return_counts=True
        )
        discounts, estimated = estimate_discounts(counts_N)
        discount_N = np.array((0.0, *discounts))[np.minimum(counts_N, 3)]
        context_N = keys_N // vocabulary
        totals_C = np.bincount(context_N, weights=counts_N, minlength=len(contexts_C))
        backoff_C = np.bincount(context_N, weights=discount_N, minlength=len(contexts_C)) / totals_C
        levels.append(Level(contexts_C, totals_C, backoff_C, keys_N, counts_N - discount_N, discounts, estimated))
        occurrences = occurrences[first_N]
    return NGram(order, vocabulary, tuple(reversed(levels)))


def probabilities(model: NGram, grams_TN: Ids) -> Floats:
    """(T,) probability of each window's last token after the tokens before it."""
    last_T = grams_TN[:, -1]
    p_T = np.full(len(grams_TN), 1 / model.vocabulary)
    for n, level in enumerate(model.levels, 1):
        packed_T = pack(grams_TN[:, model.order - n : -1], model.vocabulary)
        row_T, known_T = find(level.contexts_C, packed_T)
        key_T, seen_T = find(level.keys_N, row_T * model.vocabulary + last_T)
        higher_T = np.where(seen_T, level.discounted_N[key_T], 0.0) / level.totals_C[row_T]
        p_T = np.where(known_T, higher_T + level.backoff_C[row_T] * p_T, p_T)
    return p_T


def find(sorted_values: Ids, wanted: Ids) -> tuple[Ids, NDArray[np.bool_]]:
    """Position of each wanted value, and whether it is there at all."""
    position = np.minimum(np.searchsorted(sorted_values, wanted), len(sorted_values) - 1)
    return position, sorted_values[position] == wanted


def measure(model: NGram, rows: list[dict[str, str]], tokenizer: Tokenizer, end: int) -> dict[str, object]:
    """Bits per byte of the documents, with the 95 % bootstrap interval over documents, and for each source.

    `bits_per_byte` counts the document's tokens; `bits_per_byte_with_end` also the `<|end|>` that closes it.
    """
    documents = [tokenizer.encode(row["text"]).ids for row in rows]
    bits_T = -np.log2(probabilities(model, windows(documents, model.order, end)))
    lengths_D = np.array([len(ids) + 1 for ids in documents])
    stops_D = np.cumsum(lengths_D)
    with_end_D = np.add.reduceat(bits_T, stops_D - lengths_D)
    bits_D = with_end_D - bits_T[stops_D - 1]
    bytes_D = np.array([len(row["text"].encode()) for row in rows])
    draws = np.random.default_rng(0).integers(len(rows), size=(2000, len(rows)))
    low, high = np.quantile(bits_D[draws].sum(1) / bytes_D[draws].sum(1), (0.025, 0.975))
    source_D = np.array([row["source"] for row in rows])
    tokens = int(lengths_D.sum()) - len(rows)
    return {
        "documents": len(rows),
        "bytes": int(bytes_D.sum()),
        "tokens": tokens,
        "bits_per_byte": round(float(bits_D.sum() / bytes_D.sum()), 4),
        "interval_95": [round(float(low), 4), round(float(high), 4)],
        "bits_per_byte_with_end": round(float(with_end_D.sum() / bytes_D.sum()), 4),
        "perplexity_per_token": round(float(2 ** (bits_D.sum() / tokens)), 2),
        "by_source": {
            str(name): round(float(bits_D[source_D == name].sum() / bytes_D[source_D == name].sum()), 4)
            for name in np.unique(source_D)
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--order", type=int, default=5)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(options.tokenizer / "tokenizer.json"))
    end = tokenizer.token_to_id(SPECIALS[1])
    begun = time.perf_counter()
    documents = [tokenizer.encode(row["text"]).ids for row in read_texts(options.corpus / "train.jsonl.gz")]
    model = fit(documents, options.order, tokenizer.get_vocab_size(), end)
    result = {
        "order": options.order,
        "smoothing": "interpolated modified Kneser-Ney",
        "train_tokens": sum(map(len, documents)),
        "fit_seconds": round(time.perf_counter() - begun, 1),
        "n_grams": [len(level.keys_N) for level in model.levels],
        "discounts": [[round(d, 4) for d in level.discounts] for level in model.levels],
        "discounts_estimated": [level.estimated for level in model.levels],
        "held_out": {
            part: measure(model, read_texts(options.corpus / f"heldout_{part}.jsonl"), tokenizer, end)
            for part in ("en", "zh", "chat")
        },
    }
    text = json.dumps(result, indent=2)
    print(text)
    if options.output:
        options.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
