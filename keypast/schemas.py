"""The wire models: every field name of the HTTP contract is defined here, and nowhere else.

Requests are strict: an unknown field, `true` or `"5"` or `1.5` where an integer is meant, or a number out of bounds is
refused (422). Replies tolerate unknown fields, so that an older client reads a newer service.

B is the number of rows of the session, n the number of queries and m of new positions (for a decoder they are the
same), T the longest past and the new positions together, E the number of the attention layer's own keys.
"""

from enum import StrEnum
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    SkipValidation,
    StringConstraints,
    field_validator,
    model_validator,
)

MAX_INT = 2**31 - 1
MAX_SEED = 2**63 - 1
MAX_ROWS = 1024
MAX_FORKS = 256
MAX_ITEMS = 512
MAX_MESSAGES = 4096
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 1024
MAX_TTL_SECONDS = 10 * 366 * 86_400.0
SESSION_ID_PATTERN = r"^[A-Za-z0-9_-]{1,64}$"

Count = Annotated[int, Field(ge=0, le=MAX_INT)]
Positive = Annotated[int, Field(ge=1, le=MAX_INT)]
TokenRow = Annotated[list[Count], Field(min_length=1, fail_fast=True)]  # or there would be an error a token
Rows = Annotated[list[Count], Field(min_length=1, max_length=MAX_ROWS, fail_fast=True)]
Text = Annotated[str, StringConstraints(min_length=1)]
Texts = Annotated[list[Text], Field(max_length=MAX_ROWS, fail_fast=True)]
Stop = Annotated[str, StringConstraints(min_length=1, max_length=MAX_STOP_CHARACTERS)]
Stops = Annotated[list[Stop], Field(max_length=MAX_STOPS, fail_fast=True)]
LabelKey = Annotated[str, StringConstraints(min_length=1, max_length=64)]
LabelValue = Annotated[str, StringConstraints(max_length=256)]


class Code(StrEnum):
    """The `code` of a problem: one a kind of refusal. The status it travels with is beside it."""

    MALFORMED = "malformed"  # 400
    BODY_TOO_FINE = "body_too_fine"  # 400, it came in too many small pieces
    UNAUTHORIZED = "unauthorized"  # 401
    FORBIDDEN = "forbidden"  # 403
    NOT_FOUND = "not_found"  # 404, no such route
    SESSION_NOT_FOUND = "session_not_found"  # 404
    MODEL_NOT_FOUND = "model_not_found"  # 404
    METHOD_NOT_ALLOWED = "method_not_allowed"  # 405
    TOO_SLOW = "too_slow"  # 408, the request itself took too long to come
    SESSION_EXISTS = "session_exists"  # 409
    WRONG_STATE = "wrong_state"  # 409
    SESSION_GONE = "session_gone"  # 410
    MOVED = "moved"  # 412
    REPLY_DROPPED = "reply_dropped"  # 412
    BODY_TOO_LARGE = "body_too_large"  # 413
    UNSUPPORTED_MEDIA_TYPE = "unsupported_media_type"  # 415
    INVALID_INPUT = "invalid_input"  # 422
    LENGTH_EXCEEDED = "length_exceeded"  # 422
    KEY_REUSED = "idempotency_key_reused"  # 422
    QUEUE_FULL = "queue_full"  # 429
    QUOTA_EXCEEDED = "quota_exceeded"  # 429
    POOL_EXHAUSTED = "pool_exhausted"  # 429
    HEAD_TOO_LARGE = "head_too_large"  # 431
    MODEL_FAILED = "model_failed"  # 500
    INTERNAL = "internal"  # 500
    NOT_READY = "not_ready"  # 503, the models are still loading
    ENGINE_STOPPED = "engine_stopped"  # 503
    DEVICE_FULL = "device_full"  # 503, the pass needed more memory than was free
    BODIES_FULL = "bodies_full"  # 503, too much is being sent to the service at a time


class Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Reply(BaseModel):
    model_config = ConfigDict(extra="ignore")


