"""llama.cpp on the requests of benchmarks/writing.py, in BF16, Q8_0 and Q4_0; runs in the peer's environment.

One JSON argument: `model` (a directory of transformers), `folder` for GGUF files, `asked` [[prompt, tokens], ...], `repeats`,
`threads`. Prompts are read as they fit into a batch, then all texts that are not finished go on together; greedy, by the
likeliest of llama.cpp's logits; end tokens are not looked at. Prints JSON: for each form many, alone and prefill in tokens a
second (medians, after four requests to warm up), peak_gb. With several repeats two sizes of a batch are
tried, the better is kept.
"""

from __future__ import annotations

import ctypes
import json
import resource
import statistics
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import gguf
import llama_cpp as llama
import numpy as np
from safetensors_read import read_tensors

TYPES = {
    "BF16": (gguf.GGMLQuantizationType.BF16, gguf.GGMLQuantizationType.BF16),
    "Q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q8_0),
    # llama.cpp keeps the output of a Q4_0 model in more bits too.
    "Q4_0": (gguf.GGMLQuantizationType.Q4_0, gguf.GGMLQuantizationType.Q8_0),
}
# (size of a batch, flash attention, one cache for all texts), of which the best for `many` is kept. One cache for all was
# slower by a quarter to two fifths, and flash attention was never slower.
SETTINGS = ((512, 1, False), (2048, 1, False))
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
}  # fmt: skip


