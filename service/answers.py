"""What an OpenAI request comes to, whatever its dialect: prompts, and replies to each, drawn by the engine's own loop.

Without a session each reply is drawn on one of its own, which is gone when the request is over, however it ends: a
prompt is appended once, and forked for the further replies. With a session a turn is one generation, prompt included,
that is known again by its key: a retry is told what was appended, and goes on from there if the first was cut off.
"""

import asyncio
import hashlib
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import ExitStack, aclosing, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
from starlette.types import Message, Receive

from engine.batch import Append, Array, Generate, GenerateResult, Likeliest, Once, Sample, TokenEvent, Want
from engine.errors import EngineStopped
from keypast.schemas import MAX_SEED
from service.lifecycle import Service
from service.text import GeneratedText, TextModel
from service.worker import ReaderGone, left

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Asked:
    """`max_tokens` may be 0: then nothing is drawn. `top`: how many are told that were likeliest in a token's place.
    `of_prompt`: the prompt's tokens are told, too."""

    model: str
    text: TextModel
    tenant: str
    prompts: list[list[int]]
    n: int
    max_tokens: int
    sample: Sample
    stops: list[str]
    ignore_eos: bool = False
    logprobs: bool = False
    top: int = 0
    of_prompt: bool = False
    reuse: bool = True


@dataclass(slots=True)
class Turn:
    """A turn of a session: what it appends is `Asked.prompts`, one. `at`: the length that it is cut back to before;
    `version`: what it must be at. `key` and `digest` are the request's; `outlives` its reader, who may come back."""

    session_id: str
    digest: bytes
    key: str
    at: int | None = None
    version: int | None = None
    outlives: bool = False
    replayed: bool = False

    def part(self, index: int) -> str:
        """The key of one of its generations."""
        return f"{self.key} {index}"

    @property
    def name(self) -> str:
        """The same for each of its retries."""
        return hashlib.sha256(self.key.encode() + self.digest).hexdigest()[:24]


@dataclass(frozen=True, slots=True)
class ToldToken:
    """`logprob` is None where it was not asked for, and for a position that nothing foretells."""

    id: int
    logprob: float | None
    likeliest: Likeliest


@dataclass(frozen=True, slots=True)
class Piece:
    """What a reply says at once: as much text as may be shown. The last one has the `finish_reason`."""

    choice: int
    text: str
    token: ToldToken | None = None
    finish_reason: str | None = None
    error: BaseException | None = None


@dataclass(slots=True)
class Count:
    """Tokens so far. `cached` is None until it is known."""

    prompt: int = 0
    completion: int = 0
    cached: int | None = None


