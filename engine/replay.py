"""What was done already, so that a request that comes twice is done once. No tensors, no clock.

    the request has                     the session knows                    so it is
    a key that is new to the session                                         done
    a key, and its digest               the reply                            replayed
    a key, and its digest               that there was one, too large        refused (ReplyDropped), never done again
    a key, and another digest                                                refused (KeyReused)
    no key, but the version before      the reply of that change,            replayed
    the session's last change           and the same digest

A reply is remembered with the commit that it tells of, under the same lock, and as the result that it is made from: one
that was lost on its way, or could not be encoded, is made again. What failed is not remembered, so a retry runs. While
the first of two runs, the second waits behind it in the session's queue, and is looked up again when its turn comes.

A session's last `keys` keys are known for its life; their replies are kept up to so many bytes a session and in all,
the oldest going first. What a session has here goes with it, but for the receipt of its deletion.
"""

from collections import OrderedDict
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import numpy as np

from engine.batch import AppendResult, Once
from engine.errors import KeyReused, ReplyDropped
from engine.session import Session
from engine.stats import Receipt, SessionInfo

_OBJECT = 64  # bytes of a small object, about


@dataclass(slots=True, eq=False)
class _Reply:
    """`result` is None when it was dropped. `before`: the version that it changed, None for what changed nothing."""

    digest: bytes
    key: str | None
    before: int | None
    version: int
    result: Any
    size: int


@dataclass(slots=True, eq=False)
class _Replies:
    """A session's. `kept`: those with a result, oldest first; `created_by`: the key that created it."""

    by_key: dict[str, _Reply] = field(default_factory=dict)
    last: _Reply | None = None
    kept: dict[_Reply, None] = field(default_factory=dict)
    size: int = 0
    created_by: str | None = None


class Replays:
    """`keys` a session; `session_bytes` and `total_bytes` of results; `receipts` of deletions."""

    def __init__(self, keys: int, session_bytes: int, total_bytes: int, receipts: int) -> None:
        self.size = 0
        self._keys = keys
        self._session_bytes = session_bytes
        self._total_bytes = total_bytes
        self._max_receipts = receipts
        self._sessions: dict[Session, _Replies] = {}
        self._kept: dict[_Reply, _Replies] = {}  # oldest first
        self._created: dict[tuple[str, str], tuple[bytes, SessionInfo]] = {}
        self._receipts: OrderedDict[tuple[str, str, str], tuple[bytes, Receipt]] = OrderedDict()

    def __repr__(self) -> str:
        return f"<Replays {len(self._kept)} replies of {len(self._sessions)} sessions, {self.size} bytes>"

    def find(self, session: Session, once: Once | None, expected_version: int | None = None) -> Any:  # noqa: ANN401
        """The result of this very request, which is marked as replayed, or None: it was not done.

        Raises KeyReused, ReplyDropped.
        """
        if once is None:
            return None
        replies = self._sessions.get(session)
        if once.key is None:
            reply = None if replies is None else replies.last
            if reply is None or reply.digest != once.digest or reply.before != expected_version:
                return None
            if session.version != reply.version:
                return None
        else:
            reply = None if replies is None else replies.by_key.get(once.key)
            _check_waiting(session, once)
            if reply is None:
                return None
            _check_digest(reply.digest, once)
        if reply.result is None:
            raise ReplyDropped(reply.version, session.version, session.valid_length)
        once.replayed = True
        return reply.result

    def remember(self, session: Session, once: Once | None, result: object, before: int) -> None:
        """What was just done to the session, which was at version `before`."""
        changed = session.version != before
        replies = self._sessions.get(session)
        if changed and replies is not None and replies.last is not None:
            last, replies.last = replies.last, None
            self._release(replies, last)
        if once is None or not (changed or once.key):
            return
        replies = self._sessions.setdefault(session, _Replies())
        reply = _Reply(once.digest, once.key, before if changed else None, session.version, None, 0)
        if changed:
            replies.last = reply
        if once.key is not None:
            replies.by_key[once.key] = reply
            if len(replies.by_key) > self._keys:
                self._release(replies, replies.by_key.pop(next(iter(replies.by_key))))
        self._keep(replies, reply, result)

    def newest(self, session: Session, digest: bytes) -> str | None:
        """The key of its newest change, one that waits or runs before one that is done, if that has this digest."""
        for operation in reversed(session.waiting):
            if operation.once is not None and not operation.future.cancelled():
                return operation.once.key if operation.once.digest == digest else None
        replies = self._sessions.get(session)
        last = None if replies is None else replies.last
        if last is None or last.version != session.version or last.digest != digest:
            return None
        return last.key

    def find_created(self, tenant: str, once: Once | None) -> SessionInfo | None:
        """What this very request created, as it was then, if it is there still. Raises KeyReused."""
        if once is None or once.key is None or (tenant, once.key) not in self._created:
            return None
        digest, info = self._created[tenant, once.key]
        _check_digest(digest, once)
        once.replayed = True
        return info

    def remember_created(self, session: Session, once: Once | None, info: SessionInfo) -> None:
        if once is not None and once.key is not None:
            self._created[session.tenant, once.key] = once.digest, info
            self._sessions.setdefault(session, _Replies()).created_by = once.key

    def find_deleted(self, tenant: str, session_id: str, once: Once | None) -> Receipt | None:
        """The receipt that this very request got for a session that is gone."""
        if once is None or once.key is None:
            return None
        digest, receipt = self._receipts.get((tenant, session_id, once.key), (b"", None))
        if receipt is None or digest != once.digest:
            return None
        once.replayed = True
        return receipt

    def remember_deleted(self, session: Session, once: Once | None, receipt: Receipt) -> None:
        if once is None or once.key is None:
            return
        self._receipts[session.tenant, session.id, once.key] = once.digest, receipt
        while len(self._receipts) > self._max_receipts:
            self._receipts.popitem(last=False)

    def forget(self, session: Session) -> None:
        """All of a session that is gone."""
        replies = self._sessions.pop(session, None)
        if replies is None:
            return
        for reply in list(replies.kept):
            self._drop(replies, reply)
        if replies.created_by is not None:
            del self._created[session.tenant, replies.created_by]

    def check(self) -> None:
        """Raises RuntimeError unless the sizes add up and keep their bounds."""
        sizes = [replies.size for replies in self._sessions.values()]
        held = {reply for replies in self._sessions.values() for reply in (*replies.by_key.values(), replies.last)}
        if self.size != sum(sizes) or self.size != sum(reply.size for reply in self._kept):
            raise RuntimeError(f"{self!r}, the sessions' replies have {sum(sizes)}")
        if self.size > self._total_bytes or max(sizes, default=0) > self._session_bytes:
            raise RuntimeError(f"{self!r} passes its bounds, {self._session_bytes} and {self._total_bytes}")
        if not self._kept.keys() <= held:
            raise RuntimeError(f"{self!r} keeps replies that no session can ask for")

    def _keep(self, replies: _Replies, reply: _Reply, result: object) -> None:
        size = weigh(result)
        if size > min(self._session_bytes, self._total_bytes):
            return
        try:
            own = _owned(result)
        except MemoryError:  # what it tells of is done: it is known, and cannot be told again
            return
        reply.result, reply.size = own, size
        replies.kept[reply] = None
        self._kept[reply] = replies
        replies.size += size
        self.size += size
        while replies.size > self._session_bytes:
            self._drop(replies, next(iter(replies.kept)))
        while self.size > self._total_bytes:
            oldest, owner = next(iter(self._kept.items()))
            self._drop(owner, oldest)

    def _release(self, replies: _Replies, reply: _Reply) -> None:
        """Drops it unless it can still be asked for."""
        by_key = reply.key is not None and replies.by_key.get(reply.key) is reply
        if reply in replies.kept and not by_key and replies.last is not reply:
            self._drop(replies, reply)

    def _drop(self, replies: _Replies, reply: _Reply) -> None:
        del replies.kept[reply], self._kept[reply]
        replies.size -= reply.size
        self.size -= reply.size
        reply.result, reply.size = None, 0


