"""A turn of a session that an OpenAI request asks for: which session, whether it is a retry, and what is appended."""

import re
import secrets
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from fastapi import Request

from engine.batch import Once, Sample
from engine.engine import Engine
from engine.errors import InvalidInput, SessionExists, SessionNotFound, WrongState
from engine.stats import SessionInfo
from engine.text import Tokenizer
from keypast.openai_schemas import TextRequest
from keypast.schemas import MAX_SEED, SESSION_ID_PATTERN
from service.answers import Turn
from service.lifecycle import Service
from service.logs import audit

SESSION_HEADER = "X-Session-ID"
RETRY_HEADER = "X-Stainless-Retry-Count"  # OpenAI's clients say which try this is


@dataclass(slots=True)
class Plan:
    """`done`: this very turn was taken already; what it appended is not worked out again. `begun`: there is a past."""

    info: SessionInfo
    turn: Turn
    done: bool

    @property
    def begun(self) -> bool:
        return self.done or self.info.state != "idle" or self.info.valid_length[0] > 0


class Asker:
    """`session_id` and `model` are those that the request names, the model perhaps by its session.

    Raises InvalidInput, ModelNotFound, SessionNotFound, SessionGone, QueueFull, QuotaExceeded.
    """

    def __init__(self, service: Service, request: Request, tenant: str, wanted: TextRequest, once: Once) -> None:
        self._service = service
        self._request = request
        self._tenant = tenant
        self._once = once
        self.model = wanted.model
        header = request.headers.get(SESSION_HEADER) or None
        if None not in (header, wanted.session_id) and header != wanted.session_id:
            raise InvalidInput("session_id", f"is another than {SESSION_HEADER} names; give one of them")
        if header is not None and not re.fullmatch(SESSION_ID_PATTERN, header):
            raise InvalidInput(SESSION_HEADER, "is 1 to 64 letters, digits, - and _")
        self.session_id = wanted.session_id or header
        self._may_create = header is not None
        if self.session_id is not None and (wanted.n or 1) > 1:
            raise InvalidInput("n", "must be 1 with a session: its next turn follows on one reply; fork it for more")

    def turn(self) -> Plan:
        """The session as it is now, made if only the header names it and it is not there."""
        assert self.session_id is not None
        info = self._session(self.session_id)
        if self.model not in (None, info.model):
            raise InvalidInput("model", f"is {self.model}, and the session's is {info.model}")
        if len(info.valid_length) != 1:
            raise InvalidInput("session_id", f"names a session of {len(info.valid_length)} rows; a turn needs one of 1")
        self.model = info.model
        digest, key = self._once.digest, self._once.key
        if key is None and self._is_retry:
            known = self._service.engine.repeated(info.id, self._tenant, digest)
            key = None if known is None else known.rpartition(" ")[0]
        turn = Turn(info.id, digest, key or f" {secrets.token_hex(12)}")  # no key of a caller begins with a blank
        first = Once(digest, turn.part(0))
        return Plan(info, turn, self._service.engine.recalls(info.id, self._tenant, first, None))

    @property
    def _is_retry(self) -> bool:
        count = self._request.headers.get(RETRY_HEADER, "")
        return count.isdecimal() and bool(count.strip("0"))  # as a number it may be longer than Python reads

    def _session(self, session_id: str) -> SessionInfo:
        engine = self._service.engine
        with suppress(SessionNotFound):
            return engine.session(session_id, self._tenant)
        if not self._may_create:
            raise SessionNotFound
        model = self.model
        if model is None:
            model = next((name for name in engine.specs if self._service.text_model(name) is not None), "")
        elif self._service.text_model(model) is None and model in engine.specs:
            raise InvalidInput("model", f"{model} reads no text")
        with suppress(SessionExists):  # another request has just made it
            ttl = self._service.settings.conversation_seconds
            info = engine.create_session(model, tenant=self._tenant, session_id=session_id, ttl_seconds=ttl)
            audit(self._request, "create", info.id, model=info.model)
            return info
        return engine.session(session_id, self._tenant)


def chat_turn(engine: Engine, plan: Plan, tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """The ids that the turn appends. Messages with an assistant's reply among them are the whole conversation: the
    session is cut back to what it has of it, which is all but, at most, the end of the last reply.

    Raises InvalidInput, WrongState, SessionNotFound, SessionGone.
    """
    info, turn = plan.info, plan.turn
    if plan.done:
        return []
    replies = [at for at, message in enumerate(messages) if message.get("role") == "assistant"]
    if not plan.begun or not replies:
        return tokenizer.render_chat(messages, continuing=plan.begun)
    ids = tokenizer.render_chat(messages)
    same = engine.begins_with(info.id, info.tenant, ids)
    before = messages[: replies[-1]]
    if same < min(info.valid_length[0], len(tokenizer.render_chat(before)) if before else 0):
        raise WrongState(
            "the messages are not the conversation in this session; send only the new ones, or use another"
        )
    turn.version = info.version
    at = min(same, len(ids) - 1)
    turn.at = at if at < info.valid_length[0] else None
    return ids[at:]


def sample_of(wanted: TextRequest) -> Sample:
    """A seed left out is drawn anew for each request."""
    seed = secrets.randbelow(MAX_SEED) if wanted.seed is None else wanted.seed % (MAX_SEED + 1)
    return Sample(
        temperature=1.0 if wanted.temperature is None else wanted.temperature,
        top_p=1.0 if wanted.top_p is None else wanted.top_p,
        top_k=max(0, wanted.top_k or 0),
        min_p=wanted.min_p or 0.0,
        seed=seed,
        repetition_penalty=1.0 if wanted.repetition_penalty is None else wanted.repetition_penalty,
    )
