"""What an adapter adds to the linear layers of a base, read and checked in full, for texts that are written beside others.

From the files of PEFT (see peft_files.py for what is where), from the directory of a run, or from a model in memory that was
tuned. The base is only looked at. What cannot be added layer by layer (DoRA, learned embeddings, rows, heads) is refused: it
can be merged, and served as a model of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from luthier.core.errors import DataError, ModelError
from luthier.models.adapters.inject import LoraLinear, edge_layers, linear_layers, lora_layers, shape_of
from luthier.models.adapters.peft_files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    PREFIX,
    fill_in,
    look_up,
    read_adapter_config,
)
from luthier.models.adapters.principal import PissaLinear
from luthier.models.adapters.tokens import token_layers
from luthier.models.facts import base_fingerprint
from luthier.models.sources import resolve_source
from luthier.models.spec import LoadedModel, ModelSpec, read_spec
from luthier.text.golden import find_difference, make_golden, read_golden, render_again

MERGE = "which cannot be added beside the base; merge it (luthier merge) and serve it as a model of its own"
MATRICES = re.compile(r"(.+?)\.lora_([AB])\.weight")
# Ways of PEFT to begin that leave the base as it is.
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
# Settings under which more than matrices beside linear layers was learned.
BEYOND = {
    "use_dora": "learned magnitudes too (DoRA)",
    "modules_to_save": "learned whole modules too (modules_to_save)",
    "trainable_token_indices": "learned rows of the embedding too (trainable_token_indices)",
}


@dataclass(frozen=True, slots=True, eq=False)
class Addition:
    """Of one layer: scale x B A x, with A [rank, in] and B [out, rank] in fp32."""

    a_RI: Tensor
    b_OR: Tensor
    scale: float


class Line(NamedTuple):
    """What a report says of a layer."""

    module: str
    rank: int
    scale: float


@dataclass(frozen=True, slots=True, eq=False)
class Additions:
    """All that an adapter adds, by the names of the base's layers; `notes` are what is not as it was in its tuning."""

    source: str
    layers: Mapping[str, Addition]
    notes: tuple[str, ...] = ()

    @property
    def report(self) -> tuple[Line, ...]:
        """A line for each layer."""
        return tuple(Line(name, len(one.a_RI), one.scale) for name, one in self.layers.items())

    @property
    def parameters(self) -> int:
        """Numbers in all its matrices."""
        return sum(one.a_RI.numel() + one.b_OR.numel() for one in self.layers.values())


def read_additions(model: LoadedModel, source: str | Path | LoadedModel) -> Additions:
    """What the adapter at `source` (run:<id>, a directory, or a tuned model in memory) adds to `model`, which stays as it is.

    Raises ModelError with one sentence where anything is wrong: files that are missing or damaged, another base, layers,
    shapes or ranks that do not fit, layers left over or left out, numbers that are not finite, and what can only be merged.
    """
    if model.spec.adapter is not None or any(True for _ in lora_layers(model.network)):
        raise ModelError(
            f"{model.spec.source}: this model holds an adapter of its own, beside which no other can be added; load its base"
        )
    if model.spec.kind != "decoder":
        raise ModelError(
            f"{model.spec.source}: only texts of decoders are written with adapters beside their base, and this is an "
            f"{model.spec.kind}; serve the adapter as a model of its own"
        )
    if isinstance(source, LoadedModel):
        return _from_memory(model, source)
    place = resolve_source(str(source))
    if not isinstance(place, Path):
        raise ModelError(f"{source}: no such directory; an adapter is the directory that holds its {ADAPTER_CONFIG}")
    return _from_files(model, str(source), place)


def _from_files(model: LoadedModel, source: str, place: Path) -> Additions:
    settings, saved = read_adapter_config(place), read_spec(place)
    if settings is None:
        raise ModelError(f"{source}: there is no {ADAPTER_CONFIG}, so this is no adapter")
    _check_settings(source, settings)
    if saved is not None and saved.task != "causal":
        raise ModelError(f"{source}: this adapter is made to {saved.task}, and the base here writes text")
    settings, assumed = fill_in(settings)
    found = _sort(model, source, place, settings)
    layers = {name: _join(source, name, parts, settings) for name, parts in found.items()}
    _check_targets(model.network, source, settings, layers)
    _check_layers(model, source, layers)
    notes = [*assumed, _check_base(model, source, saved)]
    golden = read_golden(place)
    if golden is not None:
        try:
            notes.append(find_difference(render_again(model.renderer, golden), golden))
        except DataError as err:
            notes.append(str(err))
    else:
        notes.append(_foreign_template(model, place))
    return Additions(source, layers, _told(source, notes))


