"""Triton's own clients, sync and aio, against the real service: what they are told is what the native API tells."""

import inspect
import json
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from keypast import AppendResult, Client
from keypast.wire import Array
from tests.e2e.test_server import Server
from tests.tiny import save_tiny_decoder

pytestmark = [
    pytest.mark.anyio,
    # the asyncio client asks for a model's readiness and leaves the refusal's body unread
    pytest.mark.filterwarnings("ignore:Unclosed connection:ResourceWarning"),
]

HIDDEN, HEADS = 64, 4
LAYER, WORDS = "layer", "org/words"
INPUTS = ("query", "key", "value")


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    models = {
        WORDS: str(save_tiny_decoder(tmp_path_factory.mktemp("tiny"))),
        LAYER: f"attention:hidden={HIDDEN},heads={HEADS}",
    }
    with Server("service", models=json.dumps(models), kv_memory="64MiB") as server:
        yield server.address()


@pytest.fixture
def native(address: str) -> Iterator[Client]:
    with Client(address) as client:
        yield client


class Caller:
    """Either client, awaited."""

    def __init__(self, client: Any) -> None:
        self._client = client

    async def __call__(self, method: str, *arguments: Any, **options: Any) -> Any:
        result = getattr(self._client, method)(*arguments, **options)
        return await result if inspect.isawaitable(result) else result


@pytest.fixture(params=["sync", "aio"])
async def call(request: pytest.FixtureRequest, address: str) -> AsyncIterator[Caller]:
    kind = triton if request.param == "sync" else triton_aio
    caller = Caller(kind.InferenceServerClient(address.removeprefix("http://")))
    yield caller
    await caller("close")


def given(arrays: Mapping[str, Array], *, binary: bool = True) -> list[Any]:
    inputs = []
    for name, array in arrays.items():
        datatype = "BF16" if array.dtype == ml_dtypes.bfloat16 else np_to_triton_dtype(array.dtype)
        tensor = triton.InferInput(name, list(array.shape), datatype)
        tensor.set_data_from_numpy(array, binary_data=binary)
        inputs.append(tensor)
    return inputs


def wanted(*names: str, binary: bool = True) -> list[Any]:
    return [triton.InferRequestedOutput(name, binary_data=binary) for name in names]


def tensors(n: int, past: int, dtype: Any = np.float16, rows: int = 1) -> dict[str, Any]:
    """Of a causal layer."""
    random = np.random.default_rng([n, past])
    arrays = {name: random.normal(size=(rows, n, HIDDEN)).astype(dtype) for name in INPUTS}
    mask = np.tri(n, past + n, past, dtype=bool)
    return {**arrays, "attention_mask": np.repeat(mask[None], rows, 0)}


def told(result: AppendResult) -> bytes:
    """By the native API."""
    assert result.attn_out is not None
    return result.attn_out.tobytes()


async def test_health_and_metadata(call: Caller) -> None:
    assert await call("is_server_live")
    assert await call("is_server_ready")
    assert "sequence(string_id)" in (await call("get_server_metadata"))["extensions"]
    for model in (LAYER, WORDS):
        assert await call("is_model_ready", model)
        assert await call("is_model_ready", model, "1")
        assert not await call("is_model_ready", model, "2")
        metadata, config = await call("get_model_metadata", model), await call("get_model_config", model, "1")
        assert metadata["name"] == config["name"] == model
        told = [(each["name"], f"TYPE_{each['datatype']}".replace("BYTES", "STRING")) for each in metadata["inputs"]]
        assert told == [(each["name"], each["data_type"]) for each in config["input"]]
        assert "sequence_batching" in config
    assert not await call("is_model_ready", "nobody")


