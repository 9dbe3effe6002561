import os
from pathlib import Path

import pytest

from tests.containers.podman import Podman


@pytest.fixture(scope="session")
def podman() -> Podman:
    folder = os.environ.get("CONTAINERS_DIR", "")
    assert folder, "`make test-containers` runs these: it makes the folder of setup.sh and sets CONTAINERS_DIR"
    return Podman(Path(folder))


@pytest.fixture(scope="session")
def image(podman: Podman) -> str:
    return podman.build("docker.io/library/keypast:latest")


@pytest.fixture(scope="session")
def tester(podman: Podman) -> str:
    return podman.build("docker.io/library/keypast:loadtest", "--target=loadtest")
