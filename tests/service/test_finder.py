"""A route is found as FastAPI would find it, whatever the path and the method."""

import re
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.routing import BaseRoute, Match

from engine.config import EngineConfig
from engine.engine import Engine
from service.app import create_app
from service.finder import Finder
from service.lifecycle import Loaded
from service.settings import Settings

METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "BREW")


@pytest.fixture(scope="module")
def app() -> FastAPI:
    return create_app(lambda progress: Loaded(Engine([], EngineConfig()), {}), Settings())


def full(routes: list[BaseRoute], scope: dict[str, Any]) -> dict[str, Any] | None:
    """What the first route that matches adds to the scope."""
    for route in routes:
        match, found = route.matches(dict(scope))
        if match is Match.FULL:
            return dict(found)
    return None


def test_each_path_and_method_goes_to_the_route_that_fastapi_tries_first(app: FastAPI) -> None:
    finder, *others = app.router.routes
    assert isinstance(finder, Finder)
    ours = [route for route in others if isinstance(route, APIRoute)]
    assert len(ours) > 30
    paths = [
        re.sub(r"{[\w:]+}", name, route.path) for route in ours for name in ("a", "b-1_", "step", "past", "org/name")
    ]
    for path in [*paths, *(path + "/" for path in paths), "/", "", "/v1", "/v1/sessions//step", "/docs"]:
        for method in METHODS:
            scope = {"type": "http", "path": path, "method": method, "root_path": "", "path_params": {}}
            assert full([finder], scope) == full(list(ours), scope), (method, path)


def test_it_leaves_alone_what_is_no_request(app: FastAPI) -> None:
    scope = {"type": "websocket", "path": "/v1/sessions", "root_path": "", "path_params": {}}
    assert app.router.routes[0].matches(scope) == (Match.NONE, {})
