"""One engine step of a decoder, against a plain read of all that it must read: its linears' weights and its sessions'
keys and values, with the same threads. What is above 1.0 is arithmetic that a read does not hide, norms, rotary,
sampling, scheduling and Python. Beside it one pass of all the packed linears alone, at the same number of rows.

    python -m benchmarks.engine_step [--sessions 1 4 16] [--context 256 2048] [--rounds 7] [--quantize int8]
"""

import argparse
import json
import statistics
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.peers.compare import median_ms
from benchmarks.peers.ours import run
from engine.batch import Append, Sample, Want
from engine.config import EngineConfig
from engine.engine import Engine
from engine.layers import Linear
from engine.loading import LoadedModel, LoadOptions, load_model


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
    print(f"{'sessions':>8} {'context':>8} {'read ms':>8} {'linears ms':>11} {'step ms':>8} {'step / read':>11}")
    cases = [(sessions, context) for context in options.context for sessions in options.sessions]
    results = [measure(engine, loaded, sessions, context, options.rounds) for sessions, context in cases]
    report = {"benchmark": "engine_step", "threads": options.threads, "rounds": options.rounds, "results": results}
    print(json.dumps(report))


def measure(engine: Engine, loaded: LoadedModel, sessions: int, context: int, rounds: int) -> dict[str, float]:
    """Medians of interleaved rounds."""
    ids = [prefilled(engine, context) for _ in range(sessions)]
    linears = packed_linears(loaded)
    # Zeros would be one page, mapped many times.
    memory = torch.ones(step_bytes(loaded, sessions, context) // 8, dtype=torch.int64)
    rows = [
        (
            median_ms(lambda: read(memory)),
            median_ms(lambda: pass_linears(linears, sessions)),
            median_ms(lambda: step(engine, ids)),
        )
        for _ in range(rounds)
    ]
    for session in ids:
        engine.delete_session(session)
    floor, products, whole = (statistics.median(column) for column in zip(*rows, strict=True))
    ratio = statistics.median(row[2] / row[0] for row in rows)
    print(f"{sessions:8} {context:8} {floor:8.2f} {products:11.2f} {whole:8.2f} {ratio:11.2f}")
    names = ("sessions", "context", "read_ms", "linears_ms", "step_ms", "ratio")
    return dict(zip(names, (sessions, context, floor, products, whole, ratio), strict=True))


def packed_linears(loaded: LoadedModel) -> list[Linear]:
    assert isinstance(loaded.runner.model, torch.nn.Module)
    linears = [module for module in loaded.runner.model.modules() if isinstance(module, Linear)]
    return [linear for linear in linears if linear.packed is not None]


def step_bytes(loaded: LoadedModel, sessions: int, context: int) -> int:
    """What a step must read."""
    weights = sum(linear.packed.nbytes for linear in packed_linears(loaded) if linear.packed is not None)
    return weights + sessions * context * loaded.runner.spec.kv.position_bytes


def read(memory: Tensor) -> None:
    memory.sum()


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
