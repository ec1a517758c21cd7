"""Train a byte-level BPE tokenizer and save it so that transformers loads it with no code of ours.

Byte-pair encoding: Sennrich et al. 2016 (arXiv:1508.07909). Byte level, so that no text is out of vocabulary: Radford et al.
2019 (GPT-2). The text is first cut into words by a regular expression, and no merge crosses a cut.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from luthier.core.errors import ConfigError, DataError

# In the manner of GPT-4's pre-tokeniser, with two differences. A digit always stands alone: a small model learns carrying from
# place value, and 1,110 entries are not spent on the numbers below 1,000. Chinese characters run apart from other letters, so
# that no merge joins the two scripts in a mixed line.
WORDS = "|".join(
    (
        r"(?i:['’](?:s|t|re|ve|m|ll|d))(?![\p{L}\p{M}])",  # English contractions
        r"\p{Han}+",
        r" ?[[\p{L}\p{M}]&&[^\p{Han}]]+",  # a word with the space before it
        r" ?\p{N}",
        r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*",  # punctuation, symbols, emoji, and the line break after them
        r"\s*[\r\n]+",
        r"\s+(?!\S)",  # all but the last of several spaces: the last belongs to the next word
        r"\s+",
    )
)
BYTES = 256


def train_bpe(texts: Iterable[str], vocab_size: int, special_tokens: Sequence[str]) -> Tokenizer:
    """Train a byte-level BPE of exactly `vocab_size` entries: `special_tokens` (ids 0, 1, ...), the 256 bytes, then the merges.

    `decode(encode(text).ids, skip_special_tokens=False)` gives back any `text` that UTF-8 can encode, for nothing is
    normalised. Special tokens inside `texts` are cut out before counting, so that no merge is spent on their letters.

    Raises ConfigError when `vocab_size` has no room for the bytes and the special tokens, or a special token is empty or
    given twice, and DataError when the texts hold too few repeated words for `vocab_size` entries.
    """
    if not all(special_tokens) or len(set(special_tokens)) != len(special_tokens):
        raise ConfigError(f"special_tokens holds an empty or a repeated token: {list(special_tokens)}")
    least = BYTES + len(special_tokens)
    if vocab_size < least:
        raise ConfigError(
            f"vocab_size={vocab_size} is too small: the {BYTES} bytes and {len(special_tokens)} special tokens need {least}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in special_tokens],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_without(special_tokens, texts), trainer)
    found = tokenizer.get_vocab_size()
    if found != vocab_size:
        raise DataError(
            f"the texts give only {found} entries (a merge needs a pair seen twice) of vocab_size={vocab_size}: "
            f"add text or set vocab_size={found}"
        )
    return tokenizer


def save_tokenizer(
    tokenizer: Tokenizer,
    directory: str | Path,
    *,
    chat_template: str,
    pad_token: str,
    eos_token: str,
    bos_token: str | None = None,
    additional_special_tokens: Sequence[str] = (),
    model_max_length: int | None = None,
) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`, which `AutoTokenizer.from_pretrained(directory)` loads offline.

    `chat_template` is a Jinja template in the convention of transformers. `model_max_length` is in tokens.

    Raises ConfigError when a special token is not in the vocabulary, or padding would be the same token as end of sequence
    (a model so trained cannot learn to stop, for padding carries no loss).
    """
    named: Mapping[str, str | None] = {"pad_token": pad_token, "eos_token": eos_token, "bos_token": bos_token}
    for name, token in [*named.items(), *(("additional_special_tokens", token) for token in additional_special_tokens)]:
        if token is not None and tokenizer.token_to_id(token) is None:
            raise ConfigError(f"{name}: {token!r} is not in the vocabulary; name it in special_tokens when training")
    if pad_token == eos_token:
        raise ConfigError(f"pad_token and eos_token are both {pad_token!r}; give padding a token of its own")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings: dict[str, object] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{name: token for name, token in named.items() if token is not None},
        "additional_special_tokens": list(additional_special_tokens),
        "clean_up_tokenization_spaces": False,
        "chat_template": chat_template,
    }
    if model_max_length is not None:
        settings["model_max_length"] = model_max_length
    text = json.dumps(settings, ensure_ascii=False, indent=2) + "\n"
    (directory / "tokenizer_config.json").write_text(text, encoding="utf-8")


def _without(special_tokens: Sequence[str], texts: Iterable[str]) -> Iterator[str]:
    """The pieces of the texts between special tokens. (`train_from_iterator` itself would count them as plain text.)"""
    if not special_tokens:
        yield from texts
        return
    special = re.compile("|".join(map(re.escape, sorted(special_tokens, key=len, reverse=True))))
    for text in texts:
        yield from filter(None, special.split(text))
