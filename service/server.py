"""The process: a socket, uvicorn, what the operator sees, and a drain at the end."""

import asyncio
import contextlib
import gc
import ipaddress
import os
import signal
import socket
import ssl
from collections.abc import Iterator

import uvicorn
import uvloop
from rich.console import Console

from engine.errors import EngineError, RanksLost
from service import logs
from service.app import create_app
from service.connection import Connection
from service.host import give_back_memory
from service.lifecycle import Load, Service
from service.progress import Display
from service.settings import Settings, SettingsError

KEEP_ALIVE_SECONDS = 75  # a client thinks between two steps; longer than most pools and proxies keep an idle connection
REPLIES_SECONDS = 5  # after the drain, for what is answered to reach its readers
SIGNALS = (signal.SIGINT, signal.SIGTERM)

_console = Console(stderr=True, highlight=False, soft_wrap=True)


def serve(load: Load, settings: Settings) -> int:
    """Until a signal. Returns the exit code: 0 after a drain, 2 when settings are wrong, 1 when it cannot serve or was
    told twice to stop."""
    logs.configure(settings.log_level, settings.log_format)
    try:
        check_tls(settings)
        app = create_app(load, settings)
        listener = _listen(settings)
    except (OSError, SettingsError) as error:
        complain(error)
        return 2 if isinstance(error, SettingsError) else 1
    config = uvicorn.Config(
        app,
        http=Connection.bounded(settings, app.state.traffic),
        ws="none",
        ssl_certfile=settings.tls_cert,
        ssl_keyfile=settings.tls_key,
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=REPLIES_SECONDS,
    )
    service: Service = app.state.service
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_run(_Server(config, service), listener, service))


class _Server(uvicorn.Server):
    """Drains at the first signal, while new work is still answered with 503; leaves at once at the second."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service
        self._draining: asyncio.Task[None] | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            loop.add_signal_handler(number, self._on_signal)
        try:
            yield
        finally:
            for number in SIGNALS:
                loop.remove_signal_handler(number)

    def _on_signal(self) -> None:
        if self._draining is None:
            self._draining = asyncio.ensure_future(self._drain())
        else:
            os._exit(1)

    async def _drain(self) -> None:
        await self._service.stop()
        self.should_exit = True


async def _run(server: _Server, listener: socket.socket, service: Service) -> int:
    serving = asyncio.ensure_future(server.serve([listener]))
    loading = asyncio.ensure_future(service.loaded())
    await _show_progress([serving, loading], service)
    if loading.done() and (error := loading.exception()) is not None:
        server.should_exit = True
        await serving
        if not isinstance(error, EngineError | RanksLost):
            raise error
        complain(error)
        return 1
    if loading.done():
        gc.collect()
        gc.freeze()  # what is loaded stays: looking all through it again stops every thread for a third of a second
        give_back_memory()
        _console.print(_welcome(service, _address(listener, tls=server.config.is_ssl)), markup=False)
    await serving
    loading.cancel()
    return 0


async def _show_progress(ends: list[asyncio.Future[None]], service: Service) -> None:
    """Until one of them ends."""
    with Display(_console) as show:
        while not any(end.done() for end in ends):
            show(service.progress)
            await asyncio.wait(ends, timeout=0.1, return_when=asyncio.FIRST_COMPLETED)


def complain(error: BaseException) -> None:
    _console.print(f"keypast: {error}", markup=False)


def _welcome(service: Service, address: str) -> str:
    specs = service.engine.specs
    speaks = next((name for name, spec in specs.items() if spec.history is not None), None)
    body = f'{{"model": "{speaks or next(iter(specs))}"}}'
    lines = [
        f"keypast serves {', '.join(specs)} on {address}",
        f"  try  keypast {'chat' if speaks else 'models'} --url {address}",
        f"       curl --json '{body}' {address}/v1/sessions",
        f"  see  {address}/docs",
    ]
    return "\n".join(lines)


def check_tls(settings: Settings) -> None:
    """Raises SettingsError unless certificate and key are both there and belong together, or neither is."""
    cert, key = settings.tls_cert, settings.tls_key
    if cert is None and key is None:
        return
    if cert is None or key is None:
        raise SettingsError("KEYPAST_TLS_CERT and KEYPAST_TLS_KEY go together; set both, or neither for http")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key, password="")  # never asks a terminal
    except (OSError, ssl.SSLError) as error:
        reason = error.strerror or str(error)
        raise SettingsError(f"KEYPAST_TLS_CERT={cert} with KEYPAST_TLS_KEY={key}: {reason}") from None


def _check_open(settings: Settings, address: str) -> None:
    """Raises SettingsError when other machines could ask, and nothing would ask them for a key."""
    if not (settings.guarded or settings.insecure) and not ipaddress.ip_address(address.partition("%")[0]).is_loopback:
        raise SettingsError(
            f"KEYPAST_HOST={settings.host}: without API keys only this machine is served; make some with `keypast keys "
            "new TENANT --file FILE` and set KEYPAST_KEYS_FILE, or serve whoever asks with --insecure "
            "(KEYPAST_INSECURE=1)"
        )


def _listen(settings: Settings) -> socket.socket:
    """Bound before anything is loaded. Raises SettingsError, and OSError that says what to change."""
    host, port = settings.host, settings.port
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        _check_open(settings, str(address[0]))
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(f"cannot listen on {host} port {port}: {reason}; set KEYPAST_HOST or KEYPAST_PORT") from error
    listener.set_inheritable(True)
    return listener


def _address(listener: socket.socket, *, tls: bool) -> str:
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    scheme = "https" if tls else "http"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
