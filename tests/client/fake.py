"""A service small enough to read, behind an `httpx.MockTransport`: it answers by the contract, and computes little.

The decoder's text is one token a byte, and it goes on with "Paris. " for ever. The attention gives back its query.
"""

import json
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np
from pydantic import BaseModel

from keypast import batch, schemas, wire
from keypast.past import Past
from keypast.schemas import Code
from keypast.wire import Array

LOOP = b"Paris. "
NOW = "2026-01-01T00:00:00Z"
EFFORT: dict[str, Any] = {"computed": [1], "reused": [4], "shared": [2]}
TIMINGS = schemas.Timings(queue_ms=0.5, compute_ms=2.0)
STATUS = {
    Code.SESSION_NOT_FOUND: 404,
    Code.MODEL_NOT_FOUND: 404,
    Code.SESSION_GONE: 410,
    Code.WRONG_STATE: 409,
    Code.MOVED: 412,
    Code.REPLY_DROPPED: 412,
    Code.LENGTH_EXCEEDED: 422,
    Code.KEY_REUSED: 422,
    Code.INVALID_INPUT: 422,
    Code.UNSUPPORTED_MEDIA_TYPE: 415,
    Code.QUEUE_FULL: 429,
    Code.QUOTA_EXCEEDED: 429,
    Code.POOL_EXHAUSTED: 429,
    Code.NOT_READY: 503,
    Code.ENGINE_STOPPED: 503,
    Code.DEVICE_FULL: 503,
    Code.BODIES_FULL: 503,
    Code.MODEL_FAILED: 500,
}


class Sse(httpx.SyncByteStream, httpx.AsyncByteStream):
    """A body of events that knows whether it was closed; an exception among the chunks is raised in its place."""

    def __init__(self, chunks: Iterator[bytes | BaseException]) -> None:
        self.chunks = chunks
        self.sent = 0
        self.closed = False

    def __iter__(self) -> Iterator[bytes]:
        for chunk in self.chunks:
            if isinstance(chunk, BaseException):
                raise chunk
            self.sent += 1
            yield chunk

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for chunk in self:
            yield chunk

    def close(self) -> None:
        self.closed = True

    async def aclose(self) -> None:
        self.closed = True


@dataclass
class FakeSession:
    id: str
    model: str
    rows: list[list[int]]
    max_length: int
    parent: str | None = None
    labels: dict[str, str] = field(default_factory=dict)
    ttl_seconds: float | None = None
    pinned: bool = False
    version: int = 0

    @property
    def lengths(self) -> list[int]:
        return [len(row) for row in self.rows]

    def view(self) -> schemas.SessionView:
        return schemas.SessionView.model_validate(
            {
                "id": self.id,
                "model": self.model,
                "kind": self.model,
                "state": "idle",
                "batch_size": len(self.rows),
                "valid_length": self.lengths,
                "max_length": self.max_length,
                "version": self.version,
                "bytes": 64 * sum(self.lengths),
                "blocks": len(self.rows),
                "shared_blocks": 0 if self.parent is None else 1,
                "parent": self.parent,
                "labels": self.labels,
                "ttl_seconds": self.ttl_seconds,
                "pinned": self.pinned,
                "created_at": NOW,
                "last_used_at": NOW,
            }
        )


def problem(code: str, detail: str = "no", retry_header: int | None = None, **members: object) -> httpx.Response:
    status = STATUS[Code(code)]
    body = {"type": "about:blank", "title": "No", "status": status, "detail": detail, "code": code, **members}
    body["error"] = {"message": detail, "type": "invalid_request_error", "param": None, "code": code}
    headers = {"Content-Type": "application/problem+json"}
    if retry_header is not None:
        headers["Retry-After"] = str(retry_header)
    return httpx.Response(status, headers=headers, content=json.dumps(body))


def card(name: str, *inputs: str) -> schemas.ModelCard:
    infos = [schemas.TensorInfo(name=input_, dtypes=["float16"], shape=["B", "n"]) for input_ in inputs]
    return schemas.ModelCard(
        id=name, kind=name, max_length=64, dtype="float16", device="cpu", fingerprint="f", inputs=infos, outputs=[]
    )


