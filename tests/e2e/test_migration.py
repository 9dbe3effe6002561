"""A migration user's session: weights from MindSpore, from torch and in our names, in float16 over HTTP."""

import json
from pathlib import Path

import numpy as np

from engine.batch import Array
from keypast import Client
from tests.e2e.test_server import Server
from tests.engine.compat.three_namings import HEADS, SIZE, causal, save_three, sequences, trained_layer, whole

BATCH, LENGTH, PREFILL = 3, 12, 8


def test_three_namings_serve_one_layer(tmp_path: Path) -> None:
    layer, inputs = trained_layer(), sequences(BATCH, LENGTH)
    expected = whole(layer, inputs)
    files = save_three(layer, tmp_path)
    models = {
        name: f"attention:hidden={SIZE},heads={HEADS},dtype=float16,weights={path}" for name, path in files.items()
    }
    serving = Server("service", models=json.dumps(models), kv_memory="64MiB")
    with serving as server, Client(server.address()) as client:
        cards = client.models()
        assert {card.dtype for card in cards} == {"float16"}
        assert len({card.fingerprint for card in cards}) == 1
        got = {name: _prefilled_and_stepped(client, name, inputs) for name in models}
    for name, out in got.items():
        assert out.dtype == np.float16
        assert (np.abs(out - expected) / np.maximum(1, np.abs(expected))).max() < 1e-2, name
        np.testing.assert_array_equal(out, got["torch"])


def _prefilled_and_stepped(client: Client, model: str, inputs: dict[str, Array]) -> Array:
    query, key, value = inputs["query"], inputs["key"], inputs["value"]
    past = slice(PREFILL)
    with client.sessions.create(model, batch_size=BATCH) as session:
        prefill = session.prefill(
            query=query[:, past], key=key[:, past], value=value[:, past], attention_mask=causal(BATCH, PREFILL)
        )
        news = [slice(at, at + 1) for at in range(PREFILL, LENGTH)]
        steps = [session.step(query=query[:, new], key=key[:, new], value=value[:, new]) for new in news]
    return np.concatenate([np.asarray(part.attn_out) for part in (prefill, *steps)], axis=1)
