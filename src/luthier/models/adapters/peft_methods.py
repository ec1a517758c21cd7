"""The methods of the PEFT library put into a loaded model, written and read in its own format."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers.pytorch_utils import Conv1D

from luthier.core.errors import ConfigError, MissingExtra, ModelError, did_you_mean
from luthier.models.adapters.inject import linear_layers
from luthier.models.adapters.peft_files import ADAPTER_WEIGHTS, PREFIX
from luthier.models.adapters.peft_write import TASK_TYPES
from luthier.models.facts import context_of
from luthier.models.quiet import quiet
from luthier.models.virtual import VirtualEmbedding, add_prefix, add_virtual_tokens, reader

if TYPE_CHECKING:
    from luthier.models.spec import LoadedModel, ModelSpec

# Names that the papers and users give to methods, and PEFT's own.
ALIASES = {
    "prompt": "prompt_tuning",
    "prefix": "prefix_tuning",
    "p-tuning": "p_tuning",
    "ptuning": "p_tuning",
    "bone": "miss",
}
VIRTUAL = ("prompt_tuning", "p_tuning")
# What PEFT's own model does around the network, or asks of the loop, which a tuning here does not do.
REFUSED = {
    "lora": "is the adapter kind 'lora' here",
    "adalora": "moves its ranks between steps by a schedule of its own; lora with a higher rank is the nearest",
    "multitask_prompt_tuning": "needs a task number with every row; prompt_tuning learns one task",
    "poly": "needs a task number with every row",
    "xlora": "mixes several finished adapters",
    "cpt": "has a loss of its own; prompt_tuning is the nearest",
    "cartridge": "is distilled from a long text, not tuned on rows; prefix_tuning is the nearest",
    "adaption_prompt": "changes the attention of one family; prefix_tuning is the nearest",
    "shadow": "runs a second network beside the model",
    "adamss": "chooses its layers' parts anew at every load, so its files do not come back",
    "frod": "computes its matrices from the base anew at every load, so they depend on the precision of that",
    "trainable_tokens": "learns rows of the embedding, which prompt_tuning does without changing the vocabulary",
    "osf": "replaces the base's own weights, and projects their gradients",
}
# Settings of a method that are the model's or the file's, and not the user's.
OURS = (
    "peft_type",
    "task_type",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "auto_mapping",
    "peft_version",
)
# Under this name PEFT keeps the adapter.
NAME = "default"


def config_class(method: str) -> Any:
    """The settings class of a method. Raises MissingExtra, and ConfigError for one that is unknown or cannot be tuned here."""
    try:
        from peft import mapping
    except ImportError:
        raise MissingExtra("peft", "peft", f"adapter 'peft' with the method {method!r}") from None
    known = {kind.value.lower(): made for kind, made in mapping.PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    name = ALIASES.get(method, method)
    if name in REFUSED:
        raise ConfigError(f"adapter.method: {method} {REFUSED[name]}, so it cannot be used through adapter 'peft'")
    if name not in known:
        fitting = sorted((known.keys() | ALIASES.keys()) - REFUSED.keys())
        raise ConfigError(f"adapter.method: PEFT knows no method {method!r}; {did_you_mean(method, fitting)}")
    return known[name]


def make_config(method: str, options: Mapping[str, Any], **given: Any) -> Any:
    """PEFT's settings for a method. Raises ConfigError for an option that the method does not have or refuses."""
    made = config_class(method)
    names = {field.name for field in dataclasses.fields(made) if field.init} - set(OURS)
    for name in options:
        if name not in names:
            raise ConfigError(f"adapter.options: {method} has no option {name!r}; {did_you_mean(name, names)}")
    try:
        with _hushed():
            return made(**options, **given)
    except (TypeError, ValueError, KeyError) as err:
        raise ConfigError(f"adapter.options: {method} does not take these options: {_first_line(err)}") from None


