"""What the operator decides. The only reader of the environment: `KEYPAST_PORT=9000` sets `port`, and so on."""

import dataclasses
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, ValidationError, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

from engine.config import Quota

PREFIX = "KEYPAST_"
_MEMORY = re.compile(r"(\d+(?:\.\d+)?)\s*(%|[kmgt]i?b?|b)?", re.IGNORECASE)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}")
_UNITS = {"k": 1, "m": 2, "g": 3, "t": 4}


class SettingsError(ValueError):
    """A setting is wrong; the message names its key and the fix."""


class Settings(BaseSettings):
    model_config = SettingsConfigDict(frozen=True, extra="forbid", validate_default=True)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """What it is given, and nothing else: `read_settings` says from where."""
        return (init_settings,)

    host: str = Field(default="127.0.0.1", min_length=1, description="address to listen on; 0.0.0.0 for every one")
    port: int = Field(default=8000, ge=0, le=65535, description="port to listen on; 0 takes a free one")
    keys_file: Path | None = Field(
        default=None, description="API keys by their hashes, as `keypast keys new` writes them; read again on change"
    )
    keys: str = Field(default="", repr=False, description="lines of such a file, separated by ;")
    insecure: bool = Field(default=False, description="serve other machines without API keys, to whoever asks")
    tls_cert: Path | None = Field(default=None, description="a certificate chain in PEM; serves https")
    tls_key: Path | None = Field(default=None, description="the certificate's key in PEM")

    models: Annotated[dict[str, str], NoDecode] = Field(
        default={"smollm2-135m": "default", "attention": "attention:hidden=512,heads=8"},
        min_length=1,
        description="what to serve: NAME=SPEC, separated by spaces, or a JSON object",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="of weights and activations; auto: what the device does best"
    )
    kv_dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="float16", description="of the keys and values that sessions hold"
    )
    quantize: Literal["none", "int8"] = Field(
        default="none", description="int8: decoders on the CPU keep their linears' weights in 8 bits"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto: cuda where there is one")
    attention_backend: Literal["auto", "cpu", "triton", "flashinfer", "sdpa"] = Field(
        default="auto", description="sdpa is the slow reference; auto: the fastest that the device has"
    )
    exact: bool = Field(
        default=False,
        description="refuse to start where an output's bits could depend on batch mates, chunks, forks or rollbacks",
    )
    cuda_graphs: bool = Field(
        default=True, description="on a GPU, steps are recorded at start and played back: a slower start, faster steps"
    )
    threads: int = Field(
        default=0, ge=0, le=4096, description="threads that a forward pass uses; 0: one a core that it may use"
    )
    model_parallel: int = Field(
        default=1, ge=1, le=64, description="ranks that share each model by its heads: processes, on GPUs one each"
    )
    rank_seconds: float = Field(
        default=60.0, gt=0, description="a rank that keeps the others waiting for longer ends the service"
    )
    cache_dir: Path = Field(
        default=Path("~/.cache/keypast"), description="where models and compiled kernels are kept; made when missing"
    )

    kv_memory: str = Field(
        default="25%", description="for keys and values: bytes (4GiB, 500MB) or a share of the free memory (25%)"
    )
    block_size: int = Field(default=16, ge=1, le=1024, description="positions a block")
    token_budget: int = Field(
        default=512, ge=1, description="new positions of one batch; longer prefills run in chunks"
    )
    guard_positions: int = Field(
        default=16,
        ge=1,
        description="positions of one batch that others have while a tenant with guaranteed blocks is at work",
    )
    guard_requests: int | None = Field(
        default=None,
        ge=0,
        description="requests a second that others make then, the rest waits (50 a processor if not set; 0: no bound)",
    )
    max_rows: int = Field(default=256, ge=1, description="rows of one batch")
    gather_share: float = Field(
        default=0.5,
        ge=0,
        le=10,
        description="share of a batch's time that the next may wait for the sessions that stepped in it",
    )
    max_sessions: int = Field(default=65536, ge=1, description="sessions at a time")
    max_waiting: int = Field(default=4096, ge=1, description="appends that may wait in all; more are refused (429)")
    max_waiting_per_session: int = Field(default=16, ge=1, description="appends that may wait on one session")
    wait_seconds: float = Field(default=30.0, gt=0, description="an append that got no blocks by then is refused")

    quota: Annotated[Quota, NoDecode] = Field(
        default=Quota(),
        description="of every tenant that has none of its own: NAME=NUMBER, separated by spaces, or a JSON object, of "
        "sessions, pinned, blocks (of each model), positions_per_minute and concurrent_appends",
    )
    quotas: Annotated[dict[str, dict[str, int | None]], NoDecode] = Field(
        default={},
        description="a JSON object of tenants' own quotas: what one leaves out is as in quota; guaranteed_blocks are "
        "kept free for the tenant",
    )
    evict: Literal["none", "lru"] = Field(
        default="none", description="lru: when blocks are short, idle sessions that are not pinned are closed"
    )
    zero_freed: bool = Field(default=True, description="freed blocks are zeroed before they are used again")
    tombstones: int = Field(default=65536, ge=1, description="gone sessions that still answer 410, the last ones")
    tombstone_seconds: float = Field(default=3600.0, gt=0, description="how long a gone session answers 410")

    event_ring: int = Field(
        default=4096, ge=1, le=1 << 20, description="events of each tenant that a reader who comes back still gets"
    )
    max_event_streams: int = Field(default=16, ge=1, description="event streams that a tenant may have open")

    prefix_reuse: bool = Field(
        default=True, description="a prompt without a session begins with what its tenant's pasts have of it"
    )
    conversation_seconds: float = Field(
        default=3600.0, gt=0, description="time to live of a session that X-Session-ID made, since its last turn"
    )
    max_choices: int = Field(default=128, ge=1, description="replies of one OpenAI request: prompts times n")
    max_streams: int = Field(default=256, ge=1, description="streams of OpenAI requests that a tenant may have open")
    sequence_seconds: float = Field(
        default=600.0, gt=0, description="a sequence of the inference protocol that is not used for so long ends"
    )

    max_batch_items: int = Field(default=256, ge=1, le=512, description="steps of one batch request")

    max_body_bytes: int = Field(default=64 << 20, ge=1024, description="longest request body; longer ones are refused")
    max_json_bytes: int = Field(
        default=16 << 20, ge=1024, description="of them, those in JSON, which takes up to 40 times its size in memory"
    )
    max_past_bytes: int = Field(default=1 << 30, ge=1024, description="longest past that is imported or exported")
    bodies_bytes: int = Field(
        default=2 << 30,
        ge=2048,
        description="of all bodies that are held at a time; at least twice the longest; more are refused (503)",
    )
    replay_bytes: int = Field(
        default=256 << 20, ge=1024, description="of replies that are kept for retries, of all sessions"
    )
    replay_bytes_per_session: int = Field(default=16 << 20, ge=1024, description="of them, of one session")
    max_head_bytes: int = Field(default=32 << 10, ge=1024, description="longest request line and headers together")
    max_connections: int = Field(default=4096, ge=1, description="open at a time; more are refused")
    requests_per_minute: int = Field(
        default=0, ge=0, description="of a tenant; a minute's worth may come at once; 0: no bound"
    )
    body_seconds: float = Field(
        default=30.0, gt=0, description="how long a body may take to come, and a second more for each 16 KiB of it"
    )
    head_seconds: float = Field(default=10.0, gt=0, description="how long a request's headers may take to come")
    stall_seconds: float = Field(
        default=60.0, gt=0, description="a reader who takes nothing of a reply for so long is gone"
    )
    ping_seconds: float = Field(default=15.0, gt=0, description="silence in a stream before a comment is sent")
    drain_seconds: float = Field(default=30.0, ge=0, description="how long running work may go on after SIGTERM")
    cancel_seconds: float = Field(default=5.0, ge=0, description="how long generations may take to end after that")
    log_format: Literal["auto", "json", "text"] = Field(
        default="auto", description="of the log on standard error; auto: text on a terminal, else json"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="info writes a line a request, warning does not; audit lines always"
    )
    otlp_endpoint: str = Field(
        default="",
        description="an OpenTelemetry collector that is sent a trace of each request, by OTLP over HTTP: "
        "http://HOST:4318; empty: none is made",
    )
    otlp_share: float = Field(
        default=1.0, ge=0, le=1, description="share of the requests that is traced, where their callers do not say"
    )

    @field_validator("models", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        if value.lstrip().startswith("{"):
            return json.loads(value)
        models: dict[str, str] = {}
        for entry in value.split():
            name, equals, spec = entry.partition("=")
            if not (equals and spec):
                raise ValueError(f"{entry!r} is not NAME=SPEC, as in smollm2-135m=default")
            if name in models:
                raise ValueError(f"{name} is named twice")
            models[name] = spec
        return models

    @field_validator("quota", mode="before")
    @classmethod
    def _quota(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        if value.lstrip().startswith("{"):
            return json.loads(value)
        return dict(_setting(entry) for entry in value.split())

    @field_validator("quotas", mode="before")
    @classmethod
    def _json(cls, value: object) -> object:
        return json.loads(value) if isinstance(value, str) else value

    @field_validator("quotas")
    @classmethod
    def _hold(cls, own: dict[str, dict[str, int | None]], info: ValidationInfo) -> dict[str, dict[str, int | None]]:
        for tenant, fields in own.items():
            try:
                _own_quota(info.data.get("quota", Quota()), fields)
            except ValueError as error:
                raise ValueError(f"{tenant!r}: {error}") from None
        return own

    @field_validator("otlp_endpoint")
    @classmethod
    def _is_http(cls, url: str) -> str:
        parts = urlsplit(url)
        if url and not (parts.scheme in ("http", "https") and parts.hostname):
            raise ValueError("is not http://HOST:PORT or https://HOST:PORT")
        return url

    @field_validator("bodies_bytes")
    @classmethod
    def _holds_the_longest(cls, size: int, info: ValidationInfo) -> int:
        longest = max(info.data.get("max_body_bytes", 0), info.data.get("max_past_bytes", 0))
        if size < 2 * longest:
            raise ValueError(
                f"give at least {2 * longest}, twice the longest body (KEYPAST_MAX_BODY_BYTES, KEYPAST_MAX_PAST_BYTES)"
            )
        return size

    @property
    def kv_share(self) -> float | None:
        """Of the free memory, if kv_memory is said so."""
        text = self.kv_memory.strip()
        return float(text.removesuffix("%")) / 100 if text.endswith("%") else None

    @property
    def guarded(self) -> bool:
        """Whether there are API keys, so that every request needs one."""
        return self.keys_file is not None or bool(self.keys.strip())

    @property
    def tenant_quotas(self) -> dict[str, Quota]:
        """Of tenants that have one of their own, whole."""
        return {tenant: _own_quota(self.quota, fields) for tenant, fields in self.quotas.items()}

    @field_validator("models")
    @classmethod
    def _well_named(cls, models: dict[str, str]) -> dict[str, str]:
        for name in models:
            if not _NAME.fullmatch(name):
                raise ValueError(f"{name!r} is not a name: letters, digits and ._/- , 128 at most")
        return models

    @field_validator("kv_memory")
    @classmethod
    def _readable(cls, text: str) -> str:
        parse_memory(text, available=1 << 40)
        return text


def _own_quota(common: Quota, fields: Mapping[str, Any]) -> Quota:
    """Raises ValueError."""
    unknown = fields.keys() - {field.name for field in dataclasses.fields(Quota)}
    if unknown:
        raise ValueError(f"{', '.join(sorted(unknown))} is no quota")
    if fields.get("guaranteed_blocks", 0) is None:
        raise ValueError("guaranteed_blocks is a number")
    return dataclasses.replace(common, **fields)


def _setting(entry: str) -> tuple[str, int]:
    name, _, number = entry.partition("=")
    if not number.isdecimal():
        raise ValueError(f"{entry!r} is not NAME=NUMBER, as in sessions=100")
    return name, int(number)


def parse_memory(text: str, available: int) -> int:
    """Bytes, of which a share is taken of `available`. KB is 1000 bytes, KiB and K are 1024."""
    match = _MEMORY.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not an amount of memory, as in 4GiB, 500MB or 25%")
    number, unit = float(match[1]), (match[2] or "b").lower()
    if unit == "%":
        if not 0 < number <= 95:
            raise ValueError(f"{text!r} must be more than 0% and at most 95%")
        return int(available * number / 100)
    base = 1000 if len(unit) == 2 else 1024
    size = int(number * base ** _UNITS.get(unit[0], 0))
    if size < 1 << 20:
        raise ValueError(f"{text!r} is less than 1MiB, too little to hold a session")
    return size


def read_settings(environment: Mapping[str, str] = os.environ) -> Settings:
    """What KEYPAST_* says, in whichever case; other names are not ours. Raises SettingsError."""
    given: dict[str, Any] = {}
    for key, value in environment.items():
        prefix, name = key[: len(PREFIX)].upper(), key[len(PREFIX) :].lower()
        if prefix == PREFIX and name in Settings.model_fields:
            given[name] = value
    try:
        return Settings(**given)
    except ValidationError as error:
        lines = []
        for problem in error.errors(include_url=False):
            key = str(problem["loc"][0])
            message = problem["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
            meant = Settings.model_fields[key].description
            lines.append(f"{PREFIX}{key.upper()}={problem['input']}: {message} ({meant})")
        raise SettingsError("\n".join(lines)) from None
