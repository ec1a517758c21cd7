"""Text that spells a control token of a model, said by somebody who is to control nothing."""

from __future__ import annotations

import re
from typing import Any

# Stands, between a template and the tokenizer, inside such a text: it is tokenised in two there, and so is a text.
MARK = "\uf8ff"


class Controls:
    """The control tokens of a tokenizer, and texts without them."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        texts = {one for one in (*added, *tokenizer.all_special_tokens) if len(one) > 1}
        self._pattern = re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or r"(?!)")

    def guard(self, text: str) -> tuple[str, int]:
        """The text with a mark inside each of them that it spells, and how many it does."""
        return self._pattern.subn(lambda one: one[0][0] + MARK + one[0][1:], text)

    def ids(self, text: str) -> list[int]:
        """The tokens of a text, in which a mark stands for nothing."""
        parts = (
            self._tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"] for part in text.split(MARK)
        )
        return [token for part in parts for token in part]

    def placed(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """The same, with the first character and the one after the last of each; marks count as characters."""
        ids, offsets, start = list[int](), list[tuple[int, int]](), 0
        for part in text.split(MARK):
            found = self._tokenizer(part, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            ids += found["input_ids"]
            offsets += [(start + first, start + last) for first, last in found["offset_mapping"]]
            start += len(part) + 1
        return ids, offsets
