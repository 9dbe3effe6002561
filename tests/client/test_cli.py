"""The command line, piped: every command against the fake service, and every error in one line."""

import json
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import get_args

import httpx
import pytest
from typer.testing import CliRunner, Result

from keypast import Client
from keypast.chat import Speed
from keypast.cli import Device, Dtype, Quantize, app
from keypast.schemas import Code
from service.settings import Settings

from .fake import FakeService, FakeSession, problem, reply


@pytest.fixture
def service() -> FakeService:
    return FakeService(max_length=200)


Run = Callable[..., Result]


@pytest.fixture
def run(service: FakeService) -> Run:
    def connect(url: str | None) -> Client:
        return Client(url, transport=service.transport, sleep=lambda _: None)

    def run(*arguments: str, lines: tuple[str, ...] = ()) -> Result:
        return CliRunner().invoke(app, arguments, obj=connect, input="".join(f"{line}\n" for line in lines))

    return run


def test_models(run: Run) -> None:
    result = run("models")
    assert result.exit_code == 0
    assert "decoder" in result.stdout
    assert "token_ids" in result.stdout


def test_a_conversation_is_one_session(run: Run, service: FakeService) -> None:
    result = run("chat", "--system", "brief", "--max-tokens", "6", lines=("hello", "", "more"))
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.count("Paris.") == 2
    created, *rest = [request for request in service.requests if request.method == "POST"]
    assert json.loads(created.content)["model"] == "decoder"
    assert [request.url.path.rsplit("/")[-1] for request in rest] == ["prefill", "generate"] * 2
    first, second = json.loads(rest[0].content), json.loads(rest[2].content)
    assert [message["role"] for message in first["messages"]] == ["system", "user"]
    assert second["messages"] == [{"role": "user", "content": "more"}]
    assert json.loads(rest[1].content) == {"max_tokens": 6, "sample": {"temperature": 0.0}, "stream": True}
    assert not service.sessions


def test_undo_goes_back_to_before_the_turn(run: Run, service: FakeService) -> None:
    result = run("chat", "--max-tokens", "1", lines=("one", "two", "/undo", "/undo", "/undo", "/stats"))
    assert "back at 10 positions\nback at 0 positions\nno turn to take back\n" in result.stdout
    assert "0 of 200 positions, 0 B in 1 blocks (0 shared)" in result.stdout


def test_fork_and_switch(run: Run) -> None:
    lines = ("one", "/fork", "two", "/undo", "/switch", "/undo", "/switch b", "/stats", "/switch zz")
    result = run("chat", "--max-tokens", "1", lines=lines)
    assert "on b-1, a copy of a-1" in result.stdout
    assert "on a-1, 10 positions\nback at 0 positions\non b-1, 10 positions\n" in result.stdout
    assert "b-1: 10 of 200 positions, 640 B in 1 blocks (1 shared)" in result.stdout
    assert "no session begins with zz; there are a-1, b-1" in result.stdout


def test_stats_tell_of_the_last_reply(run: Run) -> None:
    assert "last reply: " in run("chat", lines=("one", "/stats")).stdout
    assert str(Speed(tokens=11, first=0.25, rest=2.0)) == "5.0 tokens/s, first after 250 ms"
    assert str(Speed(tokens=1, first=0.25, rest=0.0)) == "one token, first after 250 ms"


def test_help_quit_and_other_words(run: Run, service: FakeService) -> None:
    result = run("chat", lines=("/help", "/nonsense", "/quit", "never read"))
    assert "/switch [ID]" in result.stdout
    assert "no such command: /nonsense" in result.stdout
    assert not any(request.url.path.endswith("prefill") for request in service.requests)


def test_ctrl_c_stops_the_reply_and_the_chat_goes_on(run: Run, service: FakeService) -> None:
    service.interrupt = KeyboardInterrupt()
    result = run("chat", "--max-tokens", "20", lines=("one", "/undo", "/stats"))
    assert result.exit_code == 0
    assert "Pa\n[stopped at 12 positions]\nback at 0 positions\n" in result.stdout
    assert service.streams[0].closed


def test_a_refusal_costs_one_line(run: Run, service: FakeService) -> None:
    result = run("chat", "--max-tokens", "1", lines=("x" * 300, "short"))
    assert result.exit_code == 0
    assert "longer than max_length; /undo, or begin a new chat\nP\n" in result.stdout


def test_a_stream_that_breaks(run: Run, service: FakeService) -> None:
    service.interrupt = httpx.ReadError("reset")
    result = run("chat", lines=("one", "/undo"))
    assert "Pa\nthe stream broke off: reset\nback at 0 positions\n" in result.stdout


@pytest.mark.parametrize(
    ("answer", "line"),
    [
        (
            httpx.ConnectError("refused"),
            "cannot connect to http://127.0.0.1:8000: refused; start the service with `keypast serve`, or give",
        ),
        (problem(Code.NOT_READY, "loading", retry_after=5), "loading; try again in 5 s"),
        (problem(Code.ENGINE_STOPPED, "stopping"), "stopping; try again later"),
        (problem(Code.SESSION_GONE, "the session is gone: expired"), "the session is gone: expired; begin a new chat"),
        (problem(Code.MODEL_NOT_FOUND, "no such model"), "no such model; `keypast models` lists what is loaded"),
        (
            httpx.Response(200, json={"object": "list", "data": []}),
            "no loaded model takes text; start the service with",
        ),
        (problem(Code.MODEL_FAILED, "failed"), "failed"),
    ],
)
def test_errors_in_one_line(run: Run, service: FakeService, answer: httpx.Response | Exception, line: str) -> None:
    service.answers = [answer] * 3
    result = run("chat")
    assert result.exit_code == 1
    assert result.stderr.startswith(f"keypast: {line}")
    assert result.stderr.count("\n") == 1
    service.answers = [answer] * 3
    assert run("models").exit_code == (0 if isinstance(answer, httpx.Response) and answer.is_success else 1)


