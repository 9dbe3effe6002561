"""Minutes under load: does anything fail, leak or drift?

`keypast loadtest` first looks for the highest rate of the mixed scenario that holds the objectives, then sends 0.8 of
it for ten minutes, against the service in a process of its own. Memory and what the engine holds are read every second;
at the end the sessions are gone, `Engine.check()` passes in the server after its drain, and it exits with 0.

Bounds: no error, no session and no block left, memory that does not grow with time.

    python -m benchmarks.soak [--minutes 10] [--rate VISITS_A_SECOND] [--save]
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from datetime import date
from functools import partial
from importlib.metadata import version
from typing import Any

import service.__main__ as service_main
from benchmarks.peers.compare import RESULTS
from benchmarks.peers.servers import ROOT, free_port
from keypast._machine import processor
from service.lifecycle import Loaded, Progress
from service.settings import Settings, read_settings

SHARE = 0.8  # of the highest rate that holds
SLO = "ttft.p95=1s,inter_token.p95=250ms"  # and no error
CHECKED = 10  # visits of each worker that are done again at the end
MODELS = "smollm=default layer=attention:hidden=512,heads=8"
MEMORY = "process_resident_memory_bytes"
HELD = [
    f'{name}{{model="{model}",state="{state}"}}'
    for model in ("smollm", "layer")
    for name, state in (("keypast_blocks", "used"), ("keypast_sessions", "idle"), ("keypast_sessions", "running"))
]


def serve() -> None:
    """`python -m service`, but for the last look at the engine's books."""
    settings = read_settings()
    service_main.set_up_torch(settings)
    from service.server import serve

    kept: list[Loaded] = []

    def load(settings: Settings, progress: Progress) -> Loaded:
        from service.loader import load_models

        kept.append(load_models(settings, progress))
        return kept[0]

    code = serve(partial(load, settings), settings)
    kept[0].engine.check()
    sys.exit(code)


def loadtest(port: int, *options: str) -> dict[str, Any]:
    """The last line of a run of the mixed scenario."""
    command = [sys.executable, "-m", "keypast.cli", "loadtest", "mixed", "--url", f"http://127.0.0.1:{port}", *options]
    ran = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if ran.returncode == 1:
        raise SystemExit("the load test could not be done")
    told: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return told


def metrics(port: int) -> dict[str, float]:
    """What is watched, by name and labels."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as reply:
        lines = reply.read().decode().splitlines()
    told = {name: value for name, _, value in (line.rpartition(" ") for line in lines)}
    return {name: float(told[name]) for name in (MEMORY, *HELD)}


class Watch(threading.Thread):
    """Reads the metrics every second until it is told to end."""

    def __init__(self, port: int) -> None:
        super().__init__(daemon=True)
        self.seen: list[tuple[float, dict[str, float]]] = []
        self._port = port
        self._over = threading.Event()

    def run(self) -> None:
        started = time.monotonic()
        while not self._over.wait(1.0):
            self.seen.append((time.monotonic() - started, metrics(self._port)))

    def end(self) -> None:
        self._over.set()
        self.join()

    def minutes(self, name: str) -> list[float]:
        """Its median in each minute."""
        whole = range(int(self.seen[-1][0] // 60 + 1))
        each = [[now[name] for at, now in self.seen if at // 60 == minute] for minute in whole]
        return [statistics.median(values) for values in each if len(values) > 10]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--rate", type=float, help="visits a second; default: 0.8 of the highest that holds")
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve()
    port = free_port()
    environment = {"KEYPAST_PORT": str(port), "KEYPAST_MODELS": MODELS, "KEYPAST_LOG_LEVEL": "warning"}
    command = [sys.executable, "-m", "benchmarks.soak", "--serve"]
    server = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **environment})
    try:
        summary = soak(port, server, options.minutes, options.rate)
        server.send_signal(signal.SIGTERM)
        summary["holds"]["the engine's books agree, and the server ends with 0"] = server.wait(60) == 0
    finally:
        server.kill()
    line = json.dumps(summary)
    if options.save:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{summary['date']}-soak.json").write_text(line + "\n")
    print(line)
    failed = [name for name, holds in summary["holds"].items() if not holds]
    if failed:
        sys.exit(f"does not hold: {', '.join(failed)}")


def soak(port: int, server: "subprocess.Popen[bytes]", minutes: float, rate: float | None) -> dict[str, Any]:
    wait_until_ready(port, server)
    if rate is None:
        found = loadtest(port, "--find-max", "--slo", SLO, "-d", "30")["find_max"]["rate"]
        if found is None:
            raise SystemExit("no rate holds the objectives")
        rate = SHARE * found
        print(f"the highest rate that holds {SLO}: {found:g} visits a second", flush=True)
    before = metrics(port)
    watch = Watch(port)
    watch.start()
    told = loadtest(port, "-r", f"{rate:g}", "-d", f"{60 * minutes:g}", "--slo", SLO, "--check", str(CHECKED))
    watch.end()
    after = metrics(port)
    memory = [round(value / 2**20) for value in watch.minutes(MEMORY)]
    left = {name: after[name] for name in HELD}
    growth = memory[-1] - memory[len(memory) // 5]
    print(
        f"{rate:g} visits a second for {minutes:g} minutes: {told['counts']['operations']} operations, {told['errors']}"
    )
    print(f"resident memory, MiB, by the minute: {memory}")
    print(f"left: {left}")
    return {
        "benchmark": "soak",
        "date": date.today().isoformat(),
        "machine": f"{processor()}, {os.cpu_count()} cores",
        "versions": {"torch": version("torch")},
        "rate": rate,
        "minutes": minutes,
        "resident_mib": {"before": round(before[MEMORY] / 2**20), "by_minute": memory},
        "left": left,
        "load": {
            name: told[name] for name in ("visits", "counts", "rates", "measures", "errors", "slo", "check", "busy")
        },
        "holds": {
            "no error": not told["errors"],
            "outputs as those of a client alone": not (told["check"]["different"] or told["check"]["failed"]),
            "nothing is left": not any(left.values()),
            "memory does not grow after the first minutes": growth <= 0.02 * memory[-1],
        },
    }


def wait_until_ready(port: int, server: "subprocess.Popen[bytes]") -> None:
    for _ in range(1200):
        if server.poll() is not None:
            raise SystemExit(f"the server ended with {server.returncode}")
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz").close()
            return
        except OSError:
            time.sleep(0.25)
    raise SystemExit("the server did not become ready in five minutes")


if __name__ == "__main__":
    main()
