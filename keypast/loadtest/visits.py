"""What a visit does, in the words of the target. All it draws comes from the run's seed and the visit's number."""

import asyncio
import json
import math
import random
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, assert_never

import numpy as np

from keypast import wire
from keypast._protocol import session_path
from keypast.loadtest.caller import Caller, Operation, Over, read_json
from keypast.loadtest.clock import Clock
from keypast.loadtest.connection import Connections, Failed, Reply
from keypast.loadtest.plan import ModelInfo, Plan
from keypast.loadtest.record import Recorder
from keypast.loadtest.scenario import ChatVisit, RequestVisit, StepsVisit, TreeVisit, draw, draw_count
from keypast.wire import Array

TTL_SECONDS = 900  # of sessions whose visit was killed before it could delete them
VOCABULARY = 256  # token ids that any decoder has
POOL = 4096  # rows of numbers that tensors are cut from
BINARY = {"Content-Type": wire.SAFETENSORS_TYPE, "Accept": wire.SAFETENSORS_TYPE}
PROSE = (
    "the river runs past old stone bridge and slow boats carry grain salt wool down to a harbour where people trade "
    "what they grow for tools paper glass while children ask why water never stops one day someone built mill then "
    "another soon whole town lived by its wheel winter came hard ice held boats fast so smiths made sledges next "
    "spring flood took two houses but left rich soil behind farmers planted beans barley flax market grew again each "
    "year new road brought letters news songs from far away some stayed others went home with stories about sea"
)
WORDS = PROSE.split()

Output = str | list[int | None] | Array


@dataclass
class Outcome:
    """What a visit was given, in order, if that was to be kept; and what ended it early: it `failed`, or was `cut` off
    by the run's end."""

    outputs: list[Output] = field(default_factory=list)
    failed: Failed | None = None
    cut: bool = False


def words(drawn: random.Random, count: int) -> str:
    return " ".join(drawn.choices(WORDS, k=count))


class Visitor:
    """Performs visits; `keep` their outputs, to compare them."""

    def __init__(self, plan: Plan, connections: Connections, recorder: Recorder, clock: Clock) -> None:
        self._plan = plan
        self._connections = connections
        self._recorder = recorder
        self._clock = clock
        drawn = np.random.default_rng(plan.seed)
        widths = {width for model in plan.models for _, width in model.tensors.values()}
        self._numbers = {width: drawn.standard_normal((POOL, width), np.float32) for width in sorted(widths)}

    async def visit(self, index: int, due: float, *, end: float = math.inf, keep: bool = False) -> Outcome:
        """The visit of that number, due at that instant; nothing of it is begun from `end` on."""
        drawn = random.Random(f"visit {self._plan.seed} {index}")
        chosen = self._plan.scenario.choose(drawn)
        timeout = self._plan.timeout
        caller = Caller(self._connections, self._recorder, self._clock, due=due, end=end, timeout=timeout)
        outcome = Outcome()
        kept = outcome.outputs if keep else None
        try:
            await self._perform(chosen, caller, drawn, kept)
        except Over:
            outcome.cut = True
        except Failed as failed:
            outcome.failed = failed
        return outcome

    async def _perform(self, chosen: int, caller: Caller, drawn: random.Random, kept: list[Output] | None) -> None:
        visit, model = self._plan.scenario.visits[chosen], self._plan.models[chosen]
        match visit:
            case RequestVisit():
                async with caller.operation("request") as operation:
                    reply = await operation.request(visit.method, visit.path, visit.body.encode())
                if kept is not None:
                    kept.append(reply.body.decode("utf-8", "replace"))
            case ChatVisit():
                chat = Chat(visit, model.id, drawn, kept)
                if visit.session and self._plan.target == "keypast":
                    await chat.in_session(caller)
                else:
                    await chat.without(caller)
            case StepsVisit() | TreeVisit():
                feed = Feed(model, self._numbers, drawn, kept)
                if isinstance(visit, StepsVisit):
                    await steps(visit, caller, feed, drawn)
                else:
                    await tree(visit, caller, feed, drawn)
            case _:
                assert_never(visit)


async def create(caller: Caller, model: str) -> str:
    """A session's path."""
    async with caller.operation("create") as operation:
        view = await operation.post("/v1/sessions", {"model": model, "ttl_seconds": TTL_SECONDS})
    return session_path(str(view.get("id")))


