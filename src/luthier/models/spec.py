"""What a model is and is for, and the loaded thing itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from pydantic import ValidationError
from torch import nn

from luthier.core.config import Config
from luthier.core.errors import ModelError
from luthier.core.types import Task

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from luthier.models.embedding import Manner
    from luthier.models.output import Head, OwnHead
    from luthier.text.render import Renderer

Kind: TypeAlias = Literal["decoder", "encoder", "encoder-decoder"]
Pooling: TypeAlias = Literal["last", "mean", "first"]

SPEC_FILE = "luthier.json"
HEAD_FILE = "head.safetensors"
NATURAL_TASK: dict[Kind, Task] = {"decoder": "causal", "encoder": "masked", "encoder-decoder": "seq2seq"}


class ModelSpec(Config):
    """Everything about a model that its weights do not say; saved beside them as `luthier.json`."""

    source: str
    """Where it was loaded from: a shipped name, a hub id, a directory or run:<id>."""
    kind: Kind
    """The shape of its network."""
    family: str
    """The architecture's name in transformers (`model_type`)."""
    task: Task
    """What it computes."""
    learned: str | None = None
    """The objective of its last tuning here; None for models that came from elsewhere."""
    labels: tuple[str, ...] = ()
    """Class names by index, for classify."""
    multi_label: bool = False
    """Whether a text may hold several classes at once."""
    pooling: Pooling = "mean"
    """How classify and regress make one vector of a text."""
    template: dict[str, str] | None = None
    """The chat template: its name and its source; None for models that hold no conversations."""
    max_length: int
    """Longest row in tokens."""
    stop_ids: tuple[int, ...] = ()
    """Tokens that end a generated text."""
    adapter: dict[str, Any] | None = None
    """The adapter whose weights lie beside the base, with its settings; None for a whole model."""
    base: str | None = None
    """Source of the base that the adapter belongs to."""
    base_fingerprint: str | None = None
    """Fingerprint of that base's weights."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """What it was tuned in, and computes in when it is loaded again."""
    quantize: Literal["none", "int8", "nf4"] = "none"
    """The form in which the frozen base was held under its adapter, and is held when it is loaded again."""
    target_mean: float = 0.0
    """Mean of the numbers learned, for regress: prediction = score x target_scale + target_mean."""
    target_scale: float = 1.0
    """Standard deviation of the numbers learned, for regress."""


@dataclass
class LoadedModel:
    """A module on its device with its tokenizer, its spec, and the renderer that turns examples into its tokens."""

    module: nn.Module
    tokenizer: Any
    spec: ModelSpec
    renderer: Renderer
    as_stored: bool = False
    """Whether it is in bf16 only because its files are, and would compute in fp32 by itself."""

    parts: int = 1
    """Processes that share its layers, this one among them (`models.parallel`)."""

    packs: bool | None = None
    """Whether it reads texts laid end to end as if each were alone; None: not tried yet (`models.packed.packs`)."""
    shares: bool | None = None
    """Whether it reads a text once for all that continue it; None: not tried yet (`models.packed.shares`)."""

    pages: int | None = None
    """Bytes of keys and values that a token takes where it writes with what came before in blocks, 0 where it cannot; None:
    not tried yet (`models.pages.writes_by_pages`)."""

    plainly: tuple[str, ...] | None = None
    """Why some of its layers are attended to in plain torch on a CUDA device, empty where none is; None: it is on another, or was
    not tried yet (`models.pages.writes_by_pages`)."""

    slots: Literal["direct", "masked", ""] | None = None
    """How it writes answers to sources side by side, wherever each of them is, "" where it cannot; None: not tried yet
    (`models.slots.way_of`)."""

    native: Any = None
    """Its weights packed for the native decoder; None: texts are written by the module itself (`engine.native`)."""

    manner: Manner | None = None
    """How it makes one vector of a text; None: not read yet (`models.embedding.manner_of`)."""

    server: Any = None
    """The server that has its weights and writes in its place (`engine.remote`); None: they are here."""

    learned: Any = None
    """The rows of its tuning, as `engine.learned.Learned`: what it writes is guessed from them."""

    draft: Any = None
    """A smaller model of the same tokenizer that guesses what it writes (`engine.draft_model`); None: there is none."""

    packable: bool | None = None
    """Whether the native decoder computes what it computes; None: not tried yet (`engine.native.natively`)."""

    packed_only: bool = False
    """Whether its packed weights are all that is left of it, and its module gives names and shapes alone."""

    fingerprint: str | None = None
    """Of its weights; None: not taken yet (`models.facts.base_fingerprint`)."""

    head: tuple[nn.Module, Head | OwnHead] | None = None
    """Its output layer, and how logits are made with it; None: not read yet (`models.output.head_of`)."""

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.module.parameters()).device

    @property
    def network(self) -> Any:
        """The transformers model inside: the module itself, or the backbone under a pooling head."""
        return getattr(self.module, "backbone", self.module)

    @property
    def config(self) -> PreTrainedConfig:
        """The transformers config of that."""
        config: PreTrainedConfig = self.network.config
        return config

    @property
    def vocabulary(self) -> int:
        """Tokens that it embeds."""
        return int(self.network.get_input_embeddings().weight.shape[0])


def read_spec(directory: Path) -> ModelSpec | None:
    """The spec saved in `directory`; None where there is none. Raises ModelError when it cannot be understood."""
    path = directory / SPEC_FILE
    if not path.is_file():
        return None
    try:
        return ModelSpec.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValidationError) as err:
        raise ModelError(f"{path}: cannot be read as a model's description ({type(err).__name__})") from None
