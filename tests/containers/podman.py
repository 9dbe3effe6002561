"""Podman as a few calls; what it needs is in the environment that setup.sh wrote down."""

import contextlib
import os
import shlex
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
HARDENED = ("--read-only", "--tmpfs=/tmp", "--cap-drop=all", "--security-opt=no-new-privileges")


class Podman:
    def __init__(self, folder: Path) -> None:
        """`folder` is what setup.sh was given."""
        lines = (folder / "env").read_text().splitlines()
        told = dict(line.split("=", 1) for line in lines)
        self.folder = folder
        self._volumes = shlex.split(told.pop("BUILD_VOLUMES"))
        self.environment = os.environ | told

    def __call__(self, *arguments: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        return self.command("podman", *arguments, check=check)

    def command(
        self, *command: str | Path, check: bool = True, cwd: Path = ROOT, **more: str
    ) -> subprocess.CompletedProcess[str]:
        """`more` goes into the environment. Raises AssertionError with what was printed, if it fails and `check`."""
        done = subprocess.run(
            command, cwd=cwd, env=self.environment | more, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0 or not check, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def build(self, tag: str, *options: str) -> str:
        """From this tree's Dockerfile. Steps that were done before are not done again."""
        self("build", "--pull-never", *self._volumes, "--build-arg=TORCH_INDEX=", *options, "-t", tag, ".")
        return tag

    @contextlib.contextmanager
    def running(self, image: str, *options: str) -> Iterator[str]:
        """A container's name; it is removed in the end."""
        name = self("run", "-d", "--pull=never", *HARDENED, *options, image).stdout.strip()
        try:
            yield name
        finally:
            self("rm", "-f", "-t", "0", name)

    def healthy(self, name: str, seconds: float = 120) -> float:
        """Waits for the image's own health check, which nothing runs by itself without systemd: seconds."""

        def is_healthy() -> bool:
            running = self("inspect", "--format={{.State.Running}}", name).stdout.strip() == "true"
            assert running, f"it has ended:\n{self.logs(name)}"
            return self("healthcheck", "run", name, check=False).returncode == 0

        return until(is_healthy, seconds)

    def logs(self, name: str) -> str:
        done = self("logs", name)
        return done.stdout + done.stderr


def until(condition: Callable[[], bool], seconds: float = 120) -> float:
    """Seconds until it held. Raises AssertionError when it does not hold in time."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < seconds, "it never was so"
        time.sleep(0.2)
    return time.monotonic() - started