def convert(model: Path, to: Path, form: str) -> None:
    """A model of random weights as GGUF: rotary rows are not reordered, which changes what it says and not how fast."""
    config = json.loads((model / "config.json").read_text())
    arch = "qwen3" if config["model_type"] == "qwen3" else "llama"
    heads = config["num_attention_heads"]
    size = config.get("head_dim") or config["hidden_size"] // heads
    writer = gguf.GGUFWriter(str(to), arch)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("llama")
    words = [f"w{at}".encode() for at in range(config["vocab_size"])]
    writer.add_token_list(words)
    writer.add_token_scores([0.0] * len(words))
    writer.add_token_types([1] * len(words))
    inner, outer = TYPES[form]
    for name, tensor in read_tensors(model):
        parts = name.removesuffix(".weight").split(".")
        if name == "model.embed_tokens.weight":
            made, kind = "token_embd.weight", outer
        elif name == "lm_head.weight":
            made, kind = "output.weight", outer
        elif name == "model.norm.weight":
            made, kind = "output_norm.weight", inner
        else:
            made, kind = f"blk.{parts[2]}.{NAMES['.'.join(parts[3:])]}.weight", inner
        if tensor.ndim == 1:
            writer.add_tensor(made, tensor.astype(np.float32))
        else:
            data = gguf.quants.quantize(tensor.astype(np.float32), kind)
            writer.add_tensor(made, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Running:
    """A loaded model with room for `texts` at once."""

    def __init__(self, path: Path, longest: int, texts: int, batch: int, flash: int, unified: bool, threads: int):
        settings = llama.llama_model_default_params()
        self.model = llama.llama_model_load_from_file(str(path).encode(), settings)
        context = llama.llama_context_default_params()
        context.n_batch, context.n_ubatch, context.n_seq_max = batch, min(batch, 512), texts
        # Shared out evenly where each text has a cache of its own, of which one must hold the longest.
        context.n_ctx = texts * (-(-longest // 256) * 256)
        context.n_threads = context.n_threads_batch = threads
        context.flash_attn_type, context.kv_unified = flash, unified
        self.context = llama.llama_init_from_model(self.model, context)
        assert self.context, "llama.cpp made no context"
        self.batch = llama.llama_batch_init(batch, 0, texts)
        self.most = batch
        self.width = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self.model))

    def read(self, rows: Iterable[tuple[int, int, int, bool]]) -> list[int]:
        """Decode (token, place, text, wanted) rows, and give the likeliest token after each that is wanted."""
        wanted = []
        for at, (token, place, text, want) in enumerate(rows):
            self.batch.token[at], self.batch.pos[at], self.batch.n_seq_id[at] = token, place, 1
            self.batch.seq_id[at][0], self.batch.logits[at] = text, want
            if want:
                wanted.append(at)
            self.batch.n_tokens = at + 1
        if llama.llama_decode(self.context, self.batch):
            raise SystemExit("llama_decode failed")
        found = []
        for at in wanted:
            logits = llama.llama_get_logits_ith(self.context, at)
            found.append(int(np.ctypeslib.as_array(logits, shape=(self.width,)).argmax()))
        return found

    def write(self, asked: list[tuple[list[int], int]]) -> tuple[float, float]:
        """Seconds until all prompts are read, and until all is written."""
        llama.llama_memory_clear(llama.llama_get_memory(self.context), True)
        started = time.perf_counter()
        rows = [
            (token, place, text, place == len(prompt) - 1)
            for text, (prompt, _) in enumerate(asked)
            for place, token in enumerate(prompt)
        ]
        last: dict[int, int] = {}
        for start in range(0, len(rows), self.most):
            part = rows[start : start + self.most]
            last.update(zip([text for _, _, text, want in part if want], self.read(part)))
        begun = time.perf_counter() - started
        written = dict.fromkeys(last, 1)
        while going := [text for text in last if written[text] < asked[text][1]]:
            step = [(last[text], len(asked[text][0]) + written[text] - 1, text, True) for text in going]
            for text, token in zip(going, self.read(step)):
                last[text] = token
                written[text] += 1
        return begun, time.perf_counter() - started

    def close(self) -> None:
        llama.llama_batch_free(self.batch)
        llama.llama_free(self.context)
        llama.llama_model_free(self.model)


def main() -> None:
    options: dict[str, Any] = json.loads(sys.argv[1])
    silent = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *given: None)
    llama.llama_log_set(silent, ctypes.c_void_p())
    llama.llama_backend_init()
    asked = [(list(prompt), int(room)) for prompt, room in options["asked"]]
    ids = [token for prompt, _ in asked for token in prompt]
    alone, long = [(ids[:128], 128)], [(ids[:1024], 1)]
    # The longest first: a text that ends leaves no gap among those that go on.
    asked.sort(key=lambda one: -one[1])
    longest, wanted = max(len(prompt) + room for prompt, room in asked), sum(room for _, room in asked)
    found: dict[str, Any] = {"version": llama.__version__}
    for form in TYPES:
        path = Path(options["folder"]) / f"{Path(options['model']).name}-{form}.gguf"
        if not path.exists():
            convert(Path(options["model"]), path, form)
        best, kept = 0.0, SETTINGS[0]
        for settings in SETTINGS if options["repeats"] > 1 else ():
            running = Running(path, longest, len(asked), *settings, options["threads"])
            running.write(asked[-4:])
            rate = wanted / running.write(asked)[1]
            running.close()
            if rate > best:
                best, kept = rate, settings
        running = Running(path, longest, len(asked), *kept, options["threads"])
        single = Running(path, 1280, 1, *kept, options["threads"])
        rates: dict[str, list[float]] = {"many": [], "alone": [], "prefill": []}
        running.write(asked[-4:])
        single.write(long)
        for _ in range(options["repeats"]):
            rates["many"].append(wanted / running.write(asked)[1])
            begun, whole = single.write(alone)
            rates["alone"].append(127 / (whole - begun))
            rates["prefill"].append(1024 / single.write(long)[0])
        running.close()
        single.close()
        found[form] = {name: round(statistics.median(one), 1) for name, one in rates.items()}
        found[form] |= {"batch": kept[0], "flash": kept[1], "unified": kept[2]}
        print(form, found[form], file=sys.stderr, flush=True)
    found["peak_gb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