def _from_memory(model: LoadedModel, tuned: LoadedModel) -> Additions:
    source, spec = tuned.spec.source, tuned.spec
    if spec.adapter is None or spec.adapter.get("kind") == "peft":
        raise ModelError(f"{source}: this model in memory holds no LoRA adapter that could be added beside a base")
    if spec.task != "causal":
        raise ModelError(f"{source}: this adapter is made to {spec.task}, and the base here writes text")
    if spec.adapter.get("also") or any(True for _ in token_layers(tuned.network)):
        raise ModelError(f"{source}: the adapter learned whole modules or rows of the embedding too, {MERGE}")
    layers: dict[str, Addition] = {}
    edges = edge_layers(model.network)
    for name, layer in lora_layers(tuned.network):
        if name in edges:
            raise ModelError(f"{source}: the adapter adapts {name}, the embedding or the output layer, {MERGE}")
        assert isinstance(layer, LoraLinear)
        if isinstance(layer, PissaLinear):
            a_RI, b_OR = layer.difference()
        elif type(layer) is LoraLinear:
            a_RI, b_OR = layer.lora_a.detach(), layer.lora_b.detach()
        else:
            raise ModelError(f"{source}: the adapter learned magnitudes too (DoRA), {MERGE}")
        # Copies: it may go on learning.
        layers[name] = Addition(a_RI.float().clone(), b_OR.float().clone(), layer.scale)
    _check_layers(model, source, layers)
    notes = [
        _check_base(model, source, spec),
        find_difference(make_golden(model.renderer), make_golden(tuned.renderer)),
    ]
    return Additions(source, layers, _told(source, notes))


def _check_settings(source: str, settings: Mapping[str, Any]) -> None:
    """Raises ModelError for what is no LoRA, or more than that."""
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise ModelError(f"{source}: an adapter of the type {kind} is no low-rank one, {MERGE}")
    for name, what in BEYOND.items():
        if settings.get(name):
            raise ModelError(f"{source}: the adapter {what}, {MERGE}")
    if settings.get("bias", "none") != "none":
        raise ModelError(f"{source}: the adapter learned biases too (bias: {settings['bias']}), {MERGE}")
    start = settings.get("init_lora_weights")
    if start not in PLAIN_STARTS:
        raise ModelError(f"{source}: the adapter began by changing its base (init_lora_weights: {start}), {MERGE}")


