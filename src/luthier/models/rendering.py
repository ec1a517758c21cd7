"""How a model makes tokens of text, and whether a saved one still does it as when it was saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from luthier.core.errors import DataError, ModelError, RenderingError
from luthier.core.events import Events
from luthier.models.purpose import make_renderer
from luthier.models.spec import SPEC_FILE, ModelSpec
from luthier.text.golden import GOLDEN_FILE, Golden, find_difference, read_golden, render_again
from luthier.text.render import Renderer
from luthier.text.template import Template


def checked_renderer(
    place: Path | str,
    tokenizer: Any,
    spec: ModelSpec,
    saved: ModelSpec | None,
    *,
    template: str = "auto",
    truncate: bool = False,
    learn: Literal["all", "last"] = "all",
    conversations: bool = False,
    events: Events | None = None,
) -> tuple[ModelSpec, Renderer]:
    """The renderer of the model at `place`, as `make_renderer` makes it, once it is known to read as it was `saved`. Raises
    RenderingError where it does not."""
    if saved is not None and isinstance(place, Path):
        check_rendering(place, spec.source, tokenizer, saved)
    return make_renderer(
        tokenizer,
        spec,
        saved.template if saved else None,
        template=template,
        truncate=truncate,
        learn=learn,
        events=events,
        conversations=conversations,
    )


def check_rendering(place: Path, source: str, tokenizer: Any, saved: ModelSpec) -> None:
    """Raises RenderingError when the files at `place` render its golden texts otherwise than they were rendered.

    Models without a golden.json (from elsewhere, from before) are not checked. `tokenizer` is as it was loaded.
    """
    golden = read_golden(place)
    if golden is None:
        return
    own, held = tokenizer.chat_template, saved.template
    if isinstance(own, str) and held is not None and held["source"] and own != held["source"]:
        different: str | None = f"the chat template beside the tokenizer is not the one in {SPEC_FILE}"
    else:
        different = _find(golden, tokenizer, saved)
    if different is not None:
        raise RenderingError(
            f"{source}: this model reads text otherwise than it was tuned to: {different}; bring back its tokenizer's files, "
            f"its chat template and its {SPEC_FILE} as the tuning wrote them, or remove its {GOLDEN_FILE} to use it as it is"
        )


def _find(golden: Golden, tokenizer: Any, saved: ModelSpec) -> str | None:
    try:
        renderer = Renderer(
            tokenizer,
            kind=saved.kind,
            template=None if saved.template is None else Template(**saved.template),
            max_length=saved.max_length,
        )
        return find_difference(render_again(renderer, golden), golden)
    except (DataError, ModelError) as err:
        return str(err)
