"""Text at the service's edge: what a request says becomes token ids, and what a model says becomes text."""

import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from engine.batch import Array, GenerateResult, Sample, TokenEvent
from engine.errors import InvalidInput
from engine.generation import commits
from engine.stats import SessionInfo
from engine.text import StopStrings, Tokenizer
from keypast.schemas import MAX_SEED, AppendRequest, FinishReason, SampleOptions


@dataclass(frozen=True, slots=True)
class TextModel:
    """What a model needs to read and write text. `end_ids` end a reply."""

    tokenizer: Tokenizer
    end_ids: frozenset[int] = frozenset()


def sampling(options: SampleOptions) -> Sample:
    """A seed left out is drawn anew for each request."""
    return Sample(
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        min_p=options.min_p,
        seed=secrets.randbelow(MAX_SEED) if options.seed is None else options.seed,
        repetition_penalty=options.repetition_penalty,
    )


def encode_rows(request: AppendRequest, session: SessionInfo, model: TextModel | None) -> list[list[int]]:
    """The ids of each row of `text` or `messages`, one of which the request has. Raises InvalidInput."""
    field = "text" if request.messages is None else "messages"
    if model is None:
        raise InvalidInput(field, f"model {session.model} reads no text")
    rows = len(session.valid_length)
    begun = session.state != "idle"  # what runs now will have appended something
    if request.messages is not None:
        if rows != 1:
            raise InvalidInput(field, f"are for a session of one row; this one has {rows}")
        messages = [message.model_dump() for message in request.messages]
        return [model.tokenizer.render_chat(messages, continuing=begun or session.valid_length[0] > 0)]
    texts = [request.text] if isinstance(request.text, str) else request.text or []
    if len(texts) != rows:
        raise InvalidInput(field, f"needs one text a row, {rows}, got {len(texts)}")
    return [
        model.tokenizer.encode(text, add_special=not (begun or length))
        for text, length in zip(texts, session.valid_length, strict=True)
    ]


def pad(rows: list[list[int]]) -> Array:
    """(B, n): shorter rows are filled up with 0, which batch_valid_length keeps out of the session."""
    ids = np.zeros((len(rows), max(map(len, rows))), dtype=np.int64)
    for own, row in zip(ids, rows, strict=True):
        own[: len(row)] = row
    return ids


class GeneratedText:
    """What each row of a generation has written so far. Text waits while its last character is incomplete, or while it
    may be the beginning of a stop text. A model without a tokenizer writes nothing.

    `stops` and `committed` are called on the engine's thread, `rest` after the end.
    """

    def __init__(self, tokenizer: Tokenizer | None, rows: int, stop_texts: Sequence[str]) -> None:
        self._decoder = None if tokenizer is None else partial(StopStrings, tokenizer, stop_texts)
        self._decoders = [] if self._decoder is None else [self._decoder() for _ in range(rows)]
        self._drawn = [""] * rows  # by the token that was drawn last, which may yet not be appended
        self._fed = [0] * rows
        self._tokens: list[list[int]] = [[] for _ in range(rows)]
        self._texts = [""] * rows

    @property
    def texts(self) -> list[str]:
        return list(self._texts)

    def stops(self, row: int, token: int) -> bool:
        """Whether the token completes a stop text."""
        if not self._decoders:
            return False
        self._drawn[row], stopped = self._decoders[row].feed(token)
        self._fed[row] += 1
        return stopped

    def committed(self, event: TokenEvent) -> list[str]:
        """What each row has to say after its token was appended."""
        said = [""] * len(self._texts)
        for row, token in enumerate(event.token_ids):
            if token is not None:
                self._tokens[row].append(token)
                said[row] = self._drawn[row]
                self._texts[row] += said[row]
        return said

    def again(self, result: GenerateResult) -> Iterator[tuple[TokenEvent, list[str]]]:
        """A whole generation that was written before: its commits and what each had to say, up to its end."""
        for event in commits(result):
            for row, token in enumerate(event.token_ids):
                if token is not None:
                    self.stops(row, token)
            yield event, self.committed(event)
        for row, token in enumerate(result.stopped_by):
            if token is not None:
                self.stops(row, token)

    def rest(self, reasons: Sequence[FinishReason]) -> list[str]:
        """What was held back until the row had ended."""
        rest = []
        for row, reason in enumerate(reasons):
            text = self._rest(row, reason) if self._decoders else ""
            self._texts[row] += text
            rest.append(text)
        return rest

    def _rest(self, row: int, reason: FinishReason) -> str:
        if self._decoders[row].matched is not None and reason == "stop":
            return self._drawn[row]
        if self._fed[row] == len(self._tokens[row]):
            return self._decoders[row].flush()
        # the last token drawn was not appended, and its text must not be shown: the others are read again
        assert self._decoder is not None
        again = self._decoder()
        text = "".join([again.feed(token)[0] for token in self._tokens[row]]) + again.flush()
        return text[len(self._texts[row]) :]
