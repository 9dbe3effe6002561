"""Decoders against transformers' own models of the same weights, and the laws of a session on real attention."""

import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.batch import Append, Generate, Sample, Truncate, Want
from tests.engine.models import CACHE, FAMILIES, Served, reference_logits, reference_model, serve_checkpoint

ROOT = Path(__file__).parent.parent.parent
BACKENDS = ["cpu", "sdpa"]
ALL = Want(logits="all")


def words(count: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(89), k=count)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Path]]:
    saved = {}
    for family in FAMILIES:
        path = tmp_path_factory.mktemp(family)
        model = reference_model(family)
        model.save_pretrained(path)
        saved[family] = (model, path)
    return saved


@pytest.fixture(scope="session", params=BACKENDS)
def llama(request: pytest.FixtureRequest, checkpoints: dict[str, tuple[Any, Path]]) -> Served:
    return serve_checkpoint(checkpoints["llama"][1], backend_name=request.param)


@pytest.mark.parametrize("backend_name", BACKENDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_float32_logits_equal_transformers(
    family: str, backend_name: str, checkpoints: dict[str, tuple[Any, Path]]
) -> None:
    reference, path = checkpoints[family]
    served = serve_checkpoint(path, backend_name=backend_name, token_budget=50)
    tokens = words(140)  # more than YARN's and Llama 3's original 64, in three chunks and then steps
    expected = reference_logits(reference, tokens)
    session = served.open()
    logits = [served.logits(session, tokens[:120])]
    logits += [served.logits(session, [token]) for token in tokens[120:]]
    torch.testing.assert_close(torch.cat(logits), expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_bfloat16_weights_and_float16_past_stay_near_float32(
    family: str, checkpoints: dict[str, tuple[Any, Path]]
) -> None:
    """bfloat16 keeps 8 bits: over 3 layers an error of some 2 % of the logits' spread is rounding, not a fault. Where
    float32's best two are further apart than twice the largest error, the argmax must be the same."""
    reference, path = checkpoints[family]
    served = serve_checkpoint(path, dtype=torch.bfloat16, kv_dtype="float16")
    tokens = words(100)
    expected = reference_logits(reference, tokens)
    logits = served.logits(served.open(), tokens)
    error = (logits - expected).abs().max()
    assert error < 0.05 * (expected.max() - expected.min())
    best = expected.topk(2).values
    clear = (best[:, 0] - best[:, 1]) > 2 * error
    assert clear.sum() > 20
    assert torch.equal(logits.argmax(-1)[clear], expected.argmax(-1)[clear])


def test_prefill_equals_shorter_prefill_and_steps_for_every_split(llama: Served) -> None:
    tokens = words(40)
    whole = llama.logits(llama.open(), tokens)
    for split in range(1, 40):
        session = llama.open()
        parts = [llama.logits(session, tokens[:split])]
        parts += [llama.logits(session, [token]) for token in tokens[split:]]
        torch.testing.assert_close(torch.cat(parts), whole, atol=1e-4, rtol=0)
        llama.engine.delete_session(session)


def test_ragged_rows_in_one_batch_equal_each_alone(llama: Served) -> None:
    rows = [words(length, seed=length) for length in (1, 17, 40, 3)]
    batch = llama.open(batch_size=4)
    padded = [row + [0] * (40 - len(row)) for row in rows]
    llama.tokens(batch, *padded, batch_valid_length=[len(row) for row in rows])
    for step in range(5):
        new = [[(row[0] + step) % 89] for row in rows]
        got = llama.tokens(batch, *new, want=ALL, step=True).outputs["logits"]
        rows = [row + own for row, own in zip(rows, new, strict=True)]
        for row, logits in zip(rows, torch.from_numpy(got), strict=True):
            alone = llama.logits(llama.open(), row)[-1:]
            torch.testing.assert_close(logits, alone, atol=1e-4, rtol=0)


def test_different_sessions_share_a_batch_and_not_their_past(llama: Served) -> None:
    """Prefills, steps and a replay of three sessions at once."""
    tokens = [words(30, seed=seed) for seed in range(3)]
    sessions = [llama.open() for _ in tokens]
    for session, own in zip(sessions, tokens, strict=True):
        llama.tokens(session, own[:20])
    llama.finish(Truncate(sessions[2], 15))
    operations: list[Append] = []
    for session, new in zip(sessions[:2], (tokens[0][20:30], tokens[1][20:21]), strict=True):
        operations.append(Append(session, {"token_ids": torch.tensor([new]).numpy()}, want=ALL))
        llama.engine.submit(operations[-1])
    last = Generate(sessions[2], 4)
    llama.engine.submit(last)
    while llama.engine.run_once():
        llama.engine.check()
    for operation, row in zip(operations, (tokens[0], tokens[1][:21]), strict=True):
        logits = torch.from_numpy(operation.future.result(0).outputs["logits"][0])
        alone = llama.logits(llama.open(), row)
        torch.testing.assert_close(logits, alone[20:], atol=1e-4, rtol=0)
    fresh = llama.open()
    llama.tokens(fresh, tokens[2][:15])
    assert last.future.result(0).token_ids == llama.finish(Generate(fresh, 4)).token_ids


@pytest.mark.parametrize("at", [1, 15, 16, 17, 30])
def test_a_fork_continues_exactly_as_its_parent_would(llama: Served, at: int) -> None:
    tokens, parent = words(30), llama.open()
    llama.tokens(parent, tokens)
    children = [child.id for child in llama.engine.fork(parent, count=2, at=at)]
    llama.tokens(children[1], words(20, seed=9))  # writes into what it shares
    expected = llama.open()
    llama.tokens(expected, tokens[:at])
    new = words(20, seed=5)
    torch.testing.assert_close(llama.logits(children[0], new), llama.logits(expected, new), atol=1e-4, rtol=0)
    if at == 30:  # computed by the very same calls
        assert torch.equal(llama.logits(llama.engine.fork(parent)[0].id, new), llama.logits(parent, new))


@pytest.mark.parametrize("length", [0, 1, 15, 16, 17, 39])
def test_truncate_then_append_equals_never_having_appended(llama: Served, length: int) -> None:
    tokens, session, expected = words(40), llama.open(), llama.open()
    llama.tokens(session, tokens)
    llama.finish(Truncate(session, length))
    if length:
        llama.tokens(expected, tokens[:length])
    new = words(20, seed=5)
    torch.testing.assert_close(llama.logits(session, new), llama.logits(expected, new), atol=1e-4, rtol=0)


def test_generate_is_greedy_decoding(checkpoints: dict[str, tuple[Any, Path]], llama: Served) -> None:
    reference, _ = checkpoints["llama"]
    tokens = words(20)
    session = llama.open()
    llama.tokens(session, tokens)
    generated = llama.finish(Generate(session, 12)).token_ids[0]
    for token in generated:
        assert int(reference_logits(reference, tokens)[-1].argmax()) == token
        tokens.append(token)


def test_outputs_are_given_as_asked(llama: Served) -> None:
    session = llama.open()
    everything = llama.tokens(
        session, words(9), want=Want(logits="last", top_logprobs=3, sample=Sample(), logprob=True)
    ).outputs
    logits = torch.from_numpy(everything["logits"])
    assert logits.shape == (1, 89)
    logprobs = torch.log_softmax(logits[0], -1)
    ids, values = zip(*everything["top_logprobs"][0], strict=True)
    assert list(ids) == logits[0].topk(3).indices.tolist()
    torch.testing.assert_close(torch.tensor(values), logprobs[list(ids)])
    assert everything["next_token"] == [ids[0]]
    assert everything["logprob"] == pytest.approx([float(logprobs[ids[0]])])
    assert llama.tokens(session, [1]).outputs == {}


SERVES = """
import sys
from pathlib import Path
import numpy as np, torch
from engine.attention import choose
from engine.batch import Generate, Sample
from engine.checkpoints.weights import Checkpoint
from engine.config import EngineConfig
from engine.engine import Engine
from engine.models.build import load_decoder
from engine.runner import ModelRunner

checkpoint, cache = Checkpoint.open(Path(sys.argv[1])), Path(sys.argv[2])
model = load_decoder("m", checkpoint, device="cpu", dtype=torch.bfloat16, kv_dtype="float16", kernels=True)
engine = Engine([ModelRunner(model, choose("cpu", "cpu", cache, print), 50, 16)], EngineConfig(block_size=16))
asked = Generate(engine.create_session("m").id, 4, sample=Sample(temperature=0.7))
asked.inputs = {"token_ids": np.array([[1, 2, 3]])}
engine.submit(asked)
while engine.run_once():
    pass
assert len(asked.future.result(0).token_ids[0]) == 4
print(*{"torch._dynamo", "torch._inductor", "triton", "sympy"} & sys.modules.keys())
"""


def test_what_serves_a_model_imports_no_compiler(checkpoints: dict[str, tuple[Any, Path]]) -> None:
    """torch imports its own, and triton, at the first of some calls: a second of each start, and 200 MB."""
    command = [sys.executable, "-c", SERVES, str(checkpoints["llama"][1]), str(CACHE)]
    ran = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    assert ran.stdout.split() == []
