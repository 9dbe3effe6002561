"""Starts the service: `python -m service`, or `keypast serve`."""

import os
import sys
from functools import partial

from service.host import processors
from service.settings import Settings, SettingsError, read_settings


def main() -> None:
    try:
        settings = read_settings()
    except SettingsError as error:
        sys.stderr.write(f"keypast: {error}\n")
        sys.exit(2)
    set_up_torch(settings)
    from service.loader import load_models
    from service.server import serve

    sys.exit(serve(partial(load_models, settings), settings))


def set_up_torch(settings: Settings) -> None:
    """Must run before torch is imported, whose OpenMP reads this once; hence the imports above. An operator's own
    settings stay.

    OpenMP threads that wait spin for long by default, which beside an event loop on the same cores can cost a time
    slice a parallel region; not spinning at all costs a wake-up a region (a step of 16 ms instead of 9). This many
    turns outlast the gaps inside a step and little more.

    A step reads all weights and pasts from end to end, which is faster in pages of 2 MB than of 4 KB: torch asks for
    such pages, where the kernel gives them to who asks.

    The ranks that share a model inherit this: they share the threads, and talk to each other inside this machine only.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    may_run = processors()  # fewer than there are, in a container with a quota, which OpenMP does not know
    limited = may_run < len(os.sched_getaffinity(0)) and "OMP_NUM_THREADS" not in os.environ
    if settings.threads or settings.model_parallel > 1 or limited:
        threads = settings.threads or may_run
        os.environ["OMP_NUM_THREADS"] = str(max(1, threads // settings.model_parallel))
    if settings.model_parallel > 1:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


if __name__ == "__main__":
    main()