def _with(config: ConfigDict, example: dict[str, Any]) -> ConfigDict:
    return ConfigDict(**config, json_schema_extra={"examples": [example]})


# ---- requests -------------------------------------------------------------------------------------------------------


class TensorBody(Request):
    """A tensor in JSON: exactly one of `data` (flat or nested numbers) and `data_b64` (little-endian, row-major).

    Only the envelope is checked here; `keypast.wire` checks the numbers against `dtype` and `shape`.
    """

    model_config = _with(Request.model_config, {"dtype": "float32", "shape": [1, 2, 2], "data": [1, 2, 3, 4]})

    dtype: Literal["float16", "float32", "bfloat16", "int32", "int64", "uint8", "bool"]
    shape: list[Count] = Field(max_length=8)
    data: list[Any] | None = None
    data_b64: str | None = None

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        if (self.data is None) == (self.data_b64 is None):
            raise ValueError("give exactly one of data and data_b64")
        return self


class SampleOptions(Request):
    """How the next token is chosen. Temperature 0 takes the likeliest, whatever the other options say."""

    model_config = _with(Request.model_config, {"temperature": 0.7, "top_p": 0.9, "seed": 1})

    temperature: float = Field(default=0.0, ge=0, le=100)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: Count = Field(default=0, description="0 keeps all")
    min_p: float = Field(default=0.0, ge=0, le=1, description="relative to the likeliest token's probability")
    seed: int | None = Field(default=None, ge=0, le=MAX_SEED, description="the same seed repeats the same choice")
    repetition_penalty: float = Field(default=1.0, gt=0, le=100)


class Message(Request):
    """One message of a conversation, for the model's own chat template."""

    role: Text
    content: str


class CreateSession(Request):
    model_config = _with(Request.model_config, {"model": "attention", "batch_size": 1, "ttl_seconds": 600})

    model: Text
    id: str | None = Field(default=None, pattern=SESSION_ID_PATTERN, description="minted, unguessable, when left out")
    batch_size: int = Field(default=1, ge=1, le=MAX_ROWS)
    max_length: Positive | None = Field(default=None, description="positions a row; default: the model's own")
    ttl_seconds: float | None = Field(
        default=None, gt=0, le=MAX_TTL_SECONDS, description="since the last use, which a read is not; null: for ever"
    )
    pinned: bool = Field(default=False, description="never expires and is never evicted; how many may be, is a quota")
    labels: dict[LabelKey, LabelValue] = Field(default_factory=dict, max_length=32)


class UpdateSession(Request):
    """A merge patch (RFC 7396): what is left out stays as it is, null goes back to the default. It is a use, so the
    session's time to live begins anew; it is no commit, so the version stays."""

    model_config = _with(Request.model_config, {"ttl_seconds": 3600, "labels": {"team": "a", "draft": None}})

    ttl_seconds: float | None = Field(
        default=None, gt=0, le=MAX_TTL_SECONDS, description="since the last use; null: for ever"
    )
    pinned: bool | None = Field(default=None, description="never expires and is never evicted; null: false")
    labels: dict[LabelKey, LabelValue | None] | None = Field(
        default=None, max_length=64, description="null takes a label away; null for labels takes all away"
    )


class ListSessions(BaseModel):
    """The query of `GET /v1/sessions`; not strict, since a query string holds only text."""

    model_config = ConfigDict(extra="forbid")

    limit: int = Field(default=100, ge=1, le=1000)
    cursor: str | None = Field(default=None, max_length=256, description="`next_cursor` of the page before")
    model: str | None = None
    label: list[str] = Field(default_factory=list, description="`key` or `key=value`; all must hold")
    state: Literal["idle", "running"] | None = None


