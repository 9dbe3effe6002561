"""What the sync and the async session share: the state that the object knows, and the calls it makes. No I/O."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypedDict

from keypast import _protocol, schemas, wire
from keypast._protocol import AppendResult, Call
from keypast.errors import ProtocolError, StatusError
from keypast.past import Past
from keypast.schemas import GenerateReply, GenerateRequest, Message, Receipt, SampleOptions, SessionView

ArrayLike = Any  # a numpy array, a torch tensor, or nested numbers
Ids = list[list[int]] | ArrayLike


class Expectation(TypedDict, total=False):
    """Refuse (PreconditionFailed) if the session has moved on. Default: whatever version it is at.

    `if_version` names the version; `expect_version=True` takes the one that this object knows. Off unless asked for,
    since a session that another object also appends to, or whose stream was cut, is ahead of what this one knows.
    """

    if_version: int | None
    expect_version: bool


class Change(Expectation, total=False):
    """`idempotency_key`: names the call, 1 to 255 visible ASCII characters, so that it is done once however often it is
    sent: also by another process, which had no reply. Each call has a key of its own unless it is given one."""

    idempotency_key: str


class AppendInputs(Change, total=False):
    """The keywords of `prefill`, `step` and `score`; B rows, n queries, m new positions, T the longest row's length
    with them.

    attention: query (B, n, H), key and value (B, m, H), attention_mask (B, n, T), 1 = attend. Query alone reads the
               past and appends nothing; key and value alone are appended and answer nothing.
    decoder:   one of token_ids (B, n), text (a string, or one a row) and messages (of a session of one row)
    """

    query: ArrayLike
    key: ArrayLike
    value: ArrayLike
    attention_mask: ArrayLike
    need_weights: bool
    average_attn_weights: bool
    token_ids: Ids
    text: str | list[str]
    messages: list[Message] | list[dict[str, str]]
    batch_valid_length: list[int] | ArrayLike
    logits: str
    top_logprobs: int
    token_logprobs: bool
    sample: SampleOptions | dict[str, Any]


class GenerateOptions(Change, total=False):
    """The keywords of `generate`; the service's defaults are in `schemas.GenerateRequest`: 128 tokens a row, greedy."""

    max_tokens: int
    stop: str | list[str]
    sample: SampleOptions | dict[str, Any]
    logprobs: bool
    ignore_eos: bool


class SessionOptions(TypedDict, total=False):
    """The keywords of `sessions.create`."""

    id: str
    batch_size: int
    max_length: int
    ttl_seconds: float
    pinned: bool
    labels: dict[str, str]
    idempotency_key: str


class SessionChanges(Expectation, total=False):
    """The keywords of `update`; what is left out stays. `ttl_seconds` None: for ever. A label of None is taken away,
    labels of None are all taken away."""

    ttl_seconds: float | None
    pinned: bool
    labels: dict[str, str | None] | None


class SessionFilter(TypedDict, total=False):
    """The keywords of `sessions.list`; `label` is `key` or `key=value`, and all must hold. `limit` is a page's size."""

    model: str
    label: list[str]
    state: str
    limit: int


