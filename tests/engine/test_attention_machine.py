"""Random lives of sessions of an attention layer, any n queries with any m keys, against torch's own layer, which is
given every row's whole past again at every call."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from engine.batch import Append, ExportPast, ImportPast, Truncate, Want
from engine.errors import EngineError, LengthExceeded, WrongState
from engine.layers import MultiHeadAttention
from engine.models.attention import AttentionModel, attention_spec
from engine.runner import ModelRunner
from tests.engine.models import Served, backend

HIDDEN, KDIM, VDIM, HEADS = 24, 20, 28, 3
MAX_LENGTH, BLOCKS = 40, 200
picks = st.integers(0, 10**6)


def torch_layer(own_keys: int) -> torch.nn.MultiheadAttention:
    """`own_keys`: 0, or 2 for a learnt one and one of zeros."""
    torch.manual_seed(own_keys)
    layer = torch.nn.MultiheadAttention(
        HIDDEN, HEADS, batch_first=True, kdim=KDIM, vdim=VDIM, add_bias_kv=own_keys > 0, add_zero_attn=own_keys > 0
    )
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0, 0.3)
    return layer.eval()


def serve(oracle: torch.nn.MultiheadAttention, backend_name: str) -> Served:
    """Our layer with torch's weights."""
    own = oracle.bias_k is not None
    layer = MultiHeadAttention(
        HIDDEN, HEADS, kdim=KDIM, vdim=VDIM, bias_kv=own, zero_attn=own, compute_dtype=torch.float32
    )
    theirs = oracle.state_dict()
    weights = {f"{name}_proj.weight": theirs[f"{name}_proj_weight"] for name in "qkv"}
    weights |= {f"{name}_proj.bias": bias for name, bias in zip("qkv", theirs["in_proj_bias"].chunk(3), strict=True)}
    weights |= {f"o_proj.{name}": theirs[f"out_proj.{name}"] for name in ("weight", "bias")}
    weights |= {name: theirs[name].flatten() for name in ("bias_k", "bias_v") if own}
    layer.load_state_dict({name: weight.clone() for name, weight in weights.items()})
    spec = attention_spec("layer", layer, kv_dtype="float32", max_length=MAX_LENGTH, fingerprint="")
    model = AttentionModel(spec, layer)
    model.requires_grad_(False).eval()
    model.pack()
    return Served(ModelRunner(model, backend(backend_name), BLOCKS, 16))


@dataclass
class Told:
    """What a session must hold: each row's keys (length, KDIM) and values (length, VDIM)."""

    keys: list[np.ndarray]
    values: list[np.ndarray]
    version: int = 0

    @property
    def lengths(self) -> list[int]:
        return [len(keys) for keys in self.keys]


@dataclass
class Asked:
    """An append as it was sent, and the past that it should find and leave."""

    append: Append
    told: Told
    after: Told
    refusal: type[EngineError] | None

    @property
    def columns(self) -> int:
        """T of its mask."""
        key = self.append.inputs.get("key")
        return max(self.told.lengths) + (0 if key is None else key.shape[1])


