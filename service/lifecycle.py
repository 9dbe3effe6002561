"""The service's life, and what its routes need of it.

loading   models are read in a background thread; /livez says 200, everything else 503
ready     the engine runs
draining  new work is refused, running work ends
down      loading failed, or the engine's thread has ended; /readyz says 503 for good
"""

import asyncio
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from fastapi import Request

from engine.engine import Engine
from engine.tally import Figures
from service.errors import NotReady
from service.limits import OpenStreams
from service.settings import Settings
from service.text import TextModel
from service.watching import Watching
from service.worker import Desk, EngineWorker

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Loaded:
    """An engine over its models, and what those that read text need for it, by the model's name. `close` gives back
    what the models hold outside of this process."""

    engine: Engine
    texts: Mapping[str, TextModel]
    close: Callable[[], object] = lambda: None


Load = Callable[[Progress], Loaded]


class Service:
    """`load` runs on its own thread and may take minutes; what it tells its argument is shown while it does. `desk`
    has a look at what is asked of the engine before it does."""

    def __init__(self, load: Load, settings: Settings, desk: Callable[[Engine], Desk] = lambda engine: engine) -> None:
        self.settings = settings
        self.progress = "starting"
        self.loaded_at = 0.0
        self.streams = OpenStreams(settings.max_streams)
        self._load = load
        self._desk = desk
        self._worker: EngineWorker | None = None
        self._watching: Watching | None = None
        self._texts: Mapping[str, TextModel] = {}
        self._settled = asyncio.Event()
        self._error: BaseException | None = None
        self._stopping = False
        self._stopped: asyncio.Task[None] | None = None

    @property
    def status(self) -> Literal["loading", "ready", "draining", "down"]:
        if self._worker is not None:
            return self._worker.status
        return "loading" if self._error is None else "down"

    @property
    def detail(self) -> str | None:
        """More about a status other than ready."""
        if self._worker is None:
            return self.progress if self._error is None else "loading failed"
        return "the engine has ended; the log says why" if self.status == "down" else None

    @property
    def worker(self) -> EngineWorker:
        """Raises NotReady."""
        if self._worker is None:
            raise NotReady("the models are not loaded; nothing was applied")
        return self._worker

    @property
    def watching(self) -> Watching:
        """Raises NotReady."""
        if self._watching is None:
            self._watching = Watching(self.engine.events, self.worker.ended, self.settings.max_event_streams)
        return self._watching

    @property
    def engine(self) -> Engine:
        """Raises NotReady."""
        return self.worker.engine

    def figures(self) -> list[Figures]:
        """What each model holds and has done; nothing before the models are loaded."""
        return [] if self._worker is None else self._worker.engine.figures()

    def text_model(self, name: str) -> TextModel | None:
        return self._texts.get(name)

    def start(self) -> None:
        loop = asyncio.get_running_loop()

        def load() -> None:
            try:
                outcome: Loaded | BaseException = self._load(self._report)
            except BaseException as error:
                outcome = error
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._settle, outcome)

        threading.Thread(target=load, name="load", daemon=True).start()

    async def loaded(self) -> None:
        """Returns when the models are loaded. Raises what loading them raised."""
        await self._settled.wait()
        if self._error is not None:
            raise self._error

    def drain(self) -> None:
        """Begins it, once: new work is refused, running work ends."""
        self._stopping = True  # what is loaded from now on is not started
        if self._worker is not None and self._stopped is None:
            self._worker.refuse_new()
            self._stopped = asyncio.ensure_future(
                self._worker.stop(self.settings.drain_seconds, self.settings.cancel_seconds)
            )

    async def stop(self) -> None:
        """Drains; whoever calls it again waits for the same end."""
        self.drain()
        if self._stopped is not None:
            await asyncio.shield(self._stopped)

    def _report(self, message: str) -> None:
        self.progress = message

    def _settle(self, outcome: Loaded | BaseException) -> None:
        if isinstance(outcome, BaseException):
            self._error = outcome
        elif self._stopping:
            outcome.close()
        else:
            self._texts = outcome.texts
            self._worker = EngineWorker(outcome.engine, outcome.close, self._desk(outcome.engine))
            self._worker.start()
            self.loaded_at = time.time()
        self._settled.set()


def service_of(request: Request) -> Service:
    service: Service = request.app.state.service
    return service