def test_a_lost_session_ends_the_chat(run: Run, service: FakeService) -> None:
    service.answers = [reply(FakeSession("lost", "decoder", [[]], 64).view(), 201)]
    result = run("chat", "--model", "decoder", lines=("one", "two"))
    assert (result.exit_code, result.stderr) == (1, "keypast: no such session; begin a new chat\n")
    assert [request.method for request in service.requests] == ["POST", "POST", "DELETE"]


def test_a_wrong_address(run: Run) -> None:
    result = run("models", "--url", "there")
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)


def test_serve_hands_its_options_on() -> None:
    started: list[dict[str, str]] = []
    names = ("PORT", "QUANTIZE", "MODELS", "KV_MEMORY", "MODEL_PARALLEL")
    environment = {
        "KEYPAST_HOST": "0.0.0.0",
        **{f"KEYPAST_{name}": None for name in names},
    }  # as it is again afterwards

    def load(name: str) -> SimpleNamespace:
        assert name == "service.__main__"
        return SimpleNamespace(main=lambda: started.append({key: os.environ[key] for key in environment}))

    models_given = ["--model", "a=b:c=d", "--model", "e=f"]
    others = ["--kv-memory", "4GiB", "--model-parallel", "2", "--quantize", "int8"]
    arguments = ["serve", "--port", "9", *models_given, *others]
    result = CliRunner().invoke(app, arguments, obj=load, env=environment)
    assert result.exit_code == 0
    models = json.dumps({"a": "b:c=d", "e": "f"})
    assert started == [
        {
            "KEYPAST_HOST": "0.0.0.0",
            "KEYPAST_PORT": "9",
            "KEYPAST_QUANTIZE": "int8",
            "KEYPAST_MODELS": models,
            "KEYPAST_KV_MEMORY": "4GiB",
            "KEYPAST_MODEL_PARALLEL": "2",
        }
    ]


def test_serve_without_the_service() -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(name="fastapi")

    result = CliRunner().invoke(app, ["serve"], obj=missing)
    assert result.exit_code == 1
    assert "pip install 'keypast[server]'" in result.stderr
    wrong = CliRunner().invoke(app, ["serve", "--model", "nonsense"], obj=missing)
    assert (wrong.exit_code, wrong.stderr) == (2, "keypast: --model takes NAME=SPEC, not 'nonsense'\n")


def test_serve_offers_what_the_settings_take() -> None:
    for name, choices in {"dtype": Dtype, "quantize": Quantize, "device": Device}.items():
        assert get_args(Settings.model_fields[name].annotation) == get_args(choices)


NEW = ["keys", "new"]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["sessoins"], "no such command 'sessoins'; did you mean 'sessions'? Try: keypast --help"),
        (["sessions", "sohw"], "no such command 'sohw'; did you mean 'show'? Try: keypast sessions --help"),
        (
            ["keys", "stpe"],
            "no such command 'stpe'; did you mean one of new, ls, rm? Try: keypast keys --help",
        ),
        (["--nope"], "no such option: --nope. Try: keypast --help"),
        (
            ["sessions", "ls", "--lable", "a"],
            "no such option: --lable; did you mean --label? Try: keypast sessions ls --help",
        ),
        (["sessions", "ls", "--label"], "--label needs an argument. Try: keypast sessions ls --help"),
        (["loadtest", "--compare", "a.json"], "--compare needs 2 arguments. Try: keypast loadtest --help"),
        (["sessions", "show"], "missing argument ID. Try: keypast sessions show --help"),
        (["sessions", "rm"], "missing argument ID. Try: keypast sessions rm --help"),
        (["sessions", "show", "a", "b"], "not expected: b. Try: keypast sessions show --help"),
        (NEW, "missing argument TENANT. Try: keypast keys new --help"),
        ([*NEW, "a"], "missing option --file (or KEYPAST_KEYS_FILE in the environment). Try: keypast keys new --help"),
        ([*NEW, "a", "--file", "/"], "--file: file '/' is a directory. Try: keypast keys new --help"),
        (
            [*NEW, "a", "--file", "k", "--role", "boss"],
            "--role: 'boss' is not one of 'user', 'admin', 'metrics'. Try: keypast keys new --help",
        ),
        (["serve", "--port", "http"], "--port must be a valid integer. Try: keypast serve --help"),
        (["serve", "--port", "65536"], "--port must be less than or equal to 65535. Try: keypast serve --help"),
        (
            ["serve", "--device", "tpu"],
            "--device: 'tpu' is not one of 'auto', 'cpu', 'cuda'. Try: keypast serve --help",
        ),
        (["loadtest", "-c", "0"], "--concurrency must be greater than or equal to 1. Try: keypast loadtest --help"),
    ],
)
def test_a_wrong_command_line_is_one_line_with_the_fix(run: Run, arguments: list[str], line: str) -> None:
    result = run(*arguments)
    assert (result.exit_code, result.stdout, result.stderr) == (2, "", f"keypast: {line}\n")


@pytest.mark.parametrize("arguments", [(), ("sessions",), ("keys",)])
def test_a_group_alone_shows_its_help(run: Run, arguments: tuple[str, ...]) -> None:
    result = run(*arguments)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == run(*arguments, "--help").stdout
    assert "Commands:" in result.stdout
