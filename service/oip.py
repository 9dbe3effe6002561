"""The Open Inference Protocol's words for what the engine has: a model's tensors, a request as an append, a sequence as
a session, the attention layer's pasts and presents.

    sequence_id                 a session of the caller's; its id is derived from the model's name and the sequence's
    sequence_start              a new one; whatever had the id ends
    sequence_end                it is deleted as soon as its answer is known
    key_past, value_past        without a sequence: the past of this call alone, (B, N, d, T) and (B, N, T, d)
    key_present, value_present  what the next call brings as its past, in as many slots
"""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from engine.batch import Array, SessionPast
from engine.errors import InvalidInput
from engine.specs import ModelSpec, TensorSpec
from keypast import oip
from keypast.oip import DATATYPES, Datatype, Inference, InferRequest, Parameter
from keypast.schemas import AppendReply, AppendRequest, PrefillRequest, SampleOptions, StepRequest
from keypast.wire import WireError, validated

VERSION = "1"  # of every model: another one has another name here
MAX_SEQUENCE_ID = 128  # characters
LENGTHS = "batch_valid_length"
PASTS = {"key_past": "key_past.0", "value_past": "value_past.0"}  # and their names in a past
PRESENTS = {"key_present": "key_past.0", "value_present": "value_past.0"}
ANY = -1

_PREFERRED = ("bool", "int64", "float16", "float32")  # of the dtypes that a tensor may have, the one that is told
_ON_REQUEST = ("attn_weights",)  # what costs, and nobody gets without asking
_SAMPLED = ("next_token", "text")
_GIVEN = ("attn_out", "attn_weights", "logits", "next_token")  # of a model's own outputs, those that are tensors here
_SAMPLING = tuple(SampleOptions.model_fields)
_OPTIONS = ("average_attn_weights", *_SAMPLING)
_RESERVED = ("sequence_id", "sequence_start", "sequence_end", "binary_data_output", "priority", "timeout", "headers")


class Tensor(NamedTuple):
    """As the protocol tells of it; ANY for an axis of any length."""

    name: str
    datatype: Datatype
    shape: list[int]
    optional: bool = True


def stateless(spec: ModelSpec) -> bool:
    """Whether a call can bring its past along: keys and values of one layer are all that there is of it."""
    return spec.history is None and spec.kv.layers == 1


def inputs_of(spec: ModelSpec, reads_text: bool) -> list[Tensor]:
    """Every input that an inference may have."""
    tensors = [_told(tensor, optional=reads_text or not tensor.required) for tensor in spec.inputs]
    if reads_text:
        tensors.append(Tensor("text", "BYTES", [ANY]))
    tensors.append(Tensor(LENGTHS, "INT32", [ANY]))
    return tensors + (_pasts(spec, PASTS) if stateless(spec) else [])


def outputs_of(spec: ModelSpec, reads_text: bool) -> list[Tensor]:
    """What a request gets that names no outputs."""
    tensors = [_told(tensor) for tensor in spec.outputs if tensor.name in _GIVEN and tensor.name not in _ON_REQUEST]
    return tensors + ([Tensor("text", "BYTES", [ANY])] if reads_text else [])


def further_outputs(spec: ModelSpec) -> list[str]:
    """What it gets when it names them."""
    asked = [tensor.name for tensor in spec.outputs if tensor.name in _ON_REQUEST]
    return [*asked, "valid_length", *(PRESENTS if stateless(spec) else ())]


def _told(tensor: TensorSpec, *, optional: bool = True) -> Tensor:
    """logits and next_token are those of a row's last position, so they have no axis of positions."""
    own = [axis if isinstance(axis, int) else ANY for axis in tensor.trailing]
    shape = [ANY, *own] if tensor.name in ("logits", "next_token") else [ANY, ANY, *own]
    dtype = next((dtype for dtype in _PREFERRED if dtype in tensor.dtypes), tensor.dtypes[0])
    return Tensor(tensor.name, DATATYPES[dtype], shape, optional)


def _pasts(spec: ModelSpec, names: Mapping[str, str]) -> list[Tensor]:
    held = spec.past_tensors(ANY, ANY)
    return [Tensor(name, DATATYPES[held[own][0]], list(held[own][1])) for name, own in names.items()]


# ---- a request ------------------------------------------------------------------------------------------------------


class Sequence(NamedTuple):
    """`given`: its id in the client's words."""

    session_id: str
    given: int | str
    start: bool
    end: bool


