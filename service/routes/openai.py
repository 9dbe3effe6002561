"""What OpenAI's clients ask: completions, chats, and the tokens of a text. Nothing here is computed but on sessions."""

import secrets
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any, NamedTuple, TypeVar

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from engine.errors import InvalidInput, LengthExceeded, ModelNotFound
from engine.specs import ModelSpec
from keypast.openai_schemas import (
    ChatChunk,
    ChatReply,
    ChatRequest,
    CompletionReply,
    CompletionRequest,
    Detokenized,
    DetokenizeRequest,
    Tokenized,
    TokenizeRequest,
)
from keypast.schemas import MAX_INT, Problem
from keypast.wire import JSON_TYPE, validated
from service.answers import Answers, Asked, Piece, Turn
from service.auth import Tenant
from service.dialects import Chat, Completion, Dialect, Head
from service.errors import note, problem_of
from service.lifecycle import Service, service_of
from service.limits import json_body, json_limit
from service.once import REPLAYED, once_of
from service.openapi import KEY, REPLAYED_HEADER, SESSION_NAME, event_stream, json_request, problems, reply
from service.routes.inference import coded
from service.streams import PING, EventStream, event
from service.text import TextModel
from service.turns import Asker, chat_turn, sample_of

T = TypeVar("T")

router = APIRouter(tags=["openai"], default_response_class=Response)


def _documented(request: type[BaseModel], whole: type[BaseModel], chunk: type[BaseModel]) -> dict[str, Any]:
    found = reply(
        whole, f"The replies; with `stream`, server-sent events: {chunk.__name__} …, [DONE].", REPLAYED_HEADER
    )
    found["content"] |= event_stream(chunk, Problem)
    return {
        "openapi_extra": {**json_request(request), "parameters": [KEY, SESSION_NAME]},
        "responses": {200: found, **problems(400, 404, 409, 410, 412, 413, 415, 422, 429, 500, 503)},
    }


@router.post("/v1/completions", **_documented(CompletionRequest, CompletionReply, CompletionReply))
async def completions(request: Request, tenant: Tenant) -> Response:
    """Goes on after each prompt: n times, or as the next turn of a session."""
    return await _answer(request, await _read_as(request, partial(_read_completion, request, tenant)))


@router.post("/v1/chat/completions", **_documented(ChatRequest, ChatReply, ChatChunk))
async def chat(request: Request, tenant: Tenant) -> Response:
    """The assistant's reply to a conversation; or, with a session, to the next messages of the one in it."""
    return await _answer(request, await _read_as(request, partial(_read_chat, request, tenant)))


@router.post(
    "/tokenize",
    openapi_extra=json_request(TokenizeRequest),
    responses={200: reply(Tokenized, "The token ids."), **problems(400, 404, 413, 415, 422, 503)},
)
async def tokenize(request: Request) -> Response:
    """Text or messages as the model would get them."""
    service = service_of(request)
    told = await _read_as(request, lambda body: _tokenize(service, validated(TokenizeRequest, body)))
    return Response(told.model_dump_json(), media_type=JSON_TYPE)


def _tokenize(service: Service, wanted: TokenizeRequest) -> Tokenized:
    spec, text = model_of(service, wanted.model)
    if wanted.messages is not None:
        ids = text.tokenizer.render_chat([message.model_dump() for message in wanted.messages])
    else:
        ids = text.tokenizer.encode(wanted.prompt or "", add_special=wanted.add_special_tokens is not False)
    tokens = Tokenized(count=len(ids), max_model_len=spec.max_length, tokens=ids)
    if wanted.return_token_strs:
        tokens.token_strs = [text.tokenizer.decode([token], skip_special=False) for token in ids]
    return tokens


@router.post(
    "/detokenize",
    openapi_extra=json_request(DetokenizeRequest),
    responses={200: reply(Detokenized, "Their text."), **problems(400, 404, 413, 415, 422, 503)},
)
async def detokenize(request: Request) -> Response:
    """The text of token ids, control tokens included."""
    service = service_of(request)
    told = await _read_as(request, lambda body: _detokenize(service, validated(DetokenizeRequest, body)))
    return Response(told.model_dump_json(), media_type=JSON_TYPE)


def _detokenize(service: Service, wanted: DetokenizeRequest) -> Detokenized:
    spec, text = model_of(service, wanted.model)
    _check_ids("tokens", [wanted.tokens], spec)
    return Detokenized(prompt=text.tokenizer.decode(wanted.tokens, skip_special=False))


