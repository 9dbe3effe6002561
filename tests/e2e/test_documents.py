"""What the README, the guides and the examples say, done against a real service that has tiny models under
the real ones' names."""

import contextlib
import io
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from _pytest.mark import ParameterSet

from examples import attention_session, decoder_session
from tests.e2e.test_server import ROOT, Server
from tests.tiny import save_tiny_decoder

README = (ROOT / "README.md").read_text()
SESSIONS = (ROOT / "docs" / "sessions.md").read_text()
MIGRATING = (ROOT / "docs" / "migrating.md").read_text()
CLIENTS = (ROOT / "docs" / "clients.md").read_text()
QUICKSTART = (ROOT / "docs" / "quickstart.md").read_text()
CONCEPTS = (ROOT / "docs" / "concepts.md").read_text()
GUIDES = [SESSIONS, CLIENTS, QUICKSTART, CONCEPTS]
SERVICE = "http://127.0.0.1:8000"


def blocks(document: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", document, flags=re.DOTALL)


def curls(document: str) -> list[str]:
    return [line for block in blocks(document, "sh") for line in block.splitlines() if line.startswith("curl")]


def run_snippet(code: str, directory: Path) -> str:
    """Runs it there, as a process of its own for each rank if it has ranks. What it printed."""
    script = directory / "snippet.py"
    script.write_text(code)
    if "torch.distributed" in code:
        ranks = re.findall(r"^# torchrun (--nproc-per-node \d)", code)[0].split()
        command = [sys.executable, "-W", "error", "-m", "torch.distributed.run", "--standalone", *ranks, script]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            command, cwd=directory, env=environment, capture_output=True, text=True, timeout=100, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.chdir(directory):
        runpy.run_path(str(script))
    return printed.getvalue()


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    directory = save_tiny_decoder(tmp_path_factory.mktemp("tiny"))
    layer = tmp_path_factory.mktemp("layer")
    saving = next(code for code in blocks(MIGRATING, "python") if "save_file" in code)
    run_snippet(saving, layer)
    models = {
        "smollm2-135m": str(directory),
        "attention": "attention:hidden=512,heads=8",
        "layer": f"attention:hidden=64,heads=4,dtype=float32,weights={layer / 'layer.safetensors'}",
    }
    with Server("service", models=json.dumps(models), kv_memory="256MiB") as server:
        yield server.address()


@pytest.mark.parametrize("code", blocks(README, "python"))
def test_readme_python(code: str, address: str, tmp_path: Path) -> None:
    assert SERVICE in code
    script = tmp_path / "readme.py"
    script.write_text(code.replace(SERVICE, address))
    done = subprocess.run(
        [sys.executable, "-W", "error", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout


def snippets(document: str) -> list[ParameterSet]:
    """Those that start processes of their own are for the slow suite."""
    found = blocks(document, "python")
    return [pytest.param(code, marks=[pytest.mark.slow] if "torch.distributed" in code else []) for code in found]


@pytest.mark.parametrize("code", snippets(MIGRATING))
def test_migrating_python(code: str, address: str, tmp_path: Path) -> None:
    """A snippet prints what its comments say, no more and no less."""
    printed = run_snippet(code.replace(SERVICE, address), tmp_path)
    said = re.findall(r"^ *print\(.*\)  # (.+)$", code, flags=re.MULTILINE)
    assert said
    assert printed.splitlines() == said


@pytest.mark.parametrize("code", [code for guide in GUIDES for code in blocks(guide, "python")])
def test_guides_python(code: str, address: str, tmp_path: Path) -> None:
    """A snippet prints what its comments say; in a loop, each time, or each of them in turn. Not every client says the
    scheme."""
    said = re.findall(r"^( *)print\(.*\)  # (.+)$", code, flags=re.MULTILINE)
    assert said
    here = code.replace(SERVICE.removeprefix("http://"), address.removeprefix("http://"))
    printed = run_snippet(here, tmp_path).splitlines()
    assert list(dict.fromkeys(printed)) == [line for _, text in said for line in text.split(" | ")]


@pytest.mark.parametrize("document", [README, QUICKSTART, SESSIONS], ids=["readme", "quickstart", "sessions"])
def test_curl(document: str, address: str) -> None:
    lines = curls(document)
    assert lines
    for line in lines:
        *words, url = shlex.split(line)[1:]
        url = url.replace("127.0.0.1:8000", address)
        match words:
            case ["--json", body]:
                reply = httpx.post(url, content=body, headers={"Content-Type": "application/json"})
            case ["-X", method]:
                reply = httpx.request(method, url)
            case _:
                assert not words, line
                reply = httpx.get(url)
        assert reply.is_success, f"{line}: {reply.text}"


def test_attention_example(address: str) -> None:
    assert attention_session.main(address) < 5e-3  # outputs are float16


def test_decoder_example(address: str) -> None:
    reply, winter, again = decoder_session.main(address)
    assert reply
    assert winter
    assert again == reply
