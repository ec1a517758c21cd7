"""The C of decoder.c: its library, and the structures that a step is told by."""

from __future__ import annotations

import ctypes
import weakref
from functools import cache
from typing import Any

from luthier.native.build import NoLibrary, load_library
from luthier.native.shape import PRODUCTS

# Tokens of a block of keys and values (TOKENS in the C files), and what rows are filled up to: the most numbers that any
# processor works on at once (LANE there).
TOKENS, LANE = 32, 16
LONG, FLOAT, POINTER = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p


class CNorm(ctypes.Structure):
    _fields_ = (("kind", LONG), ("eps", FLOAT), ("weight", POINTER), ("bias", POINTER))


class CProduct(ctypes.Structure):
    _fields_ = (("n", LONG), ("k", LONG), ("bits", LONG),
                ("weight", POINTER), ("scale", POINTER), ("scales", POINTER), ("bias", POINTER))  # fmt: skip


class CLow(ctypes.Structure):
    _fields_ = (("from", LONG), ("to", LONG), ("rank", LONG), ("a", POINTER), ("b", POINTER))


class CLowSet(ctypes.Structure):
    _fields_ = (("parts", LONG), ("part", CLow * 3))


class CLayer(ctypes.Structure):
    _fields_ = (
        *((name, CNorm) for name in ("before_attention", "query", "key", "after_attention", "before_mlp", "after_mlp")),
        *((name, CProduct) for name in PRODUCTS),
        ("cosine", POINTER), ("sine", POINTER), ("window", LONG), ("keys", POINTER), ("values", POINTER),
        *((f"low_{name}", POINTER) for name in PRODUCTS),
    )  # fmt: skip


class CDecoder(ctypes.Structure):
    _fields_ = (
        *((name, LONG) for name in ("width", "heads", "kv", "size", "turned", "inner", "layers", "gated", "activation",
                                    "parallel", "kept")),
        *((name, FLOAT) for name in ("scale", "softcap", "residual", "embedding_scale")),
        ("embedding", POINTER), ("places", POINTER), ("last", CNorm), ("head", CProduct),
        ("head_scale", FLOAT), ("head_softcap", FLOAT), ("layer", ctypes.POINTER(CLayer)),
    )  # fmt: skip


class CStep(ctypes.Structure):
    _fields_ = (
        *((name, LONG) for name in ("count", "wanted", "threads", "low")),
        *(
            (name, POINTER)
            for name in ("ids", "places", "first", "tables", "rows", "logits", "best", "adapters", "states")
        ),
    )


@cache
def decoder_library() -> Any:
    """The compiled decoder.c, its functions told what they take. Raises NoLibrary."""
    library = load_library("decoder")
    library.take_pages.restype, library.take_pages.argtypes = POINTER, (ctypes.c_size_t,)
    library.give_pages.argtypes = (POINTER, ctypes.c_size_t)
    for name in ("pack_halves", "pack_bytes", "pack_nibbles"):
        getattr(library, name).argtypes = (POINTER, POINTER, LONG, LONG)
    library.pack_rounded.argtypes = (POINTER, POINTER, POINTER, *(LONG,) * 5)
    library.decoder_step.argtypes = (ctypes.POINTER(CDecoder), ctypes.POINTER(CStep))
    return library


@cache
def why_no_decoder() -> str | None:
    """Why no decoder can be packed here, as a sentence; None where it can."""
    try:
        decoder_library()
    except NoLibrary as why:
        return str(why)
    return None


def kernels() -> str:
    """By which instructions of this processor the decoder multiplies. Raises NoLibrary."""
    library = decoder_library()
    library.decoder_kernels.restype = ctypes.c_char_p
    return str(library.decoder_kernels().decode())


class Pages:
    """Memory in large pages, given back when nobody holds it."""

    def __init__(self, size: int):
        self.bytes = -(-size // 2**21) * 2**21
        self.at = decoder_library().take_pages(self.bytes)
        if not self.at:
            raise MemoryError(f"no memory for {self.bytes:,} bytes")
        weakref.finalize(self, decoder_library().give_pages, self.at, self.bytes)
