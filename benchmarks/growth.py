"""How the cost of a step grows with the context and with the number of sessions, ours beside llama.cpp's; two plots.

Both through HTTP, streams of their own generation, BF16 weights, in turn. A point is the median of the rounds.

    python -m benchmarks.growth --llama-server PATH --weights DIR [--rounds 3] [--save]

`--save` leaves benchmarks/results/DATE-growth.json and docs/growth.svg (needs matplotlib).
"""

import argparse
import asyncio
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peers.compare import Pairs, report
from benchmarks.peers.servers import Keypast, Llama, Server, prompt

TOKENS = 32
CONTEXTS = (16, 256, 1024, 2048, 4096, 8000)  # one session
SESSIONS = (1, 2, 4, 8, 16, 32, 64)  # at context 256
PLOT = Path(__file__).parent.parent / "docs" / "growth.svg"


@dataclass
class Point:
    sessions: int
    context: int
    ours_ms: float
    theirs_ms: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-server", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    print(f"{'sessions':>8} {'context':>8} {'ours ms':>9} {'llama.cpp ms':>13}")
    cases = [(1, context) for context in CONTEXTS] + [(sessions, 256) for sessions in SESSIONS[1:]]
    with asyncio.Runner() as runner, Keypast() as ours:
        runner.run(ours.ready("/readyz"))
        points = [measure(runner, ours, sessions, context, options) for sessions, context in cases]
    results = [
        Pairs(f"{p.sessions} x {p.context}", "llama.cpp BF16", "ms", "less", None, [p.ours_ms], [p.theirs_ms])
        for p in points
    ]
    if options.save:
        plot(points)
    report("growth", results, {}, options.save)


def measure(runner: asyncio.Runner, ours: Server, sessions: int, context: int, options: argparse.Namespace) -> Point:
    prompts = [prompt(seed, context) for seed in range(sessions)]
    weights = options.weights / "smollm2-BF16.gguf"
    with Llama(options.llama_server, weights, sessions, context + TOKENS + 8) as peer:
        runner.run(peer.ready("/health"))
        times: tuple[list[float], list[float]] = [], []
        for _ in range(options.rounds):
            for server, own in zip((ours, peer), times, strict=True):
                own.append(sessions / runner.run(server.streams(prompts, TOKENS))[0] * 1e3)
    point = Point(sessions, context, *map(statistics.median, times))
    print(f"{sessions:8} {context:8} {point.ours_ms:9.2f} {point.theirs_ms:13.2f}", flush=True)
    return point


def plot(points: Sequence[Point]) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4))
    by_context = sorted((p.context, p.ours_ms, p.theirs_ms) for p in points if p.sessions == 1)
    by_sessions = sorted((p.sessions, p.ours_ms, p.theirs_ms) for p in points if p.context == 256)
    for axes, rows, what in (
        (left, by_context, "context of one session (positions)"),
        (right, by_sessions, "sessions at context 256"),
    ):
        x, ours, theirs = zip(*rows, strict=True)
        axes.plot(x, ours, "o-", label="keypast")
        axes.plot(x, theirs, "s--", label="llama.cpp BF16")
        axes.set_xlabel(what)
        axes.set_ylabel("ms a step")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.tight_layout()
    figure.savefig(PLOT)
    print(f"plotted {len(points)} points into {PLOT}")


if __name__ == "__main__":
    main()