def weigh(value: object) -> int:
    """Bytes that a result takes, about: arrays to the byte, small things roughly."""
    if isinstance(value, np.ndarray):
        return _OBJECT + value.nbytes
    if isinstance(value, AppendResult):  # what there is most of: its own numbers are not looked at one by one
        return weigh(value.outputs) + _OBJECT * (8 + 5 * len(value.valid_length))
    if isinstance(value, str):
        return _OBJECT + len(value)
    if isinstance(value, dict):
        return _OBJECT + sum(_OBJECT + weigh(item) for item in value.values())
    if isinstance(value, list | tuple):
        flat = bool(value) and isinstance(value[0], int | float)
        return _OBJECT + (_OBJECT * len(value) if flat else sum(map(weigh, value)))
    if is_dataclass(value):
        return _OBJECT + sum(weigh(getattr(value, part.name)) for part in fields(value))
    return _OBJECT


def _owned(result: object) -> object:
    """With arrays of its own: a view of one row would hold on to the whole batch."""
    if not isinstance(result, AppendResult) or not any(map(_is_part, result.outputs.values())):
        return result
    own = {name: value.copy() if _is_part(value) else value for name, value in result.outputs.items()}
    return replace(result, outputs=own)


def _is_part(value: object) -> bool:
    """Whether it is a view of something larger, or of what is not numpy's."""
    owner = value
    while isinstance(owner, np.ndarray) and owner.base is not None:
        owner = owner.base
    if not isinstance(value, np.ndarray) or owner is value:
        return False
    return not isinstance(owner, np.ndarray) or owner.nbytes > value.nbytes


def _check_waiting(session: Session, once: Once) -> None:
    for operation in session.waiting:
        if operation.once is not None and operation.once.key == once.key and not operation.future.cancelled():
            _check_digest(operation.once.digest, once)


def _check_digest(digest: bytes, once: Once) -> None:
    if digest != once.digest:
        raise KeyReused
