"""Which blocks of keys and values are whose: shared by texts that begin alike, and remembered after their end."""

from __future__ import annotations

import hashlib
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Sequence

from luthier.models.pages import BLOCK

Name = bytes


class Blocks:
    """A number of blocks of `size` tokens, those from 0 on or those of `numbers`. Each is held by so many texts; a full one that
    is held by none keeps its name, and can be found by a text that begins like the one it was of, until it is needed."""

    def __init__(self, count: int, numbers: Iterable[int] | None = None, *, size: int = BLOCK):
        self.count, self.size = count, size
        self._empty = deque(range(count) if numbers is None else numbers)
        self._holders = dict.fromkeys(self._empty, 0)
        self._names: dict[int, Name] = {}
        self._known: dict[Name, int] = {}
        self._adapters: dict[int, int] = {}
        """By whose adapter a block with a name was read."""
        self._idle: OrderedDict[int, None] = OrderedDict()
        """Held by none, with a name; longest unused first."""

    @property
    def tokens(self) -> int:
        """That all of them hold."""
        return self.count * self.size

    @property
    def free(self) -> int:
        """Blocks that can be taken."""
        return len(self._empty) + len(self._idle)

    @property
    def used(self) -> int:
        """Blocks that texts hold."""
        return self.count - self.free

    def take(self) -> int:
        """A block for one text. Raises IndexError where none is free."""
        if self._empty:
            block = self._empty.popleft()
        else:
            if not self._idle:
                raise IndexError("no block is free")
            block, _ = self._idle.popitem(last=False)
            self._unname(block)
        self._holders[block] = 1
        return block

    def share(self, block: int) -> int:
        """One text more holds it."""
        self._holders[block] += 1
        return block

    def drop(self, block: int) -> None:
        """One text less holds it."""
        self._holders[block] -= 1
        if self._holders[block]:
            return
        if block in self._names:
            self._idle[block] = None
        else:
            self._empty.append(block)

    def find(self, name: Name) -> int | None:
        """The block of that name, for one text more."""
        block = self._known.get(name)
        if block is None:
            return None
        self._idle.pop(block, None)
        self._holders[block] += 1
        return block

    def knows(self, name: Name) -> bool:
        """Whether a block has that name."""
        return name in self._known

    def name(self, block: int, name: Name, adapter: int = -1) -> None:
        """What a full block holds, as it was read with that adapter; the first of a name keeps it."""
        if name not in self._known and block not in self._names:
            self._known[name] = block
            self._names[block] = name
            self._adapters[block] = adapter

    def forget(self, adapter: int) -> None:
        """No text begins with what was read with that adapter any more."""
        for block in [one for one, whose in self._adapters.items() if whose == adapter]:
            self._unname(block)
            if block in self._idle:
                del self._idle[block]
                self._empty.append(block)

    def _unname(self, block: int) -> None:
        del self._known[self._names.pop(block)], self._adapters[block]


def names_of(ids: Sequence[int], salt: str, size: int = BLOCK) -> Iterator[Name]:
    """The name of each full block of `size` tokens of a text: by its tokens, all before them, and `salt`."""
    before = hashlib.blake2b(salt.encode(), digest_size=16).digest()
    for start in range(0, len(ids) - len(ids) % size, size):
        tokens = b"".join(token.to_bytes(4, "little") for token in ids[start : start + size])
        before = hashlib.blake2b(before + tokens, digest_size=16).digest()
        yield before