async def delete(caller: Caller, path: str) -> None:
    """Whatever ended the visit; what goes wrong with it is counted, not raised."""
    last = caller.again(caller.clock.now(), math.inf)
    with suppress(Failed):
        async with last.operation("delete") as operation:
            await operation.request("DELETE", path)


# ---- conversations --------------------------------------------------------------------------------------------------


class Chat:
    """One conversation."""

    def __init__(self, visit: ChatVisit, model: str, drawn: random.Random, kept: list[Output] | None) -> None:
        self._visit = visit
        self._model = model
        self._drawn = drawn
        self._kept = kept
        self._turns = draw_count(visit.turns, drawn)

    async def in_session(self, caller: Caller) -> None:
        """The first turn is due when the visit is: a new user waits for the session, too."""
        began = caller.due
        path = await create(caller, self._model)
        caller.due = began
        try:
            for turn in range(self._turns):
                said, tokens = await self._next(caller, turn)
                async with caller.operation("turn") as operation:
                    reply = await operation.post(f"{path}/prefill", {"messages": said})
                    operation.count("prompt_tokens", sum(reply["computed"]))
                    await self._generated(operation, path, tokens)
        finally:
            await delete(caller, path)

    async def _generated(self, operation: Operation, path: str, tokens: int) -> None:
        ids: list[int | None] = []
        asked = {"max_tokens": tokens, "stream": True, "ignore_eos": True, "sample": {"temperature": 0}}
        async for event in operation.events(f"{path}/generate", asked):
            if "finish_reason" in event:
                operation.timings(event.get("timings"))
            elif (token := event["token_ids"][0]) is not None:
                operation.token()
                ids.append(token)
        if self._kept is not None:
            self._kept.append(ids)

    async def without(self, caller: Caller) -> None:
        """Every turn sends the conversation as it came to be."""
        messages: list[dict[str, str]] = []
        for turn in range(self._turns):
            said, tokens = await self._next(caller, turn)
            messages += said
            async with caller.operation("turn") as operation:
                text = await self._completed(operation, messages, tokens)
            messages.append({"role": "assistant", "content": text})
            if self._kept is not None:
                self._kept.append(text)

    async def _completed(self, operation: Operation, messages: list[dict[str, str]], tokens: int) -> str:
        asked = {
            "model": self._model,
            "messages": messages,
            "max_tokens": tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "ignore_eos": True,
        }
        text, chunks, usage = "", 0, None
        async for event in operation.events("/v1/chat/completions", asked):
            usage = event.get("usage") or usage
            for choice in event.get("choices") or []:
                if content := (choice.get("delta") or {}).get("content"):
                    text += content
                    chunks += 1
                    operation.token()
        if usage is not None:  # a chunk may hold several tokens, or a part of one
            operation.count("output_tokens", int(usage.get("completion_tokens", chunks)) - chunks)
            cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
            operation.count("prompt_tokens", int(usage.get("prompt_tokens", 0)) - int(cached))
        return text

    async def _next(self, caller: Caller, turn: int) -> tuple[list[dict[str, str]], int]:
        """What is said, after a thought, and the tokens of its reply."""
        drawn, visit = self._drawn, self._visit
        said = [{"role": "user", "content": words(drawn, draw_count(visit.prompt, drawn))}]
        tokens = draw_count(visit.output, drawn)
        if turn:
            await caller.think(draw(visit.think, drawn))
        elif system := draw_count(visit.system, random.Random("system"), least=0):
            said.insert(0, {"role": "system", "content": words(random.Random("system"), system)})
        return said, tokens


# ---- sessions that the client drives --------------------------------------------------------------------------------


