"""`keypast sessions` against the fake service: what is printed, what a script reads, how it ends."""

import json
import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner, Result

from keypast import Client, Past
from keypast._terminal import size
from keypast.cli import app
from keypast.cli_sessions import lengths, since
from keypast.schemas import Code, SessionView

from .fake import FakeService, FakeSession, problem, reply

Run = Callable[..., Result]


@pytest.fixture
def service() -> FakeService:
    return FakeService()


@pytest.fixture
def client(service: FakeService) -> Client:
    return Client(transport=service.transport, sleep=lambda _: None)


@pytest.fixture
def run(service: FakeService) -> Run:
    def connect(url: str | None) -> Client:
        return Client(url, transport=service.transport, sleep=lambda _: None)

    def run(*arguments: str, stdin: bytes = b"") -> Result:
        return CliRunner().invoke(app, ["sessions", *arguments], obj=connect, input=stdin)

    return run


def test_ls_is_a_table_of_all_pages(run: Run, client: Client) -> None:
    for name in "abc":
        client.sessions.create("decoder", id=name, labels={"team": "red"}).prefill(text="hello")
    client.sessions.create("attention", id="layer", batch_size=5)
    result = run("ls")
    head, *rows = result.stdout.splitlines()
    assert head.split() == ["id", "model", "state", "length", "size", "used", "ends", "labels"]
    assert [re.sub(r"\d+ d ago", "long ago", row).split() for row in rows[:1]] == [
        ["a", "decoder", "idle", "5", "320", "B", "long", "ago", "never", "team=red"]
    ]
    assert [row.split()[0] for row in rows] == ["a", "b", "c", "layer"]
    assert "5 × 0" in rows[3]


def test_ls_asks_for_what_is_wanted(run: Run, service: FakeService, client: Client) -> None:
    client.sessions.create("decoder", id="a")
    client.sessions.create("attention", id="b")
    result = run("ls", "--model", "attention", "--label", "team", "--label", "shift=night", "--state", "idle", "--json")
    assert [view["id"] for view in json.loads(result.stdout)] == ["b"]
    asked = service.requests[-1].url.params
    assert (asked["model"], asked["state"], asked.get_list("label")) == ("attention", "idle", ["team", "shift=night"])


def test_json_is_one_line_that_reads_back(run: Run, client: Client) -> None:
    view = client.sessions.create("decoder", id="a", labels={"x": "é"}).view
    for arguments in (("ls", "--json"), ("show", "a", "--json")):
        printed = run(*arguments).stdout
        assert printed.count("\n") == 1
        told = json.loads(printed)
        assert SessionView.model_validate(told[0] if isinstance(told, list) else told) == view


def test_a_label_cannot_draw_on_the_terminal(run: Run, client: Client) -> None:
    client.sessions.create("decoder", id="a", labels={"evil": "[red]\x1b[31m\r\nx"})
    for command in (("ls",), ("show", "a")):
        printed = run(*command).stdout
        assert "evil=[red]?[31m??x" in printed
        assert "\x1b" not in printed


def test_show(run: Run, client: Client) -> None:
    parent = client.sessions.create("decoder", id="mine", labels={"team": "red"})
    parent.prefill(text="hello")
    child = parent.fork()
    lines = dict(line.strip().split(maxsplit=1) for line in run("show", child.id).stdout.splitlines())
    assert lines["id"] == child.id
    assert lines["length"] == "5 of 64"
    assert lines["memory"] == "320 B in 1 blocks, 1 shared"
    assert lines["parent"] == "mine"
    assert lines["created"].startswith("2026-01-01 00:00:00 UTC, ")
    assert lines["ends"] == "never"
    assert "labels" not in lines


def test_rm_goes_on_after_one_that_is_not_there(run: Run, service: FakeService, client: Client) -> None:
    for name in "ab":
        client.sessions.create("decoder", id=name).prefill(text="hello")
    result = run("rm", "a", "nobody", "b")
    assert result.exit_code == 3
    assert result.stdout == "a: 5 positions, 320 B freed\nb: 5 positions, 320 B freed\n"
    assert result.stderr == "keypast: nobody: no such session\n"
    assert service.gone == {"a", "b"}
    again = run("rm", "a", "--json")
    assert (again.exit_code, json.loads(again.stdout)) == (3, [])
    assert again.stderr == "keypast: a: the session is gone: deleted\n"


def test_rm_tells_what_stays(run: Run, service: FakeService) -> None:
    receipt = {"id": "a", "positions": 5, "bytes": 2048, "blocks_freed": 1, "blocks_still_shared": 2}
    service.answers = [httpx.Response(200, json=receipt)] * 2
    assert run("rm", "a").stdout == "a: 5 positions, 2.0 KiB freed, 2 blocks are shared and stay\n"
    assert json.loads(run("rm", "a", "--json").stdout) == [receipt]


def test_fork(run: Run, service: FakeService, client: Client) -> None:
    client.sessions.create("decoder", id="mine").prefill(text="hello")
    result = run("fork", "mine", "--count", "2", "--at", "3")
    assert result.stdout == "b-1: 3 positions, forked from mine\nc-1: 3 positions, forked from mine\n"
    told = json.loads(run("fork", "mine", "--json").stdout)
    assert [(view["parent"], view["valid_length"]) for view in told] == [("mine", [5])]


