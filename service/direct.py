"""The short way to prefill, step and score: FastAPI's routing, dependencies and layers cost more than a small step.

The same handlers, the same errors. FastAPI keeps the routes, for its reference and for every method but POST.
"""

import re
from collections.abc import Iterable, Mapping

from fastapi import Request
from fastapi.routing import APIRoute
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from service.auth import tenant
from service.errors import TOLD, problem_response

_PATH = re.compile(r"/v1/sessions/([^/]+)/([a-z]+)")


class Direct:
    """`routes` are POST /v1/sessions/{session_id}/NAME; their endpoints take (request, session_id, tenant)."""

    def __init__(self, app: ASGIApp, routes: Iterable[BaseRoute]) -> None:
        self._app = app
        self._endpoints: Mapping[str, APIRoute] = {
            route.path.rpartition("/")[2]: route for route in routes if isinstance(route, APIRoute)
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        found = _PATH.fullmatch(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        route = None if found is None else self._endpoints.get(found[2])
        if found is None or route is None:
            await self._app(scope, receive, send)
            return
        scope["route"] = route  # as FastAPI does, for who counts
        request = Request(scope, receive)
        try:
            response = await route.endpoint(request, found[1], await tenant(request))
        except TOLD as error:
            response = problem_response(request, error)
        await response(scope, receive, send)
