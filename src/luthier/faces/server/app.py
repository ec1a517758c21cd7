"""The application: every address, behind who may ask and how much."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fastapi import Depends, FastAPI
from starlette.middleware.cors import CORSMiddleware

from luthier import __version__
from luthier.faces.server import (
    batches,
    chat,
    completions,
    embeddings,
    files,
    health,
    jobs,
    kept,
    messages,
    metrics,
    models,
    page,
    responses,
    scoring,
    stores,
    tokens,
)
from luthier.faces.server.access import Access
from luthier.faces.server.bounds import Bounds
from luthier.faces.server.journal import Journal
from luthier.faces.server.keys import Key
from luthier.faces.server.limits import Counted
from luthier.faces.server.queries import check_query
from luthier.faces.server.refusals import explain
from luthier.faces.server.server import Server

ABOUT = "Inference and fine-tuning on your own machine, in the words of OpenAI's API."
ROUTES = (
    health, metrics, models, chat, completions, responses, kept, messages, embeddings, scoring, stores, tokens, files, jobs,
    batches, page,
)  # fmt: skip


def make_app(server: Server, keys: Sequence[Key] | None, journal: Callable[[str], None] = lambda line: None) -> FastAPI:
    """The addresses of a server. `keys` None: whoever is on this machine may ask. `journal` gets a line for each request."""
    app = FastAPI(
        title="Luthier", version=__version__, description=ABOUT, redoc_url=None, dependencies=[Depends(check_query)]
    )
    app.state.server = server
    explain(app, [one.routes for one in ROUTES])
    for one in ROUTES:
        app.include_router(one.routes)
    # The last one added is asked first.
    if server.settings.origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(server.settings.origins), allow_methods=["*"], allow_headers=["*"]
        )
    app.add_middleware(Bounds, server=server)
    app.add_middleware(Counted, limits=server.settings.limits, taken=server.taken)
    app.add_middleware(Access, keys=keys, origins=server.settings.origins)
    app.add_middleware(Journal, write=journal, metrics=server.metrics)
    return app
