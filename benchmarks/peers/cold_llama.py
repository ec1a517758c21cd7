"""One token by llama.cpp in Q8_0 from a GGUF file: what benchmarks/cold.py runs beside ours, in the peer's environment.

Arguments: a directory of transformers, a GGUF file, and the prompt's ids as JSON. The file is written where it is not there yet.
The ids are given, so no tokenizer is read.
"""

import ctypes
import json
import os
import sys
from pathlib import Path

import llama_cpp as llama

model, path, prompt = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
if not path.exists():
    from writing_llama import convert

    convert(model, path, "Q8_0")
silent = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *given: None)
llama.llama_log_set(silent, ctypes.c_void_p())
found = llama.Llama(str(path), n_ctx=512, n_threads=len(os.sched_getaffinity(0)), verbose=False)
found.eval(prompt)
print(found.sample(temp=0.0))
