"""One engine step of a decoder, against one pass of all its packed linears at the same number of rows.

Bound: a step must read every weight once; the packed linears alone, run one after another in the model's order, are
that read plus their arithmetic. What is above 1.0 is attention, norms, rotary, sampling, scheduling and Python.

    python -m benchmarks.engine_step [--sessions 1 4 16] [--context 256 2048] [--rounds 7]
"""

import argparse
import json
import statistics
from pathlib import Path

import numpy as np
import torch

from benchmarks.peers.compare import median_ms
from benchmarks.peers.ours import run
from engine.batch import Append, Sample, Want
from engine.config import EngineConfig
from engine.engine import Engine
from engine.layers import Linear
from engine.loading import LoadOptions, load_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default")
    parser.add_argument("--sessions", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--context", type=int, nargs="+", default=[256, 2048])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quantize", choices=["none", "int8"], default="none")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "keypast")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    loaded = load_model(
        "model", options.model, LoadOptions(options.cache, kv_memory=2 << 30, quantize=options.quantize), print
    )
    engine = Engine([loaded.runner], EngineConfig())
    assert isinstance(loaded.runner.model, torch.nn.Module)
    linears = [
        module for module in loaded.runner.model.modules() if isinstance(module, Linear) and module.packed is not None
    ]
    print(f"{'sessions':>8} {'context':>8} {'linears ms':>11} {'step ms':>8} {'ratio':>6}")
    cases = [(sessions, context) for context in options.context for sessions in options.sessions]
    results = [measure(engine, linears, sessions, context, options.rounds) for sessions, context in cases]
    report = {"benchmark": "engine_step", "threads": options.threads, "rounds": options.rounds, "results": results}
    print(json.dumps(report))


def measure(engine: Engine, linears: list[Linear], sessions: int, context: int, rounds: int) -> dict[str, float]:
    """Medians of interleaved rounds."""
    ids = [prefilled(engine, context) for _ in range(sessions)]
    pairs = [
        (median_ms(lambda: pass_linears(linears, sessions)), median_ms(lambda: step(engine, ids)))
        for _ in range(rounds)
    ]
    for session in ids:
        engine.delete_session(session)
    floor, whole = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(b / a for a, b in pairs)
    print(f"{sessions:8} {context:8} {floor:11.2f} {whole:8.2f} {ratio:6.2f}")
    return {"sessions": sessions, "context": context, "linears_ms": floor, "step_ms": whole, "ratio": ratio}


def prefilled(engine: Engine, context: int) -> str:
    session = engine.create_session("model").id
    tokens = np.random.default_rng(0).integers(0, 40000, (1, context))
    run(engine, [Append(session, {"token_ids": tokens})])
    return session


def step(engine: Engine, sessions: list[str]) -> None:
    """One greedy step of every session, in one batch."""
    appends = [
        Append(session, {"token_ids": np.array([[7]])}, step=True, want=Want(sample=Sample())) for session in sessions
    ]
    run(engine, appends)


@torch.inference_mode()
def pass_linears(linears: list[Linear], rows: int) -> None:
    inputs = {linear.in_features: torch.ones(rows, linear.in_features, dtype=torch.bfloat16) for linear in linears}
    for linear in linears:
        linear(inputs[linear.in_features])


if __name__ == "__main__":
    main()
