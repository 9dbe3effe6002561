"""The real server over fake models, as a process of its own: python -m tests.e2e.fake_service [SECONDS]."""

import sys
import time

from service.server import serve
from service.settings import read_settings
from tests.service.fakes import Fakes

STEP = 0.5  # seconds a batch takes, unless it is told


def main() -> int:
    fakes = Fakes.build()
    step = float(sys.argv[1]) if len(sys.argv) > 1 else STEP
    for runner in (fakes.decoder, fakes.attention):
        runner.before_each = lambda: time.sleep(step)
    return serve(lambda progress: fakes.loaded(), read_settings())


if __name__ == "__main__":
    sys.exit(main())
