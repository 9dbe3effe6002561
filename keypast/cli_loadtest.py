"""`keypast loadtest`: options to a plan, the plan run, its report told and kept."""

import asyncio
import json
import os
import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from keypast._protocol import authorized, resolve_url
from keypast._terminal import WRONG, advice, console, failed, listing, open_client
from keypast.errors import KeypastError

if TYPE_CHECKING:  # all of it needs what the light client does not have
    from keypast.loadtest.arrival import Rate
    from keypast.loadtest.plan import ModelInfo, Plan, Target
    from keypast.loadtest.progress import Progress
    from keypast.loadtest.report import Report
    from keypast.loadtest.scenario import Scenario

MISSED = 3  # exit code
LONG = 1e6  # seconds of a run that is bounded by its count

EPILOG = """
\b
Examples:
  8 users at a time, for 30 seconds:
    keypast loadtest chat -c 8 -d 30
  5 new users a second, whatever the service can take, and a report:
    keypast loadtest attention --rate 5 --out results
  A ramp:
    keypast loadtest chat --rate 1..20 -d 120
  The highest rate that holds:
    keypast loadtest chat --find-max --slo ttft.p95=1s,inter_token=100ms
  Are outputs under load those of a client that is alone?
    keypast loadtest mixed -c 16 --check 20
  Another server:
    keypast loadtest stateless --target openai --url http://127.0.0.1:8080
  Two reports:
    keypast loadtest --compare monday/report.json today/report.json

SCENARIO is a .toml or .json file, or one of chat (which it is if not given),
stateless, attention, steps, tree, mixed and ping. --show prints one, to begin a file with.

Exit codes: 0 done, and the SLO held; 1 could not be done; 2 a wrong command
line; 3 the SLO was missed, or --check found different outputs.
"""


