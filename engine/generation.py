"""The server's own loop of sample and step, as a chain of appends. Decides what is appended next; runs nothing.

A generation starts with its prompt or, without one, with a peek (no position, a sample of the last position's outputs);
then every turn appends the tokens just drawn and draws the next ones, until every row has stopped.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from engine.batch import Array, FinishReason, Generate, GenerateResult, Likeliest, TokenEvent, Want, Work
from engine.session import Session


class Generation:
    def __init__(self, operation: Generate, session: Session, began_at: int) -> None:
        """`began_at`: the session's version before its operation changed anything."""
        rows = len(session.sequences)
        self.operation = operation
        self.past_length = session.valid_length
        self.began_at = began_at
        self._first: Work | None = None
        self._compute_ms = 0.0
        self._session = session
        self._reasons: list[FinishReason | None] = [None] * rows
        self._tokens: list[list[int]] = [[] for _ in range(rows)]
        self._logprobs: list[list[float]] = [[] for _ in range(rows)]
        self._likeliest: list[list[Likeliest]] = [[] for _ in range(rows)]
        self._drawn: list[int | None] = [None] * rows
        self._drawn_logprobs: list[float | None] = [None] * rows
        self._drawn_among: list[Likeliest | None] = [None] * rows
        self._stopped_by: list[int | None] = [None] * rows

    @property
    def want(self) -> Want:
        asked = self.operation
        return Want(sample=asked.sample, logprob=asked.logprobs, top_logprobs=asked.top_logprobs)

    def ran(self, work: Work) -> None:
        """A turn has ended. What waited is the first; later turns wait behind other rows, which is compute."""
        self._first = self._first or work
        self._compute_ms += work.compute_ms

    def draw(self, outputs: dict[str, Any]) -> None:
        """Takes the tokens that a turn drew, and ends the rows that stop before theirs."""
        for row, reason in enumerate(self._reasons):
            self._drawn[row] = None
            if reason is not None:
                continue
            token = outputs["next_token"][row]
            if self._stops(row, token):
                self._reasons[row] = "stop"
            elif len(self._tokens[row]) >= self.operation.max_tokens or self._is_full(row):
                self._reasons[row] = "length"
            elif self.operation.cancelled:
                self._reasons[row] = "cancelled"
            else:
                self._drawn[row] = token
                self._drawn_logprobs[row] = outputs["logprob"][row] if self.operation.logprobs else None
                self._drawn_among[row] = outputs["top_logprobs"][row] if self.operation.top_logprobs else None

    @property
    def new(self) -> list[int]:
        """Positions a row that the next turn appends; all 0 when the generation is done."""
        return [0 if token is None else 1 for token in self._drawn]

    @property
    def token_ids(self) -> Array:
        """The next turn's input, (B, 1)."""
        return np.array([[token or 0] for token in self._drawn], dtype=np.int64)

    def committed(self) -> TokenEvent:
        """Books the tokens that were just appended."""
        logprobs: list[float | None] = [None] * len(self._drawn)
        likeliest: list[Likeliest | None] = [None] * len(self._drawn)
        past = self._session.valid_length
        for row, token in enumerate(self._drawn):
            if token is None:
                continue
            past[row] -= 1
            self._tokens[row].append(token)
            logprob = logprobs[row] = self._drawn_logprobs[row]
            if logprob is not None:
                self._logprobs[row].append(logprob)
            among = likeliest[row] = self._drawn_among[row]
            if among is not None:
                self._likeliest[row].append(among)
        valid, version = self._session.valid_length, self._session.version
        return TokenEvent(list(self._drawn), logprobs, past, valid, version, likeliest)

    @property
    def next_is_last(self) -> bool:
        """Whether every row ends by length with the tokens just drawn, so that no more need be drawn."""
        return all(
            token is None or len(self._tokens[row]) + 1 >= self.operation.max_tokens or self._is_full(row, 1)
            for row, token in enumerate(self._drawn)
        )

    def result(self, otherwise: FinishReason = "length") -> GenerateResult:
        """`otherwise`: why the rows ended that have not ended by themselves."""
        first = self._first
        assert first is not None  # nothing ends before its first turn
        valid, began = self._session.valid_length, first.effort
        computed = [length - reused for length, reused in zip(valid, began.reused, strict=True)]
        return GenerateResult(
            token_ids=self._tokens,
            logprobs=self._logprobs,
            finish_reason=[reason or otherwise for reason in self._reasons],
            past_length=self.past_length,
            valid_length=valid,
            version=self._session.version,
            queue_ms=first.queue_ms,
            compute_ms=self._compute_ms,
            stopped_by=self._stopped_by,
            effort=replace(began, computed=computed),
            top_logprobs=self._likeliest,
        )

    @property
    def left_a_prompt(self) -> bool:
        """Whether its prompt was appended, and no token after it."""
        return not any(self._tokens) and self._session.valid_length != self.past_length

    def partial(self, error: BaseException) -> GenerateResult | None:
        """The result of one that fails now; None when it has appended nothing."""
        return replace(self.result("cancelled"), error=_bare(error)) if any(self._tokens) else None

    def _stops(self, row: int, token: int) -> bool:
        stop = self.operation.stop
        if token in self.operation.stop_ids:
            return True
        if stop is None or not stop(row, token):
            return False
        self._stopped_by[row] = token
        return True

    def _is_full(self, row: int, more: int = 0) -> bool:
        return self._session.sequences[row].length + more >= self._session.max_length


def _bare(error: BaseException) -> BaseException:
    """The same without what it was raised from and through: a result that is remembered keeps nothing else alive."""
    bare = type(error).__new__(type(error), *error.args)
    vars(bare).update(vars(error))
    return bare


def commits(result: GenerateResult) -> Iterator[TokenEvent]:
    """The commits of a generation, again."""
    turns = max(map(len, result.token_ids))
    valid = [after - len(tokens) for after, tokens in zip(result.valid_length, result.token_ids, strict=True)]
    for turn in range(turns):
        past = list(valid)
        tokens = [row[turn] if turn < len(row) else None for row in result.token_ids]
        logprobs = [row[turn] if turn < len(row) else None for row in result.logprobs]
        likeliest = [row[turn] if turn < len(row) else None for row in result.top_logprobs]
        valid = [length + (token is not None) for length, token in zip(past, tokens, strict=True)]
        yield TokenEvent(tokens, logprobs, past, list(valid), result.version - turns + turn + 1, likeliest)
