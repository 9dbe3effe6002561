"""Generate: the server's own loop of sample and step, as one reply or as a stream of events."""

from collections import deque
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial

from fastapi import APIRouter, Request, Response
from pydantic_core import to_json

from engine.batch import Generate, GenerateResult, Once, TokenEvent
from engine.errors import InvalidInput
from engine.stats import SessionInfo
from keypast.schemas import Generated, GenerateReply, GenerateRequest, Problem, StreamEnd, StreamToken
from keypast.wire import JSON_TYPE, parse_if_match, reply_headers
from service.auth import Tenant
from service.errors import note, problem_of
from service.lifecycle import Service, service_of
from service.limits import json_limit
from service.once import read_change, replay_headers
from service.openapi import APPEND_HEADERS, GUARDS, event_stream, json_request, problems, reply
from service.routes.inference import told_of
from service.streams import PING, EventStream, event
from service.text import GeneratedText, sampling
from service.worker import ReaderGone

router = APIRouter(prefix="/v1/sessions/{session_id}", tags=["inference"], default_response_class=Response)

Said = tuple[TokenEvent, list[str]]  # a commit, and the text that each row may show for it

_REPLY = reply(GenerateReply, "What was generated; with `stream`, server-sent events.", APPEND_HEADERS)
_REPLY["content"] |= event_stream(StreamToken, StreamEnd, Problem)


@router.post(
    "/generate",
    openapi_extra={**json_request(GenerateRequest), "parameters": GUARDS},
    responses={200: _REPLY, **problems(400, 404, 409, 410, 412, 413, 415, 422, 429, 500, 503)},
)
async def generate(request: Request, session_id: str, tenant: Tenant) -> Response:
    """Draws tokens and appends them; every token is a commit.

    It ends when its reader leaves, unless it has a key and is no stream: then its reader may come back for the reply.
    """
    service = service_of(request)
    expected = parse_if_match(request.headers.get("if-match"))
    wanted, once = await read_change(request, GenerateRequest, json_limit(service.settings))
    session = service.engine.session(session_id, tenant)
    run = _Run(service, request, wanted, session, expected, once)
    return await (run.stream() if wanted.stream else run.reply())


class _Run:
    """One request's generation."""

    def __init__(
        self,
        service: Service,
        request: Request,
        wanted: GenerateRequest,
        session: SessionInfo,
        expected: int | None,
        once: Once,
    ) -> None:
        self._service = service
        self._request = request
        self._wanted = wanted
        self._once = once
        model = service.text_model(session.model)
        stop_texts = [wanted.stop] if isinstance(wanted.stop, str) else wanted.stop or []
        if stop_texts and model is None:
            raise InvalidInput("stop", f"model {session.model} writes no text")
        tokenizer = model.tokenizer if model else None
        self._new_text = partial(GeneratedText, tokenizer, len(session.valid_length), stop_texts)
        self._written = self._new_text()
        self._operation = Generate(
            session.id,
            wanted.max_tokens,
            session.tenant,
            sampling(wanted.sample),
            logprobs=wanted.logprobs,
            stop_ids=frozenset() if wanted.ignore_eos or model is None else model.end_ids,
            stop=self._written.stops,
            expected_version=expected,
            once=once,
        )

    async def reply(self) -> Response:
        try:
            async with aclosing(self._items(None, outlives=self._once.key is not None)) as items:
                async for item in items:
                    if isinstance(item, GenerateResult):
                        return self._respond(item, again=self._once.replayed)
            raise AssertionError("a generation ended without a result")
        except ReaderGone:
            raise
        except Exception:
            if self._operation.partial is None:
                raise
            # an error reply would say that nothing was applied, and be retried; these tokens are in the session
            self._written = self._new_text()  # the last of it may not have been written
            return self._respond(self._operation.partial, again=True)

    async def stream(self) -> Response:
        items = self._items(self._service.settings.ping_seconds)
        first = await anext(items)  # what fails before the first token still has a status of its own
        return EventStream(self._events(first, items), headers=replay_headers(self._once))

    def _items(self, silence: float | None, *, outlives: bool = False) -> AsyncGenerator[Said | GenerateResult | None]:
        def said(token: TokenEvent) -> Said:
            return token, self._written.committed(token)

        return self._service.worker.generate(self._operation, said, self._request.receive, silence, outlives=outlives)

    async def _events(
        self, item: Said | GenerateResult | None, items: AsyncGenerator[Said | GenerateResult | None]
    ) -> AsyncGenerator[bytes]:
        async with aclosing(items):
            while not isinstance(item, GenerateResult):
                yield PING if item is None else self._token(*item)
                item = await anext(items)
            for said in self._written.again(item) if self._once.replayed else ():
                yield self._token(*said)
            yield event(self._end(item).model_dump_json(exclude_none=True))

    def _token(self, token: TokenEvent, said: list[str]) -> bytes:
        """A StreamToken's fields, plain: a model of them would cost as much as all the rest, and there are many."""
        told: dict[str, object] = {
            "token_ids": token.token_ids,
            "text": said,
            "valid_length": token.valid_length,
            "version": token.version,
        }
        if self._wanted.logprobs:
            told["logprobs"] = token.logprobs
        return event(to_json(told).decode())

    def _end(self, result: GenerateResult) -> StreamEnd:
        return StreamEnd(
            finish_reason=result.finish_reason,
            text=self._written.rest(result.finish_reason),
            problem=self._problem(result),
            **told_of(result),
        )

    def _problem(self, result: GenerateResult) -> Problem | None:
        if result.error is None:
            return None
        problem = problem_of(result.error, self._request.url.path)
        note(self._request, problem)
        return problem

    def _respond(self, result: GenerateResult, *, again: bool) -> Response:
        if again:
            deque(self._written.again(result), maxlen=0)
        self._written.rest(result.finish_reason)
        told = told_of(result)
        body = GenerateReply(
            outputs=Generated(
                token_ids=result.token_ids,
                text=self._written.texts,
                logprobs=result.logprobs if self._wanted.logprobs else None,
            ),
            finish_reason=result.finish_reason,
            problem=self._problem(result),
            **told,
        )
        headers = reply_headers(told) | replay_headers(self._once)
        return Response(body.model_dump_json(exclude_none=True), 200, headers, JSON_TYPE)