class AppendRequest(Request):
    """New positions for every row: attention inputs, or exactly one of `token_ids`, `text` and `messages`.

    An attention layer takes any number of queries with any number of keys and values, all of one call or one of both:
    `query` alone asks the past and appends nothing (cross-attention over keys that stay), `key` and `value` alone are
    appended and have no `attn_out`. Which are needed depends on the model (`inputs` in `GET /v1/models`) and is checked
    against it, not here.
    """

    query: TensorBody | None = Field(default=None, description="(B, n, H); without key and value: reads the past")
    key: TensorBody | None = Field(default=None, description="(B, m, kdim), together with value")
    value: TensorBody | None = Field(default=None, description="(B, m, vdim), together with key")
    attention_mask: TensorBody | None = Field(
        default=None, description="(B, n, T), 1 = attend; needed by the queries of a prefill, on a step all is seen"
    )
    token_ids: list[TokenRow] | None = Field(
        default=None, min_length=1, max_length=MAX_ROWS, fail_fast=True, description="(B, n)"
    )
    text: Text | Texts | None = Field(default=None, description="one string, or one a row")
    messages: list[Message] | None = Field(
        default=None, min_length=1, max_length=MAX_MESSAGES, fail_fast=True, description="of a session of one row"
    )
    batch_valid_length: Rows | None = Field(
        default=None, description="(B,): each row's length after the call; of queries alone: its length as it is"
    )
    logits: Literal["none", "last", "all"] = "none"
    top_logprobs: int = Field(default=0, ge=0, le=256, description="the k likeliest tokens after the last position")
    token_logprobs: bool = Field(default=False, description="the log-probability of each token given")
    sample: SampleOptions | None = Field(default=None, description="choose `next_token`; it is not appended")
    need_weights: bool = False
    average_attn_weights: bool = Field(default=True, description="over the heads: (B, n, T + E), else (B, N, n, T + E)")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [name for name in ("token_ids", "text", "messages") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"give one of {', '.join(given)}, not all")
        return self

    @field_validator("token_ids")
    @classmethod
    def _rectangular(cls, rows: list[list[int]] | None) -> list[list[int]] | None:
        if rows is not None and len({len(row) for row in rows}) > 1:
            raise ValueError("the rows differ in length; pad them and say batch_valid_length")
        return rows


class PrefillRequest(AppendRequest):
    """Append any number of positions to any past, empty or not, and ask any number of queries."""

    model_config = _with(Request.model_config, {"text": "The capital of France is", "sample": {"temperature": 0}})


class StepRequest(AppendRequest):
    """Append exactly one position a row to a past that is not empty; or, with `query` alone, ask one query a row."""

    model_config = _with(Request.model_config, {"token_ids": [[7042]], "logits": "last"})


class ScoreRequest(AppendRequest):
    """What a prefill of the same body would answer, without keeping it: the session is as before."""

    model_config = _with(Request.model_config, {"token_ids": [[7042, 15]], "logits": "all"})


class BatchStep(StepRequest):
    """One step of a batch: the body of a single one, and whose it is."""

    model_config = _with(Request.model_config, {"session_id": "a", "if_match": 3, "token_ids": [[7042]]})

    session_id: str = Field(pattern=SESSION_ID_PATTERN)
    if_match: Count | None = Field(default=None, description="the version expected, as `If-Match` of a single step")


class BatchSteps(Request):
    """One step each of many sessions; each item is read by itself, so that one that is wrong spoils no other."""

    model_config = _with(
        Request.model_config,
        {"items": [{"session_id": "a", "token_ids": [[7042]]}, {"session_id": "b", "token_ids": [[15]]}]},
    )

    # as they came: `keypast.batch` reads each by itself
    items: list[SkipValidation[BatchStep]] = Field(min_length=1, max_length=MAX_ITEMS, fail_fast=True)


class GenerateRequest(Request):
    """The server's own loop of sample and step, from the last position's logits; every token is a commit."""

    model_config = _with(Request.model_config, {"max_tokens": 16, "sample": {"temperature": 0}})

    max_tokens: Positive = Field(default=128, description="a row")
    stop: Stop | Stops | None = Field(default=None, description="a row ends where it has written one of these")
    sample: SampleOptions = Field(default_factory=SampleOptions, description="default: greedy")
    stream: bool = False
    logprobs: bool = Field(default=False, description="the log-probability of each token chosen")
    ignore_eos: bool = False


