"""A source and a purpose to a model that is ready to learn or to answer."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    PreTrainedConfig,
)

from luthier.core.errors import ConfigError, ModelError
from luthier.core.events import Events
from luthier.core.types import Task
from luthier.models.adapters.peft_files import attach_adapter, read_adapter_config
from luthier.models.adapters.peft_methods import read as read_peft
from luthier.models.adapters.peft_methods import room_left
from luthier.models.facts import fingerprint, kind_of
from luthier.models.heads import Pooled
from luthier.models.lean import Undrawn
from luthier.models.origin import ask, base_of, find_origin, read_config, read_tokenizer
from luthier.models.parallel import check_device, check_shared, shared_out
from luthier.models.precision import cast_network, cast_weights
from luthier.models.purpose import add_head, begin_spec, check_task, choose_pooling, keeps_head
from luthier.models.quantised.linear import Form
from luthier.models.quantised.network import quantise
from luthier.models.rendering import checked_renderer
from luthier.models.sources import knock, lasting_name, resolve_source, settle
from luthier.models.spec import HEAD_FILE, NATURAL_TASK, Kind, LoadedModel, read_spec
from luthier.models.stored import fits_bfloat16

AUTO_CLASSES = {
    "causal": AutoModelForCausalLM,
    "masked": AutoModelForMaskedLM,
    "seq2seq": AutoModelForSeq2SeqLM,
    "classify": AutoModel,
    "regress": AutoModel,
}
DTYPES = {"auto": torch.float32, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(
    source: str,
    *,
    task: Task | None = None,
    labels: Sequence[str] = (),
    multi_label: bool = False,
    pooling: Literal["auto", "last", "mean", "first"] = "auto",
    template: str = "auto",
    max_length: int | None = None,
    truncate: bool = False,
    learn: Literal["all", "last"] = "all",
    dtype: str = "auto",
    device: str = "auto",
    from_scratch: bool = False,
    conversations: bool = False,
    quantize: Literal["auto", "none", "int8", "nf4"] = "auto",
    unquantised: bool = False,
    as_stored: bool = False,
    parts: int = 1,
    events: Events | None = None,
) -> LoadedModel:
    """Load `source` (a shipped name, run:<id>, a directory, a hub id) for `task`, in eval mode.

    `task` None: what it was saved for, else what its kind is made for. `labels` makes a classification head; the saved
    one is kept when its labels are the same, or when none are given. `dtype` auto is what the model was tuned in here,
    else float32, whatever the files hold. `from_scratch` takes the shape alone and draws the weights from torch's
    generator. `quantize` is the form in which the linear layers of the body are held; auto: as the adapter was tuned.
    `unquantised` leaves a base without an adapter as its files have it, for an adapter that reads it and quantises the rest.
    `as_stored` leaves a language model whose files hold nothing that bf16 would round in it, for who packs its weights
    (`LoadedModel.as_stored`).
    `parts` processes share its layers: each of them, in one group, makes this same call and gets its part (`models.parallel`).
    `conversations` asks for a chat template where the task alone would not: for reward models.

    On the device "meta" a model has its shape and no weights, and none are read; one with an adapter cannot be had so.
    A directory with a PEFT adapter loads its base first. Raises ModelError (not found, unreachable, damaged, an adapter
    for another base, text read otherwise than in its tuning), ConfigError (a task that the kind cannot do, a length
    beyond the context) and MissingExtra.
    """
    events = events or Events()
    source = settle(source)
    origin = find_origin(source)
    place, saved, adapter = origin.place, origin.saved, origin.adapter
    base, base_name, hub, config, kind = origin.base, origin.base_name, origin.hub, origin.config, origin.kind
    task = check_task(task or (saved.task if saved else NATURAL_TASK[kind]), kind, source)
    if dtype == "auto" and saved is not None:
        dtype = saved.precision
    if quantize == "auto":
        quantize = saved.quantize if saved is not None and adapter is not None else "none"
    elif quantize == "none" and saved is not None and saved.quantize != "none":
        events.choose(
            "base", "in full", f"the adapter was tuned over a base in {saved.quantize}, and its answers may differ"
        )
    config_dtype = getattr(config, "dtype", None)
    as_stored = as_stored and (dtype, adapter, quantize) == ("auto", None, "none") and task == "causal"
    as_stored = as_stored and kind == "decoder" and config_dtype == torch.bfloat16
    if as_stored and not ask(base, "weights", lambda: fits_bfloat16(base, hub)):
        as_stored = False
        events.choose("weights", "float32", "the files hold numbers that bfloat16 would round")
    if as_stored:
        dtype = "bfloat16"
    # What PiSSA leaves in the base is taken from it in full precision, and rounded or quantised after.
    pissa = saved is not None and (saved.adapter or {}).get("kind") == "pissa"
    late = pissa and dtype == "bfloat16" and quantize == "none"
    form: Form | None = quantize if quantize == "int8" or quantize == "nf4" else None
    # In the precision of the files, weights are read from the disk only when their layer is quantised.
    first = "float32" if late else dtype if quantize == "none" or from_scratch else "file"
    hollow = device == "meta"
    if parts > 1:
        whole = adapter is None and form is None and not hollow and not from_scratch
        check_shared(source, config, parts, writes=(kind, task) == ("decoder", "causal"), whole=whole)
        check_device(find_device(device))
    with torch.device("meta") if hollow else nullcontext():
        network = load_network(
            base, config, task, hub, dtype=first, from_scratch=from_scratch or hollow, parts=parts, events=events
        )
    if form is not None and not pissa and (adapter is not None or not unquantised):
        quantise(network, form, events)
        cast_network(network, DTYPES[dtype])
    tokenizer = read_tokenizer(origin)
    spec = begin_spec(origin, task, tokenizer, max_length).model_copy(
        update={
            "pooling": choose_pooling(pooling, saved, kind),
            "precision": "bfloat16" if dtype == "bfloat16" else "float32",
            "quantize": quantize,
        }
    )
    if parts == 1:  # else every part lies where it belongs
        network.to(find_device(device))
    found = fingerprint(network) if adapter is not None else None
    if saved is not None and adapter is not None and saved.base_fingerprint not in (None, found):
        raise ModelError(
            f"{source}: this adapter is for another base: it was trained on {saved.base} (fingerprint "
            f"{saved.base_fingerprint}), and {base_name} is now {found}; bring the old base back or tune again"
        )
    if adapter is not None and isinstance(place, Path):
        if adapter.get("peft_type") == "LORA":
            made_here = saved.adapter if saved else None
            settings = attach_adapter(
                network, place, adapter, base_name, tokenizer=tokenizer, events=events, saved=made_here, form=form
            )
            if form is not None and pissa:
                quantise(network, form, events)
                cast_network(network, DTYPES[dtype])
        else:
            settings = read_peft(network, spec, place, adapter)
        update: dict[str, Any] = {"adapter": settings, "base": lasting_name(base_name), "base_fingerprint": found}
        if adapter.get("peft_type") != "LORA":
            update["max_length"] = room_left(network, spec.max_length)
        spec = spec.model_copy(update=update)
    if len(tokenizer) > network.get_input_embeddings().weight.shape[0]:
        raise ModelError(
            f"{source}: the tokenizer has {len(tokenizer)} tokens but the model embeds "
            f"{network.get_input_embeddings().weight.shape[0]}; the two do not belong together"
        )
    module, spec = add_head(network, tokenizer, spec, saved, tuple(labels), multi_label)
    if isinstance(module, Pooled) and isinstance(place, Path) and keeps_head(spec, saved) and not hollow:
        module.head.load_state_dict(load_file(place / HEAD_FILE, device=str(find_device(device))))
    module.eval()
    spec, renderer = checked_renderer(
        place,
        tokenizer,
        spec,
        saved,
        template=template,
        truncate=truncate,
        learn=learn,
        events=events,
        conversations=conversations or (task == "regress" and spec.learned == "reward"),
    )
    loaded = LoadedModel(module, tokenizer, spec, renderer, as_stored=as_stored, parts=parts)
    if late:
        cast_weights(loaded, "bfloat16")
    return loaded


def is_whole(source: str) -> bool:
    """Whether `source` is a model by itself, and no adapter for another. Raises ModelError where it is not found."""
    place = resolve_source(source)
    return not isinstance(place, Path) or read_adapter_config(place) is None


def read_kind(source: str) -> Kind:
    """Decoder, encoder or encoder-decoder, from the config alone. Raises ModelError as `load_model` does."""
    place = resolve_source(source)
    saved = read_spec(place) if isinstance(place, Path) else None
    if saved is not None:
        return saved.kind
    adapter = read_adapter_config(place) if isinstance(place, Path) else None
    if adapter is not None:
        place = base_of(source, str(adapter.get("base_model_name_or_path") or ""))
    return kind_of(read_config(place, knock(place) if isinstance(place, str) else {}))


def load_network(
    place: Path | str,
    config: PreTrainedConfig,
    task: Task,
    hub: dict[str, Any],
    *,
    dtype: str,
    from_scratch: bool,
    parts: int = 1,
    events: Events,
) -> Any:
    """The transformers model for `task`, in `dtype` or as the "file" has it.

    Raises ModelError when weights below the head are missing or of other shapes.
    """
    if dtype not in (*DTYPES, "file"):
        raise ConfigError(f"dtype: {dtype!r} is not among {', '.join(DTYPES)}")
    factory = AUTO_CLASSES[task]
    if from_scratch:
        return ask(place, "model", lambda: factory.from_config(config, dtype=DTYPES[dtype]))  # type: ignore[no-untyped-call]
    if isinstance(place, Path) and not any((*place.glob("*.safetensors"), *place.glob("pytorch_model*.bin"))):
        raise ModelError(
            f"{place}: there is a config.json but no weights; ask for random ones with `from_scratch: true` "
            "(--from-scratch), or give the directory of a trained model"
        )
    held: Any = DTYPES.get(dtype, "auto")
    with Undrawn():
        network, info = ask(
            place,
            "weights",
            lambda: factory.from_pretrained(
                str(place), dtype=held, output_loading_info=True, **hub, **shared_out(parts)
            ),
        )
    below = network.base_model_prefix + "."
    missing = [name for name in sorted(info["missing_keys"]) if not _is_computed(network, name)]
    body = [
        name for name in missing if (name.startswith(below) or network.base_model is network) and "pooler." not in name
    ]
    if body or (missing and task in ("causal", "seq2seq")):
        lost = body or missing
        raise ModelError(
            f"{place}: {len(lost)} weights are missing from the files, {lost[0]} first; they are damaged or of another model"
        )
    if missing and task == "masked":
        events.warn(f"{place}: the files hold no head for filling in masked tokens, so it starts from random weights")
    return network


def _is_computed(network: nn.Module, name: str) -> bool:
    """Whether a weight is computed by its module and never saved (Marian's sinusoidal positions)."""
    owner: object = network
    for part in name.split(".")[:-1]:
        owner = getattr(owner, part, None)
    return "Sinusoidal" in type(owner).__name__


def find_device(asked: str) -> torch.device:
    """The device of that name; auto: a CUDA device where there is one. Raises ConfigError."""
    if asked == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(asked)
    except RuntimeError:
        raise ConfigError(f"device: {asked!r} is no device; use auto, cpu, or cuda") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device: {asked!r} is asked for, but this machine shows no CUDA device; use cpu")
    return device
