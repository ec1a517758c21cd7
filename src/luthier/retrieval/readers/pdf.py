"""PDF by its pages, with pypdf."""

from __future__ import annotations

import io
import logging
from pathlib import Path

from luthier.core.errors import DataError, MissingExtra
from luthier.core.events import Events
from luthier.retrieval.passage import Section


def read_pdf(path: Path, content: bytes, events: Events) -> list[Section]:
    """A section a page; pages without text (scanned ones) are counted. Raises DataError for a file that is damaged or
    encrypted, and MissingExtra where pypdf is not installed."""
    try:
        from pypdf import PdfReader
    except ImportError:
        raise MissingExtra("pypdf", "documents", f"{path}: reading PDF") from None
    # It logs each oddity of a file that it can read all the same.
    logging.getLogger("pypdf").setLevel(logging.CRITICAL)
    try:
        reader = PdfReader(io.BytesIO(content))
        locked = reader.is_encrypted and not reader.decrypt("")
        pages = [] if locked else [page.extract_text() for page in reader.pages]
    except Exception as err:  # pypdf raises its own errors, KeyError, RecursionError ... for what is damaged
        raise DataError(
            f"{path}: cannot be read as PDF ({type(err).__name__}); save it anew, or leave it out"
        ) from None
    if locked:
        raise DataError(f"{path}: the PDF is locked with a password; save it without, or leave it out")
    sections, start, empty = [], 0, 0
    for number, text in enumerate(pages, 1):
        if text.strip():
            sections.append(Section(text, start, page=number))
        else:
            empty += 1
        start += len(text) + 1
    if empty and sections:
        events.warn(f"{path.name}: pages hold no text (they may be pictures of text), and are left out", empty)
    return sections