class _Read(NamedTuple):
    asked: Asked
    turn: Turn | None
    dialect: Callable[[Answers, Head], Dialect]
    kind: str
    stream: bool
    usage: bool  # of a stream, in a chunk of its own


def _read_completion(request: Request, tenant: str, body: bytes) -> _Read:
    """Raises WireError and its children, and what the engine raises."""
    service, wanted = service_of(request), validated(CompletionRequest, body)
    asker = Asker(service, request, tenant, wanted, once_of(request, body))
    plan = asker.turn() if asker.session_id is not None else None
    spec, text = model_of(service, asker.model)
    texts, begun = _prompts(wanted.prompt), plan is not None and plan.begun
    prompts = [
        text.tokenizer.encode(prompt, add_special=not begun) if isinstance(prompt, str) else prompt for prompt in texts
    ]
    if plan is not None and len(prompts) > 1:
        raise InvalidInput("prompt", "must be one with a session")
    if plan is not None and wanted.echo and wanted.logprobs is not None:
        raise InvalidInput("echo", "with logprobs is for requests without a session; a score tells them")
    _check_ids("prompt", prompts, spec)
    _check_lengths("prompt", prompts, spec, may_be_empty=begun)
    tokens = 16 if wanted.max_tokens is None else wanted.max_tokens
    options = wanted.stream_options
    asked = Asked(
        model=spec.name,
        text=text,
        tenant=tenant,
        prompts=prompts,
        n=wanted.n or 1,
        max_tokens=_max_tokens(tokens, plan is not None),
        sample=sample_of(wanted),
        stops=_stops(wanted.stop),
        ignore_eos=bool(wanted.ignore_eos),
        logprobs=wanted.logprobs is not None,
        top=wanted.logprobs or 0,
        of_prompt=bool(wanted.echo) and wanted.logprobs is not None,
        reuse=service.settings.prefix_reuse,
    )
    _check_choices(service, asked)
    echo = [text.tokenizer.decode(each) if not isinstance(each, str) else each for each in texts] if wanted.echo else []

    def dialect(answers: Answers, head: Head) -> Completion:
        continuous = bool(options and options.continuous_usage_stats)
        return Completion(answers, head, echo=echo, logprobs=wanted.logprobs, continuous=continuous)

    usage = bool(options and options.include_usage)
    return _Read(asked, None if plan is None else plan.turn, dialect, "cmpl", bool(wanted.stream), usage)


def _read_chat(request: Request, tenant: str, body: bytes) -> _Read:
    """Raises WireError and its children, and what the engine raises."""
    service, wanted = service_of(request), validated(ChatRequest, body)
    asker = Asker(service, request, tenant, wanted, once_of(request, body))
    plan = asker.turn() if asker.session_id is not None else None
    spec, text = model_of(service, asker.model)
    messages = [message.model_dump() for message in wanted.messages]
    if plan is None:
        ids = text.tokenizer.render_chat(messages)
    else:
        ids = chat_turn(service.engine, plan, text.tokenizer, messages)
    _check_lengths("messages", [ids], spec, may_be_empty=plan is not None and plan.done)
    tokens = wanted.max_completion_tokens if wanted.max_completion_tokens is not None else wanted.max_tokens
    options = wanted.stream_options
    asked = Asked(
        model=spec.name,
        text=text,
        tenant=tenant,
        prompts=[ids],
        n=wanted.n or 1,
        max_tokens=_max_tokens(MAX_INT if tokens is None else tokens, plan is not None),
        sample=sample_of(wanted),
        stops=_stops(wanted.stop),
        ignore_eos=bool(wanted.ignore_eos),
        logprobs=bool(wanted.logprobs),
        top=wanted.top_logprobs or 0,
        reuse=service.settings.prefix_reuse,
    )
    _check_choices(service, asked)

    def dialect(answers: Answers, head: Head) -> Chat:
        continuous = bool(options and options.continuous_usage_stats)
        return Chat(answers, head, logprobs=bool(wanted.logprobs), continuous=continuous)

    usage = bool(options and options.include_usage)
    return _Read(asked, None if plan is None else plan.turn, dialect, "chatcmpl", bool(wanted.stream), usage)