def _sort(model: LoadedModel, source: str, place: Path, settings: Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
    """A and B by the names of the base's layers."""
    path = place / ADAPTER_WEIGHTS
    if not path.is_file():
        pickled = (place / "adapter_model.bin").is_file()
        other = "; pickled weights (.bin) are not read, save it again with peft" if pickled else ""
        raise ModelError(f"{source}: there is no {ADAPTER_WEIGHTS}, so the adapter is not whole{other}")
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as err:
        raise ModelError(f"{path}: cannot be read ({type(err).__name__}); the adapter is not whole") from None
    network = model.network
    linears, edges = linear_layers(network), edge_layers(network)
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = MATRICES.fullmatch(key.removeprefix(PREFIX))
        stated = match[1] if match is not None else key.removeprefix(PREFIX)
        names = list(_names(network, stated))
        if match is None or any(one in edges for one in names):
            raise ModelError(f"{source}: the adapter holds {key}, which is no matrix beside a linear layer, {MERGE}")
        name = next((one for one in names if one in linears), None)
        if name is None:
            raise ModelError(
                f"{source}: this adapter is for another base: {model.spec.source} has no linear layer {stated}"
            )
        found.setdefault(name, {})[match[2]] = tensor.float()
    if not found:
        raise ModelError(f"{path}: there is nothing in it; the adapter is not whole")
    return found


def _join(source: str, name: str, parts: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Addition:
    """The two matrices of a layer, and their scale. Raises ModelError where they do not fit each other or the settings."""
    if len(parts) < 2:
        raise ModelError(f"{source}: the layer {name} has one matrix of two; the adapter is not whole")
    a_RI, b_OR = parts["A"], parts["B"]
    stated = int(look_up(settings.get("rank_pattern"), name, settings["r"]))
    if a_RI.dim() != 2 or b_OR.dim() != 2 or len(a_RI) != b_OR.shape[1] or len(a_RI) != stated:
        raise ModelError(
            f"{source}: the matrices of {name} are {_shown(a_RI)} and {_shown(b_OR)}, and {ADAPTER_CONFIG} says rank "
            f"{stated}; the files do not belong together"
        )
    alpha = look_up(settings.get("alpha_pattern"), name, settings["lora_alpha"])
    return Addition(a_RI, b_OR, alpha / (stated**0.5 if settings.get("use_rslora") else stated))


def _check_targets(network: Any, source: str, settings: Mapping[str, Any], layers: Mapping[str, Addition]) -> None:
    """Raises ModelError where the layers in the files are not those that the settings name."""
    stated = settings.get("target_modules")
    if stated is None:
        # PEFT's own choice for the family, which it writes down as a rule.
        return
    linears = linear_layers(network)
    if not isinstance(stated, str):
        for one in stated:
            if not any(_ends(name, one) for other in linears for name in _names(network, other)):
                edge = any(_ends(name, one) for name in edge_layers(network))
                raise ModelError(
                    f"{source}: the adapter adapts {one}, the embedding or the output layer, {MERGE}"
                    if edge
                    else f"{source}: target_modules names {one!r}, and the base has no linear layer of that name"
                )
    meant = {name for name in linears if any(_is_target(one, settings) for one in _names(network, name))}
    missing, left = sorted(meant - layers.keys()), sorted(layers.keys() - meant)
    if missing:
        raise ModelError(
            f"{source}: {missing[0]} is among its target_modules and has no matrices in {ADAPTER_WEIGHTS}"
            f"{_more(missing)}; the adapter is not whole"
        )
    if left:
        raise ModelError(
            f"{source}: {ADAPTER_WEIGHTS} holds matrices for {left[0]}, which is not among its target_modules"
            f"{_more(left)}; the files do not belong together"
        )


def _is_target(name: str, settings: Mapping[str, Any]) -> bool:
    """PEFT's rule for which layers are adapted."""
    stated, out = settings["target_modules"], settings.get("exclude_modules") or []
    if re.fullmatch(out, name) if isinstance(out, str) else any(_ends(name, one) for one in out):
        return False
    if isinstance(stated, str):
        return stated == "all-linear" or re.fullmatch(stated, name) is not None
    if not any(_ends(name, one) for one in stated):
        return False
    numbers = settings.get("layers_to_transform")
    if numbers is None or numbers == []:
        return True
    patterns = settings.get("layers_pattern") or []
    patterns = [patterns] if isinstance(patterns, str) else patterns
    rules = [rf"(?:^|.*?\.){one}\.(\d+)\." for one in patterns] or [r".*?\.[^.]*\.(\d+)\."]
    match = next((found for rule in rules if (found := re.match(rule, name)) is not None), None)
    return match is not None and int(match[1]) in ([numbers] if isinstance(numbers, int) else numbers)


def _check_layers(model: LoadedModel, source: str, layers: Mapping[str, Addition]) -> None:
    """Raises ModelError for layers that are not the base's, of other shapes, and for numbers that are not finite."""
    linears = linear_layers(model.network)
    for name, one in layers.items():
        if name not in linears:
            raise ModelError(
                f"{source}: this adapter is for another base: {model.spec.source} has no linear layer {name}"
            )
        outputs, inputs = shape_of(linears[name])
        if one.a_RI.shape[1] != inputs or len(one.b_OR) != outputs:
            raise ModelError(
                f"{source}: this adapter is for another base: its layer {name} is {len(one.b_OR)} x {one.a_RI.shape[1]}, "
                f"and that of {model.spec.source} is {outputs} x {inputs}"
            )
        if not (bool(torch.isfinite(one.a_RI).all()) and bool(torch.isfinite(one.b_OR).all())):
            raise ModelError(f"{source}: the matrices of {name} hold numbers that are not finite; tune it again")


def _check_base(model: LoadedModel, source: str, saved: ModelSpec | None) -> str | None:
    """What cannot be said of the base. Raises ModelError for another one."""
    found = base_fingerprint(model)
    if saved is None or saved.base_fingerprint is None:
        return f"nothing says which weights its base had, so whether {model.spec.source} is that base is not known"
    if saved.base_fingerprint != found:
        raise ModelError(
            f"{source}: this adapter is for another base: it was trained on {saved.base} (fingerprint "
            f"{saved.base_fingerprint}), and {model.spec.source} is {found}; bring the old base back or tune again"
        )
    return None


def _foreign_template(model: LoadedModel, place: Path) -> str | None:
    """What of the chat template that lies beside an adapter is not the base's."""
    from transformers import PreTrainedTokenizerFast

    own = None
    if (place / "chat_template.jinja").is_file():
        own = (place / "chat_template.jinja").read_text(encoding="utf-8")
    elif (place / "tokenizer.json").is_file():
        own = PreTrainedTokenizerFast.from_pretrained(str(place)).chat_template
    held = model.renderer.template
    if own and (held is None or held.source != own):
        return "the chat template beside it is not the one that the base is asked with here"
    return None


def _names(network: Any, stated: str) -> Iterable[str]:
    """As a layer may be called: with or without the body's prefix, as it was trained for another task."""
    prefix = network.base_model_prefix + "."
    return stated, stated.removeprefix(prefix), prefix + stated


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith("." + end)


def _told(source: str, notes: Iterable[str | None]) -> tuple[str, ...]:
    return tuple(f"{source}: {one}" for one in notes if one)


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _shown(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape))
