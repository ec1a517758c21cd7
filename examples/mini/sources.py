"""What mini reads: each source's file, licence, and how its rows become documents.

Only public-domain and permissively licensed texts. A reader yields documents; what it leaves out it counts in `dropped`.
"""

from __future__ import annotations

import gzip
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2.sandbox import ImmutableSandboxedEnvironment

DOCUMENT = 2000  # characters of one document, about
CONVERSATION = 4000  # characters of one rendered conversation, at most
TEMPLATE = Path(__file__).with_name("chat_template.jinja")


@dataclass(frozen=True, slots=True)
class Source:
    """One file of the data folder. `language` is en, zh, or en-zh.

    `share` of its documents are kept, and of these `held_out` are kept from training.
    """

    name: str
    file: str
    language: str
    licence: str
    attribution: str
    read: Callable[[Path, Counter[str]], Iterator[str]]
    chat: bool = False
    share: float = 1.0
    held_out: float = 0.02


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


# -- prose ------------------------------------------------------------------------------------------------------------


def read_book(path: Path, dropped: Counter[str]) -> Iterator[str]:
    """A Project Gutenberg book: its licence header and footer removed, hard-wrapped lines joined, paragraphs grouped."""
    with gzip.open(path, "rt", encoding="utf-8-sig") as file:
        text = file.read()
    begin = re.search(r"\*\*\* ?START OF[^*]*\*\*\*", text)
    end = re.search(r"\*\*\* ?END OF[^*]*\*\*\*", text)
    text = text[begin.end() if begin else 0 : end.start() if end else len(text)]
    blocks = re.split(r"\n\s*\n", text)
    # A table of contents is indented in every line; so are a few verses, whose line breaks are kept.
    paragraphs = [b if re.match(r"\s{2,}\S", b) else " ".join(b.split()) for b in map(str.rstrip, blocks)]
    yield from group([paragraph for paragraph in paragraphs if paragraph.strip()], "\n\n")


def read_play(path: Path, dropped: Counter[str]) -> Iterator[str]:
    """Verse: line breaks are part of the text; speeches are grouped."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        yield from group([speech.strip() for speech in file.read().split("\n\n") if speech.strip()], "\n\n")


def read_texts(path: Path, dropped: Counter[str]) -> Iterator[str]:
    """One document a row, without its blank lines; a long one is cut at line breaks.

    Quotation marks that were decoded as cp1252 are put right.
    """
    mended = {"â€œ": "“", "â€™": "’", "â€˜": "‘", "â€“": "–", "â€”": "—", "â€¦": "…", "â€": "”"}
    for row in read_rows(path):
        text = re.sub("|".join(mended), lambda match: mended[match[0]], row["text"].strip())
        yield from group([line for line in text.split("\n") if line.strip()], "\n")


def group(pieces: Iterable[str], separator: str, size: int = DOCUMENT) -> Iterator[str]:
    """Join consecutive pieces into documents of at most `size` characters; a longer piece is a document of its own."""
    document: list[str] = []
    length = 0
    for piece in pieces:
        if document and length + len(separator) + len(piece) > size:
            yield separator.join(document)
            document, length = [], 0
        length += len(piece) + (len(separator) if document else 0)
        document.append(piece)
    if document:
        yield separator.join(document)


# -- Chinese poems and sentence pairs ---------------------------------------------------------------------------------


def read_poems(path: Path, dropped: Counter[str]) -> Iterator[str]:
    """Poems under their title and author, a few to a document. A poem with lost characters (□) is dropped."""
    poems = []
    for row in read_rows(path):
        if re.search(r"[□\ufffd{}/\[\]A-Za-zЀ-ӿぁ-ヺ┾]", row["title"] + row["text"]):
            dropped["lost or foreign characters"] += 1
            continue
        poems.append(f"《{row['title']}》 {row['author']}\n{row['text'].strip()}")
    yield from group(poems, "\n\n", DOCUMENT // 4)


def read_sentences(path: Path, dropped: Counter[str]) -> Iterator[str]:
    """Sentence pairs, shuffled: two thirds as translation pairs, the rest as plain lines of one language."""
    rows = list(read_rows(path))
    random.Random(0).shuffle(rows)
    pairs, chinese = int(len(rows) * 0.66), int(len(rows) * 0.90)
    for n, part in enumerate(batches(rows[:pairs], 10)):
        first, second = ("en", "zh") if n % 2 else ("zh", "en")
        yield "\n\n".join(f"{row[first]}\n{row[second]}" for row in part)
    for part in batches(rows[pairs:chinese], 20):
        yield "\n".join(row["zh"] for row in part)
    for part in batches(rows[chinese:], 20):
        yield "\n".join(row["en"] for row in part)


def batches(rows: list[dict[str, str]], size: int) -> Iterator[list[dict[str, str]]]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


# -- conversations ----------------------------------------------------------------------------------------------------

Message = dict[str, Any]


def render_chat(messages: list[Message], tools: list[dict[str, Any]] | None = None) -> str:
    """A conversation by mini's chat template, without the last `<|end|>`: every document is followed by one anyway."""
    return _TEMPLATE.render(messages=messages, tools=tools).removesuffix("<|end|>\n")


def _refuse(message: str) -> None:
    raise ValueError(message)


_ENVIRONMENT = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
_ENVIRONMENT.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
_ENVIRONMENT.globals["raise_exception"] = _refuse
_TEMPLATE = _ENVIRONMENT.from_string(TEMPLATE.read_text(encoding="utf-8"))