async def _read_as(request: Request, read: Callable[[bytes], T]) -> T:
    """What `read` makes of the body."""
    body = await json_body(request, json_limit(service_of(request).settings))
    return await coded(len(body), lambda: read(body))


async def _answer(request: Request, read: _Read) -> Response:
    service, turn = service_of(request), read.turn
    answers = Answers(service, read.asked, request.receive, turn)
    named = secrets.token_hex(12) if turn is None else turn.name
    session_id = None if turn is None else turn.session_id
    head = Head(f"{read.kind}-{named}", int(time.time()), read.asked.model, session_id)
    dialect = read.dialect(answers, head)
    if read.stream:
        chunks = _chunks(service, answers, dialect, usage=read.usage)
        first = await anext(chunks)  # what fails before has a status of its own
        return EventStream(chunks, headers=_headers(turn), first=first)
    if turn is not None:
        turn.outlives = True  # its reader may come back for it
    pieces: list[Piece] = []
    async with aclosing(answers.pieces()) as coming:
        async for piece in coming:
            assert piece is not None  # there is no silence to tell of
            pieces.append(piece)
    error = pieces[-1].error
    problem = None if error is None else problem_of(error, request.url.path)
    if problem is not None:
        note(request, problem)
    whole = dialect.whole(pieces, problem)
    return Response(whole.model_dump_json(exclude_unset=True), 200, _headers(turn), JSON_TYPE)


async def _chunks(service: Service, answers: Answers, dialect: Dialect, *, usage: bool) -> AsyncGenerator[bytes]:
    silence = service.settings.ping_seconds
    with service.streams.one(answers.asked.tenant):
        async with aclosing(answers.pieces(silence)) as pieces:
            async for piece in pieces:
                if piece is None:
                    yield PING
                    continue
                chunk = dialect.chunk(piece)
                if chunk is not None:
                    yield event(chunk.model_dump_json(exclude_unset=True))
                if piece.error is not None:
                    raise piece.error
        if usage:
            yield event(dialect.last_chunk().model_dump_json(exclude_unset=True))


def _headers(turn: Turn | None) -> dict[str, str]:
    return {REPLAYED: "true"} if turn is not None and turn.replayed else {}


def model_of(service: Service, name: str | None) -> tuple[ModelSpec, TextModel]:
    """That of this name, or the first that reads text. Raises ModelNotFound, InvalidInput."""
    specs = service.engine.specs
    if name is None:
        name = next((each for each in specs if service.text_model(each) is not None), "")
    if name not in specs:
        raise ModelNotFound(name, sorted(specs))
    text = service.text_model(name)
    if text is None:
        raise InvalidInput("model", f"{name} reads no text")
    return specs[name], text


def _prompts(given: str | list[str] | list[int] | list[list[int]]) -> list[str | list[int]]:
    if isinstance(given, str):
        return [given]
    texts: list[str | list[int]] = [each for each in given if not isinstance(each, int)]
    return texts or [[each for each in given if isinstance(each, int)]]


def _stops(stop: str | list[str] | None) -> list[str]:
    return [stop] if isinstance(stop, str) else stop or []


def _max_tokens(tokens: int, in_session: bool) -> int:
    if in_session and not tokens:
        raise InvalidInput("max_tokens", "must be at least 1 with a session; a prefill appends without drawing")
    return tokens


def _check_choices(service: Service, asked: Asked) -> None:
    most, choices = service.settings.max_choices, asked.n * len(asked.prompts)
    if choices > most:
        raise InvalidInput("n", f"times the prompts makes {choices} replies; {most} at most")


def _check_ids(field: str, rows: Sequence[Sequence[int]], spec: ModelSpec) -> None:
    largest = max(map(max, filter(None, rows)), default=0)
    if spec.vocab_size is not None and largest >= spec.vocab_size:
        raise InvalidInput(field, f"has the token {largest}; this model's are 0 to {spec.vocab_size - 1}")


def _check_lengths(field: str, rows: Sequence[Sequence[int]], spec: ModelSpec, *, may_be_empty: bool) -> None:
    longest, shortest = max(map(len, rows)), min(map(len, rows))
    if longest > spec.max_length:
        raise LengthExceeded(field, f"{longest} tokens pass the model's max_length {spec.max_length}")
    if not shortest and not may_be_empty:
        raise InvalidInput(field, "has no token; there is nothing to go on from")
