"""Models that can be worked out in the head, and the service over them. No weights, no torch."""

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

import engine.text
from engine.batch import Array, Batch, Row, RowResult
from engine.config import EngineConfig
from engine.engine import Engine
from engine.specs import KVSpec, ModelSpec, TensorSpec
from keypast.wire import SAFETENSORS_TYPE, dump_tensors, encode_options, encode_tensor
from service.lifecycle import Loaded
from service.text import TextModel
from tests.fakes import FakeMemory

H = 4
END = 256
VOCABULARY = 259
POISON = 13  # a token, or a value, that makes a batch fail
TEMPLATE = (
    "{% for message in messages %}<|in|>{{ message.role }}: {{ message.content }}<|out|>{% endfor %}"
    "{% if add_generation_prompt %}<|in|>{% endif %}"
)


class FakeRunner:
    """`gate` is open; close it to hold every batch. `batches` are the rows' (start, stop) of each that ran; `broken`
    is raised instead of the next; `before_each` is called first. What it was fed is in its `memory`."""

    def __init__(self, spec: ModelSpec, blocks: int, block_size: int) -> None:
        self.spec = spec
        self.blocks = blocks
        self.memory = FakeMemory(spec, block_size)
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.held = threading.Event()
        self._holds_in = 0
        self.before_each: Callable[[], object] = bool
        self.broken: BaseException | None = None
        self.batches: list[list[tuple[int, int]]] = []

    def hold(self, batch: int) -> None:
        """Closes the gate at the so-manieth batch from now, and sets `held` there."""
        self._holds_in = batch

    def run(self, batch: Batch) -> list[RowResult]:
        self._turn()
        self.batches.append([(row.start, row.stop) for row in batch.rows])
        results = [self.row(row) for row in batch.rows]
        self.memory.copy(batch.copies)
        for row in batch.rows:
            self.memory.write(row.table, row.start, self.numbers(row) if row.count else [])
        return results

    def read_past(self, tables: list[list[int]], lengths: list[int]) -> dict[str, Array]:
        self._turn()
        return self.memory.read_past(tables, lengths)

    def write_past(self, tables: list[list[int]], lengths: list[int], arrays: dict[str, Array]) -> None:
        self._turn()
        self.memory.write_past(tables, lengths, arrays)

    def zero(self, blocks: list[int]) -> None:
        self.memory.zero(blocks)

    def _turn(self) -> None:
        self.before_each()
        self._holds_in -= 1
        if self._holds_in == 0:
            self.gate.clear()
            self.held.set()
        self.entered.set()
        assert self.gate.wait(20)
        if self.broken is not None:
            raise self.broken

    def row(self, row: Row) -> RowResult:
        raise NotImplementedError

    def numbers(self, row: Row) -> list[float]:
        """What is kept of each position."""
        raise NotImplementedError