class Feed:
    """What one session's appends bring: tensors cut from a pool of numbers, or tokens, the last reply's at a step."""

    def __init__(
        self,
        model: ModelInfo,
        numbers: dict[int, Array],
        drawn: random.Random,
        kept: list[Output] | None,
    ) -> None:
        self.model = model
        self.kept = kept
        self._numbers = numbers
        self._drawn = drawn
        self._token = 0

    def branch(self, child: int) -> "Feed":
        """Of a fork; its outputs are kept with the others', in the order of the children."""
        kept: list[Output] | None = None if self.kept is None else []
        feed = Feed(self.model, self._numbers, random.Random(f"{self._drawn.random()} {child}"), kept)
        feed._token = self._token
        return feed

    async def append(self, operation: Operation, path: str, verb: str, count: int) -> None:
        """`count` positions."""
        reply = (
            await self._tokens(operation, path, verb, count)
            if self.model.tokens
            else await self._tensors(operation, path, verb, count)
        )
        operation.count("positions", count)
        if self.kept is not None and not self.model.tokens:
            self.kept.append(_attn_out(reply))

    async def _tokens(self, operation: Operation, path: str, verb: str, count: int) -> Reply:
        ids = [self._token] if verb == "step" else [self._drawn.randrange(1, VOCABULARY) for _ in range(count)]
        body = json.dumps({"token_ids": [ids], "sample": {"temperature": 0}}).encode()
        reply = await operation.request("POST", f"{path}/{verb}", body, {"Content-Type": wire.JSON_TYPE})
        if verb == "step":  # no first token of anything
            operation.count("output_tokens", 1)
        else:
            operation.token()
        try:
            self._token = int(read_json(reply.body)["outputs"]["next_token"][0])
        except (KeyError, TypeError, IndexError):
            raise Failed("protocol", f"no next_token in {reply.body[:80]!r}") from None
        if self.kept is not None:
            self.kept.append([self._token])
        return reply

    async def _tensors(self, operation: Operation, path: str, verb: str, count: int) -> Reply:
        arrays: dict[str, Array] = {}
        for name, (dtype, width) in self.model.tensors.items():
            at = self._drawn.randrange(POOL - count)
            arrays[name] = self._numbers[width][None, at : at + count].astype(_numpy_dtype(dtype))
        if self.model.masked and verb == "prefill":
            arrays["attention_mask"] = np.tri(count, dtype=np.uint8)[None]
        return await operation.request("POST", f"{path}/{verb}", wire.dump_tensors(arrays, {}), BINARY)


def _numpy_dtype(name: str) -> str:
    return "float32" if name == "bfloat16" else name  # it travels widened


def _attn_out(reply: Reply) -> Array:
    try:
        return wire.load_tensors(reply.body, finite=False).arrays["attn_out"]
    except (wire.WireError, KeyError) as error:
        raise Failed("protocol", f"no attn_out in the reply: {error}") from None


async def steps(visit: StepsVisit, caller: Caller, feed: Feed, drawn: random.Random) -> None:
    prompt, count = draw_count(visit.prompt, drawn), draw_count(visit.steps, drawn, least=0)
    path = await create(caller, feed.model.id)
    try:
        await prefill(caller, feed, path, prompt)
        for _ in range(count):
            if seconds := draw(visit.think, drawn):
                await caller.think(seconds)
            await step(caller, feed, path)
    finally:
        await delete(caller, path)


async def tree(visit: TreeVisit, caller: Caller, feed: Feed, drawn: random.Random) -> None:
    prompt, count = draw_count(visit.prompt, drawn), draw_count(visit.steps, drawn, least=0)
    paths = [await create(caller, feed.model.id)]
    try:
        await prefill(caller, feed, paths[0], prompt)
        await _grow(visit, caller, feed, paths, paths[0], visit.levels, count)
    finally:
        await asyncio.gather(*(delete(caller, path) for path in paths))


async def _grow(
    visit: TreeVisit, caller: Caller, feed: Feed, paths: list[str], parent: str, levels: int, count: int
) -> None:
    """Children of `parent`, and theirs; every new path is added to `paths`."""
    async with caller.operation("fork") as operation:
        reply = await operation.post(f"{parent}/fork", {"count": visit.branches})
    children = [session_path(str(view["id"])) for view in reply.get("sessions", [])]
    paths += children
    feeds = [feed.branch(child) for child in range(len(children))]

    async def live(path: str, own: Feed) -> None:
        line = caller.again()
        for _ in range(count):
            await step(line, own, path)
        if levels > 1:
            await _grow(visit, line, own, paths, path, levels - 1, count)

    await together([live(path, own) for path, own in zip(children, feeds, strict=True)])
    if feed.kept is not None:
        feed.kept.extend(output for own in feeds for output in own.kept or [])


async def together(lives: Sequence[Any]) -> None:
    """All of them; the first to fail stops the others, and is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            for life in lives:
                group.create_task(life)
    except* Failed as errors:
        raise errors.exceptions[0] from None


async def prefill(caller: Caller, feed: Feed, path: str, count: int) -> None:
    async with caller.operation("prefill") as operation:
        await feed.append(operation, path, "prefill", count)


async def step(caller: Caller, feed: Feed, path: str) -> None:
    async with caller.operation("step") as operation:
        await feed.append(operation, path, "step", 1)
