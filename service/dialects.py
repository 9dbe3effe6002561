"""The two ways in which OpenAI's clients want to be told: completions and chats, each whole or in chunks."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TypeVar

from pydantic import BaseModel

from engine.text import StreamDecoder, Tokenizer
from keypast.openai_schemas import (
    ChatAnswer,
    ChatChoice,
    ChatChunk,
    ChatDelta,
    ChatLogprobs,
    ChatReply,
    ChunkChoice,
    CompletionChoice,
    CompletionLogprobs,
    CompletionReply,
    LikelyToken,
    PromptDetails,
    TokenUsage,
    ToldToken,
)
from keypast.schemas import Problem
from service import answers
from service.answers import Answers, Piece

Whole = TypeVar("Whole", CompletionReply, ChatReply)


@dataclass(frozen=True, slots=True)
class Head:
    """What every reply and chunk of a request begins with."""

    id: str
    created: int
    model: str
    session_id: str | None = None


class Dialect(ABC):
    def __init__(self, given: Answers, head: Head, *, continuous: bool = False) -> None:
        """`continuous`: the usage so far is in every chunk."""
        self._answers = given
        self._head = head
        self._continuous = continuous

    @abstractmethod
    def chunk(self, piece: Piece) -> BaseModel | None:
        """What a piece says; None when that is nothing."""

    @abstractmethod
    def last_chunk(self) -> BaseModel:
        """No choice, and the usage."""

    @abstractmethod
    def whole(self, pieces: Iterable[Piece], problem: Problem | None) -> BaseModel:
        """All pieces at once."""

    @property
    def _tokenizer(self) -> Tokenizer:
        return self._answers.asked.text.tokenizer

    def _usage(self) -> TokenUsage:
        count = self._answers.count
        usage = TokenUsage(
            prompt_tokens=count.prompt,
            completion_tokens=count.completion,
            total_tokens=count.prompt + count.completion,
        )
        if count.cached is not None:
            usage.prompt_tokens_details = PromptDetails(cached_tokens=count.cached)
        return usage

    def _texts(self, tokens: Iterable[int]) -> list[str]:
        return [self._tokenizer.decode([token], skip_special=False) for token in tokens]


class Completion(Dialect):
    def __init__(
        self, given: Answers, head: Head, *, echo: Sequence[str] = (), logprobs: int | None, continuous: bool = False
    ) -> None:
        """`echo`: the prompts, when they come first in the texts."""
        super().__init__(given, head, continuous=continuous)
        self._echo = echo
        self._logprobs = logprobs
        self._said: dict[int, int] = {}  # characters of a choice

    def chunk(self, piece: Piece) -> CompletionReply | None:
        choice = self._choice(piece.choice, [piece])
        if not choice.text and choice.logprobs is None and piece.finish_reason is None:
            return None
        return self._reply([choice], self._usage() if self._continuous else None)

    def last_chunk(self) -> CompletionReply:
        return self._reply([], self._usage())

    def whole(self, pieces: Iterable[Piece], problem: Problem | None) -> CompletionReply:
        choices = [self._choice(choice, own) for choice, own in _by_choice(pieces)]
        return _closed(self._reply(choices, self._usage()), self._head, problem)

    def _reply(self, choices: list[CompletionChoice], usage: TokenUsage | None = None) -> CompletionReply:
        head = self._head
        reply = CompletionReply(
            id=head.id, object="text_completion", created=head.created, model=head.model, choices=choices
        )
        if usage is not None:
            reply.usage = usage
        return reply

    def _choice(self, index: int, pieces: Sequence[Piece]) -> CompletionChoice:
        """With what its pieces say; the first time with the prompt, if that is to be told."""
        prompt = index // self._answers.asked.n
        echoed = self._echo[prompt] if self._echo and index not in self._said else ""
        logprobs = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        if echoed and prompt in self._answers.prompt_tokens:
            self._tell_prompt(logprobs, self._answers.prompt_tokens[prompt])
        text, at = echoed, self._said.get(index, 0) + len(echoed)
        for piece in pieces:
            if piece.token is not None:
                self._tell(logprobs, piece.token, at)
            text, at = text + piece.text, at + len(piece.text)
        self._said[index] = at
        told = logprobs if self._logprobs is not None and logprobs.tokens else None
        return CompletionChoice(index=index, text=text, logprobs=told, finish_reason=pieces[-1].finish_reason)

    def _tell_prompt(self, logprobs: CompletionLogprobs, tokens: Sequence[answers.ToldToken]) -> None:
        decoder, at = StreamDecoder(self._tokenizer), 0
        for token in tokens:
            self._tell(logprobs, token, at)
            at += len(decoder.feed(token.id))

    def _tell(self, logprobs: CompletionLogprobs, token: answers.ToldToken, at: int) -> None:
        (text,) = self._texts([token.id])
        logprobs.tokens.append(text)
        logprobs.token_logprobs.append(token.logprob)
        logprobs.text_offset.append(at)
        if token.logprob is None:
            logprobs.top_logprobs.append(None)
            return
        top: dict[str, float] = {}
        for likely, logprob in zip(self._texts(i for i, _ in token.likeliest), token.likeliest, strict=True):
            top.setdefault(likely, logprob[1])  # of two that look alike, the likelier
        top.setdefault(text, token.logprob)
        logprobs.top_logprobs.append(top)


class Chat(Dialect):
    def __init__(self, given: Answers, head: Head, *, logprobs: bool, continuous: bool = False) -> None:
        super().__init__(given, head, continuous=continuous)
        self._logprobs = logprobs
        self._begun: set[int] = set()

    def chunk(self, piece: Piece) -> ChatChunk | None:
        delta = ChatDelta()
        if piece.choice not in self._begun:
            self._begun.add(piece.choice)
            delta.role, delta.content = "assistant", piece.text
        elif piece.text:
            delta.content = piece.text
        logprobs = self._told([piece])
        if not delta.model_fields_set and logprobs is None and piece.finish_reason is None:
            return None
        choice = ChunkChoice(index=piece.choice, delta=delta, finish_reason=piece.finish_reason)
        if logprobs is not None:
            choice.logprobs = logprobs
        return self._chunk([choice], self._usage() if self._continuous else None)

    def last_chunk(self) -> ChatChunk:
        return self._chunk([], self._usage())

    def whole(self, pieces: Iterable[Piece], problem: Problem | None) -> ChatReply:
        head, choices = self._head, []
        for index, own in _by_choice(pieces):
            answer = ChatAnswer(role="assistant", content="".join(piece.text for piece in own))
            logprobs, reason = self._told(own), own[-1].finish_reason or ""
            choices.append(ChatChoice(index=index, message=answer, logprobs=logprobs, finish_reason=reason))
        reply = ChatReply(
            id=head.id,
            object="chat.completion",
            created=head.created,
            model=head.model,
            choices=choices,
            usage=self._usage(),
        )
        return _closed(reply, head, problem)

    def _chunk(self, choices: list[ChunkChoice], usage: TokenUsage | None = None) -> ChatChunk:
        head = self._head
        chunk = ChatChunk(
            id=head.id, object="chat.completion.chunk", created=head.created, model=head.model, choices=choices
        )
        if usage is not None:
            chunk.usage = usage
        return chunk

    def _told(self, pieces: Sequence[Piece]) -> ChatLogprobs | None:
        tokens = [piece.token for piece in pieces if piece.token is not None]
        if not self._logprobs or (not tokens and len(pieces) == 1):
            return None
        return ChatLogprobs(content=[self._told_token(token) for token in tokens])

    def _told_token(self, token: answers.ToldToken) -> ToldToken:
        assert token.logprob is not None  # they were asked for
        own = self._likely(token.id, token.logprob)
        top = [self._likely(i, logprob) for i, logprob in token.likeliest]
        return ToldToken(token=own.token, logprob=own.logprob, bytes=own.bytes, top_logprobs=top)

    def _likely(self, token: int, logprob: float) -> LikelyToken:
        (text,) = self._texts([token])
        return LikelyToken(token=text, logprob=logprob, bytes=None if "\ufffd" in text else list(text.encode()))


def _by_choice(pieces: Iterable[Piece]) -> list[tuple[int, list[Piece]]]:
    ordered = sorted(pieces, key=lambda piece: piece.choice)
    return [(choice, list(own)) for choice, own in groupby(ordered, key=lambda piece: piece.choice)]


def _closed(reply: Whole, head: Head, problem: Problem | None) -> Whole:
    if head.session_id is not None:
        reply.session_id = head.session_id
    if problem is not None:
        reply.problem = problem
    return reply
