"""The `keypast` command."""

import sys
from importlib import import_module
from json import dumps
from os import environ
from typing import Annotated, Literal

import typer
from rich.console import Console

from keypast._terminal import WRONG, Commands, Url, advice, console, examples, failed, listing, open_client
from keypast.chat import Chat, ChatOptions
from keypast.chat import advice as chat_advice
from keypast.cli_doctor import EPILOG as DOCTOR_EPILOG
from keypast.cli_doctor import doctor
from keypast.cli_keys import keys
from keypast.cli_loadtest import EPILOG, loadtest
from keypast.cli_sessions import sessions
from keypast.client import Client
from keypast.errors import KeypastError

app = typer.Typer(cls=Commands, rich_markup_mode=None, pretty_exceptions_enable=False)
# As the service's settings have them, which the light client cannot import.
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Quantize = Literal["none", "int8"]
Device = Literal["auto", "cpu", "cuda"]

app.add_typer(sessions, name="sessions")
app.add_typer(keys, name="keys")


@app.callback(
    epilog=examples(
        ("keypast serve", "serve the default models on 127.0.0.1:8000"),
        ("keypast doctor", "is all well here?"),
        ("keypast chat", "talk to a model"),
        ("keypast sessions ls", "what the service holds"),
        ("keypast --install-completion", "the Tab key knows the commands from then on"),
    )
)
def keypast() -> None:
    """Hold, step, fork and roll back a transformer's past over HTTP."""


@app.command(
    epilog=examples(
        ("keypast serve", "the default models"),
        ("keypast serve --model mine=path/to/hf-directory --port 9000", ""),
        ("keypast serve --model small=model.gguf --quantize int8 --kv-memory 4GiB", ""),
        ("keypast serve --model layer=attention:hidden=1024,heads=16 --dtype float32", ""),
        ("keypast serve --host 0.0.0.0 --keys-file keys.txt", "for others, with keys"),
    )
)
def serve(
    context: typer.Context,
    host: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="The address to listen on; default: 127.0.0.1.")
    ] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, metavar="PORT", help="Default: 8000.")] = None,
    model: Annotated[list[str] | None, typer.Option(metavar="NAME=SPEC", help="A model to load; repeatable.")] = None,
    dtype: Annotated[Dtype | None, typer.Option(metavar="DTYPE", help="auto, float32, bfloat16 or float16.")] = None,
    quantize: Annotated[
        Quantize | None, typer.Option(metavar="none|int8", help="int8: decoders' weights in 8 bits, on the CPU.")
    ] = None,
    device: Annotated[Device | None, typer.Option(metavar="DEVICE", help="auto, cpu or cuda.")] = None,
    exact: Annotated[
        bool | None, typer.Option("--exact", help="Refuse to start where bits could depend on batch mates or chunks.")
    ] = None,
    kv_memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="For keys and values: 4GiB, or a share of the free memory: 25%.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=0, metavar="N", help="CPU threads; 0: one a core.")] = None,
    model_parallel: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Ranks that share each model: processes, on GPUs one each.")
    ] = None,
    keys_file: Annotated[
        str | None, typer.Option(metavar="FILE", help="API keys, as `keypast keys new` writes them.")
    ] = None,
    insecure: Annotated[bool | None, typer.Option("--insecure", help="Serve other machines without API keys.")] = None,
    tls_cert: Annotated[str | None, typer.Option(metavar="FILE", help="A certificate chain in PEM: https.")] = None,
    tls_key: Annotated[str | None, typer.Option(metavar="FILE", help="Its key in PEM.")] = None,
) -> None:
    """Start the service. What is not given comes from the environment's KEYPAST_*, else from its defaults."""
    given = {
        "host": host,
        "port": port,
        "dtype": dtype,
        "quantize": quantize,
        "device": device,
        "exact": exact,
        "kv_memory": kv_memory,
        "threads": threads,
        "model_parallel": model_parallel,
        "keys_file": keys_file,
        "insecure": insecure,
        "tls_cert": tls_cert,
        "tls_key": tls_key,
    }
    environ.update({f"KEYPAST_{name.upper()}": str(value) for name, value in given.items() if value is not None})
    if model:
        environ["KEYPAST_MODELS"] = dumps(dict(map(_named, model)))
    try:
        service = (context.obj or import_module)("service.__main__")
    except ModuleNotFoundError as error:
        message = f"serving needs {error.name}, which is not installed: pip install 'keypast[server]'"
        raise failed(message) from None
    service.main()


@app.command(
    epilog=examples(
        ("keypast models", ""),
        ("keypast models --url http://gpu-box:8000", "KEYPAST_API_KEY is its key"),
    )
)
def models(context: typer.Context, url: Url = None) -> None:
    """List the models that the service has loaded."""
    try:
        with open_client(context, url) as client:
            cards = client.models()
    except KeypastError as error:
        raise failed(advice(error)) from None
    table = listing("model", "kind", ">max length", "dtype", "device", "inputs")
    for card in cards:
        inputs = ", ".join(info.name for info in card.inputs)
        table.add_row(card.id, card.kind, str(card.max_length), card.dtype, card.device, inputs)
    console().print(table)


@app.command(
    epilog=examples(
        ("keypast chat", "with the first model that takes text"),
        ("keypast chat --system 'Answer in one word.' --temperature 0.7", ""),
        ("echo 'Name three rivers.' | keypast chat --max-tokens 48", ""),
    )
)
def chat(
    context: typer.Context,
    model: Annotated[str | None, typer.Option(metavar="NAME", help="Default: the first that takes text.")] = None,
    url: Url = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="The system message.")] = None,
    temperature: Annotated[float, typer.Option(min=0.0, metavar="T", help="0 always takes the likeliest token.")] = 0.0,
    max_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Of one reply.")] = 512,
) -> None:
    """Talk to a model over one session. Within it: /fork, /switch, /undo, /stats, /help, /quit."""
    options = ChatOptions(system, temperature, max_tokens)
    prompt = "› " if sys.stdin.isatty() else ""
    try:
        with open_client(context, url) as client:
            name = model or _first_decoder(client)
            Chat(client, name, options, console=Console(), read=lambda: input(prompt)).run()
    except KeypastError as error:
        raise failed(chat_advice(error)) from None


app.command(epilog=DOCTOR_EPILOG)(doctor)
app.command(epilog=EPILOG)(loadtest)


def main() -> None:
    app()


def _first_decoder(client: Client) -> str:
    for card in client.models():
        if any(info.name == "token_ids" for info in card.inputs):
            return card.id
    raise failed("no loaded model takes text; start the service with one: keypast serve --model NAME=SPEC")


def _named(option: str) -> tuple[str, str]:
    name, equals, spec = option.partition("=")
    if not (name and equals and spec):
        raise failed(f"--model takes NAME=SPEC, not {option!r}", WRONG)
    return name, spec


if __name__ == "__main__":
    main()
