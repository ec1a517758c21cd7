"""What is known of a model before its weights are read: where it and its base lie, its config, its tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from transformers import AutoConfig, AutoTokenizer

from luthier.core.errors import LuthierError, MissingExtra, ModelError
from luthier.models.adapters.peft_files import ADAPTER_CONFIG, read_adapter_config
from luthier.models.facts import kind_of
from luthier.models.quiet import quiet
from luthier.models.sources import knock, resolve_source
from luthier.models.spec import Kind, ModelSpec, read_spec

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Origin:
    """A source, found; of a model without an adapter, the base is the model itself."""

    source: str
    place: Path | str
    saved: ModelSpec | None
    adapter: dict[str, Any] | None
    base: Path | str
    base_name: str
    hub: dict[str, Any]
    """How the hub is asked for the base (`sources.knock`)."""
    config: Any
    """The transformers config of the base; None where only its tokenizer is asked for (`engine.recalled`)."""
    kind: Kind


def find_origin(source: str) -> Origin:
    """What lies at `source`. Raises ModelError where it or its base is not found, unreachable or damaged."""
    place = resolve_source(source)
    saved = read_spec(place) if isinstance(place, Path) else None
    adapter = read_adapter_config(place) if isinstance(place, Path) else None
    base, base_name = place, source
    if adapter is not None:
        base_name = (saved.base if saved else None) or str(adapter.get("base_model_name_or_path") or "")
        base = base_of(source, base_name)
    hub = knock(base) if isinstance(base, str) else {}
    config = read_config(base, hub)
    return Origin(source, place, saved, adapter, base, base_name, hub, config, kind_of(config))


def read_config(place: Path | str, hub: dict[str, Any]) -> PreTrainedConfig:
    """The transformers config at `place`. Raises ModelError."""
    if isinstance(place, Path) and not (place / "config.json").is_file():
        raise ModelError(f"{place}: no config.json here, so this is no model directory")
    config: PreTrainedConfig = ask(place, "config", lambda: AutoConfig.from_pretrained(str(place), **hub))
    return config


def read_tokenizer(origin: Origin) -> Any:
    """The model's own tokenizer, or its base's where an adapter brings none. Raises ModelError, and MissingExtra when its kind
    needs sentencepiece."""
    own = isinstance(origin.place, Path) and (origin.place / "tokenizer.json").is_file()
    place = origin.place if origin.adapter is None or origin.saved is not None or own else origin.base
    return ask(place, "tokenizer", lambda: AutoTokenizer.from_pretrained(str(place), **origin.hub))


def base_of(source: str, base: str) -> Path | str:
    """Where the base of the adapter `source` is. Raises ModelError for one that is not named, not found, or an adapter too."""
    if not base:
        raise ModelError(f"{source}: {ADAPTER_CONFIG} names no base model, so the adapter cannot be loaded")
    try:
        place = resolve_source(base)
    except ModelError as err:
        raise ModelError(f"{source}: the base of this adapter cannot be found: {err}") from None
    if isinstance(place, Path) and (place / ADAPTER_CONFIG).is_file():
        raise ModelError(f"{source}: its base {base} is an adapter too; merge that one into a whole model first")
    return place


def ask(place: Path | str, what: str, load: Callable[[], T]) -> T:
    """Run `load` quietly, and turn whatever transformers raises into one sentence."""
    try:
        with quiet():
            return load()
    except LuthierError:
        raise
    except ImportError as err:
        if any(name in str(err).lower() for name in ("sentencepiece", "protobuf", "tiktoken")):
            raise MissingExtra("sentencepiece", "sentencepiece", f"{place}: its tokenizer") from None
        raise ModelError(f"{place}: the {what} cannot be loaded: {_first_line(err)}") from None
    except Exception as err:  # transformers raises OSError, ValueError, KeyError, RuntimeError, safetensors' own ...
        if "trust_remote_code" in str(err):
            raise ModelError(
                f"{place}: this model brings its own Python code, which is never run here; choose one that transformers knows"
            ) from None
        raise ModelError(f"{place}: the {what} cannot be loaded ({type(err).__name__}: {_first_line(err)})") from None


def _first_line(err: BaseException) -> str:
    lines = [line.strip() for line in str(err).splitlines() if line.strip()]
    return lines[0][:300] if lines else "no reason given"