@pytest.mark.parametrize("sequence_id", [2**64 - 1, "a sequence"])
async def test_a_sequence_of_a_layer(call: Caller, native: Client, sequence_id: int | str) -> None:
    """Prefill and steps in binary float16, no mask on a step; to the bit."""
    with native.sessions.create(LAYER) as session:
        past = 0
        for at, n in enumerate((5, 1, 1, 1)):
            arrays = tensors(n, past)
            expected = told((session.step if at else session.prefill)(**arrays))
            if at:
                del arrays["attention_mask"]
            flags = {"sequence_id": sequence_id, "sequence_start": at == 0, "sequence_end": at == 3}
            result = await call("infer", LAYER, given(arrays), request_id=str(at), **flags)
            out = result.as_numpy("attn_out")
            assert (out.dtype, out.shape) == (np.float16, (1, n, HIDDEN))
            assert out.tobytes() == expected
            assert result.get_response()["id"] == str(at)
            past += n
    with pytest.raises(InferenceServerException, match="sequence_start"):
        await call("infer", LAYER, given(tensors(1, past)), sequence_id=sequence_id)


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
async def test_packed_both_ways(call: Caller, native: Client, coding: str) -> None:
    arrays = tensors(5, 0)
    with native.sessions.create(LAYER) as session:
        expected = told(session.prefill(**arrays))
    packed = {"request_compression_algorithm": coding, "response_compression_algorithm": coding}
    for binary in (True, False):
        result = await call("infer", LAYER, given(arrays), outputs=wanted("attn_out", binary=binary), **packed)
        assert result.as_numpy("attn_out").tobytes() == expected


async def test_bfloat16(call: Caller, native: Client) -> None:
    arrays = tensors(4, 0, ml_dtypes.bfloat16)
    wide: dict[str, Any] = {
        name: array.astype(np.float32) if name in INPUTS else array for name, array in arrays.items()
    }
    with native.sessions.create(LAYER) as session:
        expected = told(session.prefill(**wide))
    out = (await call("infer", LAYER, given(arrays))).as_numpy("attn_out")
    assert (out.dtype, out.tobytes()) == (np.float32, expected)


async def test_a_past_goes_along(call: Caller, native: Client) -> None:
    """Without any session of the client's: the presents of a call are the pasts of the next; outputs and presents are
    those of a session, to the bit, and it stays the only one."""
    past = {"key_past": np.zeros((2, HEADS, HIDDEN // HEADS, 0), np.float16)}
    past["value_past"] = past["key_past"].swapaxes(2, 3).copy()
    total = 0
    with native.sessions.create(LAYER, batch_size=2) as session:
        for n in (4, 1, 3):
            arrays = tensors(n, total, rows=2)
            expected = told(session.prefill(**arrays))
            result = await call("infer", LAYER, given(arrays | past))
            total += n
            assert result.as_numpy("attn_out").tobytes() == expected
            past = {f"{name}_past": result.as_numpy(f"{name}_present") for name in ("key", "value")}
        file = session.past()
        assert past["key_past"].tobytes() == file.key().tobytes()
        assert past["value_past"].tobytes() == file.value().tobytes()
        assert [each.id for each in native.sessions.list()] == [session.id]


@pytest.mark.parametrize("binary", [True, False])
async def test_texts(call: Caller, native: Client, binary: bool) -> None:
    texts = ["The capital of France is", "hello"]
    with native.sessions.create(WORDS, batch_size=2) as session:
        expected = session.prefill(text=texts, sample={"temperature": 0}, logits="last")
        arrays = {"text": np.array([text.encode() for text in texts], dtype=object)}
        outputs = wanted("logits", "next_token", "text", binary=binary)
        result = await call("infer", WORDS, given(arrays, binary=binary), outputs=outputs)
        assert result.as_numpy("next_token").tolist() == expected.next_token
        said = [text if isinstance(text, str) else text.decode() for text in result.as_numpy("text")]
        assert said == expected.text
        assert expected.logits is not None
        assert result.as_numpy("logits").tobytes() == expected.logits.tobytes()


async def test_what_is_refused(call: Caller) -> None:
    wide = {name: np.zeros((1, 1, HIDDEN + 1), np.float16) for name in INPUTS}
    for model, arrays, status, words in (
        (LAYER, wide | {"attention_mask": np.ones((1, 1, 1), bool)}, "422", "query: shape must be"),
        ("nobody", tensors(1, 0), "404", "model 'nobody' is not loaded"),
        (WORDS, tensors(1, 0), "422", "query: model org/words takes token_ids"),
    ):
        with pytest.raises(InferenceServerException) as refused:
            await call("infer", model, given(arrays))
        assert refused.value.status() == status
        assert words in refused.value.message()