class ForkRequest(Request):
    model_config = _with(Request.model_config, {"count": 2})

    count: int = Field(default=1, ge=1, le=MAX_FORKS)
    at: Count | Rows | None = Field(default=None, description="the children's length, one int or one a row; now")


class TruncateRequest(Request):
    model_config = _with(Request.model_config, {"length": 4})

    length: Count | Rows = Field(description="one int, or one a row; no longer than the valid length")


# ---- replies --------------------------------------------------------------------------------------------------------


class ErrorBody(Reply):
    """The OpenAI error object, so that its clients read our problems."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class Problem(Reply):
    """RFC 9457 `application/problem+json`. `code` is one of `Code`; members that do not apply are left out."""

    model_config = _with(
        Reply.model_config,
        {
            "type": "about:blank",
            "title": "Precondition Failed",
            "status": 412,
            "detail": "the session is at version 3, not 2",
            "instance": "/v1/sessions/a/step",
            "code": "moved",
            "version": 3,
            "valid_length": [7],
            "request_id": "r-1",
            "error": {
                "message": "the session is at version 3, not 2",
                "type": "invalid_request_error",
                "code": "moved",
            },
        },
    )

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    instance: str | None = None
    code: str
    field: str | None = Field(default=None, description="the input that is wrong")
    reason: str | None = Field(default=None, description="why the session is gone: deleted, expired or evicted")
    version: int | None = None
    valid_length: list[int] | None = None
    retry_after: float | None = Field(default=None, description="seconds; the Retry-After header rounded up")
    request_id: str | None = None
    error: ErrorBody


class SessionView(Reply):
    """A session as its owner sees it. `bytes` and `blocks` count what it holds, shared blocks included."""

    model_config = _with(
        Reply.model_config,
        {
            "id": "q3mZt0cVbLw",
            "model": "attention",
            "kind": "attention",
            "state": "idle",
            "batch_size": 1,
            "valid_length": [5],
            "max_length": 1024,
            "version": 1,
            "bytes": 32768,
            "blocks": 1,
            "shared_blocks": 0,
            "parent": None,
            "labels": {},
            "ttl_seconds": 600,
            "pinned": False,
            "created_at": "2026-01-01T00:00:00Z",
            "last_used_at": "2026-01-01T00:00:01Z",
            "expires_at": "2026-01-01T00:10:01Z",
        },
    )

    id: str
    model: str
    kind: str
    state: str = Field(description="idle or running")
    batch_size: int
    valid_length: list[int]
    max_length: int
    version: int
    bytes: int
    blocks: int
    shared_blocks: int = Field(description="those of `blocks` that another session holds too")
    parent: str | None = Field(default=None, description="the session that this one was forked from")
    labels: dict[str, str] = Field(default_factory=dict)
    ttl_seconds: float | None = None
    pinned: bool = False
    created_at: AwareDatetime
    last_used_at: AwareDatetime = Field(description="a read is no use")
    expires_at: AwareDatetime | None = Field(default=None, description="null: never")


class SessionPage(Reply):
    object: Literal["list"] = "list"
    data: list[SessionView]
    next_cursor: str | None = Field(default=None, description="null on the last page")


class OwnedView(SessionView):
    """A session as an admin sees it."""

    model_config = ConfigDict(json_schema_extra=None)

    tenant: str


class OwnedPage(Reply):
    object: Literal["list"] = "list"
    data: list[OwnedView]
    next_cursor: str | None = Field(default=None, description="null on the last page")


class ForkReply(Reply):
    sessions: list[SessionView]


class Receipt(Reply):
    """What a delete gave back: `bytes` are those of `blocks_freed`; shared blocks stay with their other owners."""

    model_config = _with(
        Reply.model_config, {"id": "a", "positions": 5, "bytes": 32768, "blocks_freed": 1, "blocks_still_shared": 0}
    )

    id: str
    positions: int
    bytes: int
    blocks_freed: int
    blocks_still_shared: int


class Event(Reply):
    """Something that happened to a session, told by its id, its length and its version after it. `type` is created,
    committed, forked (this session was, from `parent`), truncated, imported, exported, evicted, expired or deleted; or
    gap, of no session: events are missing here, so look at the sessions again."""

    model_config = _with(
        Reply.model_config,
        {
            "id": "5f1c09ab-17",
            "type": "committed",
            "at": "2026-01-01T00:00:01Z",
            "session_id": "q3mZt0cVbLw",
            "model": "attention",
            "version": 1,
            "valid_length": [5],
        },
    )

    id: str = Field(description="for `Last-Event-ID`")
    type: str
    at: AwareDatetime | None = None
    session_id: str | None = None
    model: str | None = None
    version: int | None = None
    valid_length: list[int] | None = None
    parent: str | None = None
    lost: int | None = Field(default=None, description="of a gap: how many; null: nobody can say")


class Timings(Reply):
    """Milliseconds: waiting for a turn, and on the device."""

    queue_ms: float
    compute_ms: float


class TopLogprob(Reply):
    token_id: int
    logprob: float
    text: str


class Appended(Reply):
    """What every reply to an append carries; the lists have one entry a row."""

    past_length: list[int] = Field(description="before the call")
    valid_length: list[int] = Field(description="after the call")
    version: int
    computed: list[int] = Field(description="positions that the model computed for this call")
    reused: list[int] = Field(description="positions of the past that it did not; with `computed` the valid length")
    shared: list[int] = Field(description="those of `reused` whose memory another session held too, as after a fork")
    timings: Timings


class Outputs(Reply):
    """What was asked for; the rest is left out."""

    attn_out: TensorBody | None = Field(
        default=None, description="(B, n, H): every query's answer, of padding too; left out when there was no query"
    )
    attn_weights: TensorBody | None = Field(
        default=None,
        description="(B, n, T + E) averaged, else (B, N, n, T + E): a row's positions, zeros up to T, and in the last E"
        " columns the layer's own keys",
    )
    logits: TensorBody | None = Field(default=None, description="(B, V) for last, (B, n, V) for all")
    top_logprobs: list[list[TopLogprob]] | None = Field(default=None, description="(B, k), the likeliest first")
    token_logprobs: list[list[float | None]] | None = Field(
        default=None,
        description="of each token given, after the tokens before it; a list a row, as long as what the row appended;"
        " null for the first position of a session, which nothing foretells",
    )
    next_token: list[int | None] | None = Field(
        default=None, description="(B,), not appended: step with it; null for a row that appended nothing"
    )
    text: list[str] | None = Field(default=None, description='(B,): next_token as text, "" for null')


class AppendReply(Appended):
    """The reply to a prefill or a step; to a score, with the lengths it would have made, at the version as it is."""

    model_config = _with(
        Reply.model_config,
        {
            "outputs": {"next_token": [7042], "text": [" Paris"]},
            "past_length": [0],
            "valid_length": [5],
            "version": 1,
            "computed": [5],
            "reused": [0],
            "shared": [0],
            "timings": {"queue_ms": 0.1, "compute_ms": 0.4},
        },
    )

    outputs: Outputs


class Generated(Reply):
    """A row's lists end where the row ended; the tokens are those appended to it."""

    token_ids: list[list[int]]
    text: list[str]
    logprobs: list[list[float]] | None = None