@dataclass(slots=True)
class Answers:
    """Replies to one request; those to prompt i are choices i * n to i * n + n - 1. `prompt_tokens`: of each prompt,
    when they were asked for."""

    service: Service
    asked: Asked
    receive: Receive
    turn: Turn | None = None
    count: Count = field(default_factory=Count)
    prompt_tokens: dict[int, list[ToldToken]] = field(default_factory=dict)

    async def pieces(self, silence: float | None = None) -> AsyncGenerator[Piece | None]:
        """As they come; None after every `silence` seconds without. Closing it ends what still runs.

        Raises what the engine raises, and ReaderGone.
        """
        gone = asyncio.ensure_future(left(self.receive))
        try:
            if self.turn is not None:
                sources = [self._session_turn(self.turn)]
            else:
                sources = [self._replies_to(i, ids) for i, ids in enumerate(self.asked.prompts)]
            async with aclosing(merged(sources, silence, gone)) as pieces:
                async for piece in pieces:
                    if piece is not None and piece.token is not None:
                        self.count.completion += 1
                    yield piece
        finally:
            gone.cancel()

    async def _replies_to(self, index: int, ids: list[int]) -> AsyncGenerator[Piece]:
        """On sessions that are gone afterwards."""
        asked, engine = self.asked, self.service.engine
        choices = range(index * asked.n, (index + 1) * asked.n)
        with ExitStack() as borrowed:
            like = ids if asked.reuse and not asked.of_prompt else []
            first = engine.create_session(asked.model, tenant=asked.tenant, like=like)
            borrowed.enter_context(self._borrowed(first.id, keep=asked.reuse))
            there = first.valid_length[0]
            self.count.prompt += len(ids)
            self.count.cached = (self.count.cached or 0) + there
            prompt, sessions = ids[there:], [first.id]
            if asked.n > 1 or asked.of_prompt or not asked.max_tokens:
                await self._append(index, first.id, prompt)
                prompt = []
            if asked.n > 1 and asked.max_tokens:
                for child in engine.fork(first.id, tenant=asked.tenant, count=asked.n - 1):
                    borrowed.enter_context(self._borrowed(child.id, keep=False))
                    sessions.append(child.id)
            if not asked.max_tokens:
                for choice in choices:
                    yield Piece(choice, "", finish_reason="length")
                return
            drawn = zip(choices, sessions, strict=True)
            replies = [self._reply(choice, index, session, prompt) for choice, session in drawn]
            async with aclosing(merged(replies)) as pieces:
                async for piece in pieces:
                    assert piece is not None  # there is no silence to tell of
                    yield piece

    @contextmanager
    def _borrowed(self, session_id: str, *, keep: bool) -> Iterator[None]:
        """`keep`: what it has may serve the next prompt that begins like it, unless the request fails."""
        ended = False
        try:
            yield
            ended = True
        finally:
            self.service.engine.end_session(session_id, self.asked.tenant, keep=keep and ended)

    async def _append(self, index: int, session_id: str, prompt: list[int]) -> None:
        asked = self.asked
        want = Want(token_logprobs=asked.of_prompt, token_top_logprobs=asked.top if asked.of_prompt else 0)
        append = Append(session_id, inputs_of(prompt), asked.tenant, want=want)
        result = await self.service.worker.append(append, _never)
        if asked.of_prompt:
            self.prompt_tokens[index] = _told(prompt, result.outputs)

    async def _reply(self, choice: int, index: int, session_id: str, prompt: list[int]) -> AsyncGenerator[Piece]:
        seed = (self.asked.sample.seed + choice - index * self.asked.n) % (MAX_SEED + 1)
        written = self._new_text()
        operation = self._generate(session_id, self.asked.max_tokens, written, seed)
        operation.inputs = inputs_of(prompt)
        result: GenerateResult | None = None
        async with aclosing(self._run(choice, operation, written)) as items:
            async for item in items:
                if isinstance(item, GenerateResult):
                    result = item
                else:
                    yield item
        assert result is not None
        if result.finish_reason == ["cancelled"]:
            raise EngineStopped("the service stops; nothing was applied")
        yield self._end(choice, result, written)

    async def _session_turn(self, turn: Turn) -> AsyncGenerator[Piece]:
        """Part 0 has the prompt; each further part goes on where the one before was cut off by its reader's leaving."""
        written, tokens, part = self._new_text(), self.asked.max_tokens, 0
        inputs, at, version = inputs_of(self.asked.prompts[0]), turn.at, turn.version
        while True:
            operation = self._generate(turn.session_id, tokens, written, self.asked.sample.seed)
            operation.inputs, operation.at, operation.expected_version = inputs, at, version
            once = operation.once = Once(turn.digest, turn.part(part))
            try:
                result: GenerateResult | None = None
                async with aclosing(self._run(0, operation, written, turn.outlives)) as items:
                    async for item in items:
                        if isinstance(item, GenerateResult):
                            result = item
                        else:
                            yield item
            except Exception:
                result = operation.partial
                if result is None or not turn.outlives:  # a stream ends with the error itself
                    raise
            assert result is not None
            turn.replayed = turn.replayed or once.replayed
            if once.replayed:
                for event, said in written.again(result):
                    yield self._piece(0, event, said)
            if part == 0:
                self.count.prompt = result.valid_length[0] - len(result.token_ids[0])
                self.count.cached = result.effort.reused[0]
            tokens -= len(result.token_ids[0])
            if not once.replayed or result.finish_reason != ["cancelled"] or result.error is not None:
                yield self._end(0, result, written)
                return
            part, inputs, at, version = part + 1, {}, None, result.version

    async def _run(
        self, choice: int, operation: Generate, written: GeneratedText, outlives: bool = False
    ) -> AsyncGenerator[Piece | GenerateResult]:
        def said(event: TokenEvent) -> tuple[TokenEvent, list[str]]:
            return event, written.committed(event)

        items = self.service.worker.generate(operation, said, _never, outlives=outlives)
        async with aclosing(items):
            async for item in items:
                assert item is not None  # there is no silence to tell of
                yield item if isinstance(item, GenerateResult) else self._piece(choice, *item)

    def _generate(self, session_id: str, tokens: int, written: GeneratedText, seed: int) -> Generate:
        asked = self.asked
        return Generate(
            session_id,
            tokens,
            asked.tenant,
            replace(asked.sample, seed=seed),
            logprobs=asked.logprobs,
            stop_ids=frozenset() if asked.ignore_eos else asked.text.end_ids,
            stop=written.stops,
            top_logprobs=asked.top,
        )

    def _new_text(self) -> GeneratedText:
        return GeneratedText(self.asked.text.tokenizer, 1, self.asked.stops)

    def _piece(self, choice: int, event: TokenEvent, said: list[str]) -> Piece:
        if self.turn is not None and not self.count.prompt:
            self.count.prompt = event.past_length[0]
        (token,), (logprob,) = event.token_ids, event.logprobs or [None]
        assert token is not None  # its session has one row
        likeliest = event.top_logprobs[0] if event.top_logprobs else None
        return Piece(choice, said[0], ToldToken(token, logprob, likeliest or []))

    def _end(self, choice: int, result: GenerateResult, written: GeneratedText) -> Piece:
        rest = written.rest(result.finish_reason)[0]
        return Piece(choice, rest, finish_reason=result.finish_reason[0], error=result.error)