def put_in(network: Any, spec: ModelSpec, config: Any) -> None:
    """Put the method into the network, in place.

    PEFT's model around the network, of which saving and loading make use, is at `peft_of(network)`. Raises ConfigError
    where the method does not go with the model.
    """
    from peft import PeftModel

    method = config.peft_type.value.lower()
    if method == "prefix_tuning" and spec.kind != "decoder":
        raise ConfigError(
            f"adapter.method: a prefix is put into the cache of a decoder, and {spec.source} is an {spec.kind}; "
            "prompt_tuning works for it"
        )
    if config.is_prompt_learning and not config.num_virtual_tokens:
        raise ConfigError(
            f"adapter.options: {method} learns vectors that stand before the text; say how many, as in num_virtual_tokens: 20"
        )
    _choose_layers(config, network, method)
    try:
        with _hushed():
            around = PeftModel(network, config, NAME)
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError, NotImplementedError) as err:
        raise ConfigError(
            f"adapter.method: {method} does not go with {spec.source}, a {spec.family} model: {_first_line(err)}"
        ) from None
    vars(network)["luthier_peft"] = around
    if not config.is_prompt_learning:
        for parameter in network.parameters():
            # A norm's weights stand in the base's own layer, and compute in its precision; masters in fp32 learn for them.
            added = parameter.requires_grad and method != "ln_tuning"
            vars(parameter).update(learns=parameter.requires_grad, added=added)
        return
    network.requires_grad_(False)
    learned, count = around.prompt_encoder[NAME].to(network.device), int(config.num_virtual_tokens)
    for parameter in learned.parameters():
        vars(parameter).update(learns=True, added=True)
    if method in VIRTUAL:
        embedding = VirtualEmbedding(reader(network).get_input_embeddings(), learned, Prompt(around, count), count)
        add_virtual_tokens(network, embedding, kept=spec.task == "seq2seq")
    else:
        add_prefix(network, learned, around.get_prompt, count)


@dataclasses.dataclass(frozen=True, slots=True)
class Prompt:
    """The first `count` learned vectors that PEFT's model makes: an object, so that a copy of a network asks its own."""

    around: Any
    count: int

    def __call__(self) -> Any:
        return self.around.get_prompt(1)[0, : self.count]


def let_learn(loaded: LoadedModel) -> None:
    """Open what the method added, and nothing else of the network; of an encoder-decoder that classifies, in its encoder."""
    from luthier.models.adapters.inject import used_parameters

    used = {id(parameter) for parameter in used_parameters(loaded)}
    for parameter in loaded.network.parameters():
        parameter.requires_grad_(bool(vars(parameter).get("learns")) and id(parameter) in used)


def peft_of(network: Any) -> Any:
    """PEFT's model around a network; None where there is none."""
    return vars(network).get("luthier_peft")


def room_left(network: Any, length: int) -> int:
    """The longest row, `length`, less what the method's vectors take of the context where both do not fit.

    Raises ConfigError when they leave nothing.
    """
    config = peft_of(network).peft_config[NAME]
    context = context_of(network.config)
    tokens = int(config.num_virtual_tokens) if config.is_prompt_learning else 0
    if context is None or length + tokens <= context:
        return length
    if context - tokens < 2:
        raise ConfigError(
            f"adapter.options: {tokens} virtual tokens leave nothing of the model's context of {context} tokens for a text; "
            "set num_virtual_tokens to less"
        )
    return context - tokens


def write(network: Any, spec: ModelSpec, directory: Path) -> None:
    """Write the adapter as `PeftModel.save_pretrained` does. Raises ModelError for a network that lost it."""
    import peft

    around = peft_of(network)
    if around is None:
        raise ModelError(
            f"{spec.source}: the adapter was made for another task and cannot be written for this one; merge it first"
        )
    config = around.peft_config[NAME]
    tensors = peft.get_peft_model_state_dict(around, adapter_name=NAME, save_embedding_layers=False)
    save_file(
        {name: one.detach().cpu().contiguous().clone() for name, one in tensors.items()},
        directory / ADAPTER_WEIGHTS,
        metadata={"format": "pt"},
    )
    held = config.inference_mode, config.base_model_name_or_path, config.task_type
    try:
        config.inference_mode, config.base_model_name_or_path = True, spec.base
        config.task_type = TASK_TYPES.get(spec.task, "FEATURE_EXTRACTION")
        config.save_pretrained(str(directory))
    finally:
        config.inference_mode, config.base_model_name_or_path, config.task_type = held