def fit_chat(
    messages: list[Message], dropped: Counter[str], tools: list[dict[str, Any]] | None = None
) -> Iterator[str]:
    """The conversation up to the last assistant turn that fits into CONVERSATION characters; none: dropped and counted."""
    last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=-1)
    while last >= 0:
        text = render_chat(messages[: last + 1], tools)
        if len(text) <= CONVERSATION:
            yield text
            return
        dropped["turns past the length limit"] += 1
        last = max((i for i in range(last) if messages[i]["role"] == "assistant"), default=-1)
    dropped["conversation too long"] += 1


def read_instructions(path: Path, dropped: Counter[str]) -> Iterator[str]:
    """Rows of instruction, input, and response or output. `{{name}}` and `{{author}}` of an identity set are filled in."""
    for row in read_rows(path):
        question = "\n".join(filter(None, (row["instruction"].strip(), row["input"].strip())))
        answer = (row.get("response") or row.get("output") or "").strip()
        answer = answer.replace("{{name}}", "Mini").replace("{{author}}", "Luthier")
        if not question or not answer:
            dropped["empty question or answer"] += 1
            continue
        yield from fit_chat([{"role": "user", "content": question}, {"role": "assistant", "content": answer}], dropped)


def read_problems(path: Path, dropped: Counter[str]) -> Iterator[str]:
    """GSM8K without its calculator annotations (<<48/2=24>>)."""
    for row in read_rows(path):
        answer = re.sub(r"<<[^>]*>>", "", row["answer"])
        yield from fit_chat(
            [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": answer}], dropped
        )


def read_conversations(path: Path, dropped: Counter[str]) -> Iterator[str]:
    """ShareGPT turns, with tools where the row lists some; the chosen answer of a preference row closes the conversation."""
    roles = {"human": "user", "gpt": "assistant", "observation": "tool", "system": "system"}
    for row in read_rows(path):
        turns = row["conversations"] + ([row["chosen"]] if "chosen" in row else [])
        messages: list[Message] = []
        for turn in turns:
            if turn["from"] == "function_call":
                calls = json.loads(turn["value"])
                calls = calls if isinstance(calls, list) else [calls]
                messages.append({"role": "assistant", "content": "", "tool_calls": calls})
            else:
                messages.append({"role": roles[turn["from"]], "content": turn["value"].strip()})
        tools = row.get("tools") or None
        yield from fit_chat(messages, dropped, json.loads(tools) if isinstance(tools, str) else tools)


GUTENBERG = "Project Gutenberg text, its header and footer removed"
GLAIVE = "Glaive function calling, glaiveai, by way of LLaMA-Factory"
GPTEACHER = "GPTeacher, Teknium"
POETRY = "chinese-poetry (github.com/chinese-poetry/chinese-poetry)"
DPO = "DPO-En-Zh-20k, LLaMA-Factory"
SOURCES = (
    Source("war_and_peace", "lm_corpora/war_and_peace_en.txt.gz", "en", "public domain", GUTENBERG, read_book),
    Source("grimms", "lm_corpora/grimms_fairy_tales.txt.gz", "en", "public domain", GUTENBERG, read_book),
    Source("sherlock", "lm_corpora/sherlock_holmes.txt.gz", "en", "public domain", GUTENBERG, read_book),
    Source(
        "shakespeare", "lm_corpora/tinyshakespeare.txt.gz", "en", "public domain", "A. Karpathy's selection", read_play
    ),
    Source(
        "tinystories", "lm_corpora/tinystories_sample.jsonl.gz", "en", "CDLA-Sharing-1.0", "R. Eldan, Y. Li", read_texts
    ),
    Source(
        "c4", "lm_corpora/c4_demo.jsonl.gz", "en", "ODC-BY 1.0", "C4, Allen Institute for AI; Common Crawl", read_texts
    ),
    Source("tang", "lm_corpora/zh_tang_poems.jsonl.gz", "zh", "public domain, MIT", POETRY, read_poems),
    Source("song", "lm_corpora/zh_song_ci.jsonl.gz", "zh", "public domain, MIT", POETRY, read_poems),
    Source(
        "tatoeba",
        "translation/tatoeba_en_zh.jsonl.gz",
        "en-zh",
        "CC BY 2.0 FR",
        "Tatoeba (tatoeba.org)",
        read_sentences,
        held_out=0.10,  # of its plain lines; they are the modern Chinese of the held-out text
    ),
    Source("roleplay", "instruction/gpteacher_roleplay.jsonl.gz", "en", "MIT", GPTEACHER, read_instructions, True),
    Source(
        "toolformer", "instruction/gpteacher_toolformer.jsonl.gz", "en", "MIT", GPTEACHER, read_instructions, True, 0.4
    ),
    Source("identity", "instruction/identity.jsonl", "en", "Apache-2.0", "LLaMA-Factory", read_instructions, True),
    Source("gsm8k", "qa/gsm8k_train.jsonl.gz", "en", "MIT", "GSM8K, OpenAI", read_problems, True, 0.2),
    Source(
        "glaive_en",
        "instruction/glaive_toolcall_en_demo.jsonl.gz",
        "en",
        "Apache-2.0",
        GLAIVE,
        read_conversations,
        True,
    ),
    Source(
        "glaive_zh",
        "instruction/glaive_toolcall_zh_demo.jsonl.gz",
        "zh",
        "Apache-2.0",
        GLAIVE,
        read_conversations,
        True,
    ),
    Source("dpo_en", "preference/dpo_en_demo.jsonl.gz", "en", "Apache-2.0", DPO, read_conversations, True),
    Source("dpo_zh", "preference/dpo_zh_demo.jsonl.gz", "zh", "Apache-2.0", DPO, read_conversations, True),
)
