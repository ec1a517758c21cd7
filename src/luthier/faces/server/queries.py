"""What is asked for behind the question mark of an address: as of bodies, nothing of it is ignored."""

from __future__ import annotations

from fastapi import Request
from fastapi.routing import APIRoute

from luthier.core.errors import did_you_mean
from luthier.faces.server.refusals import Refusal


async def check_query(request: Request) -> None:
    """Raises Refusal for what an address that reads or lists does not know: a filter that is not applied gives too much."""
    route = request.scope.get("route")
    if request.method != "GET" or not isinstance(route, APIRoute) or not route.path.startswith("/v1/"):
        return
    known = [one.alias for one in route.dependant.query_params]
    strange = next((name for name in request.query_params if name not in known), None)
    if strange is not None:
        hint = f" ({did_you_mean(strange, known)})" if known else ""
        raise Refusal(400, f"{strange}: this server does not support this here{hint}; leave it out", param=strange)