def test_a_past_goes_out_and_in(run: Run, service: FakeService, client: Client, tmp_path: Path) -> None:
    client.sessions.create("decoder", id="mine").prefill(text="hello")
    file = tmp_path / "mine.past"
    assert run("export", "mine", str(file)).stdout.startswith(f"{file}: 5 positions, ")
    assert Past.load(file).valid_length == [5]
    result = run("import", str(file), "--id", "copy")
    assert (result.exit_code, result.stdout) == (0, "copy: 5 positions, 320 B\n")
    assert service.sessions["copy"].rows == service.sessions["mine"].rows
    assert service.sessions["copy"].model == "decoder", "the one that the file is of"


def test_a_past_goes_through_a_pipe(run: Run, service: FakeService, client: Client) -> None:
    client.sessions.create("decoder", id="mine").prefill(text="hello")
    out = run("export", "mine", "-")
    told = json.loads(run("import", "-", "--json", stdin=out.stdout_bytes).stdout)
    assert told["valid_length"] == [5]
    assert service.sessions[told["id"]].rows == service.sessions["mine"].rows


def test_export_writes_over_a_file_only_when_told(run: Run, client: Client, tmp_path: Path) -> None:
    client.sessions.create("decoder", id="mine").prefill(text="hello")
    file = tmp_path / "mine.past"
    file.write_text("precious")
    refused = run("export", "mine", str(file))
    assert (refused.exit_code, file.read_text()) == (1, "precious")
    assert refused.stderr == f"keypast: {file} is there already; --force writes over it\n"
    told = json.loads(run("export", "mine", str(file), "--force", "--json").stdout)
    assert (told["valid_length"], told["bytes"]) == ([5], file.stat().st_size)
    assert told["digest"] == Past.load(file).digest


def test_an_import_that_fails_leaves_no_session(run: Run, service: FakeService, client: Client, tmp_path: Path) -> None:
    client.sessions.create("decoder", id="mine").prefill(text="hello")
    file = tmp_path / "mine.past"
    client.sessions.get("mine").past().save(file)
    service.sessions["new"] = FakeSession("new", "decoder", [[]], 64)
    created = reply(service.sessions["new"].view(), 201)
    service.answers = [created, problem(Code.MODEL_FAILED, "failed")]
    result = run("import", str(file), "--model", "decoder")
    assert (result.exit_code, result.stderr) == (1, "keypast: failed\n")
    assert set(service.sessions) == {"mine"}


def test_files_that_cannot_be_read(run: Run, service: FakeService, client: Client, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("not a past, but a text of some length")
    missing = tmp_path / "missing"
    for file, line in (
        (tmp_path / "text", "keypast: the file is not a past that can be read: body: not a safetensors file"),
        (missing, f"keypast: {missing}: No such file or directory"),
    ):
        result = run("import", str(file))
        assert result.exit_code == 1
        assert result.stderr.startswith(line)
        assert result.stderr.count("\n") == 1
    client.sessions.create("decoder", id="mine").prefill(text="hello")
    past = client.sessions.get("mine").past()
    Past(past.arrays, past.valid_length, past.kind, "another").save(tmp_path / "other")
    result = run("import", str(tmp_path / "other"))
    message = "keypast: the file is of another model than those that are loaded (attention, decoder)\n"
    assert (result.exit_code, result.stderr) == (1, message)
    assert run("export", "mine", str(tmp_path / "no" / "where")).exit_code == 1


@pytest.mark.parametrize(
    ("answer", "code", "line"),
    [
        (
            httpx.ConnectError("refused"),
            1,
            "cannot connect to http://127.0.0.1:8000: refused; start the service with `keypast serve`",
        ),
        (problem(Code.NOT_READY, "loading", retry_after=5), 1, "loading; try again in 5 s"),
        (problem(Code.SESSION_GONE, "the session is gone: expired"), 3, "the session is gone: expired\n"),
        (problem(Code.SESSION_NOT_FOUND, "no such session"), 3, "no such session\n"),
        (problem(Code.MODEL_FAILED, "failed"), 1, "failed\n"),
    ],
)
@pytest.mark.parametrize("command", [("show", "a"), ("fork", "a"), ("export", "a", "nowhere.past"), ("ls",)])
def test_errors_in_one_line(
    run: Run, service: FakeService, command: tuple[str, ...], answer: httpx.Response | Exception, code: int, line: str
) -> None:
    service.answers = [answer] * 3
    result = run(*command)
    assert result.exit_code == code
    assert result.stderr.startswith(f"keypast: {line}")
    assert (result.stderr.count("\n"), result.stdout) == (1, "")


@pytest.mark.parametrize(
    "arguments", [("show",), ("rm",), ("fork", "a", "--count", "0"), ("fork", "a", "--at", "-1"), ("lss",)]
)
def test_a_wrong_command_line_is_2(run: Run, service: FakeService, arguments: tuple[str, ...]) -> None:
    assert run(*arguments).exit_code == 2
    assert service.requests == []


@pytest.mark.parametrize(
    ("rows", "text"),
    [([5], "5"), ([5, 3], "5+3"), ([0, 0, 0], "0+0+0"), ([5, 3, 5, 9], "4 × 3 to 9"), ([7] * 8, "8 × 7")],
)
def test_lengths(rows: list[int], text: str) -> None:
    assert lengths(rows) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1, "1 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (3 << 29, "1.5 GiB"), (1 << 60, "1048576.0 TiB")],
)
def test_sizes(count: int, text: str) -> None:
    assert size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-5, "0 s"), (0, "0 s"), (119, "119 s"), (120, "2 min"), (7_199, "119 min"), (7_200, "2 h"), (10**6, "11 d")],
)
def test_how_long(seconds: int, text: str) -> None:
    now = datetime(2026, 1, 1, tzinfo=UTC)
    assert since(now, now + timedelta(seconds=seconds)) == text
