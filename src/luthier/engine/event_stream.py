"""Server-sent events, by the HTML standard (section 9.2.6), however the bytes are cut."""

from __future__ import annotations

from collections.abc import Iterable, Iterator


def read_data(chunks: Iterable[bytes]) -> Iterator[str]:
    """The data of each event that is whole. One that the end of the stream cuts short is left out, as the standard says."""
    held: list[str] = []
    for line in _lines(chunks):
        if not line:
            if held:
                yield "\n".join(held)
            held = []
            continue
        # A line that begins with a colon is a comment; names other than data say nothing of what was written.
        name, _, value = line.partition(b":")
        if name == b"data":
            held.append(value.removeprefix(b" ").decode("utf-8", errors="replace"))


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Whole lines, which end in CR LF, LF or CR; a byte order mark in front of the first is not part of it."""
    rest, first, after_cr = b"", True, False
    for chunk in chunks:
        if after_cr and chunk:
            # The line ended with the CR, whether or not its LF comes.
            chunk, after_cr = chunk.removeprefix(b"\n"), False
        rest += chunk
        after_cr = after_cr or rest.endswith(b"\r")
        *whole, rest = rest.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        for line in whole:
            yield line.removeprefix(b"\xef\xbb\xbf") if first else line
            first = False
