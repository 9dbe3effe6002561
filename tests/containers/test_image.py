"""The image is built and run: who it is, what it may, what it compiles, and how it ends."""

import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.containers.podman import ROOT, Podman, until

pytestmark = [pytest.mark.containers, pytest.mark.timeout(3000)]

COMPILERS = "g++ gcc cc c++ cpp clang as ld make cmake ninja rustc nvcc"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def service(podman: Podman, image: str) -> Iterator[str]:
    """It has no network, so that what it has not, it cannot fetch."""
    with podman.running(image, "--network=none", "-e", "KEYPAST_INSECURE=1") as name:
        podman.healthy(name)
        yield name


def test_the_dockerfile_is_as_hadolint_wants_it(podman: Podman) -> None:
    """But for versions of Debian's packages, which come with the base image's release, and torch's, an argument."""
    podman.command(podman.folder / "tools/bin/hadolint", "--ignore=DL3008", "--ignore=DL3013", "Dockerfile")


def test_the_image_says_how_it_is_run_and_nothing_of_where_it_was_built(podman: Podman, image: str) -> None:
    (told,) = json.loads(podman("image", "inspect", image).stdout)
    assert told["Config"]["User"] == "10001:10001"
    assert told["Config"]["StopSignal"] in ("SIGTERM", "15")
    assert told["Healthcheck"]["Test"] == ["CMD", "python", "-m", "service.healthcheck"]
    assert not [each for each in told["Config"]["Env"] if each.startswith(("PIP_", "SSL_"))]
    assert "/opt/wheels" not in json.dumps(told)


def test_the_first_start_compiles_and_fetches_nothing(podman: Podman, service: str) -> None:
    logs = podman.logs(service)
    assert "keypast serves smollm2-135m, attention" in logs
    for word in ("building", "fetching", "converting", "slow path", '"level": "warning"'):
        assert word not in logs
    program = "import pathlib; from engine.kernels import build; print(build.load(pathlib.Path('/opt/keypast/cache')))"
    assert "seconds=0.0" in podman("exec", service, "python", "-c", program).stdout


def test_it_is_nobody_special_and_writes_nothing(podman: Podman, service: str) -> None:
    status = podman("exec", service, "cat", "/proc/1/status").stdout.split("\n")
    fields = dict(line.split(":", 1) for line in status if ":" in line)
    assert fields["Uid"].split() == ["10001"] * 4
    assert int(fields["CapEff"], 16) == int(fields["CapBnd"], 16) == 0
    assert fields["NoNewPrivs"].strip() == "1"
    for folder in ("/", "/opt/keypast/cache", "/opt/keypast/venv"):
        assert "Read-only" in podman("exec", service, "touch", f"{folder}/x", check=False).stderr


def test_there_is_no_compiler(podman: Podman, service: str) -> None:
    found = podman("exec", service, "sh", "-c", f"for each in {COMPILERS}; do command -v $each; done; echo looked")
    assert found.stdout == "looked\n"


def test_without_keys_it_does_not_listen_for_everyone(podman: Podman, image: str) -> None:
    done = podman("run", "--rm", "--pull=never", "--network=none", image, check=False)
    assert done.returncode != 0
    assert "KEYPAST_KEYS_FILE" in done.stderr


def test_it_takes_its_own_share_of_the_machine(podman: Podman, image: str) -> None:
    program = "from service.host import *; print(processors(), host_memory())"
    limits = ("--cpus=0.5", "--memory=300m", "--network=none", "--entrypoint=python")
    done = podman("run", "--rm", "--pull=never", *limits, image, "-c", program)
    threads, free = map(int, done.stdout.split())
    assert threads == 1
    assert 0 < free <= 300 << 20


def test_sigterm_lets_a_stream_end(podman: Podman, image: str) -> None:
    port = free_port()
    wanted = {"model": "smollm2-135m", "prompt": "Once", "max_tokens": 60, "stream": True, "ignore_eos": True}
    with podman.running(image, f"-p127.0.0.1:{port}:8000", "-e", "KEYPAST_INSECURE=1") as name:
        podman.healthy(name)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            with client.stream("POST", "/v1/completions", json=wanted) as reply:
                lines = reply.iter_lines()
                first = next(lines)
                stopping = threading.Thread(target=podman, args=("stop", "-t", "60", name))
                stopping.start()
                until(lambda: client.get("/readyz").status_code == 503, 10)
                told = [first, *lines]
            stopping.join(60)
        *_, last, done = filter(None, told)
        assert done == "data: [DONE]"
        assert json.loads(last.removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        state = json.loads(podman("inspect", name).stdout)[0]["State"]
        assert (state["Status"], state["ExitCode"]) == ("exited", 0)


def test_the_load_tester_is_small_and_alone(podman: Podman, tester: str) -> None:
    shown = podman("run", "--rm", "--pull=never", "--read-only", "--tmpfs=/tmp", tester, "chat", "--show")
    assert json.loads(shown.stdout)["name"] == "chat"
    program = "import importlib.util, os; print(os.getuid(), importlib.util.find_spec('torch'))"
    seen = podman("run", "--rm", "--pull=never", "--entrypoint=python", tester, "-c", program)
    assert seen.stdout == "10001 None\n"


def test_what_is_sent_to_the_builder_is_small() -> None:
    kept = [ROOT / line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    files = [path for top in kept for path in ([top] if top.is_file() else Path(top).rglob("*")) if path.is_file()]
    assert sum(path.stat().st_size for path in files if "__pycache__" not in path.parts) < 16 << 20
