"""Scores of real models of both kinds: what a prefill would answer, bit by bit, and then the next step's own bits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.batch import Append, Generate, Truncate, Want
from engine.models import build
from engine.models.base import LoadOptions
from engine.runner import ModelRunner
from tests.engine.models import CACHE, Served, backend, reference_logits, reference_model, serve_checkpoint

HIDDEN = 24
PAST = 37  # in the middle of its third block
Sessions = list[str]


def served_decoder(path: Path, backend_name: str) -> Served:
    return serve_checkpoint(path, backend_name=backend_name, kv_dtype="float16", token_budget=16)


def served_layer(path: Path, backend_name: str) -> Served:
    loaded = build("layer", f"attention:hidden={HIDDEN},heads=3", LoadOptions(CACHE, dtype="float32"), print)
    return Served(ModelRunner(loaded.model, backend(backend_name), 200, 16), 16)


def words(n: int, past: int) -> dict[str, np.ndarray]:
    return {"token_ids": np.random.default_rng(past).integers(0, 89, (1, n))}


def tensors(n: int, past: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(past)
    inputs = {name: random.normal(size=(1, n, HIDDEN)).astype(np.float32) for name in ("query", "key", "value")}
    return {**inputs, "attention_mask": np.tri(n, past + n, past, dtype=np.float32)[None]}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    reference_model("llama").save_pretrained(path)
    return path


def bits(result: Any) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in result.outputs.items()}


@pytest.mark.parametrize("backend_name", ["sdpa", "cpu"])
@pytest.mark.parametrize(
    ("serve", "inputs", "want"),
    [(served_decoder, words, Want(logits="all")), (served_layer, tensors, Want())],
    ids=["decoder", "attention"],
)
def test_a_score_is_a_prefill_that_leaves_no_bit_behind(
    llama: Path,
    serve: Callable[[Path, str], Served],
    inputs: Callable[[int, int], dict[str, np.ndarray]],
    want: Want,
    backend_name: str,
) -> None:
    served = serve(llama, backend_name)
    told = []
    for scored in (False, True):
        session = served.open()
        served.append(session, inputs(PAST, 0), want)
        fork = served.engine.fork(session)[0].id
        for which in (session, fork):  # the fork's tail is shared until its first step
            past = served.engine.session(which).valid_length[0]
            score = inputs(40, past)
            if scored:
                given = served.append(which, score, want, keep=False)
                again = served.append(which, score, want, keep=False)
                assert bits(given) == bits(again)
            mate = served.engine.fork(which)[0].id
            prefilled = served.append(mate, score, want)
            if scored:
                assert bits(given) == bits(prefilled)
            for _ in range(2):
                past = served.engine.session(which).valid_length[0]
                told.append((scored, bits(served.append(which, inputs(1, past), want, step=True))))
    steps = [step for scored, step in told if not scored]
    assert [step for scored, step in told if scored] == steps
    assert len(steps) == 4


def test_the_logits_are_those_of_the_whole_text(llama: Path) -> None:
    served = serve_checkpoint(llama)
    tokens = words(60, 0)["token_ids"][0].tolist()
    session = served.open()
    served.tokens(session, tokens[:PAST])
    score = served.tokens(session, tokens[PAST:], want=Want(logits="all"), keep=False)
    expected = reference_logits(reference_model("llama"), tokens)[PAST:]
    torch.testing.assert_close(torch.from_numpy(score.outputs["logits"][0]), expected, atol=1e-3, rtol=0)


@pytest.fixture(scope="module")
def foretold(llama: Path) -> tuple[list[int], np.ndarray]:
    """A text of 60 ids and the log-probability of each but the first, by transformers over the whole of it."""
    tokens = words(60, 0)["token_ids"][0].tolist()
    logprobs = torch.log_softmax(reference_logits(reference_model("llama"), tokens), -1)
    told = logprobs[:-1].gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
    return tokens, np.concatenate([[np.nan], told.numpy()])


@pytest.mark.parametrize("backend_name", ["sdpa", "cpu"])
@pytest.mark.parametrize("budget", [7, 512])
def test_log_probabilities_of_the_tokens_given(
    llama: Path, foretold: tuple[list[int], np.ndarray], budget: int, backend_name: str
) -> None:
    """By score, by prefill and by step; from nothing, from a tail, and from a past that was cut back and has none."""
    served = serve_checkpoint(llama, token_budget=budget, backend_name=backend_name)
    tokens, expected = foretold
    want = Want(token_logprobs=True)

    def close(result: Any, start: int, stop: int) -> None:
        told = result.outputs["token_logprobs"]
        assert (told.shape, told.dtype) == ((1, stop - start), np.float32)
        np.testing.assert_allclose(told[0], expected[start:stop], atol=2e-3)

    session = served.open()
    close(served.tokens(session, tokens, want=want, keep=False), 0, 60)
    close(served.tokens(session, tokens[:1], want=want), 0, 1)
    close(served.tokens(session, tokens[1:PAST], want=want), 1, PAST)
    close(served.tokens(session, tokens[PAST : PAST + 1], want=want, step=True), PAST, PAST + 1)
    served.finish(Truncate(session, PAST - 4))
    score = served.tokens(session, tokens[PAST - 4 :], want=want, keep=False)
    close(score, PAST - 4, 60)
    assert (score.effort.computed, score.effort.reused) == ([60 - PAST + 5], [PAST - 5])
    step = served.tokens(session, tokens[PAST - 4 : PAST - 3], want=want, step=True)
    close(step, PAST - 4, PAST - 3)
    (child,) = served.engine.fork(session, at=16)
    close(served.tokens(child.id, tokens[16:], want=Want(token_logprobs=True, logits="all")), 16, 60)
    assert np.isfinite(served.tokens(session, tokens[PAST - 3 :], want=want).outputs["token_logprobs"]).all()


def test_asking_for_log_probabilities_changes_nothing_else(llama: Path) -> None:
    """Not the logits either, whose row has one position more when its past has no tail."""
    served = serve_checkpoint(llama, token_budget=16)
    tokens = words(60, 0)["token_ids"][0].tolist()
    told = []
    for want in (Want(logits="all"), Want(logits="all", token_logprobs=True)):
        session = served.open()
        served.tokens(session, tokens[:40])
        served.finish(Truncate(session, PAST))
        logits = torch.from_numpy(served.tokens(session, tokens[PAST:], want=want).outputs["logits"][0])
        told.append(torch.cat([logits, served.logits(session, [5])]))
    torch.testing.assert_close(told[0], told[1], atol=1e-4, rtol=0)


@pytest.mark.parametrize("budget", [7, 512])
def test_the_likeliest_in_each_place(llama: Path, foretold: tuple[list[int], np.ndarray], budget: int) -> None:
    """By transformers over the whole text; where the token given is the likeliest, it has the very same number."""
    served = serve_checkpoint(llama, token_budget=budget)
    tokens, _ = foretold
    logprobs = torch.log_softmax(reference_logits(reference_model("llama"), tokens), -1)
    session = served.open()
    for start, stop in ((0, PAST), (PAST, 60)):
        outputs = served.tokens(
            session, tokens[start:stop], want=Want(token_logprobs=True, token_top_logprobs=3)
        ).outputs
        ids, told = outputs["token_top_ids"][0], outputs["token_top_logprobs"][0]
        assert (ids.shape, ids.dtype, told.dtype) == ((stop - start, 3), np.int64, np.float32)
        first = int(start == 0)
        assert np.isnan(told[:first]).all()
        assert (ids[:first] == -1).all()
        expected = logprobs[start - 1 + first : stop - 1].topk(3)
        np.testing.assert_allclose(told[first:], expected.values.numpy(), atol=2e-3)
        gathered = logprobs[start - 1 + first : stop - 1].gather(1, torch.from_numpy(ids[first:]))
        np.testing.assert_allclose(told[first:], gathered.numpy(), atol=2e-3)
    greedy = served.finish(Generate(session, 9)).token_ids[0]
    again = served.open()
    served.tokens(again, tokens)
    outputs = served.tokens(again, greedy, want=Want(token_logprobs=True, token_top_logprobs=1)).outputs
    assert outputs["token_top_ids"][0, :, 0].tolist() == greedy
    assert (outputs["token_top_logprobs"][0, :, 0] == outputs["token_logprobs"][0]).all()


def test_a_prompt_and_its_generation_are_one_turn_of_the_model(llama: Path) -> None:
    """The same tokens as after a prefill; also where the session is cut back before, and begins as another does."""
    served = serve_checkpoint(llama, token_budget=16)
    tokens = words(PAST + 3, 0)["token_ids"]
    session = served.open()
    served.tokens(session, tokens[0].tolist())
    plain = served.finish(Generate(session, 8, logprobs=True, top_logprobs=2))
    at_once = served.finish(Generate(served.open(), 8, logprobs=True, top_logprobs=2, inputs={"token_ids": tokens}))
    cut = served.finish(Generate(session, 8, inputs={"token_ids": tokens[:, PAST:]}, at=PAST))
    like = served.engine.create_session(served.engine.session(session).model, like=tokens[0].tolist())
    assert like.valid_length == [PAST + 2]
    shared = served.finish(Generate(like.id, 8, inputs={"token_ids": tokens[:, PAST + 2 :]}))
    for result in (at_once, cut, shared):
        assert result.token_ids == plain.token_ids
    np.testing.assert_allclose(at_once.logprobs, plain.logprobs, atol=1e-5)
    for token, logprob, likeliest in zip(plain.token_ids[0], plain.logprobs[0], plain.top_logprobs[0], strict=True):
        assert likeliest[0][0] == token
        assert likeliest[0][1] == logprob
        assert likeliest[1][1] <= likeliest[0][1]


def test_rows_of_different_lengths_and_ends_have_log_probabilities_each(
    llama: Path, foretold: tuple[list[int], np.ndarray]
) -> None:
    """Two rows of one session beside another session that asks for none: each as alone."""
    served = serve_checkpoint(llama, token_budget=9)
    tokens, expected = foretold
    ragged = served.open(batch_size=2)
    served.tokens(ragged, tokens[:20], tokens[:20], batch_valid_length=[20, 0])
    rows = np.array([tokens[20:32], tokens[:12]])
    append = Append(ragged, {"token_ids": rows}, batch_valid_length=[25, 12], want=Want(token_logprobs=True))
    mate = Append(served.open(), {"token_ids": rows[:1]}, want=Want(logits="last"))
    served.engine.submit(mate)
    told = served.finish(append).outputs["token_logprobs"]
    np.testing.assert_allclose(told[0, :5], expected[20:25], atol=2e-3)
    np.testing.assert_allclose(told[1], expected[:12], atol=2e-3)
    assert mate.future.result(0).outputs.keys() == {"logits"}


def test_a_generation_goes_on_from_the_past_alone(llama: Path) -> None:
    """It begins with the last position's outputs, which the session keeps."""
    served = serve_checkpoint(llama)
    drawn = []
    for scored in (False, True):
        session = served.open()
        served.append(session, words(PAST, 0))
        if scored:
            served.append(session, words(20, 1), keep=False)
        drawn.append(served.finish(Generate(session, 12)).token_ids)
    assert drawn[0] == drawn[1]
