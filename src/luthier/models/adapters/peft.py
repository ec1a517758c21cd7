"""Any method of the PEFT library."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from luthier.core.errors import ConfigError
from luthier.models.adapters.part import Adapter

if TYPE_CHECKING:
    from luthier.models.spec import LoadedModel


class Peft(Adapter):
    """A method of the PEFT library (pip install 'luthier[peft]'), saved in its own format; a classifier's head learns in full.

    Methods on layers: ia3, vera, oft, boft, lokr, loha, hra, fourierft, miss, ln_tuning and others. Learned vectors before the
    text: prompt_tuning, p_tuning, prefix_tuning, which take num_virtual_tokens from the context.
    """

    kind: ClassVar[str] = "peft"
    quantises: ClassVar[bool] = True

    method: str = "ia3"
    """A method as PEFT calls it; prompt, prefix and bone are understood too."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Its settings, as in PEFT's config class of the method, such as num_virtual_tokens, r or target_modules."""

    def apply(self, loaded: LoadedModel) -> None:
        from luthier.models.adapters.peft_methods import let_learn, make_config, put_in, room_left
        from luthier.models.facts import fingerprint
        from luthier.models.heads import Pooled
        from luthier.models.sources import lasting_name

        if loaded.spec.adapter is not None:
            self._learn_on(loaded)
        else:
            base = {"base": lasting_name(loaded.spec.source), "base_fingerprint": fingerprint(loaded.network)}
            put_in(loaded.network, loaded.spec, make_config(self.method, self.options))
            loaded.spec = loaded.spec.model_copy(update={"adapter": self.model_dump(), **base})
            left = room_left(loaded.network, loaded.spec.max_length)
            loaded.spec = loaded.spec.model_copy(update={"max_length": left})
            loaded.renderer.max_length = left
        let_learn(loaded)
        loaded.packs = loaded.shares = loaded.head = None
        if isinstance(loaded.module, Pooled):
            loaded.module.head.requires_grad_(True)

    def merge(self, loaded: LoadedModel) -> None:
        from luthier.models.adapters.merge import merge_adapter

        merge_adapter(loaded)

    def save(self, loaded: LoadedModel, directory: Path) -> None:
        from luthier.models.adapters.peft_methods import write

        write(loaded.network, loaded.spec, directory)

    def _learn_on(self, loaded: LoadedModel) -> None:
        """The adapter that the model brings learns on, if it is the one asked for and its files hold all that learned."""
        from luthier.models.adapters.peft_methods import ALIASES, NAME, peft_of

        brought, around = loaded.spec.adapter or {}, peft_of(loaded.network)
        method = ALIASES.get(self.method, self.method)
        if brought.get("kind") != "peft" or ALIASES.get(str(brought.get("method")), brought.get("method")) != method:
            raise ConfigError(
                f"adapter: {loaded.spec.source} already holds an adapter of the kind "
                f"{brought.get('method') or brought.get('kind')}; ask for the same to train it further, or for adapter "
                "'full', which merges it into the weights first where it can be"
            )
        if around is None:
            raise ConfigError(
                f"adapter: {loaded.spec.source} was loaded for another task; load it anew to train its adapter"
            )
        config = around.peft_config[NAME]
        if method == "p_tuning" or getattr(config, "prefix_projection", False):
            raise ConfigError(
                f"adapter: {loaded.spec.source} holds the vectors that {method} made, and not what made them, so they cannot "
                "be trained further; start from the base"
            )
        config.inference_mode = False