def read(network: Any, spec: ModelSpec, directory: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Put the adapter in `directory` on the network, and return it as settings of the Part `peft`.

    Raises ModelError when it is damaged or for another base, and what `put_in` raises.
    """
    import peft

    method = str(settings.get("peft_type")).lower()
    names = {field.name for field in dataclasses.fields(config_class(method)) if field.init} - set(OURS)
    options = {name: value for name, value in settings.items() if name in names}
    config = make_config(method, options, task_type=settings.get("task_type"))
    # Of what made the vectors only the vectors are kept in the files.
    config.inference_mode = config.is_prompt_learning
    put_in(network, spec, config)
    around, path = peft_of(network), directory / ADAPTER_WEIGHTS
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as err:
        raise ModelError(f"{path}: cannot be read ({type(err).__name__}); the adapter is not whole") from None
    if not config.is_prompt_learning:
        tensors = _rename(tensors, peft.get_peft_model_state_dict(around, save_embedding_layers=False), network, path)
    try:
        peft.set_peft_model_state_dict(around, tensors, adapter_name=NAME)
    except (RuntimeError, KeyError, ValueError) as err:
        raise ModelError(f"{directory}: this adapter is for another base: {_first_line(err)}") from None
    shown = {field.name: field.default for field in dataclasses.fields(config) if field.name in options}
    kept = {name: value for name, value in options.items() if value != shown[name] and value is not None}
    return {"kind": "peft", "method": method, "options": json.loads(json.dumps(kept))}


def merge(network: Any, source: str) -> None:
    """Fold the method into the weights, in place. Raises ConfigError for one that cannot be."""
    around = peft_of(network)
    method = "" if around is None else around.peft_config[NAME].peft_type.value.lower()
    refusal = (
        f"{source}: an adapter of the method {method} cannot be folded into the weights: {{}}; keep it beside its base, or "
        "tune another kind of adapter"
    )
    if around is None or around.peft_config[NAME].is_prompt_learning:
        raise ConfigError(refusal.format("it stands before the text"))
    try:
        with _hushed():
            whole = around.merge_and_unload()
    except (AttributeError, ValueError, NotImplementedError, RuntimeError, TypeError) as err:
        raise ConfigError(refusal.format(_first_line(err))) from None
    assert whole is network
    del vars(network)["luthier_peft"]
    for parameter in network.parameters():
        for mark in ("learns", "added"):
            vars(parameter).pop(mark, None)


def _choose_layers(config: Any, network: Any, method: str) -> None:
    """Where neither the user nor PEFT says which layers of a family get the method: all linear ones but the output layer."""
    from peft.utils import constants

    if hasattr(config, "fan_in_fan_out"):
        config.fan_in_fan_out = any(isinstance(layer, Conv1D) for layer in linear_layers(network).values())
    if getattr(config, "target_modules", "none") is not None:
        return
    known = getattr(constants, f"TRANSFORMERS_MODELS_TO_{method.upper()}_TARGET_MODULES_MAPPING", {})
    if network.config.model_type in known or method == "ln_tuning":
        return
    config.target_modules = {name.rpartition(".")[2] for name in linear_layers(network)}
    if hasattr(config, "feedforward_modules") and config.feedforward_modules is None:
        config.feedforward_modules = []


def _rename(
    tensors: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], network: Any, path: Path
) -> dict[str, torch.Tensor]:
    """The tensors under the names of this network: with or without the body's prefix, as they were made for another task."""
    body = network.base_model_prefix + "."
    found = {}
    for key, tensor in tensors.items():
        stem = key.removeprefix(PREFIX)
        fitting = [PREFIX + name for name in (stem, stem.removeprefix(body), body + stem) if PREFIX + name in expected]
        name = key if key in expected or not fitting else fitting[0]
        if name in expected and expected[name].shape != tensor.shape:
            raise ModelError(f"{path}: this adapter is for another base: {key} has another shape there")
        found[name] = tensor
    lost = sorted(expected.keys() - found.keys()) or sorted(found.keys() - expected.keys())
    if lost:
        raise ModelError(
            f"{path}: {lost[0]} is in the adapter or in the model, and not in the other; it is for another base"
        )
    return found


@contextmanager
def _hushed() -> Iterator[None]:
    """`quiet`, and without what PEFT is told of coming versions of transformers, which is no matter of the user's."""
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def _first_line(err: BaseException) -> str:
    lines = [line.strip() for line in str(err).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(err).__name__
