"""Linears of 8-bit integers: a step against the bytes that it must read, and what the rounding does to logits.

Bound: a step reads every linear's weights once (and its sessions' keys and values), at the rate at which the machine
reads that much memory with the same threads, measured in the same rounds. Errors are against `transformers` in float32
on the same unrounded weights, over a fixed text; bfloat16's own stand beside them.

    python -m benchmarks.int8 [--sessions 1 4 16] [--context 256] [--rounds 7] [--threads N]
"""

import argparse
import json
import statistics
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.engine_step import prefilled, read, step, step_bytes
from benchmarks.peers.compare import median_ms
from engine.batch import Append, Want
from engine.checkpoints.gguf import convert, default_model
from engine.config import EngineConfig
from engine.engine import Engine
from engine.loading import LoadedModel, LoadOptions, load_model

KINDS = ("none", "int8")
TEXT = (
    "A transformer reads a sequence one position at a time and keeps, for each layer, the keys and values of what it "
    "has read. In 1905 Einstein published four papers; by 2024 they had been cited more than 100,000 times. List the "
    "first ten prime numbers, then explain what a prime number is to a child of seven."
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sessions", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "keypast")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    loaded = {
        kind: load_model("model", "default", LoadOptions(options.cache, kv_memory=1 << 30, quantize=kind), print)
        for kind in KINDS
    }
    engines = {kind: Engine([model.runner], EngineConfig()) for kind, model in loaded.items()}
    report = {
        "benchmark": "int8",
        "threads": options.threads,
        "rounds": options.rounds,
        "steps": [measure(engines, loaded, n, options.context, options.rounds) for n in options.sessions],
        "errors": errors(engines, loaded["int8"], options.cache),
    }
    print(json.dumps(report))


def measure(
    engines: dict[str, Engine], loaded: dict[str, LoadedModel], sessions: int, context: int, rounds: int
) -> dict[str, float]:
    """Medians of interleaved rounds, and int8's best."""
    size = step_bytes(loaded["int8"], sessions, context)
    memory = torch.ones(size // 8, dtype=torch.int64)  # zeros would be one page, mapped many times
    ids = {kind: [prefilled(engine, context) for _ in range(sessions)] for kind, engine in engines.items()}
    times: dict[str, list[float]] = {"read": [], "none": [], "int8": []}
    for _ in range(rounds):
        times["read"].append(median_ms(lambda: read(memory)))
        for kind, engine in engines.items():
            times[kind].append(median_ms(lambda: step(engine, ids[kind])))  # noqa: B023
    for kind, engine in engines.items():
        for session in ids[kind]:
            engine.delete_session(session)
    middle = {kind: statistics.median(values) for kind, values in times.items()}
    found = {
        "sessions": sessions,
        "context": context,
        "megabytes": size / 1e6,
        "read_ms": middle["read"],
        "none_ms": middle["none"],
        "int8_ms": middle["int8"],
        "int8_best_ms": min(times["int8"]),
        "over_read": statistics.median(b / a for a, b in zip(times["read"], times["int8"], strict=True)),
        "over_none": statistics.median(a / b for a, b in zip(times["none"], times["int8"], strict=True)),
    }
    print("  ".join(f"{name} {value:.2f}" for name, value in found.items()))
    return found


def errors(engines: dict[str, Engine], loaded: LoadedModel, cache: Path) -> dict[str, dict[str, float]]:
    """Of logits at every position of the text: largest and mean, and the share of positions with float32's argmax."""
    assert loaded.tokenizer is not None
    tokens = loaded.tokenizer.encode(TEXT)
    truth = reference(convert(default_model(cache, print), cache, print), tokens)
    spread = float(truth.max() - truth.min())
    found = {"float32": {"positions": float(len(tokens)), "spread": spread}}
    for kind, engine in engines.items():
        got = logits(engine, tokens)
        error = (got - truth).abs()
        same = (got.argmax(-1) == truth.argmax(-1)).float().mean()
        found[kind] = {"largest": float(error.max()), "mean": float(error.mean()), "same_argmax": float(same)}
        print(kind, found[kind])
    return found


def reference(directory: Path, tokens: list[int]) -> Tensor:
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # transformers' own deprecations
        from transformers import LlamaForCausalLM

        model = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
        found: Tensor = model(torch.tensor([tokens]), use_cache=False).logits[0]
    return found


def logits(engine: Engine, tokens: list[int]) -> Tensor:
    session = engine.create_session("model").id
    append = Append(session, {"token_ids": np.array([tokens])}, want=Want(logits="all"))
    engine.submit(append)
    while engine.run_once():
        pass
    engine.delete_session(session)
    return torch.from_numpy(append.future.result(0).outputs["logits"][0])


if __name__ == "__main__":
    main()
