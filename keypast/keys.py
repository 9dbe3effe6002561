"""API keys, and the text that knows them by their salted hashes alone.

    kp_3f9a2c01b7d4_Zk0..                      a key, as a client sends it: an id that is no secret, and 256 random bits
    3f9a2c01b7d4 alice user never 8f..:41..    its line: id, tenant, role, when it ends, salt and hash

The hash is one keyed BLAKE2b. A slow hash guards what people think up; nobody guesses 256 random bits, and a slow hash
would let wrong keys load the service.
"""

import hashlib
import hmac
import os
import re
import secrets
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, cast, get_args

Role = Literal["user", "admin", "metrics"]

_NEVER = "never"
_ID = re.compile(r"[0-9a-f]{12}")
_KEY = re.compile(r"kp_([0-9a-f]{12})_([A-Za-z0-9_-]{43})")
_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_HASH = re.compile(r"([0-9a-f]{32}):([0-9a-f]{64})")
_HEAD = "# API keys by their salted hashes: id, tenant, role, end, salt:hash. `keypast keys` writes this file.\n"


class KeysError(ValueError):
    """What is wrong and how to put it right. It never repeats what was read, which may be a key."""


def _hash(secret: str, salt: bytes) -> bytes:
    return hashlib.blake2b(secret.encode(), key=salt, digest_size=32).digest()


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """What is kept of a key. `ends` is in seconds since 1970, None: never."""

    id: str
    tenant: str
    role: Role
    ends: int | None
    salt: bytes = field(repr=False)
    hashed: bytes = field(repr=False)

    def is_of(self, secret: str) -> bool:
        """In the same time for every secret of its length."""
        return hmac.compare_digest(_hash(secret, self.salt), self.hashed)

    def ended(self, now: float) -> bool:
        return self.ends is not None and now >= self.ends

    def line(self) -> str:
        ends = _NEVER if self.ends is None else datetime.fromtimestamp(self.ends, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        return f"{self.id} {self.tenant} {self.role} {ends} {self.salt.hex()}:{self.hashed.hex()}"


def new_key(tenant: str, role: Role = "user", days: float | None = None) -> tuple[str, KeyRecord]:
    """A key, which nothing keeps, and its record. Raises KeysError."""
    if not _TENANT.fullmatch(tenant):
        raise KeysError("a tenant's name is 1 to 64 letters, digits and ._- , the first a letter or a digit")
    key_id, secret, salt = secrets.token_hex(6), secrets.token_urlsafe(32), secrets.token_bytes(16)
    ends = None if days is None else int(time.time() + days * 86_400)
    return f"kp_{key_id}_{secret}", KeyRecord(key_id, tenant, role, ends, salt, _hash(secret, salt))


NOBODY = new_key("nobody")[1]  # compared with when there is no such id, so that the answer takes as long


def find_key(keys: Mapping[str, KeyRecord], key: str, now: float) -> KeyRecord | None:
    """The record of a key as a client sent it; None for one that is unknown, wrong or over."""
    match = _KEY.fullmatch(key)
    if match is None:
        return None
    record = keys.get(match[1])
    same = (record or NOBODY).is_of(match[2])
    return record if record is not None and same and not record.ended(now) else None


def parse_keys(text: str) -> dict[str, KeyRecord]:
    """Records by their ids. Lines (or what `;` parts, for one variable) may be empty or comments. Raises KeysError."""
    keys: dict[str, KeyRecord] = {}
    for number, line in enumerate(re.split(r"[\n;]", text), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        record = _parse(line.split(), number)
        if record.id in keys:
            raise KeysError(f"line {number}: the id {record.id} is there twice; remove one of the two")
        keys[record.id] = record
    return keys


def read_keys(path: Path) -> dict[str, KeyRecord]:
    """Raises KeysError, OSError."""
    try:
        return parse_keys(path.read_text())
    except UnicodeDecodeError:
        raise KeysError("is not text") from None


def write_keys(path: Path, keys: Iterable[KeyRecord]) -> None:
    """In one move, so that no reader finds half of it; readable by its owner alone. Raises OSError."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # 0600, as mkstemp makes it
    try:
        with os.fdopen(handle, "w") as file:
            file.write(_HEAD + "".join(f"{record.line()}\n" for record in keys))
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _parse(fields: list[str], number: int) -> KeyRecord:
    if len(fields) != 5:
        raise KeysError(f"line {number} has {len(fields)} fields, not the 5: id, tenant, role, end, salt:hash")
    key_id, tenant, role, ends, hashed = fields
    match = _HASH.fullmatch(hashed)
    wrong = next(
        (
            name
            for name, right in (
                ("id", _ID.fullmatch(key_id)),
                ("tenant", _TENANT.fullmatch(tenant)),
                ("role", role in get_args(Role)),
                ("salt:hash", match),
            )
            if not right
        ),
        None,
    )
    if wrong is not None or match is None:
        raise KeysError(f"line {number}: its {wrong} is wrong; write it with `keypast keys new`")
    salt, digest = bytes.fromhex(match[1]), bytes.fromhex(match[2])
    return KeyRecord(key_id, tenant, cast(Role, role), _ends(ends, number), salt, digest)


def _ends(text: str, number: int) -> int | None:
    if text == _NEVER:
        return None
    try:
        end = datetime.fromisoformat(text)
    except ValueError:
        end = None
    if end is None or end.tzinfo is None:
        raise KeysError(f"line {number}: its end is `{_NEVER}` or a time such as 2030-01-31T00:00:00Z")
    return int(end.timestamp())