class SessionCore:
    """`view` is the service's last full account of the session; `version` and `valid_length` follow every reply."""

    def __init__(self, view: SessionView, *, binary: bool) -> None:
        self.view = view
        self.version = view.version
        self.valid_length = view.valid_length
        self._binary = binary

    @property
    def id(self) -> str:
        return self.view.id

    @property
    def model(self) -> str:
        return self.view.model

    @property
    def batch_size(self) -> int:
        return self.view.batch_size

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id} {self.model} v{self.version} {self.valid_length}>"

    def _moved(self, version: int, valid_length: list[int]) -> None:
        self.version = version
        self.valid_length = valid_length

    def _seen(self, view: SessionView) -> None:
        self.view = view
        self._moved(view.version, view.valid_length)

    def _appended(self, result: AppendResult) -> AppendResult:
        self._moved(result.version, result.valid_length)
        return result

    def _scored(self, result: AppendResult) -> AppendResult:
        self._moved(result.version, result.past_length)
        return result

    def _generated(self, reply: GenerateReply) -> GenerateReply:
        self._moved(reply.version, reply.valid_length)
        return reply

    def _if_match(self, options: dict[str, Any]) -> int | None:
        """Takes the expectation out of the options."""
        expected = options.pop("expect_version", False)
        version: int | None = options.pop("if_version", None)
        return self.version if version is None and expected else version

    def _guards(self, options: dict[str, Any]) -> tuple[int | None, str | None]:
        """Takes the expectation and the key out of the options."""
        return self._if_match(options), options.pop("idempotency_key", None)

    # ---- calls ----

    def _append(self, verb: str, inputs: AppendInputs) -> Call[AppendResult]:
        options: dict[str, Any] = dict(inputs)
        if_match, key = self._guards(options)
        call = _protocol.append(self.id, verb, options, binary=self._binary, if_match=if_match)
        return call.once(key).then(self._appended)

    def _score(self, inputs: AppendInputs) -> Call[AppendResult]:
        options: dict[str, Any] = dict(inputs)
        if_match, _ = self._guards(options)
        call = _protocol.append(self.id, "score", options, binary=self._binary, if_match=if_match)
        return replace(call, reads=True).then(self._scored)

    def _generate(self, options: GenerateOptions) -> Call[GenerateReply]:
        request, if_match, key = self._generate_request(options, stream=False)
        call = _protocol.post(_protocol.session_path(self.id, "generate"), request, GenerateReply, if_match)
        return replace(call, parse=_protocol.parse_generated).once(key).then(self._generated)

    def _stream(self, options: GenerateOptions) -> Call[None]:
        request, if_match, key = self._generate_request(options, stream=True)
        return _protocol.stream(self.id, request, if_match).once(key)

    def _generate_request(
        self, options: GenerateOptions, *, stream: bool
    ) -> tuple[GenerateRequest, int | None, str | None]:
        fields: dict[str, Any] = dict(options)
        guards = self._guards(fields)
        return _protocol.request_of(GenerateRequest, {**fields, "stream": stream}), *guards

    def _fork(self, count: int, at: int | list[int] | None, change: Change) -> Call[list[SessionView]]:
        request = _protocol.request_of(schemas.ForkRequest, {"count": count, "at": at})
        if_match, key = self._guards({**change})
        call = _protocol.post(_protocol.session_path(self.id, "fork"), request, schemas.ForkReply, if_match)
        return call.once(key).then(lambda reply: reply.sessions)

    def _truncate(self, length: int | list[int], change: Change) -> Call[None]:
        request = _protocol.request_of(schemas.TruncateRequest, {"length": length})
        if_match, key = self._guards({**change})
        call = _protocol.post(_protocol.session_path(self.id, "truncate"), request, SessionView, if_match)
        return call.once(key).then(self._seen)

    def _update(self, changes: SessionChanges) -> Call[None]:
        fields: dict[str, Any] = dict(changes)
        if_match = self._if_match(fields)
        request = _protocol.request_of(schemas.UpdateSession, fields)
        return _protocol.patch(_protocol.session_path(self.id), request, SessionView, if_match).then(self._seen)

    def _past(self, expectation: Expectation) -> Call[Past]:
        return _protocol.get_past(self.id, self._if_match({**expectation})).then(self._exported)

    def _exported(self, reply: tuple[Past, int]) -> Past:
        past, version = reply
        self._moved(version, past.valid_length)
        return past

    def _load_past(self, past: Past, change: Change) -> Call[None]:
        if_match, key = self._guards({**change})
        return _protocol.put_past(self.id, past, if_match).once(key).then(self._seen)

    def _delete(self, change: Change) -> Call[Receipt]:
        return delete_session(self.id, *self._guards({**change}))

    def _refresh(self) -> Call[None]:
        return get_session(self.id).then(self._seen)


def batch_step(
    steps: "Sequence[tuple[SessionCore, AppendInputs]]", *, binary: bool, key: str | None = None
) -> Call[list[AppendResult | StatusError]]:
    """Tells each session of what became of its step."""
    items = []
    for session, inputs in steps:
        options: dict[str, Any] = dict(inputs)
        if_match, _ = session._guards(options)
        items.append((session.id, options, if_match))

    def followed(results: list[AppendResult | StatusError]) -> list[AppendResult | StatusError]:
        if len(results) != len(steps):
            raise ProtocolError(f"not the reply that was expected: {len(results)} items to {len(steps)} steps")
        for (session, _), result in zip(steps, results, strict=True):
            if isinstance(result, AppendResult):
                session._appended(result)
        return results

    return _protocol.batch_step(items, binary=binary).once(key).then(followed)


def create_session(model: str, options: SessionOptions) -> Call[SessionView]:
    fields: dict[str, Any] = {"model": model, **options}
    key = fields.pop("idempotency_key", None)
    request = _protocol.request_of(schemas.CreateSession, fields)
    return _protocol.post("/v1/sessions", request, SessionView).once(key)


def get_session(session_id: str) -> Call[SessionView]:
    return _protocol.get(_protocol.session_path(session_id), SessionView)


def list_sessions(filters: SessionFilter, cursor: str | None) -> Call[schemas.SessionPage]:
    listing = _protocol.request_of(schemas.ListSessions, {**filters, "cursor": cursor})
    query = listing.model_dump(exclude_unset=True, exclude_none=True)
    return _protocol.get("/v1/sessions", schemas.SessionPage, query)


def delete_session(session_id: str, if_match: int | None = None, key: str | None = None) -> Call[Receipt]:
    headers = {} if if_match is None else {"If-Match": wire.etag(if_match)}
    call = Call("DELETE", _protocol.session_path(session_id), _protocol.parse_model(Receipt), headers=headers)
    return call.once(key)


def events(after: str | None) -> Call[None]:
    """Its `parse` only checks the status; the body is for an EventReader."""
    headers = {"Accept": "text/event-stream"} | ({} if after is None else {"Last-Event-ID": after})
    return Call("GET", "/v1/events", _protocol.check, headers=headers)


READY = Call("GET", "/readyz", _protocol.parse_ready)
MODELS = _protocol.get("/v1/models", schemas.ModelList).then(lambda reply: reply.data)
CAPACITY = _protocol.get("/v1/capacity", schemas.Capacity)
VERSION = _protocol.get("/version", schemas.Version).then(lambda reply: reply.version)