@dataclass(frozen=True, slots=True)
class Call:
    """An inference, checked as far as that needs no session. `fields` are those of a PrefillRequest, `outputs` the
    names of what is wanted, those in `binary` as bytes."""

    fields: dict[str, Any]
    arrays: dict[str, Array]
    past: SessionPast | None
    sequence: Sequence | None
    outputs: list[str]
    binary: frozenset[str]

    @property
    def rows(self) -> int:
        texts = self.fields.get("text")
        return len(texts) if texts is not None else next(iter(self.arrays.values())).shape[0]

    def append(self, spec: ModelSpec, *, begun: bool) -> AppendRequest:
        """A step where the past has `begun`, one query a row is asked, and no mask says what it sees; else a prefill.
        Raises WireError."""
        first = self.arrays.get(spec.inputs[0].name)
        one = first is not None and first.ndim > 1 and first.shape[1] == 1 and "attention_mask" not in self.arrays
        kind: type[AppendRequest] = StepRequest if begun and one else PrefillRequest
        return validated(kind, self.fields)

    @property
    def presents(self) -> list[str]:
        return [name for name in self.outputs if name in PRESENTS]


def call_of(spec: ModelSpec, reads_text: bool, asked: Inference) -> Call:
    """Raises WireError, InvalidInput."""
    request, arrays = asked.request, dict(asked.arrays)
    known = [tensor.name for tensor in inputs_of(spec, reads_text)]
    for name, array in arrays.items():
        if name not in known:
            raise WireError(name, f"model {spec.name} takes {', '.join(known)}")
        if array.ndim == 0:
            raise WireError(name, "must have an axis of rows, got shape []")
    _check_parameters(request.parameters)
    sequence = sequence_of(spec.name, request.parameters)
    outputs, binary = _wanted(spec, reads_text, request, bool(PASTS.keys() & arrays.keys()))
    if sequence is not None and (PASTS.keys() & arrays.keys() or PRESENTS.keys() & set(outputs)):
        raise WireError("sequence_id", "a sequence keeps its past; leave out pasts and presents, or the sequence")
    fields = _fields(request.parameters, arrays, outputs)
    past = _past_of(spec, arrays, fields.get(LENGTHS))
    if bool(arrays) == ("text" in fields):
        name = min(arrays, default=spec.inputs[0].name)
        raise WireError(name, "comes with text; one of them is needed" if arrays else "is required")
    validated(PrefillRequest, fields)  # now, before anything ends for it
    for tensor in spec.inputs:
        given = arrays.get(tensor.name)
        if given is not None and given.dtype == np.int32 and "int32" not in tensor.dtypes:
            arrays[tensor.name] = given.astype(np.int64)
    return Call(fields, arrays, past, sequence, outputs, binary)


def sequence_of(model: str, parameters: Mapping[str, Parameter]) -> Sequence | None:
    """None where the id is left out, 0 or "". Raises WireError."""
    given = parameters.get("sequence_id", 0)
    flags = {name: parameters.get(name, False) for name in ("sequence_start", "sequence_end")}
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise WireError(name, "must be true or false")
        if flag and given in (0, ""):
            raise WireError("sequence_id", f"is required with {name}: a number from 1 on, or a text")
    if isinstance(given, bool) or not isinstance(given, int | str):
        raise WireError("sequence_id", "must be a number or a text")
    if isinstance(given, int) and not 0 <= given < 2**64:
        raise WireError("sequence_id", "must be 1 to 2^64 - 1")
    if isinstance(given, str) and len(given) > MAX_SEQUENCE_ID:
        raise WireError("sequence_id", f"may have {MAX_SEQUENCE_ID} characters, got {len(given)}")
    if given in (0, ""):
        return None
    named = hashlib.sha256(repr((model, given)).encode()).hexdigest()
    return Sequence(f"sequence-{named[:32]}", given, flags["sequence_start"] is True, flags["sequence_end"] is True)


def _check_parameters(parameters: Mapping[str, Parameter]) -> None:
    for name in parameters:
        if name not in (*_OPTIONS, *_RESERVED) and not name.startswith("triton_"):
            raise WireError(name, f"is no parameter; those are {', '.join((*_RESERVED[:4], *_OPTIONS))}")


def _wanted(
    spec: ModelSpec, reads_text: bool, request: InferRequest, with_past: bool
) -> tuple[list[str], frozenset[str]]:
    """Names of outputs, and which of them as bytes. Raises WireError."""
    default = request.parameters.get("binary_data_output", False)
    given = [tensor.name for tensor in outputs_of(spec, reads_text)]
    if not request.outputs:
        names = given + (list(PRESENTS) if with_past else [])
        return names, frozenset(names if _flag("binary_data_output", default) else ())
    known = given + further_outputs(spec)
    names, binary = [], set()
    for output in request.outputs:
        if output.name not in known:
            raise WireError(output.name, f"is no output; model {spec.name} gives {', '.join(known)}")
        if output.name in names:
            raise WireError(output.name, "is named twice in outputs")
        if unknown := output.parameters.keys() - {"binary_data"}:
            raise WireError(output.name, f"{min(unknown)} is no parameter of an output; binary_data is")
        names.append(output.name)
        if _flag("binary_data", output.parameters.get("binary_data", default)):
            binary.add(output.name)
    return names, frozenset(binary)


