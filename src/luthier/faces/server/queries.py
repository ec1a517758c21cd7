"""What is asked for behind the question mark of an address: as of bodies, nothing of it is ignored."""

from __future__ import annotations

from fastapi import Request
from fastapi.routing import APIRoute

from luthier.core.errors import did_you_mean
from luthier.faces.server.refusals import Refusal, speaks_messages

# Anthropic's client says so which form of its API it speaks.
SPOKEN = ("beta", "true")


async def check_query(request: Request) -> None:
    """Raises Refusal for what an address does not know: a filter that is not applied gives too much, and a setting that is not
    read is missed by whoever sent it. What is only looked at beside the API (the page, health, figures) is for all to ask."""
    route = request.scope.get("route")
    if not isinstance(route, APIRoute) or (request.method == "GET" and not route.path.startswith("/v1/")):
        return
    known = [one.alias for one in route.dependant.query_params]
    for name, value in request.query_params.multi_items():
        if name in known or ((name, value) == SPOKEN and speaks_messages(route.path)):
            continue
        hint = f" ({did_you_mean(name, known)})" if known else ""
        where = "leave it out" if request.method == "GET" else "leave it out of the address; settings go into the body"
        raise Refusal(400, f"{name}: this server does not support this here{hint}; {where}", param=name)