# its end-of-sequence token or a stop text; max_tokens or max_length; something else came first: see `problem`
FinishReason = Literal["stop", "length", "cancelled"]


class GenerateReply(Appended):
    model_config = _with(
        Reply.model_config,
        {
            "outputs": {"token_ids": [[7042, 15]], "text": [" Paris."]},
            "finish_reason": ["length"],
            "past_length": [5],
            "valid_length": [7],
            "version": 3,
            "computed": [2],
            "reused": [5],
            "shared": [0],
            "timings": {"queue_ms": 0.2, "compute_ms": 9.1},
        },
    )

    outputs: Generated
    finish_reason: list[FinishReason]
    problem: Problem | None = Field(
        default=None,
        description="what ended it before its time, as no memory that came free; the tokens above are appended, so go"
        " on from there: the same request again would append others after them",
    )
    _replayed: bool = PrivateAttr(default=False)

    @property
    def replayed(self) -> bool:
        """For a client: whether it was done before and this is the first reply again. It travels as a header."""
        return self._replayed


class StreamToken(Reply):
    """One commit of a stream. A row that has ended gives null and ""; a half-written character waits for its rest."""

    token_ids: list[int | None]
    text: list[str]
    valid_length: list[int]
    version: int
    logprobs: list[float | None] | None = None