async def merged(
    sources: Sequence[AsyncGenerator[T]], silence: float | None = None, gone: asyncio.Future[None] | None = None
) -> AsyncGenerator[T | None]:
    """What they give, as it comes; None after every `silence` seconds without. What one raises ends all, and so
    does the reader when it is `gone`, also while the model runs. Raises ReaderGone."""
    queue: asyncio.Queue[Any] = asyncio.Queue()

    async def pump(source: AsyncGenerator[T]) -> None:
        async with aclosing(source):
            async for item in source:
                queue.put_nowait(item)

    tasks = [asyncio.create_task(pump(source)) for source in sources]
    for task in tasks:
        task.add_done_callback(queue.put_nowait)
    if gone is not None:
        gone.add_done_callback(queue.put_nowait)
    running = len(tasks)
    try:
        while running:
            try:
                async with asyncio.timeout(silence):
                    item = await queue.get()
            except TimeoutError:
                yield None
                continue
            if item is gone:
                raise ReaderGone
            if isinstance(item, asyncio.Task):
                item.result()
                running -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _never() -> Message:
    """A reader who does not leave: `merged` has an eye on the real one, for all."""
    await asyncio.Event().wait()
    raise AssertionError("an event that nobody has was set")


def inputs_of(ids: list[int]) -> dict[str, Array]:
    """Of one row; none of no ids."""
    return {"token_ids": np.array([ids], dtype=np.int64)} if ids else {}


def _told(ids: list[int], outputs: dict[str, Any]) -> list[ToldToken]:
    logprobs = [None if np.isnan(logprob) else float(logprob) for logprob in outputs["token_logprobs"][0]]
    told = [ToldToken(token, logprob, []) for token, logprob in zip(ids, logprobs, strict=True)]
    if "token_top_ids" not in outputs:
        return told
    tops = zip(outputs["token_top_ids"][0].tolist(), outputs["token_top_logprobs"][0].tolist(), strict=True)
    return [
        token if token.logprob is None else replace(token, likeliest=list(zip(*top, strict=True)))
        for token, top in zip(told, tops, strict=True)
    ]
