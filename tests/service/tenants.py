"""Tenants who ask by keys of their own."""

from keypast.keys import new_key

_KEYS = {name: new_key(name) for name in ("a", "b", "c", "d", "g", "few", "x", "y")}
KEYS = ";".join(record.line() for _, record in _KEYS.values())  # the setting


def as_tenant(name: str) -> dict[str, str]:
    """Headers."""
    return {"x-api-key": _KEYS[name][0]}
