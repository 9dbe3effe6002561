"""How cost grows, over HTTP, ours beside llama.cpp's server on the same BF16 weights, in turn; three plots.

    context     ms a step of one session, over the length of its past
    sessions    ms a step of all sessions together, each on a past of 256
    history     ms to the first token of the next turn, 16 tokens, over the length of the conversation: a held session;
                ours without it, all prefilled again; llama.cpp, the conversation in its prompt cache

Bounds: a step reads all weights once and every past; a turn, the prefill of its own 16 tokens.

    python -m benchmarks.growth --llama-server PATH --weights DIR [--rounds 3] [--points N] [--plot FILE] [--save]

`--points` takes so many of each plot's points, for a look. `--plot` draws into FILE (.svg or .png); `--save` leaves
benchmarks/results/DATE-growth.json and docs/pictures/growth.svg. Drawing needs matplotlib.
"""

import argparse
import asyncio
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.peers.compare import HEADER, Pairs, interleave, report
from benchmarks.peers.servers import Keypast, Llama, Server, prompt
from benchmarks.sessions import turns
from keypast.loadtest.png import COLOURS

TOKENS = 32
CONTEXTS = (16, 1000, 2000, 4000, 6000, 8000)
SESSIONS = (1, 4, 8, 16, 32, 64)
HISTORY = (250, 500, 1000, 2000, 4000, 8000)
PICTURE = Path(__file__).parent.parent / "docs" / "pictures" / "growth.svg"
OURS, LLAMA, AGAIN = "keypast", "llama.cpp", "prefilled again"

Curve = dict[int, list[float]]  # by what grows: ms in every round
Curves = dict[str, Curve]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-server", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--points", type=int)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    print(HEADER)
    with asyncio.Runner() as runner, Keypast() as ours:
        runner.run(ours.ready("/readyz"))
        context = {at: [step(runner, ours, 1, at, options)] for at in CONTEXTS[: options.points]}
        sessions = {at: [step(runner, ours, at, 256, options)] for at in SESSIONS[: options.points]}
        history = {at: turns(runner, ours, at, options) for at in HISTORY[: options.points]}
    panels = {
        "ms a step, over the length of the past": curves(context, [LLAMA]),
        "ms a step, over the number of sessions": curves(sessions, [LLAMA]),
        "ms to a turn's first token, over the history": curves(history, [AGAIN, LLAMA]),
    }
    for path in [options.plot] * (options.plot is not None) + [PICTURE] * options.save:
        draw(panels, path)
    results = [pairs for measured in (context, sessions, history) for point in measured.values() for pairs in point]
    report("growth", results, {}, options.save)


def step(runner: asyncio.Runner, ours: Server, sessions: int, context: int, options: argparse.Namespace) -> Pairs:
    prompts = [prompt(seed, context) for seed in range(sessions)]
    with Llama(options.llama_server, options.weights / "smollm2-BF16.gguf", sessions, context + TOKENS + 8) as peer:
        runner.run(peer.ready("/health"))

        def ms(server: Server) -> float:
            return sessions / runner.run(server.streams(prompts, TOKENS))[0] * 1e3

        pairs = Pairs(f"a step, {sessions} x {context}", peer.name, "ms", "less")
        return interleave(pairs, partial(ms, ours), partial(ms, peer), options.rounds)


def curves(measured: dict[int, list[Pairs]], peers: Sequence[str]) -> Curves:
    """Of ours, and of the peers in the order in which every point has them."""
    ours = {at: [ms for pairs in point for ms in pairs.ours] for at, point in measured.items()}
    return {OURS: ours} | {
        name: {at: point[index].theirs for at, point in measured.items()} for index, name in enumerate(peers)
    }


def draw(panels: dict[str, Curves], path: Path) -> None:
    """Medians as lines, from the least to the most of the rounds as bands."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    matplotlib.rcParams["svg.hashsalt"] = "keypast"  # the same numbers give the same file
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08, wspace=0.05)
    figure = Figure(figsize=(13, 3.9), dpi=120, layout=layout, facecolor="white")
    FigureCanvasAgg(figure)
    for (title, panel), axes in zip(panels.items(), figure.subplots(1, len(panels)), strict=True):
        axes.set_title(title, loc="left", fontsize=10.5, fontweight="bold")
        _lines(panel, axes, log=AGAIN in panel)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _lines(panel: Curves, axes: Any, *, log: bool) -> None:
    """A line's name is at its end, in its colour."""
    colours = dict(zip((OURS, LLAMA, AGAIN), COLOURS, strict=False))
    for name, curve in panel.items():
        x, rounds = list(curve), list(curve.values())
        middle = [statistics.median(each) for each in rounds]
        axes.plot(x, middle, "o-", color=colours[name], linewidth=1.8, markersize=3.5)
        axes.fill_between(x, *_each(rounds, min, max), color=colours[name], alpha=0.15, linewidth=0)
        axes.annotate(
            name,
            (x[-1], middle[-1]),
            (6, 0),
            textcoords="offset points",
            color=colours[name],
            fontsize=9,
            va="center",
            annotation_clip=False,
        )
    if log:
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:,.0f}")
    else:
        axes.set_ylim(bottom=0)
    ticks = list(panel[OURS])
    axes.set_xticks(ticks, [str(at) if at < 1000 else f"{at // 1000}k" for at in ticks])
    axes.minorticks_off()
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(left=False, labelsize=9)


def _each(rounds: list[list[float]], *of: Callable[[list[float]], float]) -> list[list[float]]:
    return [[one(each) for each in rounds] for one in of]


if __name__ == "__main__":
    main()