class Attending(RuleBasedStateMachine):
    backend_name = "sdpa"
    own_keys = 0

    def __init__(self) -> None:
        super().__init__()
        self.oracle = torch_layer(self.own_keys)
        self.served = serve(self.oracle, self.backend_name)
        self.told: dict[str, Told] = {}

    def pick(self, number: int) -> str:
        if not self.told:
            self.create(1)
        return list(self.told)[number % len(self.told)]

    @rule(rows=st.integers(1, 3))
    def create(self, rows: int) -> None:
        empty = Told([np.zeros((0, KDIM), np.float32)] * rows, [np.zeros((0, VDIM), np.float32)] * rows)
        self.told[self.served.open(rows)] = empty

    @rule(numbers=st.lists(picks, min_size=1, max_size=3), data=st.data())
    def append(self, numbers: list[int], data: st.DataObject) -> None:
        """To one session, or to several in one batch; a score among them, now and then."""
        sessions = dict.fromkeys(self.pick(number) for number in numbers)
        asked = [self.draw(session, data) for session in sessions]
        for one in asked:
            self.served.engine.submit(one.append)
        while self.served.engine.run_once():
            self.served.engine.check()
        for one in asked:
            self.check(one)

    def draw(self, session: str, data: st.DataObject) -> Asked:
        told = self.told[session]
        rows, past = len(told.keys), told.lengths
        step = data.draw(st.booleans())
        n = 1 if step else data.draw(st.integers(0, 6))
        m = data.draw(st.integers(0, 1)) if step else data.draw(st.integers(int(n == 0), 9))
        new = [m] * rows if step else [data.draw(st.integers(0, m)) for _ in past]
        if m and not any(new):
            new[0] = m
        random = np.random.default_rng(data.draw(st.integers(0, 99)))
        inputs: dict[str, np.ndarray] = {}
        if n:
            inputs["query"] = random.normal(size=(rows, n, HIDDEN)).astype(np.float32)
        if m:
            inputs["key"] = random.normal(size=(rows, m, KDIM)).astype(np.float32)
            inputs["value"] = random.normal(size=(rows, m, VDIM)).astype(np.float32)
        if n and not (step and data.draw(st.booleans())):
            seen = data.draw(st.sampled_from([0.0, 0.6, 1.0]))
            inputs["attention_mask"] = random.random((rows, n, max(past) + m)) < seen
        after = told
        if m:
            keys = [np.concatenate([told.keys[r], inputs["key"][r, : new[r]]]) for r in range(rows)]
            values = [np.concatenate([told.values[r], inputs["value"][r, : new[r]]]) for r in range(rows)]
            after = Told(keys, values, told.version + 1)
        refusal: type[EngineError] | None = None
        if not all(past) if step else not m and not any(past):
            refusal = WrongState
        elif max(after.lengths) > MAX_LENGTH:
            refusal = LengthExceeded
        lengths = after.lengths if new != [m] * rows or data.draw(st.booleans()) else None
        want = Want(need_weights=data.draw(st.booleans()), average_attn_weights=data.draw(st.booleans()))
        keep = data.draw(st.integers(0, 3)) > 0
        return Asked(Append(session, inputs, "", step, lengths, want=want, keep=keep), told, after, refusal)

    def check(self, asked: Asked) -> None:
        append = asked.append
        error = append.future.exception(0)
        if asked.refusal is not None:
            assert isinstance(error, asked.refusal)
            return
        assert error is None
        result = append.future.result(0)
        assert (result.past_length, result.valid_length) == (asked.told.lengths, asked.after.lengths)
        if append.keep:
            self.told[append.session_id] = asked.after
        if "query" not in append.inputs:
            assert result.outputs == {}
            return
        attn_out, weights = zip(*(self.expected(asked, row) for row in range(len(asked.after.keys))), strict=True)
        np.testing.assert_allclose(result.outputs["attn_out"], np.stack(attn_out), atol=2e-4)
        assert ("attn_weights" in result.outputs) == append.want.need_weights
        if append.want.need_weights:
            np.testing.assert_allclose(result.outputs["attn_weights"], np.stack(weights), atol=1e-5)

    def expected(self, asked: Asked, row: int) -> tuple[np.ndarray, np.ndarray]:
        """What torch's layer gives for a row: (n, HIDDEN), and its weights as wide as the widest row's."""
        present, query = asked.after.lengths[row], asked.append.inputs["query"][row]
        seen = np.ones((len(query), present), bool)
        if "attention_mask" in asked.append.inputs:
            seen = asked.append.inputs["attention_mask"][row, :, :present]
        # One key more that nobody sees: torch takes no empty past.
        keys, values = (np.pad(a[row], ((0, 1), (0, 0))) for a in (asked.after.keys, asked.after.values))
        hidden = torch.from_numpy(np.pad(~seen, ((0, 0), (0, 1)), constant_values=True))
        call: Any = [torch.from_numpy(array)[None] for array in (query, keys, values)]
        average = asked.append.want.average_attn_weights
        with torch.no_grad():
            out, weights = self.oracle(*call, attn_mask=hidden, average_attn_weights=average)
            blind = torch.from_numpy(~seen.any(1)) & torch.tensor(self.own_keys == 0)  # NaN there
            out[0, blind] = self.oracle.out_proj.bias
            weights[0][..., blind, :] = 0
        found = weights[0].numpy()
        between = np.zeros((*found.shape[:-1], asked.columns - present), np.float32)
        return out[0].numpy(), np.concatenate([found[..., :present], between, found[..., present + 1 :]], axis=-1)

    @rule(number=picks, at=picks)
    def fork(self, number: int, at: int) -> None:
        session = self.pick(number)
        told = self.told[session]
        length = at % (min(told.lengths) + 1)
        child = self.served.engine.fork(session, at=length)[0].id
        self.told[child] = Told([k[:length] for k in told.keys], [v[:length] for v in told.values])

    @rule(number=picks)
    def move(self, number: int) -> None:
        """Out of a session and into a new one."""
        told = self.told[self.pick(number)]
        past = self.served.finish(ExportPast(self.pick(number))).past
        child = self.served.open(len(told.keys))
        self.served.finish(ImportPast(child, past))
        self.told[child] = Told(told.keys, told.values, 1)

    @rule(number=picks, at=st.lists(picks, min_size=3, max_size=3))
    def truncate(self, number: int, at: list[int]) -> None:
        session = self.pick(number)
        told = self.told[session]
        lengths = [pick % (length + 1) for pick, length in zip(at, told.lengths, strict=False)]
        self.served.finish(Truncate(session, lengths))
        keys = [keys[:length] for keys, length in zip(told.keys, lengths, strict=True)]
        values = [values[:length] for values, length in zip(told.values, lengths, strict=True)]
        self.told[session] = Told(keys, values, told.version + 1)

    @rule(number=picks)
    def delete(self, number: int) -> None:
        session = self.pick(number)
        del self.told[session]
        self.served.engine.delete_session(session)

    @invariant()
    def everything_is_as_told(self) -> None:
        self.served.engine.check()
        for session, told in self.told.items():
            info = self.served.engine.session(session)
            assert (info.valid_length, info.version) == (told.lengths, told.version)

    def teardown(self) -> None:
        for session in self.told:
            self.served.engine.delete_session(session)
        assert self.served.engine.capacity().models[0].free == BLOCKS - 1


def machine(backend_: str, keys: int) -> Any:
    class Machine(Attending):
        backend_name, own_keys = backend_, keys

    case = Machine.TestCase
    case.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)
    return case


TestSdpa, TestSdpaOwnKeys = machine("sdpa", 0), machine("sdpa", 2)
TestCpu, TestCpuOwnKeys = machine("cpu", 0), machine("cpu", 2)