class FakeDecoder(FakeRunner):
    """The token after t is `after[t]`, else t + 1; the logits say so with 1.0. Keeps what it was fed, and the seeds.
    What it says was likeliest in the place of a token given is that token, and those that follow it."""

    def __init__(self, blocks: int = 64, block_size: int = 4, kv_dtype: str = "float16") -> None:
        super().__init__(
            ModelSpec(
                name="letters",
                kind="decoder",
                inputs=(TensorSpec("token_ids", ("int64",), values=(0, VOCABULARY - 1)),),
                outputs=(
                    TensorSpec("logits", ("float32",), (VOCABULARY,), required=False),
                    TensorSpec("top_logprobs", ("float32",), required=False),
                    TensorSpec("token_logprobs", ("float32",), required=False),
                    TensorSpec("next_token", ("int64",), required=False),
                ),
                kv=KVSpec(1, 1, 8, kv_dtype),
                causal=True,
                max_length=100,
                dtype="float32",
                device="cpu",
                fingerprint="sha256:0",
                history="token_ids",
                vocab_size=VOCABULARY,
            ),
            blocks,
            block_size,
        )
        self.after: dict[int, int] = {}
        self.fed: list[list[int]] = []
        self.seeds: list[int] = []

    def next(self, token: int) -> int:
        return self.after.get(token, (token + 1) % VOCABULARY)

    def row(self, row: Row) -> RowResult:
        tokens = row.appended("token_ids").tolist() if row.count else []
        if POISON in tokens:
            raise RuntimeError("poisoned /secret/path 0x7f0000")
        self.fed.append(tokens)
        last = tokens[-1] if tokens else row.tail if row.tail is not None else (row.history or [0])[-1]
        want, result = row.work.want, RowResult(tail=last if row.last else None)
        if want.logits == "all":
            result.positions["logits"] = np.stack([self.logits(token) for token in tokens])
        if want.token_logprobs:
            told = result.positions["token_logprobs"] = self.foretold(row, tokens)
            if k := want.token_top_logprobs:
                likeliest = np.arange(k) + np.array(tokens)[:, None]
                result.positions["token_top_ids"] = np.where(np.isnan(told)[:, None], -1, likeliest)
                result.positions["token_top_logprobs"] = np.where(np.isnan(told), np.nan, 0)[:, None] - np.arange(k)
        if row.last and want.logits == "last":
            result.once["logits"] = self.logits(last)[None]
        if row.last and want.top_logprobs:
            result.once["top_logprobs"] = [(self.next(last) + k, -float(k)) for k in range(want.top_logprobs)]
        if row.last and want.sample is not None:
            self.seeds.append(want.sample.seed)
            result.once.update(next_token=self.next(last))
        if row.last and want.logprob:
            result.once.update(logprob=-0.5)
        return result

    def foretold(self, row: Row, tokens: list[int]) -> Array:
        """0.0 for a token that comes next, -1.0 for another, NaN for the first of all."""
        given = row.work.inputs["token_ids"][row.index].tolist()
        done = row.start - row.work.past_length[row.index]
        before = [*(row.history or []), *given][row.start - 1 : row.stop - 1] if row.start else [None, *tokens[:-1]]
        assert given[done : done + len(tokens)] == tokens
        told = [np.nan if one is None else -float(self.next(one) != t) for one, t in zip(before, tokens, strict=True)]
        return np.array(told, dtype=np.float32)

    def numbers(self, row: Row) -> list[float]:
        return list(map(float, row.appended("token_ids")))

    def logits(self, token: int) -> Array:
        logits = np.zeros(VOCABULARY, np.float32)
        logits[self.next(token)] = 1
        return logits


class FakeAttention(FakeRunner):
    """attn_out is query + the row's past length + the query's index; attn_weights are ones."""

    def __init__(self, blocks: int = 64, block_size: int = 4, kv_dtype: str = "float16") -> None:
        query = TensorSpec("query", ("float16", "float32"), (H,))
        past = (TensorSpec(name, ("float16", "float32"), (H,), axis="m") for name in ("key", "value"))
        mask = TensorSpec("attention_mask", ("uint8", "bool", "int32", "int64"), ("T",), required=False, values=(0, 1))
        super().__init__(
            ModelSpec(
                name="echo",
                kind="attention",
                inputs=(query, *past, mask),
                outputs=(
                    TensorSpec("attn_out", ("float16", "float32"), (H,)),
                    TensorSpec("attn_weights", ("float32",), ("T",), required=False),
                ),
                kv=KVSpec(1, 1, H, kv_dtype),
                causal=False,
                max_length=100,
                dtype="float32",
                device="cpu",
                fingerprint="sha256:1",
                appends="m",
            ),
            blocks,
            block_size,
        )

    def row(self, row: Row) -> RowResult:
        for name in row.work.inputs.keys() & {"query", "value"}:
            if (row.work.inputs[name][row.index] == POISON).any():
                raise RuntimeError("poisoned /secret/path 0x7f0000")
        if not row.queries:
            return RowResult()
        query = row.asked("query")
        positions = {"attn_out": query + row.start + np.arange(row.queries, dtype=query.dtype)[:, None]}
        once = {"attn_weights": np.ones((row.queries, row.stop), np.float32)} if row.work.want.need_weights else {}
        return RowResult(positions, once)

    def numbers(self, row: Row) -> list[float]:
        return list(map(float, row.appended("value")[:, 0] if "value" in row.work.inputs else []))


