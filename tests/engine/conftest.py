from collections.abc import Iterator

import pytest

from tests.ranks import World


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Four ranks."""
    with World(4, tmp_path_factory.mktemp("world")) as world:
        yield world
