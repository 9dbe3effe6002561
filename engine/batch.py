"""Plain data between the parts: what a caller asks for (Append, Truncate, ...), and what a batch is made of.

An append of n positions to a sequence of length `past`, run in chunks; every range is half-open:

    0               past          start          stop                     past + n
    |--- committed ---|--- done ----|--- this Row --|--- later chunks -------|
                      |<-------------- reserved before the first row ------->|

Decoders ask at the positions that they append. An attention layer appends m positions (keys and values) and asks n
queries beside them, either of which may be none; such a work is never cut into chunks.

A *peek* is an append of no position. With queries, they read the past as it is. Without, the outputs of the last
position are given again (from the sequence's `tail`; without one, that position is replayed with its K and V written to
the null block).

A *score* is an append that is rolled back where another commits: its outputs are those of a continuation, and the
session is as before.

A *transfer* moves a past as it is, in place of a forward pass: an export is a peek that hands the past out, an import
an append to an empty session whose keys and values come ready made.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from engine.session import Session
from engine.specs import Axis
from engine.stats import SessionInfo
from engine.trail import Trail

Array = NDArray[Any]
Likeliest = list[tuple[int, float]]  # tokens and their log-probabilities, the likeliest first


@dataclass(slots=True, eq=False)
class Once:
    """What makes a request itself, so that it is done once: `digest` of all that it asks for, and the `key` that its
    caller gave it. The engine sets `replayed` when it answers with the result of the first time."""

    digest: bytes
    key: str | None = None
    replayed: bool = False


@dataclass(frozen=True, slots=True)
class Sample:
    """How the next token is drawn from the logits, in this order: repetition_penalty (divides positive and multiplies
    negative logits of ids in the history), temperature (0: the argmax, the rest ignored), top_k, top_p, min_p.
    The draw depends on (seed, row, position) only, so it is the same in any batch."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    repetition_penalty: float = 1.0


@dataclass(frozen=True, slots=True)
class Want:
    """Which outputs an append gives. A field left at its default asks for nothing beyond the model's own outputs."""

    logits: Literal["none", "last", "all"] = "none"
    top_logprobs: int = 0
    token_logprobs: bool = False  # of the tokens given
    token_top_logprobs: int = 0  # the k likeliest in the place of each of them; with token_logprobs only
    sample: Sample | None = None
    logprob: bool = False  # of the token drawn
    need_weights: bool = False
    average_attn_weights: bool = True


@dataclass(frozen=True, slots=True)
class Effort:
    """Positions of each row when a call has ended: `computed` for it, `reused` of its past; together the row's length.
    `shared`: those of the reused in blocks that another session held too when the call began."""

    computed: list[int]
    reused: list[int]
    shared: list[int]


@dataclass(frozen=True, slots=True)
class AppendResult:
    """`outputs` by name: arrays with a leading axis B for what is rectangular over rows."""

    outputs: dict[str, Any]
    past_length: list[int]
    valid_length: list[int]
    version: int
    queue_ms: float
    compute_ms: float
    effort: Effort


@dataclass(slots=True, eq=False)
class Append:
    """n or m positions a row. `inputs` by name, each (B, n or m) + the spec's trailing shape.

    `step`: refuse an empty past and any count but 1. `batch_valid_length`: each row's length after the append; row r
    appends batch_valid_length[r] - past_length[r] of the positions given. `expected_version`: refuse (Moved) at any
    other. `keep`: False for a score, whose result has the lengths that it would have made.
    """

    session_id: str
    inputs: dict[str, Array]
    tenant: str = ""
    step: bool = False
    batch_valid_length: list[int] | None = None
    expected_version: int | None = None
    want: Want = Want()
    keep: bool = True
    once: Once | None = None
    trail: Trail | None = None
    future: Future[AppendResult] = field(default_factory=Future)
    sizes: Mapping[Axis, int] = field(default_factory=dict)  # n and m; the engine reads them off the inputs


