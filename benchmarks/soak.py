"""Minutes under load: does anything fail, leak or drift?

`keypast loadtest` first looks for the highest rate of the mixed scenario that holds the objectives, by trials of two
minutes (40 seconds did not show a queue that grows); then it sends 0.8 of it for ten minutes, against the service in a
process of its own. Memory is read every second; at the end the sessions are gone, `Engine.check()` passes in the server
after its drain, and it exits with 0.

Bounds: no error, no session and no block left, memory that does not grow with time. The pools' own memory is touched as
blocks are used for the first time, so what is looked at is the rest, which keeps what its busiest moment took.

    python -m benchmarks.soak [--minutes 10] [--rate VISITS_A_SECOND] [--save]
"""

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from functools import partial
from pathlib import Path
from typing import Any

import service.__main__ as service_main
from benchmarks.peers.compare import conclude
from benchmarks.peers.http import metrics
from benchmarks.peers.servers import ROOT, free_port
from service.lifecycle import Loaded, Progress
from service.settings import Settings, read_settings

SHARE = 0.8  # of the highest rate that holds
SLO = "ttft.p95=500ms,inter_token.p95=100ms"  # and no error
CHECKED = 10  # visits of each worker that are done again at the end
MODELS = "smollm=default layer=attention:hidden=512,heads=8"
POOL = 256 << 20  # bytes: no other mapping is that large
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


def resident_mib(process: int) -> tuple[float, float]:
    """Of the pools, and of all the rest."""
    pools = rest = 0
    large = False
    for line in Path(f"/proc/{process}/smaps").read_text().splitlines():
        if mapping := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            large = int(mapping[2], 16) - int(mapping[1], 16) >= POOL
        elif line.startswith("Rss:"):
            size = int(line.split()[1])
            pools, rest = (pools + size, rest) if large else (pools, rest + size)
    return pools / 1024, rest / 1024


class Watch(threading.Thread):
    """Reads a process's memory every second until it is told to end."""

    def __init__(self, process: int) -> None:
        super().__init__(daemon=True)
        self._process = process
        self._seen: list[tuple[float, float]] = []
        self._over = threading.Event()

    def run(self) -> None:
        while not self._over.wait(1.0):
            self._seen.append(resident_mib(self._process))

    def minutes(self) -> tuple[list[int], list[int]]:
        """Ends it. MiB of the pools and of the rest: the median in each minute."""
        self._over.set()
        self.join()
        whole = [self._seen[at : at + 60] for at in range(0, len(self._seen), 60)]
        medians = [[round(statistics.median(kind)) for kind in zip(*minute, strict=True)] for minute in whole]
        return [pools for pools, _ in medians], [rest for _, rest in medians]


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
    conclude("soak", {}, summary, options.save)
    failed = [name for name, holds in summary["holds"].items() if not holds]
    if failed:
        sys.exit(f"does not hold: {', '.join(failed)}")


def soak(port: int, server: "subprocess.Popen[bytes]", minutes: float, rate: float | None) -> dict[str, Any]:
    wait_until_ready(port, server)
    if rate is None:
        found = loadtest(port, "--find-max", "-r", "4", "--slo", SLO, "-d", "120")["find_max"]["rate"]
        if found is None:
            raise SystemExit("no rate holds the objectives")
        rate = SHARE * found
        print(f"the highest rate that holds {SLO}: {found:g} visits a second", flush=True)
    before = resident_mib(server.pid)
    watch = Watch(server.pid)
    watch.start()
    told = loadtest(port, "-r", f"{rate:g}", "-d", f"{60 * minutes:g}", "--slo", SLO, "--check", str(CHECKED))
    pools, rest = watch.minutes()
    left = {name: value for name, value in metrics(port).items() if name in HELD}
    growth = rest[-1] - rest[len(rest) // 2]
    print(
        f"{rate:g} visits a second for {minutes:g} minutes: {told['counts']['operations']} operations, {told['errors']}"
    )
    print(f"resident, MiB, by the minute: pools {pools}, all else {rest}")
    print(f"left: {left}")
    return {
        "rate": rate,
        "minutes": minutes,
        "resident_mib": {"before": list(map(round, before)), "pools": pools, "rest": rest},
        "left": left,
        "load": {
            name: told[name] for name in ("visits", "counts", "rates", "measures", "errors", "slo", "check", "busy")
        },
        "holds": {
            "no error": not told["errors"],
            "it keeps up": told["visits"]["ended"] >= 0.95 * told["visits"]["begun"],
            "outputs as those of a client alone": not (told["check"]["different"] or told["check"]["failed"]),
            "nothing is left": len(left) == len(HELD) and not any(left.values()),
            "memory does not grow in the second half": growth <= 0.02 * rest[-1],
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