def _flag(name: str, value: Parameter) -> bool:
    if not isinstance(value, bool):
        raise WireError(name, "must be true or false")
    return value


def _fields(parameters: Mapping[str, Parameter], arrays: dict[str, Array], outputs: list[str]) -> dict[str, Any]:
    """Takes out of the arrays what is not the model's own. Raises WireError."""
    fields: dict[str, Any] = {}
    if (lengths := arrays.pop(LENGTHS, None)) is not None:
        if lengths.ndim != 1 or lengths.dtype.kind != "i":
            raise WireError(LENGTHS, "must be INT32 or INT64, one length a row")
        fields[LENGTHS] = lengths.tolist()
    if (texts := arrays.pop("text", None)) is not None:
        fields["text"] = _texts(texts)
    if "logits" in outputs:
        fields["logits"] = "last"
    if "attn_weights" in outputs:
        fields["need_weights"] = True
        fields["average_attn_weights"] = parameters.get("average_attn_weights", True)
    if any(name in outputs for name in _SAMPLED):
        fields["sample"] = {name: parameters[name] for name in _SAMPLING if name in parameters}
    return fields


def _texts(texts: Array) -> list[str]:
    """One a row, of shape (B,) or (B, 1)."""
    if texts.dtype != object or texts.size != texts.shape[0]:
        raise WireError("text", f"must be BYTES, one text a row, got shape {list(texts.shape)}")
    try:
        return [text.decode() for text in texts.flat]
    except UnicodeDecodeError:
        raise WireError("text", "is not UTF-8") from None


# ---- pasts and presents ---------------------------------------------------------------------------------------------


def _past_of(spec: ModelSpec, arrays: dict[str, Array], lengths: list[int] | None) -> SessionPast | None:
    """Takes it out of the arrays. `lengths` count the m positions of this call: a row of more than m has the others
    in its past, one of m or less begins. Without lengths the past is full.

    Cuts a mask over all slots to those that the call reaches. Raises WireError.
    """
    found = {own: arrays.pop(name) for name, own in PASTS.items() if name in arrays}
    if not found:
        return None
    for name, own in PASTS.items():
        if own not in found:
            raise WireError(name, "is required, as the other past is there")
        if found[own].ndim != 4:
            raise WireError(name, f"must have four axes, got shape {list(found[own].shape)}")
    rows, *_, slots = found["key_past.0"].shape
    adding = [tensor.name for tensor in spec.inputs if tensor.axis == spec.appends and tensor.required]
    m = next((arrays[name].shape[1] for name in adding if name in arrays and arrays[name].ndim > 1), 0)
    before = [slots] * rows if lengths is None else [max(length - m, 0) for length in lengths]
    mask = arrays.get("attention_mask")
    reached = max(before, default=0) + m
    if mask is not None and mask.ndim == 3 and mask.shape[2] == slots > reached:
        arrays["attention_mask"] = np.ascontiguousarray(mask[:, :, :reached])
    return SessionPast(found, before, spec.kind, spec.fingerprint)


@contextmanager
def told_of_pasts() -> Iterator[None]:
    """What the engine says of a past's arrays is said in this protocol's names."""
    try:
        yield
    except InvalidInput as error:
        own = {held: name for name, held in PASTS.items()}.get(error.field)
        if own is None:
            raise
        raise InvalidInput(own, str(error).removeprefix(f"{error.field}: ")) from None


def present_of(past: SessionPast, name: str, slots: int) -> Array:
    """In as many slots as it fills, and `slots` at least."""
    own = PRESENTS[name]
    array = past.arrays[own]
    axis = 3 if name == "key_present" else 2
    more = [(0, 0)] * 4
    more[axis] = (0, max(0, slots - array.shape[axis]))
    return np.pad(array, more) if more[axis][1] else array


# ---- a reply --------------------------------------------------------------------------------------------------------


def outputs_told(reply: AppendReply, arrays: Mapping[str, Array]) -> dict[str, Array]:
    """All that an append gave, by name. A row that appended nothing has the next token -1."""
    told = {**arrays, "valid_length": np.array(reply.valid_length, dtype=np.int64)}
    if reply.outputs.next_token is not None:
        told["next_token"] = np.array([-1 if id is None else id for id in reply.outputs.next_token], dtype=np.int64)
    if reply.outputs.text is not None:
        told["text"] = oip.strings(reply.outputs.text)
    return told