@dataclass(slots=True, eq=False)
class Truncate:
    """Back to an earlier length: one for all rows, or one a row."""

    session_id: str
    length: int | list[int]
    tenant: str = ""
    expected_version: int | None = None
    once: Once | None = None
    trail: Trail | None = None
    future: Future[SessionInfo] = field(default_factory=Future)


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One committed position of a generation. A row that appended nothing this turn has None."""

    token_ids: list[int | None]
    logprobs: list[float | None]  # None too where they were not asked for
    past_length: list[int]
    valid_length: list[int]
    version: int
    top_logprobs: list[Likeliest | None] = field(
        default_factory=list
    )  # in the token's place, where they were asked for


FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True, slots=True)
class GenerateResult:
    """`stopped_by`: the token for which `stop` ended the row, which was drawn and not appended. `error`: what ended it
    before its time. `past_length`: before the prompt, if it had one."""

    token_ids: list[list[int]]
    logprobs: list[list[float]]
    finish_reason: list[FinishReason]
    past_length: list[int]
    valid_length: list[int]
    version: int
    queue_ms: float
    compute_ms: float
    stopped_by: list[int | None]
    effort: Effort
    error: BaseException | None = None
    top_logprobs: list[list[Likeliest]] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class Generate:
    """The engine's own loop of sample and step; every token is a commit.

    A row ends before a token of `stop_ids` or one for which `stop(row, token)` is true (neither is appended), at
    `max_tokens`, or at the session's max_length. `on_token` and `stop` are called on the engine's thread. Setting
    `cancelled` ends it at the last committed position.

    `inputs`: a prompt, positions that every row appends in the first turn, at once with the first draw. `at`: the
    length that the session is cut back to before, all rows alike. One that fails before its first token takes its
    prompt back; what was cut off stays so.
    """

    session_id: str
    max_tokens: int
    tenant: str = ""
    sample: Sample = Sample()
    logprobs: bool = False
    stop_ids: frozenset[int] = frozenset()
    stop: Callable[[int, int], bool] | None = None
    on_token: Callable[[TokenEvent], None] | None = None
    expected_version: int | None = None
    inputs: dict[str, Array] = field(default_factory=dict)
    at: int | None = None
    top_logprobs: int = 0
    once: Once | None = None
    trail: Trail | None = None
    future: Future[GenerateResult] = field(default_factory=Future)
    cancelled: bool = False  # set by anyone, at any time
    partial: GenerateResult | None = None  # what it had done when it failed, if anything


@dataclass(frozen=True, slots=True, eq=False)
class SessionPast:
    """A past off the device: `arrays` by name as `ModelSpec.past_tensors` has them, `valid_length` a row, and the model
    they belong to. What stands past a row's valid length is zero in one that goes out, and ignored in one that comes.
    """

    arrays: dict[str, Array]
    valid_length: list[int]
    kind: str
    fingerprint: str


@dataclass(frozen=True, slots=True)
class ExportResult:
    past: SessionPast
    version: int


@dataclass(slots=True, eq=False)
class ExportPast:
    """The past as it is at its turn. The session is not changed."""

    session_id: str
    tenant: str = ""
    expected_version: int | None = None
    once: None = None  # it changes nothing
    trail: Trail | None = None
    future: Future[ExportResult] = field(default_factory=Future)


@dataclass(slots=True, eq=False)
class ImportPast:
    """A past into an empty session, as one append. The arrays must stay as they are until the future is done."""

    session_id: str
    past: SessionPast
    tenant: str = ""
    expected_version: int | None = None
    once: Once | None = None
    trail: Trail | None = None
    future: Future[SessionInfo] = field(default_factory=Future)


Operation = Append | Truncate | Generate | ExportPast | ImportPast
Transfer = Literal["read_past", "write_past"]


@dataclass(slots=True, eq=False)
class Work:
    """An append while the engine runs it: `new[r]` positions for row r, `done[r]` of them computed.

    `queries`: that each row asks beside the positions it appends; None: the positions that it appends ask.
    """

    session: Session
    inputs: dict[str, Array]
    new: list[int]
    want: Want
    finish: Callable[[Work, dict[str, Any], BaseException | None], None]  # called once: its outputs, or its error
    submitted_at: float
    queries: int | None = None
    started_at: float | None = None  # first scheduled
    told: bool = False  # its future runs, and can be cancelled no more
    compute_ms: float = 0.0
    reserved: bool = False
    keep: bool = True  # else it is rolled back at its end, too
    copies: list[tuple[int, int]] = field(default_factory=list)  # (shared, own) blocks; the shared ones are held
    copied: bool = False  # `copies` have been made; rolling back still takes them back
    passed: int = 0  # batches that it was ready for and had no place in
    alone: bool = False  # its last batch failed: run it by itself, so that only the culprit fails
    future: Future[Any] | None = None  # cancelled before the first schedule: dropped
    transfer: Transfer | None = None  # alone in its batch and whole; `inputs` or `outputs` are the past
    outputs: dict[str, Any] = field(default_factory=dict)  # of all rows at once
    done: list[int] = field(default_factory=list)
    results: list[list[RowResult]] = field(default_factory=list)  # a row's chunks in order
    past_length: list[int] = field(default_factory=list)
    shared_length: list[int] = field(default_factory=list)  # of the past, in shared blocks
    replayed: list[int] = field(default_factory=list)  # of the past, computed again

    @property
    def size(self) -> int:
        """What the whole of it takes of a token budget."""
        return sum(max(new, self.queries or 0) for new in self.new)

    @property
    def is_peek(self) -> bool:
        return not any(self.new)

    @property
    def changes(self) -> bool:
        """Whether its commit makes a new version. (An import may bring empty rows only.)"""
        return self.keep and (not self.is_peek or self.transfer == "write_past")

    @property
    def present_length(self) -> list[int]:
        return [past + new for past, new in zip(self.past_length, self.new, strict=True)]

    @property
    def effort(self) -> Effort:
        reused = [past - again for past, again in zip(self.past_length, self.replayed, strict=True)]
        computed = [new + again for new, again in zip(self.new, self.replayed, strict=True)]
        return Effort(computed, reused, list(map(min, reused, self.shared_length)))

    @property
    def queue_ms(self) -> float:
        return 0.0 if self.started_at is None else (self.started_at - self.submitted_at) * 1e3


@dataclass(slots=True, eq=False)  # not frozen: that would make its making dear, and there is one for every step
class Row:
    """A sequence's share of a batch, which never changes: input positions [start - past, stop - past) of its work's row
    `index`, and `queries`: as many (a decoder's positions ask), or all that the work has.

    `table` and `history` are as they were when the batch was scheduled; nobody else changes them meanwhile.
    `last`: this chunk completes the row. A peek has start = stop = past.

    `replay`: the last position of the past is computed again, before those of the chunk. A peek without queries needs
    it, and so does who asks for the log-probability of the first token given, where the past has no tail.
    """

    work: Work
    index: int
    start: int
    stop: int
    queries: int
    table: array[int]
    history: array[int] | None
    tail: Any
    last: bool

    @property
    def count(self) -> int:
        return self.stop - self.start

    @property
    def replay(self) -> bool:
        if self.tail is not None or self.start == 0:
            return False
        begins = self.start == self.work.past_length[self.index]
        return self.count == self.queries == 0 or (self.work.want.token_logprobs and begins)

    def appended(self, name: str) -> Array:
        """This chunk of a named input whose positions join the past, (count, ...); padding is left out."""
        return self._chunk(name, self.count)

    def asked(self, name: str) -> Array:
        """This chunk of a named input that has a position a query, (queries, ...)."""
        return self._chunk(name, self.queries)

    def _chunk(self, name: str, size: int) -> Array:
        done = self.start - self.work.past_length[self.index]
        chunk: Array = self.work.inputs[name][self.index, done : done + size]
        return chunk


@dataclass(slots=True)
class RowResult:
    """What a row's chunk gave by name: `positions`, arrays (queries, ...); `once`, what only the last chunk gives; and
    then the new tail."""

    positions: dict[str, Array] = field(default_factory=dict)
    once: dict[str, Any] = field(default_factory=dict)
    tail: Any = None


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """The rows of one forward pass, and the works whose rows they are."""

    rows: list[Row]
    works: list[Work]

    @property
    def copies(self) -> list[tuple[int, int]]:
        """(from, to) blocks to copy before the pass, for sequences that leave a shared one to write to their own."""
        return [copy for work in self.works if not work.copied for copy in work.copies]

    def __repr__(self) -> str:
        return f"<Batch {len(self.rows)} rows, {sum(row.count for row in self.rows)} positions>"


def concat(chunks: list[Array]) -> Array:
    """A row's chunks as one (n, ...) array."""
    return chunks[0] if len(chunks) == 1 else np.concatenate(chunks)
