"""API keys: the file, what is a key's and what is not, and the command that writes them."""

import stat
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from keypast import Client, errors
from keypast._protocol import authorized
from keypast.cli import app
from keypast.keys import KeysError, find_key, new_key, parse_keys, read_keys, write_keys

KEY, RECORD = new_key("alice")
OTHER, OTHER_RECORD = new_key("bob", "admin", days=1)
KNOWN = {RECORD.id: RECORD, OTHER_RECORD.id: OTHER_RECORD}


def test_a_key_is_256_random_bits_and_its_record_has_none_of_them() -> None:
    secret = KEY.split("_", 2)[2]
    assert len(secret) == 43
    assert secret not in RECORD.line()
    assert secret not in repr(RECORD)
    assert RECORD.hashed.hex() not in repr(RECORD)
    again, same_tenant = new_key("alice")
    assert again != KEY
    assert same_tenant.salt != RECORD.salt


def test_a_key_finds_its_record_until_it_ends() -> None:
    now = time.time()
    assert find_key(KNOWN, KEY, now + 1e9) is RECORD
    assert find_key(KNOWN, OTHER, now) is OTHER_RECORD
    assert find_key(KNOWN, OTHER, now + 80_000) is OTHER_RECORD
    assert find_key(KNOWN, OTHER, now + 86_401) is None


FORGED = {
    "empty": "",
    "another's secret": f"kp_{RECORD.id}_{OTHER.split('_', 2)[2]}",
    "one character off": KEY[:-1] + ("A" if KEY[-1] != "A" else "E"),
    "cut off": KEY[:-1],
    "longer": KEY + "A",
    "no such id": f"kp_{'0' * 12}_{KEY.split('_', 2)[2]}",
    "its hash": RECORD.hashed.hex(),
    "its line": RECORD.line(),
    "a line break": KEY + "\n",
    "letters of another script": KEY[:-1] + "А",
    "long": "kp_" + "a" * 100_000,
}


@pytest.mark.parametrize("key", FORGED.values(), ids=FORGED.keys())
def test_nothing_else_finds_it(key: str) -> None:
    assert find_key(KNOWN, key, time.time()) is None


def test_the_file_gives_back_what_was_written_and_is_its_owners_alone(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    write_keys(file, KNOWN.values())
    assert read_keys(file) == KNOWN
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["keys"]
    one_line = ";".join(line for line in file.read_text().splitlines() if not line.startswith("#"))
    assert parse_keys(one_line) == KNOWN
    assert parse_keys("\n# nothing\n ; \n") == {}


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        (KEY, "5: id, tenant"),
        (RECORD.line().replace("alice", "a/b"), "tenant"),
        (RECORD.line().replace("user", "root"), "role"),
        (RECORD.line().replace("never", "tomorrow"), "2030-01-31"),
        (RECORD.line().replace("never", "2030-01-31"), "2030-01-31T00"),
        (RECORD.line()[:-1], "salt:hash"),
        (RECORD.line().replace(RECORD.id, KEY), "id"),
    ],
    ids=["a key", "tenant", "role", "end", "a day", "salt", "id"],
)
def test_a_bad_line_is_told_by_its_number_and_never_repeated(line: str, hint: str) -> None:
    with pytest.raises(KeysError) as refused:
        parse_keys(f"# first\n{line}\n")
    assert str(refused.value).startswith("line 2")
    assert hint in str(refused.value)
    assert KEY not in str(refused.value)


def test_an_id_is_there_once() -> None:
    with pytest.raises(KeysError, match="twice"):
        parse_keys(f"{RECORD.line()}\n{RECORD.line()}")


def run(*arguments: str, file: Path) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["keys", *arguments, "--file", str(file)])
    return result.exit_code, result.stdout, result.stderr


def test_new_prints_the_key_once_and_keeps_its_hash(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    code, printed, said = run("new", "alice", "--role", "admin", "--days", "30", file=file)
    key = printed.strip()
    found = find_key(read_keys(file), key, time.time())
    assert code == 0
    assert found is not None
    assert (found.tenant, found.role) == ("alice", "admin")
    assert found.ends == pytest.approx(time.time() + 30 * 86_400, abs=60)
    assert found.id in said
    assert key not in said
    assert key.split("_", 2)[2] not in file.read_text()


def test_ls_and_rm(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    keys = [run("new", tenant, file=file)[1].strip() for tenant in ("alice", "bob")]
    code, listed, _ = run("ls", file=file)
    ids = list(read_keys(file))
    assert code == 0
    assert all(text in listed for text in (*ids, "alice", "bob", "user", "never"))
    assert run("rm", ids[0], file=file)[0] == 0
    assert find_key(read_keys(file), keys[0], time.time()) is None
    assert find_key(read_keys(file), keys[1], time.time()) is not None
    code, _, said = run("rm", ids[0], file=file)
    assert code == 1
    assert "keypast keys ls" in said


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [(["new", "a b"], "letters, digits"), (["ls"], "keypast keys new"), (["rm", "x"], "keypast keys new")],
)
def test_what_cannot_be_done_is_one_clear_line(tmp_path: Path, arguments: list[str], hint: str) -> None:
    code, printed, said = run(*arguments, file=tmp_path / "keys")
    assert (code, printed) == (2 if arguments[0] == "new" else 1, "")
    assert said.startswith("keypast: ")
    assert hint in said


def test_a_broken_file_is_not_written_over(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("nonsense\n")
    for arguments in (["new", "alice"], ["ls"], ["rm", "x"]):
        code, _, said = run(*arguments, file=file)
        assert code == 1
        assert "line 1" in said
    assert file.read_text() == "nonsense\n"


def test_a_client_sends_the_key_it_is_given_or_the_environments() -> None:
    assert authorized(None, None, {}) == {}
    assert authorized({"a": "b"}, "k1") == {"a": "b", "Authorization": "Bearer k1"}
    environment = {"KEYPAST_API_KEY": "k2"}
    assert authorized(None, None, environment) == {"Authorization": "Bearer k2"}
    assert authorized(None, "k1", environment) == {"Authorization": "Bearer k1"}
    assert authorized(None, "", environment) == {}
    assert authorized({"x-api-key": "k3"}, None, environment) == {"x-api-key": "k3"}
    with pytest.raises(ValueError, match="KEYPAST_API_KEY"):
        Client("http://k", api_key="k1\r\nX-Evil: 1")
    assert errors.BY_CODE["unauthorized"] is errors.Denied
