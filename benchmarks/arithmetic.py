"""The most that this processor multiplies in a second, from registers alone: what a share of the arithmetic limit is of.

    python benchmarks/arithmetic.py

Prints the multiply-adds a second of all threads together in int8 (VNNI), bf16 and fp32, of AVX-512 where it is there and AVX2
else; a form that the processor lacks is left out. Compiled with `cc`; other benchmarks take `peaks` from here.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

# Twelve sums that do not wait for each other fill the pipelines of every unit there is.
SOURCE = """
#include <immintrin.h>
#define ALL(step) step(0) step(1) step(2) step(3) step(4) step(5) step(6) step(7) step(8) step(9) step(10) step(11)
#define LOOP(type, zero, product, total)                                  \\
    type s[12];                                                           \\
    for (int n = 0; n < 12; n++) s[n] = zero;                             \\
    for (long at = 0; at < times; at++) {                                 \\
        ALL(product)                                                      \\
        __asm__ volatile("" : "+v"(a), "+v"(b));                          \\
    }                                                                     \\
    for (int n = 1; n < 12; n++) s[0] = total(s[0], s[n]);
#ifdef __AVX512VNNI__
#define INT8(n) s[n] = _mm512_dpbusd_epi32(s[n], a, b);
int int8(long times) {
    __m512i a = _mm512_set1_epi8(1), b = a;
    LOOP(__m512i, _mm512_setzero_si512(), INT8, _mm512_add_epi32)
    return _mm512_reduce_add_epi32(s[0]);
}
#endif
#ifdef __AVX512BF16__
#define BF16(n) s[n] = _mm512_dpbf16_ps(s[n], (__m512bh)a, (__m512bh)b);
int bf16(long times) {
    __m512i a = _mm512_set1_epi16(0x3f80), b = a;
    LOOP(__m512, _mm512_setzero_ps(), BF16, _mm512_add_ps)
    return (int)_mm512_reduce_add_ps(s[0]);
}
#endif
#ifdef __AVX512F__
#define FP32(n) s[n] = _mm512_fmadd_ps(a, b, s[n]);
int fp32(long times) {
    __m512 a = _mm512_set1_ps(1), b = a;
    LOOP(__m512, _mm512_setzero_ps(), FP32, _mm512_add_ps)
    return (int)_mm512_reduce_add_ps(s[0]);
}
#endif
"""
# Multiply-adds of one instruction.
FORMS = {"int8": 64, "bf16": 32, "fp32": 16}
TIMES = 30_000_000


def peaks() -> dict[str, float]:
    """Multiply-adds a second, by form: the best of three."""
    with tempfile.TemporaryDirectory() as folder:
        source, built = Path(folder) / "peak.c", Path(folder) / "peak.so"
        source.write_text(SOURCE)
        subprocess.run(["cc", "-O2", "-march=native", "-shared", "-fPIC", str(source), "-o", str(built)], check=True)
        library = ctypes.CDLL(str(built))
        return {form: max(_rate(library, form) for _ in range(3)) for form in FORMS if hasattr(library, form)}


def _rate(library: ctypes.CDLL, form: str) -> float:
    work, threads = getattr(library, form), torch.get_num_threads()
    work.argtypes = [ctypes.c_long]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, [1000] * threads))
        started = time.perf_counter()
        list(pool.map(work, [TIMES] * threads))
        return threads * TIMES * 12 * FORMS[form] / (time.perf_counter() - started)


if __name__ == "__main__":
    print(json.dumps({"benchmark": "arithmetic", "unit": "1e9 multiply-adds/s", "threads": torch.get_num_threads(),
                      **{form: round(rate / 1e9) for form, rate in peaks().items()}}))  # fmt: skip
