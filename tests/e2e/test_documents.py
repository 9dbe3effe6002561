"""What the README and the examples say, done against a real service that has tiny models under the real ones' names."""

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from examples import attention_session, decoder_session
from tests.e2e.test_server import ROOT, Server
from tests.tiny import save_tiny_decoder

README = (ROOT / "README.md").read_text()


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    directory = save_tiny_decoder(tmp_path_factory.mktemp("tiny"))
    models = {"smollm2-135m": str(directory), "attention": "attention:hidden=512,heads=8"}
    with Server("service", models=json.dumps(models), kv_memory="256MiB") as server:
        yield server.address()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("code", blocks("python"))
def test_readme_python(code: str, address: str, tmp_path: Path) -> None:
    assert "http://127.0.0.1:8000" in code
    script = tmp_path / "readme.py"
    script.write_text(code.replace("http://127.0.0.1:8000", address))
    done = subprocess.run(
        [sys.executable, "-W", "error", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_readme_curl(address: str) -> None:
    lines = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("curl")]
    assert len(lines) > 5
    for line in lines:
        words = shlex.split(line)[1:]
        url = words.pop().replace("127.0.0.1:8000", address)
        if words[0] == "--json":
            reply = httpx.post(url, content=words[1], headers={"Content-Type": "application/json"})
        else:
            assert words[0] == "-X"
            reply = httpx.request(words[1], url)
        assert reply.is_success, f"{line}: {reply.text}"


def test_attention_example(address: str) -> None:
    assert attention_session.main(address) < 5e-3  # outputs are float16


def test_decoder_example(address: str) -> None:
    reply, winter, again = decoder_session.main(address)
    assert reply
    assert winter
    assert again == reply