def loadtest(
    context: typer.Context,
    scenario: Annotated[str, typer.Argument(metavar="SCENARIO", hidden=True)] = "chat",
    url: Annotated[
        str | None, typer.Option(metavar="URL", help="The server; default: KEYPAST_URL, else the local service.")
    ] = None,
    target: Annotated[
        str, typer.Option(help="keypast, or openai: any server with /v1/chat/completions.", metavar="keypast|openai")
    ] = "keypast",
    model: Annotated[
        str | None, typer.Option(metavar="NAME", help="Default: the first loaded one that fits a visit.")
    ] = None,
    concurrency: Annotated[
        int | None,
        typer.Option("--concurrency", "-c", min=1, metavar="N", help="Closed loop: so many users at a time."),
    ] = None,
    rate: Annotated[
        str | None,
        typer.Option("--rate", "-r", metavar="R|A..B", help="Open loop: visits a second, or a ramp of them."),
    ] = None,
    arrival: Annotated[
        str, typer.Option(help="Of an open loop: poisson or fixed gaps.", metavar="poisson|fixed")
    ] = "poisson",
    duration: Annotated[
        float | None,
        typer.Option("--duration", "-d", min=0.1, metavar="S", help="Seconds that are measured; default 30."),
    ] = None,
    count: Annotated[
        int | None, typer.Option("--count", "-n", min=1, metavar="N", help="Visits, in place of a duration.")
    ] = None,
    warmup: Annotated[
        float | None, typer.Option(min=0, metavar="S", help="Seconds before those; default 2, with --count 0.")
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Of arrivals, lengths and texts.")] = 0,
    slo: Annotated[
        list[str] | None, typer.Option(metavar="MEASURE[.pN]=LIMIT", help="step.p99=50ms, errors=0.1%; repeatable.")
    ] = None,
    find_max: Annotated[
        bool, typer.Option("--find-max", help="Look for the highest rate that holds the --slo; begins at --rate.")
    ] = False,
    check: Annotated[
        int, typer.Option(min=0, metavar="N", help="Do N of the visits again, alone, and compare their outputs.")
    ] = 0,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Write JSON, CSV, HTML and PNGs there.")] = None,
    compare: Annotated[
        tuple[Path, Path] | None, typer.Option(metavar="A.json B.json", help="Two reports: B as multiples of A.")
    ] = None,
    ceiling: Annotated[
        bool, typer.Option("--ceiling", help="What the tester itself can do: against a server that does nothing.")
    ] = False,
    show: Annotated[bool, typer.Option("--show", help="Print the scenario, and do nothing.")] = False,
    workers: Annotated[
        int | None, typer.Option(min=1, max=64, metavar="N", help="Processes; default: half the cores, at most 4.")
    ] = None,
    connections: Annotated[int, typer.Option(min=1, metavar="N", help="At most, of each worker.")] = 1000,
    timeout: Annotated[float, typer.Option(min=0.1, metavar="S", help="Seconds of one operation.")] = 60.0,
) -> None:
    """Load a server with users, and measure what they feel. Piped, the last line is one JSON document."""
    try:
        command = Command(context, url, workers or max(1, min(4, (os.cpu_count() or 1) // 2)))
        if compare is not None:
            command.compare(*compare)
        elif ceiling:
            command.ceiling(duration or 2.0, concurrency)
        else:
            found = command.scenario(scenario)
            if show:
                sys.stdout.write(json.dumps(found.model_dump(exclude_unset=True), indent=2) + "\n")
                return
            if duration is not None and count is not None:
                raise ValueError("give --duration or --count, not both")
            settings = {
                "arrival": _arrival(concurrency, rate, arrival, find_max),
                "seed": seed,
                "slo": _slo(slo, find_max),
                "check": check,
                "timeout": timeout,
                "connections": connections,
                **_seconds(duration, count, warmup),
            }
            command.load(found, _target(target), model, settings, find_max=find_max, out=out)
    except ModuleNotFoundError as error:
        raise failed(
            f"a load test needs {error.name}, which is not installed: pip install 'keypast[loadtest]'"
        ) from None
    except ValidationError as error:
        told = "; ".join(str(each["msg"]).removeprefix("Value error, ") for each in error.errors())
        raise failed(told, WRONG) from None
    except ValueError as error:
        raise failed(str(error), WRONG) from None
    except KeypastError as error:
        raise failed(advice(error)) from None


def _arrival(concurrency: int | None, rate: str | None, gaps: str, find_max: bool) -> dict[str, Any]:
    if concurrency is not None and (rate is not None or find_max):
        raise ValueError("give --concurrency (a closed loop) or --rate (an open one; --find-max is), not both")
    if gaps not in ("poisson", "fixed"):
        raise ValueError(f"--arrival is poisson or fixed, not {gaps!r}")
    if rate is None and not find_max:
        return {"concurrency": concurrency or 1}
    begin, dots, end = (rate or "1").partition("..")
    try:
        ends = float(begin), float(end if dots else begin)
    except ValueError:
        raise ValueError(f"--rate is visits a second (5), or from one to another (1..20), not {rate!r}") from None
    if find_max and dots:
        raise ValueError("--find-max begins at one --rate, not at a ramp")
    return {"rate": {"begin": ends[0], "end": ends[1]}, "gaps": gaps}


def _slo(texts: list[str] | None, find_max: bool) -> dict[str, Any]:
    from keypast.loadtest.slo import Slo

    slo = Slo.parse(texts or [])
    if find_max and not slo.objectives:
        raise ValueError("--find-max needs an --slo that shall hold, such as step.p99=100ms")
    return slo.model_dump()


def _seconds(duration: float | None, count: int | None, warmup: float | None) -> dict[str, Any]:
    if count is not None:
        return {"count": count, "seconds": LONG, "warmup": warmup or 0.0}
    warm = 2.0 if warmup is None else warmup
    measured = 30.0 if duration is None else duration
    return {"seconds": warm + measured, "warmup": warm, "interval": max(0.25, min(1.0, measured / 30), measured / 600)}


def _target(name: str) -> "Target":
    if name == "keypast":
        return "keypast"
    if name == "openai":
        return "openai"
    raise ValueError(f"--target is keypast or openai, not {name!r}")


class Command:
    """One call of the command. All of it may raise ValueError, KeypastError and typer.Exit."""

    def __init__(self, context: typer.Context, url: str | None, workers: int) -> None:
        self._context = context
        self._url = resolve_url(url)
        self._workers = workers
        self._errors = Console(stderr=True)

    def scenario(self, name: str) -> "Scenario":
        from keypast.loadtest.scenario import load_scenario

        return load_scenario(name)

    def compare(self, a: Path, b: Path) -> None:
        from keypast.loadtest import compare
        from keypast.loadtest.report import Report

        one, other = Report.load(a), Report.load(b)
        shown = Console(width=None if sys.stdout.isatty() else 120)
        shown.print(compare.table(one, other))
        told = compare.compare(one, other)
        for name, (of, to) in told["differs"].items():
            if name != "scenario":
                shown.print(f"{name}: A {of}, B {to}", markup=False, highlight=False)
            else:
                shown.print("the scenarios differ", markup=False)
        _last_line(json.dumps(told))

    def ceiling(self, seconds: float, connections: int | None) -> None:
        from keypast.loadtest.ceiling import CONNECTIONS, ceiling, cpu_us

        table = listing(">connections", ">workers", ">requests/s", ">p50 ms", ">p99 ms", "busy", ">CPU, µs a request")

        def told(connections: int, result: "Report") -> None:
            latency, busy = result.measures["request"], " ".join(f"{100 * each:.0f}%" for each in result.busy)
            rate = f"{result.rates['requests']:,.0f}"
            cells = (rate, f"{latency['p50']:g}", f"{latency['p99']:g}", busy, f"{cpu_us(result):g}")
            table.add_row(str(connections), str(result.workers), *cells)

        numbers = CONNECTIONS if connections is None else (connections,)
        found = asyncio.run(ceiling(numbers, self._workers, seconds, told))
        console().print(table)
        _last_line(json.dumps({"ceiling": found}))

    def load(
        self,
        scenario: "Scenario",
        target: "Target",
        model: str | None,
        settings: dict[str, Any],
        *,
        find_max: bool,
        out: Path | None,
    ) -> None:
        from keypast.loadtest.plan import Plan
        from keypast.loadtest.progress import Progress
        from keypast.loadtest.run import LoadError
        from keypast.loadtest.scenario import ScenarioError

        headers = authorized({}, os.environ.get("OPENAI_API_KEY", "") if target == "openai" else None)
        try:
            chosen = self._models(scenario, target, model)
        except (LoadError, ScenarioError) as error:
            raise failed(str(error)) from None
        known = {"url": self._url, "headers": headers, "scenario": scenario, "models": chosen, "workers": self._workers}
        plan = Plan.model_validate({"target": target, **known, **settings})
        try:
            with Progress(self._errors) as progress:
                result, more = asyncio.run(_find_max(plan, progress) if find_max else _once(plan, progress))
        except LoadError as error:
            raise failed(str(error)) from None
        self._tell(result, more)
        if out is not None:
            self._write(result, out)
        _last_line(json.dumps({**json.loads(result.line()), **more}))
        if not result.holds or (result.check is not None and (result.check.different or result.check.failed)):
            raise typer.Exit(MISSED)

    def _models(self, scenario: "Scenario", target: "Target", model: str | None) -> "list[ModelInfo]":
        from keypast.loadtest.plan import ModelInfo, choose_models

        if all(visit.kind == "request" for visit in scenario.visits):
            return choose_models(scenario, [], None)
        if target == "openai":
            return choose_models(scenario, [ModelInfo.named(model or asyncio.run(_first_model(self._url)))], model)
        with open_client(self._context, self._url) as client:
            return choose_models(scenario, map(ModelInfo.of, client.models()), model)

    def _tell(self, result: "Report", more: dict[str, Any]) -> None:
        from keypast.loadtest.report import lines, table

        shown = console()
        shown.print(table(result))
        grid = Table.grid(padding=(0, 2))
        for what, how in lines(result):
            style = "bold red" if what == "warning" or "MISSED" in how or "DIFFERENT" in how else None
            grid.add_row(what, how, style=style)
        if "find_max" in more:
            best = more["find_max"]["rate"]
            grid.add_row("find-max", "no rate held" if best is None else f"{best:g} visits a second", style="bold")
        shown.print(grid, "")

    def _write(self, result: "Report", folder: Path) -> None:
        from keypast.loadtest import png
        from keypast.loadtest.html import html
        from keypast.loadtest.plots import plots
        from keypast.loadtest.report import series_csv, summary_csv

        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "report.json").write_text(result.model_dump_json() + "\n")
            (folder / "report.html").write_text(html(result))
            (folder / "summary.csv").write_text(summary_csv(result))
            (folder / "series.csv").write_text(series_csv(result))
            with suppress(ModuleNotFoundError):
                png.save(plots(result), folder)
        except OSError as error:
            raise failed(f"{error.filename}: {error.strerror}") from None
        self._errors.print(f"written: {folder / 'report.html'}, report.json, summary.csv, series.csv", highlight=False)


async def _first_model(url: str) -> str:
    """Of an OpenAI-compatible server. Raises LoadError."""
    from keypast.loadtest.connection import Address, Connection, Failed
    from keypast.loadtest.run import LoadError

    headers = authorized({}, os.environ.get("OPENAI_API_KEY", ""))
    connection = Connection(Address(url), headers)
    try:
        async with asyncio.timeout(10):
            reply = await connection.request("GET", "/v1/models")
        return str(json.loads(reply.body)["data"][0]["id"])
    except Failed as error:
        raise LoadError(f"{error}; is the server at {url}?") from None
    except (TimeoutError, ValueError, LookupError, TypeError):
        raise LoadError(f"{url} does not list its models; say which with --model") from None
    finally:
        await connection.close()


async def _once(plan: "Plan", progress: "Progress") -> "tuple[Report, dict[str, Any]]":
    from keypast.loadtest.report import report
    from keypast.loadtest.run import interruptible, run

    stop = asyncio.Event()
    with interruptible(stop):
        return report(await run(plan, progress, stop)), {}


async def _find_max(plan: "Plan", progress: "Progress") -> "tuple[Report, dict[str, Any]]":
    """The report is that of the highest rate that held, or of the last one."""
    from keypast.loadtest.report import Report, report
    from keypast.loadtest.run import LoadError, interruptible, run
    from keypast.loadtest.search import find_max

    stop, reports = asyncio.Event(), dict[float, Report]()

    async def holds(rate: float) -> bool:
        progress.title = f"{rate:g} a second: "
        arrival = plan.arrival.model_copy(update={"rate": plan.arrival.rate and _constant(rate)})
        found = reports[rate] = report(await run(plan.model_copy(update={"arrival": arrival}), progress, stop))
        if found.stopped:
            raise LoadError("stopped; the highest rate was not found")
        missed = "; ".join(f"{each.objective}: {each.measured}" for each in found.slo if not each.holds)
        progress.say(f"{rate:g} visits a second {'missed ' + missed if missed else 'hold'}")
        return found.holds

    assert plan.arrival.rate is not None
    with interruptible(stop):
        best, trials = await find_max(plan.arrival.rate.begin, holds)
    told = {"rate": best, "trials": [asdict(trial) for trial in trials]}
    return reports[trials[-1].rate if best is None else best], {"find_max": told}


def _constant(rate: float) -> "Rate":
    from keypast.loadtest.arrival import Rate

    return Rate(begin=rate, end=rate)


def _last_line(text: str) -> None:
    """For a script; on a terminal it would push what a person reads out of sight."""
    if not sys.stdout.isatty():
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