class StreamEnd(Appended):
    """The stream's last event before `[DONE]`; `text` is what had been held back, "" as a rule."""

    finish_reason: list[FinishReason]
    text: list[str] | None = None
    problem: Problem | None = Field(default=None, description="of a stream that is told again: what ended it")


class TensorInfo(Reply):
    """A model's named input or output. A string in `shape` names an axis: B rows, n queries, m new positions (n where
    the positions appended are the queries), T length."""

    name: str
    dtypes: list[str]
    shape: list[int | str]
    required: bool = True


class ModelCard(Reply):
    model_config = _with(
        Reply.model_config,
        {
            "id": "attention",
            "object": "model",
            "created": 1767225600,
            "owned_by": "keypast",
            "kind": "attention",
            "max_length": 1024,
            "dtype": "float16",
            "device": "cpu",
            "fingerprint": "sha256:5f1c",
            "inputs": [{"name": "query", "dtypes": ["float16"], "shape": ["B", "n", 512], "required": True}],
            "outputs": [{"name": "attn_out", "dtypes": ["float16"], "shape": ["B", "n", 512], "required": True}],
        },
    )

    id: str
    object: Literal["model"] = "model"
    created: int = Field(default=0, description="seconds since 1970: when the service loaded it")
    owned_by: str = "keypast"
    kind: str
    max_length: int
    dtype: str
    device: str
    fingerprint: str
    inputs: list[TensorInfo]
    outputs: list[TensorInfo]
    vocab_size: int | None = None


class ModelList(Reply):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class Usage(Reply):
    """`used` counts a shared block once; `shared` are those of `used` with more than one owner; `reserved` are those
    of `used` that a running append holds and has not committed."""

    total: int
    free: int
    used: int
    shared: int
    reserved: int


class OwnBlocks(Reply):
    used: int
    available: int = Field(description="how many more the caller could take now, within its quota")


class PoolUsage(Reply):
    model: str
    block_size: int = Field(description="positions a block")
    blocks: Usage
    bytes: Usage
    own: OwnBlocks | None = Field(default=None, description="the caller's; `blocks` and `bytes` are everybody's")


class Quota(Reply):
    """null: no bound of the caller's own."""

    sessions: int | None = None
    pinned: int | None = Field(default=None, description="of the sessions")
    blocks: int | None = Field(default=None, description="of each pool")
    positions_per_minute: int | None = None
    concurrent_appends: int | None = Field(default=None, description="that run or wait")
    guaranteed_blocks: int = Field(default=0, description="of each pool: nobody else takes them")


class QuotaUse(Reply):
    sessions: int
    pinned: int
    concurrent_appends: int
    positions: float = Field(
        description="of a minute's worth; it falls steadily, by positions_per_minute, and may pass it for a while"
    )


class Capacity(Reply):
    pools: list[PoolUsage]
    sessions: int = Field(description="the caller's")
    quota: Quota | None = Field(default=None, description="the caller's")
    use: QuotaUse | None = Field(default=None, description="the caller's")


class Health(Reply):
    """`status` is ok for livez; ready, loading, draining or down for readyz."""

    status: str
    detail: str | None = Field(default=None, description="what is being loaded, or went wrong")


class Version(Reply):
    version: str


class BatchOutcome(Reply):
    """What the single step would have answered: `reply` of a 200, else `problem`."""

    session_id: str | None = Field(default=None, description="null: the item named none")
    status: int
    replayed: bool = Field(default=False, description="the reply of the first time: this had been done before")
    reply: AppendReply | None = None
    problem: Problem | None = None


class BatchOutcomes(Reply):
    """In the order of the steps asked for."""

    items: list[BatchOutcome]
