"""Forms with a file in them, read as they come: the file goes to the disk, never as a whole into memory."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from fastapi import Request

from luthier.faces.server.refusals import Refusal

# Most bytes of a field that is no file.
FIELD = 4096
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Form:
    """The fields of a form, and the name of its file."""

    def __init__(self, path: Path):
        self.fields: dict[str, str] = {}
        self.filename: str | None = None
        self._path = path
        self._out: BinaryIO | None = None
        self._name, self._header, self._value = "", b"", b""
        self._disposition = b""
        self._held = bytearray()
        self.done = False

    def callbacks(self) -> dict[str, Any]:
        """For the parser, which calls these as it finds parts."""
        return {
            "on_part_begin": self._begin,
            "on_part_data": self._take,
            "on_part_end": self._end,
            "on_header_field": self._take_header,
            "on_header_value": self._take_value,
            "on_header_end": self._end_header,
            "on_headers_finished": self._open,
            "on_end": self._finish,
        }

    def close(self) -> None:
        if self._out is not None:
            self._out.close()

    def _begin(self) -> None:
        self._disposition, self._header, self._value = b"", b"", b""
        self._held.clear()

    def _take_header(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _take_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _end_header(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = self._value
        self._header, self._value = b"", b""

    def _open(self) -> None:
        from python_multipart.multipart import parse_options_header

        _, options = parse_options_header(self._disposition)
        self._name = options.get(b"name", b"").decode("utf-8", "replace")
        if b"filename" not in options:
            return
        if self._name != "file" or self.filename is not None:
            raise Refusal(400, "file: one file is taken, in the field 'file'", param="file")
        self.filename = options[b"filename"].decode("utf-8", "replace")
        self._out = open(self._path, "wb")  # noqa: SIM115

    def _take(self, data: bytes, start: int, end: int) -> None:
        if self._out is not None:
            self._out.write(data[start:end])
            return
        self._held += data[start:end]
        if self._name == "file":
            raise Refusal(400, "file: it has no filename; send it as a file, with one", param="file")
        if len(self._held) > FIELD:
            raise Refusal(400, f"{self._name}: is longer than {FIELD} bytes", param=self._name)

    def _end(self) -> None:
        if self._out is None:
            self.fields[self._name] = self._held.decode("utf-8", "replace")
            return
        self._out.flush()
        os.fsync(self._out.fileno())
        self._out.close()
        self._out = None

    def _finish(self) -> None:
        self.done = True


async def read_form(request: Request, path: Path) -> Form:
    """The form of a request, its file at `path`; whoever calls takes that away. Raises Refusal: no form, one that breaks off,
    and a disk that is full."""
    from python_multipart.exceptions import FormParserError
    from python_multipart.multipart import MultipartParser, parse_options_header

    kind, options = parse_options_header(request.headers.get("content-type"))
    if kind != b"multipart/form-data" or b"boundary" not in options:
        raise Refusal(400, "the body is no multipart/form-data; send the fields purpose and file")
    form = Form(path)
    try:
        parser = MultipartParser(options[b"boundary"], form.callbacks())  # type: ignore[arg-type]
        async for part in request.stream():
            parser.write(part)
        parser.finalize()
    except FormParserError as err:
        raise Refusal(400, f"the form cannot be read ({err})") from None
    except OSError as err:
        if err.errno not in FULL:
            raise
        raise full() from None
    finally:
        # What cannot be flushed to a full disk cannot be closed either.
        with suppress(OSError):
            form.close()
    if not form.done:
        raise Refusal(400, "the form breaks off before its end; send it again")
    return form


def full() -> Refusal:
    """There is no room for a file."""
    return Refusal(
        507, "the server's disk is full, so the file was not kept; delete files that are not needed, or make room",
        code="disk_full",
    )  # fmt: skip
