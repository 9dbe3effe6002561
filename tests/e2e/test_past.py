"""Pasts between two services, through the client, over real sockets."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from keypast import AsyncClient, Client, Past, errors
from tests.e2e.test_server import ROOT, Server
from tests.tiny import save_tiny_decoder

PAGE = (ROOT / "docs" / "past.md").read_text()
LONG = 4096  # positions of a long past
MAX_PAST = 40 << 20


@pytest.fixture(scope="module")
def addresses(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """Two services of the same models, whose pasts are bfloat16."""
    directory = save_tiny_decoder(tmp_path_factory.mktemp("tiny"))
    models = json.dumps({"smollm2-135m": str(directory), "attention": "attention:hidden=512,heads=8"})
    settings = {"models": models, "kv_memory": "128MiB", "kv_dtype": "bfloat16", "max_past_bytes": str(MAX_PAST)}
    with Server("service", **settings) as first, Server("service", **settings) as second:
        yield [first.address(), second.address()]


def long_past(client: Client, slots: int = LONG) -> Past:
    """Of the layer; small whole numbers, which bfloat16 holds exactly."""
    shape = (1, 8, 64, slots)
    key = np.random.default_rng(0).integers(-99, 99, shape).astype(np.float32)
    fingerprint = next(card.fingerprint for card in client.models() if card.id == "attention")
    return Past({"key_past.0": key, "value_past.0": key.swapaxes(2, 3) + 1}, [slots], "attention", fingerprint)


def test_a_decoder_goes_on_in_another_service(addresses: list[str], tmp_path: Path) -> None:
    here, there = map(Client, addresses)
    with here, there:
        session = here.sessions.create("smollm2-135m", batch_size=2)
        session.prefill(text=["The capital of France is", "One, two"])
        session.truncate([length - 1 for length in session.valid_length])  # so that both replay their last position
        session.past().save(tmp_path / "session.past")
        copy = there.sessions.create("smollm2-135m", batch_size=2)
        copy.load_past(Past.load(tmp_path / "session.past"))
        assert (copy.valid_length, copy.version) == (session.valid_length, 1)
        assert copy.past().to_bytes() == (tmp_path / "session.past").read_bytes()
        replies = [each.generate(max_tokens=8, ignore_eos=True).outputs for each in (session, copy)]
        assert replies[0] == replies[1]
        assert copy.past().digest == session.past().digest


def test_an_attention_layer_goes_on_in_another_service(addresses: list[str]) -> None:
    here, there = map(Client, addresses)
    inputs = np.random.default_rng(1).normal(size=(1, 6, 512)).astype(np.float16)
    with here, there:
        session, copy = here.sessions.create("attention"), there.sessions.create("attention")
        mask = np.tri(6, dtype=np.uint8)[None]
        session.prefill(query=inputs, key=inputs, value=inputs, attention_mask=mask)
        copy.load_past(session.past())
        new = inputs[:, :1]
        outs = [each.step(query=new, key=new, value=new).attn_out for each in (session, copy)]
        assert outs[0] is not None
        assert outs[1] is not None
        np.testing.assert_array_equal(outs[0], outs[1])


def test_a_long_past_there_and_back(addresses: list[str]) -> None:
    with Client(addresses[0]) as client, client.sessions.create("attention") as session:
        past = long_past(client)
        assert len(past.to_bytes()) > 16 << 20
        session.load_past(past)
        assert session.past().digest == past.digest


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_long_past_there_and_back_without_blocking(addresses: list[str]) -> None:
    with Client(addresses[0]) as client:
        past = long_past(client)
    async with AsyncClient(addresses[0]) as aio, await aio.sessions.create("attention") as session:
        await session.load_past(past)
        assert (await session.past()).digest == past.digest


def test_a_long_past_that_is_refused_is_told_why(addresses: list[str]) -> None:
    """The refusal may come before the body was read."""
    with Client(addresses[0]) as client:
        past = long_past(client)
        session = client.sessions.create("attention")
        session.delete()
        with pytest.raises(errors.SessionGone):
            session.load_past(past)
        other = client.sessions.create("attention")
        past.arrays["key_past.0"][0, 0, 0, -1] = np.nan
        with pytest.raises(errors.InvalidInput) as caught:
            other.load_past(past)
        assert (caught.value.field, other.refresh().valid_length) == ("key_past.0", [0])
        with pytest.raises(errors.InvalidInput, match=f"longer than {MAX_PAST} bytes"):
            other.load_past(long_past(client, 12_000))
        other.delete()


def test_the_page_s_examples(addresses: list[str], tmp_path: Path) -> None:
    """In order and in one directory, for they build on each other."""
    with Client(addresses[0]) as client:
        client.sessions.create("smollm2-135m", id="tour").prefill(text="The capital")
        blocks = re.findall(r"```(sh|python)\n(.*?)```", PAGE, flags=re.DOTALL)
        assert [language for language, _ in blocks] == ["sh", "python", "python"]
        for line in blocks[0][1].splitlines():
            curl(line.replace("127.0.0.1:8000", addresses[0]), tmp_path)
        assert client.sessions.get("copy").valid_length == client.sessions.get("tour").valid_length
        for _, code in blocks[1:]:
            done = subprocess.run(
                [sys.executable, "-W", "error", "-c", code.replace("http://127.0.0.1:8000", addresses[0])],
                cwd=tmp_path,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
            assert done.returncode == 0, done.stderr
            assert done.stdout


def curl(line: str, directory: Path) -> None:
    """What curl does with these options, where there may be none."""
    program, *words, url = shlex.split(line)
    options = dict(zip(words[::2], words[1::2], strict=True))
    assert (program, set(options) <= {"-o", "-T", "-H", "--json"}) == ("curl", True)
    headers = {"Content-Type": "application/json"} if "--json" in options else {}
    headers |= dict([options["-H"].split(": ")]) if "-H" in options else {}
    body = (directory / options["-T"]).read_bytes() if "-T" in options else options.get("--json", "").encode()
    method = "PUT" if "-T" in options else "POST" if "--json" in options else "GET"
    reply = httpx.request(method, url, content=body, headers=headers)
    assert reply.is_success, f"{line}: {reply.text}"
    if "-o" in options:
        (directory / options["-o"]).write_bytes(reply.content)
