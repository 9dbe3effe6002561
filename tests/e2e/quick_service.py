"""The real server over fake models that answer at once, as a process of its own: python -m tests.e2e.quick_service."""

import sys

from service.server import serve
from service.settings import read_settings
from tests.service.fakes import Fakes


def main() -> int:
    fakes = Fakes.build(blocks=4096)  # nobody waits for a block, however many come at once
    return serve(lambda progress: fakes.loaded(), read_settings())


if __name__ == "__main__":
    sys.exit(main())
