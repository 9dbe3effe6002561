"""The service's own application, its connection, keys, limits and logs, and behind them one route that does nothing:
`python -m benchmarks.peers.echo PORT` answers `POST /echo` with the body that came. There are no models.
"""

import sys

import uvicorn
from fastapi import Request, Response
from fastapi.routing import APIRoute

from engine.config import EngineConfig
from engine.engine import Engine
from keypast.wire import OCTETS_TYPE
from service import logs
from service.app import create_app
from service.auth import Tenant
from service.connection import Connection
from service.lifecycle import Loaded
from service.limits import read_body
from service.settings import Settings


async def echo(request: Request, tenant: Tenant) -> Response:
    settings: Settings = request.app.state.service.settings
    return Response(await read_body(request, settings.max_body_bytes), media_type=OCTETS_TYPE)


def main() -> None:
    settings = Settings(log_level="warning")
    logs.configure(settings.log_level, settings.log_format)
    app = create_app(lambda progress: Loaded(Engine([], EngineConfig()), {}), settings)
    app.router.routes.insert(0, APIRoute("/echo", echo, methods=["POST"], response_class=Response))  # found at once
    http = Connection.bounded(settings, app.state.traffic)
    uvicorn.run(
        app,
        port=int(sys.argv[1]),
        loop="uvloop",
        http=http,
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
    )


if __name__ == "__main__":
    main()