class FakeService:
    """`answers` are given first, in turn, whatever is asked; `requests` is what came, bodies read. Then a request is
    done, once for its key, and `lost` are raised, in turn, in place of the replies to what may change something."""

    def __init__(self, *answers: httpx.Response | Exception, max_length: int = 64) -> None:
        self.answers = list(answers)
        self.max_length = max_length
        self.requests: list[httpx.Request] = []
        self.sessions: dict[str, FakeSession] = {}
        self.gone: set[str] = set()
        self.streams: list[Sse] = []
        self.interrupt: BaseException | None = None  # raised in place of a stream's third event
        self.lost: list[Exception] = []
        self.replies: dict[str, httpx.Response] = {}
        self.page = 2
        self.transport = httpx.MockTransport(self.handle)

    def handle(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        if self.answers:
            answer = self.answers.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return answer
        reply = self._once(request)
        if self.lost and request.method != "GET":
            raise self.lost.pop(0)
        return reply

    def _once(self, request: httpx.Request) -> httpx.Response:
        key = request.headers.get("Idempotency-Key")
        if key is None:
            return self._done(request)
        if key in self.replies:
            first = self.replies[key]
            headers = {**first.headers, "Idempotent-Replayed": "true"}
            return httpx.Response(first.status_code, headers=headers, content=first.content)
        reply = self._done(request)
        if reply.is_success and not isinstance(reply.stream, Sse):
            self.replies[key] = reply
        return reply

    def _done(self, request: httpx.Request) -> httpx.Response:
        parts = request.url.path.removeprefix("/under").strip("/").split("/")
        if parts == ["v1", "batch", "step"]:
            return self._batch(request)
        if parts[:2] != ["v1", "sessions"]:
            return self._about(parts[-1])
        if len(parts) == 2:
            return self._create(request) if request.method == "POST" else self._list(request)
        return self._one(request, parts[2], parts[3] if len(parts) > 3 else request.method)

    # ---- routes ----

    def _about(self, name: str) -> httpx.Response:
        usage = schemas.Usage(total=8, free=6, used=2, shared=1, reserved=0)
        replies: dict[str, BaseModel] = {
            "models": schemas.ModelList(data=[card("attention", "query"), card("decoder", "token_ids")]),
            "capacity": schemas.Capacity(
                pools=[schemas.PoolUsage(model="decoder", block_size=16, blocks=usage, bytes=usage)],
                sessions=len(self.sessions),
            ),
            "readyz": schemas.Health(status="ready"),
            "version": schemas.Version(version="0.1.0"),
        }
        return reply(replies[name])

    def _create(self, request: httpx.Request) -> httpx.Response:
        wanted = schemas.CreateSession.model_validate_json(request.content)
        if wanted.model not in ("attention", "decoder"):
            return problem(Code.MODEL_NOT_FOUND, f"model {wanted.model!r} is not loaded")
        return reply(self._keep(wanted.id, wanted.model, [[] for _ in range(wanted.batch_size)], wanted.labels), 201)

    def _keep(
        self,
        session_id: str | None,
        model: str,
        rows: list[list[int]],
        labels: dict[str, str] | None = None,
        parent: str | None = None,
    ) -> schemas.SessionView:
        name = session_id or f"{'abcdefgh'[len(self.sessions)]}-1"
        self.sessions[name] = FakeSession(name, model, rows, self.max_length, parent, labels or {})
        return self.sessions[name].view()

    def _list(self, request: httpx.Request) -> httpx.Response:
        first = int(request.url.params.get("cursor", "0"))
        model = request.url.params.get("model")
        views = [session.view() for session in self.sessions.values() if model in (None, session.model)]
        after = first + self.page
        cursor = str(after) if after < len(views) else None
        return reply(schemas.SessionPage(data=views[first:after], next_cursor=cursor))

    def _one(self, request: httpx.Request, session_id: str, verb: str) -> httpx.Response:
        if session_id in self.gone:
            return problem(Code.SESSION_GONE, "the session is gone: deleted", reason="deleted")
        session = self.sessions.get(session_id)
        if session is None:
            return problem(Code.SESSION_NOT_FOUND, "no such session")
        expected = wire.parse_if_match(request.headers.get("If-Match"))
        if expected not in (None, session.version):
            return problem(Code.MOVED, "moved", version=session.version, valid_length=session.lengths)
        verbs: dict[str, Callable[[httpx.Request, FakeSession], httpx.Response]] = {
            "GET": lambda _, session: reply(session.view()),
            "PATCH": self._update,
            "DELETE": self._delete,
            "prefill": self._append,
            "step": self._append,
            "score": self._append,
            "generate": self._generate,
            "fork": self._fork,
            "truncate": self._truncate,
            "past": self._export if request.method == "GET" else self._import,
        }
        return verbs[verb](request, session)

    def _delete(self, _: httpx.Request, session: FakeSession) -> httpx.Response:
        del self.sessions[session.id]
        self.gone.add(session.id)
        positions = sum(session.lengths)
        return reply(
            schemas.Receipt(
                id=session.id, positions=positions, bytes=64 * positions, blocks_freed=1, blocks_still_shared=0
            )
        )

    def _append(self, request: httpx.Request, session: FakeSession) -> httpx.Response:
        content_type, query = request.headers.get("Content-Type"), list(request.url.params.multi_items())
        try:
            options, arrays, form = wire.read_append(schemas.AppendRequest, content_type, request.content, query)
        except wire.WireError as error:
            return problem(Code.INVALID_INPUT, str(error), field=error.field)
        if request.url.path.endswith("step") and not all(session.rows):
            return problem(Code.WRONG_STATE, "a step on an empty session")
        past = session.lengths
        if "query" in arrays and "key" not in arrays and not any(session.rows):
            return problem(Code.WRONG_STATE, "queries alone on an empty session")
        rows = self._rows(session, options, arrays)
        if max(map(len, rows)) + max(past) > session.max_length:
            return problem(Code.LENGTH_EXCEEDED, "longer than max_length", field="text")
        present = [length + len(new) for length, new in zip(past, rows, strict=True)]
        if not request.url.path.endswith("score"):
            for row, new in zip(session.rows, rows, strict=True):
                row.extend(new)
            session.version += any(rows)
        outputs, tensors = self._outputs(session, options, arrays)
        body = schemas.AppendReply(
            outputs=outputs,
            past_length=past,
            valid_length=present,
            version=session.version,
            **EFFORT,
            timings=TIMINGS,
        )
        told = body.model_dump(exclude_none=True)
        encoded = wire.write_reply(
            told, told.pop("outputs"), tensors, wire.reply_form(form, request.headers.get("Accept"))
        )
        headers = {**encoded.headers, "Content-Type": encoded.content_type}
        return httpx.Response(200, headers=headers, content=encoded.body)

    def _batch(self, request: httpx.Request) -> httpx.Response:
        """Each item is done as a single step would be."""
        content_type = request.headers.get("Content-Type")
        outcomes = []
        for step in batch.read_steps(content_type, request.content, 8):
            assert isinstance(step.body, wire.AppendBody)
            asked, arrays, _ = step.body
            assert isinstance(asked, schemas.BatchStep)
            single = schemas.StepRequest.model_validate(asked.model_dump(exclude={"session_id", "if_match"}))
            encoded = wire.write_append(single, arrays, "base64")
            headers = {} if asked.if_match is None else {"If-Match": wire.etag(asked.if_match)}
            headers |= {"Content-Type": encoded.content_type, "Accept": wire.JSON_TYPE}
            url = f"http://k/v1/sessions/{asked.session_id}/step"
            answer = self._one(
                httpx.Request("POST", url, headers=headers, content=encoded.body), asked.session_id, "step"
            )
            told = schemas.BatchOutcome(session_id=asked.session_id, status=answer.status_code)
            outputs: dict[str, Array] = {}
            if answer.status_code == 200:
                told.reply, outputs = wire.read_reply(wire.JSON_TYPE, answer.content)
                told.reply.outputs.attn_out = told.reply.outputs.logits = None
            else:
                told.problem = schemas.Problem.model_validate_json(answer.content)
            outcomes.append(batch.Told(told.model_dump(exclude_none=True), outputs))
        binary = request.headers.get("Accept") == wire.SAFETENSORS_TYPE
        written = batch.write_outcomes(outcomes, binary=binary)
        return httpx.Response(200, headers={"Content-Type": written.content_type}, content=written.body)

    def _rows(self, session: FakeSession, options: schemas.AppendRequest, arrays: dict[str, Array]) -> list[list[int]]:
        if "key" in arrays or "query" in arrays:
            rows = [[0] * arrays["key"].shape[1] if "key" in arrays else [] for _ in session.rows]
        elif options.messages is not None:
            rows = [list("".join(f"[{m.role}]{m.content}" for m in options.messages).encode())]
        elif options.text is not None:
            texts = [options.text] * len(session.rows) if isinstance(options.text, str) else options.text
            rows = [list(text.encode()) for text in texts]
        else:
            rows = options.token_ids or []
        if options.batch_valid_length is None:
            return rows
        ends = zip(rows, options.batch_valid_length, session.lengths, strict=True)
        return [row[: end - past] for row, end, past in ends]

    def _outputs(
        self, session: FakeSession, options: schemas.AppendRequest, arrays: dict[str, Array]
    ) -> tuple[schemas.Outputs, dict[str, Array]]:
        outputs, tensors = schemas.Outputs(), {}
        if "query" in arrays:
            tensors["attn_out"] = arrays["query"]
        if options.need_weights:
            tensors["attn_weights"] = np.ones((1, 1, session.lengths[0]), np.float32)
        if options.logits != "none":
            tensors["logits"] = np.full((len(session.rows), 3), -np.inf, np.float32)
        if options.sample is not None:
            outputs.next_token = [LOOP[0]] * len(session.rows)
            outputs.text = ["P"] * len(session.rows)
        return outputs, tensors

    # ---- generate ----

    def _generate(self, request: httpx.Request, session: FakeSession) -> httpx.Response:
        options = schemas.GenerateRequest.model_validate_json(request.content)
        past = session.lengths
        if not options.stream:
            list(self._commits(session, options.max_tokens))
            new = [row[start:] for row, start in zip(session.rows, past, strict=True)]
            generated = schemas.Generated(token_ids=new, text=[bytes(row).decode() for row in new])
            return reply(
                schemas.GenerateReply(
                    outputs=generated,
                    finish_reason=["length"] * len(past),
                    past_length=past,
                    valid_length=session.lengths,
                    version=session.version,
                    **EFFORT,
                    timings=TIMINGS,
                )
            )
        stream = Sse(self._events(session, options.max_tokens))
        self.streams.append(stream)
        return httpx.Response(200, headers={"Content-Type": "text/event-stream"}, stream=stream)

    def _commits(self, session: FakeSession, count: int) -> Iterator[schemas.StreamToken]:
        for at in range(count):
            token = LOOP[at % len(LOOP)]
            for row in session.rows:
                row.append(token)
            session.version += 1
            yield schemas.StreamToken(
                token_ids=[token] * len(session.rows),
                text=[chr(token)] * len(session.rows),
                valid_length=session.lengths,
                version=session.version,
            )

    def _events(self, session: FakeSession, count: int) -> Iterator[bytes | BaseException]:
        past = session.lengths
        yield b": ping\n\n"
        for at, token in enumerate(self._commits(session, count)):
            if at == 2 and self.interrupt is not None:
                yield self.interrupt
            yield event(token)
        yield event(
            schemas.StreamEnd(
                finish_reason=["length"] * len(past),
                past_length=past,
                valid_length=session.lengths,
                version=session.version,
                **EFFORT,
                timings=TIMINGS,
            )
        )
        yield b"data: [DONE]\n\n"

    # ---- without computing ----

    def _fork(self, request: httpx.Request, session: FakeSession) -> httpx.Response:
        options = schemas.ForkRequest.model_validate_json(request.content)
        at = options.at if isinstance(options.at, list) else [options.at] * len(session.rows)
        views = []
        for _ in range(options.count):
            rows = [row[:length] for row, length in zip(session.rows, at, strict=True)]
            views.append(self._keep(None, session.model, rows, parent=session.id))
        return reply(schemas.ForkReply(sessions=views), 201)

    def _truncate(self, request: httpx.Request, session: FakeSession) -> httpx.Response:
        length = schemas.TruncateRequest.model_validate_json(request.content).length
        lengths = length if isinstance(length, list) else [length] * len(session.rows)
        session.rows = [row[:end] for row, end in zip(session.rows, lengths, strict=True)]
        session.version += 1
        return reply(session.view())

    def _update(self, request: httpx.Request, session: FakeSession) -> httpx.Response:
        """RFC 7396, to the letter."""
        for name, value in json.loads(request.content).items():
            if name == "ttl_seconds":
                session.ttl_seconds = value
            elif name == "pinned":
                session.pinned = bool(value)
            elif value is None:
                session.labels = {}
            else:
                for key, text in value.items():
                    session.labels.pop(key, None) if text is None else session.labels.update({key: text})
        return reply(session.view())

    def _export(self, _: httpx.Request, session: FakeSession) -> httpx.Response:
        """One head of one channel, which is the token."""
        ids = np.zeros((len(session.rows), max(session.lengths)), np.int64)
        for row, tokens in zip(ids, session.rows, strict=True):
            row[: len(tokens)] = tokens
        key = ids[:, None, None].astype(np.float16)
        arrays: dict[str, Array] = {"key_past.0": key, "value_past.0": -key.swapaxes(2, 3), "token_ids": ids}
        headers = {"Content-Type": wire.SAFETENSORS_TYPE, "ETag": wire.etag(session.version)}
        return httpx.Response(200, headers=headers, content=Past(arrays, session.lengths, "decoder", "f").to_bytes())

    def _import(self, request: httpx.Request, session: FakeSession) -> httpx.Response:
        wire.check_safetensors(request.headers.get("Content-Type"))
        if any(session.rows):
            return problem(Code.WRONG_STATE, "the session has a past")
        past = Past.from_bytes(request.read())
        assert past.token_ids is not None
        session.rows = [ids[:end].tolist() for ids, end in zip(past.token_ids, past.valid_length, strict=True)]
        session.version += 1
        return reply(session.view())


def reply(body: BaseModel, status: int = 200) -> httpx.Response:
    return httpx.Response(status, headers={"Content-Type": "application/json"}, content=body.model_dump_json())


def event(body: BaseModel) -> bytes:
    return b"data: " + body.model_dump_json(exclude_none=True).encode() + b"\n\n"
