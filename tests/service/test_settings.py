"""What the environment says, and what is said of a bad value."""

import re
import shlex
from pathlib import Path

import pytest

from engine.config import Quota
from service.settings import PREFIX, Settings, SettingsError, parse_memory, read_settings


def test_defaults_serve_both_kinds_to_this_machine_only() -> None:
    settings = Settings()
    assert (settings.host, settings.port, settings.max_body_bytes) == ("127.0.0.1", 8000, 64 << 20)
    assert settings.max_past_bytes == 1 << 30
    assert settings.models == {"smollm2-135m": "default", "attention": "attention:hidden=512,heads=8"}
    assert settings.cache_dir == Path("~/.cache/keypast")


def test_every_setting_is_documented() -> None:
    assert [name for name, field in Settings.model_fields.items() if not field.description] == []


@pytest.mark.parametrize(
    ("text", "models"),
    [
        ("a=default", {"a": "default"}),
        ("a=x.gguf  b=attention:hidden=8,heads=2", {"a": "x.gguf", "b": "attention:hidden=8,heads=2"}),
        ('{"a": "hf:org/name@main"}', {"a": "hf:org/name@main"}),
    ],
)
def test_models(text: str, models: dict[str, str]) -> None:
    assert read_settings({"KEYPAST_MODELS": text}).models == models


def test_other_names_are_not_ours_and_case_does_not_matter() -> None:
    given = {"keypast_port": "9000", "KEYPAST_URL": "http://there", "PORT": "80", "KEYPAST_BLOCK_SIZE": "4"}
    assert read_settings(given) == Settings(port=9000, block_size=4)


@pytest.mark.parametrize(
    ("key", "value", "hint"),
    [
        ("PORT", "99999", "port to listen on"),
        ("PORT", "http", "port to listen on"),
        ("MODELS", "smollm2", "NAME=SPEC"),
        ("MODELS", "a=b a=c", "named twice"),
        ("MODELS", "", "NAME=SPEC"),
        ("MODELS", '{"a": 1}', "NAME=SPEC"),
        ("MODELS", '{"a"', "JSON"),
        ("MODELS", "a:b=c", "letters"),
        ("KV_MEMORY", "lots", "4GiB"),
        ("KV_MEMORY", "200%", "95%"),
        ("KV_MEMORY", "1K", "1MiB"),
        ("DTYPE", "int8", "float16"),
        ("QUANTIZE", "int4", "int8"),
        ("LOG_LEVEL", "loud", "warning"),
        ("BODIES_BYTES", "1000000", "at least 2147483648, twice the longest body"),
        ("DRAIN_SECONDS", "-1", "SIGTERM"),
        ("EVICT", "fifo", "lru"),
        ("TOMBSTONE_SECONDS", "0", "410"),
        ("QUOTA", "sessions", "NAME=NUMBER"),
        ("QUOTA", "sessions=-1", "NAME=NUMBER"),
        ("QUOTA", "sessions=0", "at least 1"),
        ("QUOTA", "seats=3", "QUOTA"),
        ("QUOTA", '{"blocks": "many"}', "integer"),
        ("QUOTAS", "sessions=3", "JSON"),
        ("QUOTAS", '{"a": {"seats": 3}}', "no quota"),
        ("QUOTAS", '{"a": {"blocks": 3, "guaranteed_blocks": 4}}', "at least guaranteed_blocks"),
        ("QUOTAS", '{"a": {"guaranteed_blocks": null}}', "a number"),
    ],
)
def test_a_bad_value_names_its_key_and_the_fix(key: str, value: str, hint: str) -> None:
    with pytest.raises(SettingsError) as refused:
        read_settings({PREFIX + key: value})
    assert str(refused.value).startswith(f"{PREFIX}{key}")
    assert hint in str(refused.value)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1048576", 1 << 20),
        ("4GiB", 4 << 30),
        ("4g", 4 << 30),
        ("1.5 GiB", 3 << 29),
        ("500MB", 500_000_000),
        ("2048 KiB", 2 << 20),
        ("25%", 25 << 20),
    ],
)
def test_memory(text: str, size: int) -> None:
    assert parse_memory(text, available=100 << 20) == size


def test_a_tenants_quota_is_the_common_one_with_its_own_put_in() -> None:
    assert (Settings().quota, Settings().tenant_quotas) == (Quota(), {})
    own = '{"a": {"guaranteed_blocks": 40, "sessions": null}, "b": {"pinned": 0}}'
    settings = read_settings({"KEYPAST_QUOTA": "sessions=5 positions_per_minute=600", "KEYPAST_QUOTAS": own})
    assert settings.quota == Quota(sessions=5, positions_per_minute=600)
    assert settings.tenant_quotas == {
        "a": Quota(positions_per_minute=600, guaranteed_blocks=40),
        "b": Quota(sessions=5, positions_per_minute=600, pinned=0),
    }
    assert read_settings({"KEYPAST_QUOTAS": "{}", "KEYPAST_QUOTA": '{"blocks": 7}'}).quota == Quota(blocks=7)


@pytest.mark.parametrize(("text", "share"), [("25%", 0.25), ("12.5 %", 0.125), ("4GiB", None), ("500000000", None)])
def test_a_share_of_memory_is_known_as_one(text: str, share: float | None) -> None:
    assert Settings(kv_memory=text).kv_share == share


def test_the_quotas_of_the_guide_are_read() -> None:
    page = (Path(__file__).parents[2] / "docs" / "limits.md").read_text()
    lines = re.findall(r"^KEYPAST_\w+=.+$", page, re.MULTILINE)
    settings = read_settings(dict(shlex.split(line)[0].split("=", 1) for line in lines))
    assert settings.quota == Quota(sessions=100, positions_per_minute=60000)
    assert set(settings.tenant_quotas) == {"alice", "bob"}