class FakeTokenizer(engine.text.Tokenizer):
    """`broken` is raised instead of a text."""

    broken: BaseException | None = None

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        if self.broken is not None:
            raise self.broken
        return super().decode(ids, skip_special=skip_special)


def byte_tokenizer() -> FakeTokenizer:
    """The token of a byte is the byte; three control tokens follow."""
    letters = {byte: letter for letter, byte in _byte_letters().items()}
    tokenizer = Tokenizer(models.BPE({letters[byte]: byte for byte in range(256)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in ("<|end|>", "<|in|>", "<|out|>")])
    return FakeTokenizer(tokenizer.to_str(), TEMPLATE)


def _byte_letters() -> dict[str, int]:
    """The letter that stands for each byte in byte-level vocabularies (GPT-2's table)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(rest)}


@dataclass
class Kind:
    """How to talk to one kind of model: the same test runs for each."""

    model: str
    inputs: Callable[..., dict[str, Array]]
    extra: dict[str, Any] = field(default_factory=dict)

    def json(self, n: int, past: int = 0, *, rows: int = 1, poison: bool = False, **options: object) -> dict[str, Any]:
        arrays = self.inputs(n, past, rows, poison)
        if "token_ids" in arrays:
            return {"token_ids": arrays["token_ids"].tolist(), **options}
        return {**{name: encode_tensor(array, "nested") for name, array in arrays.items()}, **options}

    def binary(self, n: int, past: int = 0, **options: object) -> dict[str, Any]:
        """Keyword arguments of a request with a safetensors body."""
        return {
            "content": dump_tensors(self.inputs(n, past, 1, False), {}),
            "headers": {"content-type": SAFETENSORS_TYPE},
            "params": encode_options(options),
        }


def _tokens(n: int, past: int, rows: int, poison: bool) -> dict[str, Array]:
    return {"token_ids": np.full((rows, n), POISON if poison else 97, dtype=np.int64)}


def _tensors(n: int, past: int, rows: int, poison: bool) -> dict[str, Array]:
    value = np.full((rows, n, H), POISON if poison else 0.5, dtype=np.float32)
    mask = np.ones((rows, n, past + n), dtype=np.uint8)
    return {"query": value, "key": value, "value": value, "attention_mask": mask}


KINDS: Mapping[str, Kind] = {"decoder": Kind("letters", _tokens), "attention": Kind("echo", _tensors)}


@dataclass
class Fakes:
    decoder: FakeDecoder
    attention: FakeAttention
    engine: Engine
    tokenizer: FakeTokenizer = field(default_factory=byte_tokenizer)

    @classmethod
    def build(cls, *, blocks: int = 64, kv_dtype: str = "float16", **config: Any) -> "Fakes":
        settings = {"block_size": 4, "token_budget": 64, **config}
        size = settings["block_size"]
        decoder, attention = FakeDecoder(blocks, size, kv_dtype), FakeAttention(blocks, size, kv_dtype)
        return cls(decoder, attention, Engine([decoder, attention], EngineConfig(**settings)))

    def loaded(self) -> Loaded:
        return Loaded(self.engine, {"letters": TextModel(self.tokenizer, frozenset({END}))})

    def runner(self, kind: Kind) -> FakeRunner:
        return self.decoder if kind.model == "letters" else self.attention


def nested(depth: int) -> bytes:
    return b'{"query": ' + b"[" * depth + b"]" * depth + b"}"


def event_data(text: str) -> list[Any]:
    """The `data:` of each event; [DONE] stays text."""
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line.startswith("data: ")]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]
