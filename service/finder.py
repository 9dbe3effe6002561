"""Finds a request's route by one look at its path. FastAPI tries its routes one after another, and those of an included
router twice, which takes longer than many a request.
"""

import re
from collections.abc import Iterable

from fastapi.routing import APIRoute
from starlette.routing import BaseRoute, Match
from starlette.types import Receive, Scope, Send


class Finder(BaseRoute):
    """Stands before `routes` in the application's own list, which keeps them: for its reference, and for what is not
    found here, a path or a method that there is none for."""

    def __init__(self, routes: Iterable[APIRoute]) -> None:
        by_method: dict[str, list[APIRoute]] = {}
        for route in routes:
            for method in route.methods or ():
                by_method.setdefault(method, []).append(route)
        self._found = {method: (_any_of(own), own) for method, own in by_method.items()}

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        paths, routes = self._found.get(scope.get("method", ""), _NONE)
        found = paths.match(scope["path"])
        if found is None or found.lastindex is None:
            return Match.NONE, {}
        return routes[found.lastindex - 1].matches(scope)

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        await scope["route"].handle(scope, receive, send)


def _any_of(routes: Iterable[APIRoute]) -> re.Pattern[str]:
    """An empty group behind each path says which one it was."""
    return re.compile("|".join(re.sub(r"\(\?P<\w+>", "(?:", route.path_regex.pattern) + "()" for route in routes))


_NONE: tuple[re.Pattern[str], list[APIRoute]] = (re.compile(r"(?!)"), [])
