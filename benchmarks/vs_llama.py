"""Ours against llama.cpp's server, both through HTTP, on the same weights, prompts and client, in turn.

Bound: decoding reads every weight once a step and every key and value of its sessions (at 37 GB/s here: 7.3 ms and
0.16 ms a session of 256 positions); prefill does 2 multiply-adds a weight and position (some 800 GFLOP/s in bfloat16).

    python -m benchmarks.vs_llama --llama-server PATH --weights DIR [--kinds BF16 F16 Q8_0 Q4_1] [--rounds 5] [--save]

DIR holds smollm2-F16.gguf, smollm2-BF16.gguf, smollm2-Q8_0.gguf (`make bench-peers` writes them); the model comes in
Q4_1. Against Q8_0 ours serves with `--quantize int8`, else in bfloat16.
"""

import argparse
import asyncio
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from benchmarks.peers.compare import HEADER, Pairs, interleave, report
from benchmarks.peers.servers import Keypast, Llama, Server, prompt
from engine.checkpoints.gguf import default_model

TOKENS = 64  # decoded by every stream
ALL = (  # (verb, sessions, context)
    ("decode", 1, 256),
    ("decode", 16, 256),
    ("decode", 1, 2048),
    ("decode", 4, 2048),
    ("decode", 16, 2048),
    ("prefill", 1, 512),
    ("prefill", 1, 2048),
)
FEW = (("decode", 1, 256), ("decode", 16, 256), ("prefill", 1, 512))
CASES = {"BF16": ALL, "F16": ALL[:3], "Q8_0": FEW, "Q4_1": FEW}
GOALS = {
    ("BF16", "decode", 1, 256): 1.0,
    ("F16", "decode", 1, 256): 1.1,
    ("BF16", "decode", 1, 2048): 1.5,
    ("F16", "decode", 1, 2048): 1.3,
    ("BF16", "decode", 16, 256): 1.8,
    ("F16", "decode", 16, 256): 2.2,
    ("BF16", "decode", 4, 2048): 2.2,
    ("BF16", "decode", 16, 2048): 2.2,
    ("BF16", "prefill", 1, 512): 1.8,
    ("BF16", "prefill", 1, 2048): 2.5,
    ("Q8_0", "decode", 1, 256): 1.3,
}

Act = Callable[[asyncio.Runner, Server, int, int], float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-server", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--kinds", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    told = subprocess.run([options.llama_server, "--version"], capture_output=True, text=True, check=True)
    version = (told.stdout + told.stderr).split()[1]
    results: list[Pairs] = []
    print(HEADER)
    with asyncio.Runner() as runner:
        for kind in options.kinds:
            with Keypast(quantize="int8" if kind == "Q8_0" else "none") as ours:
                runner.run(ours.ready("/readyz"))
                results += measure(runner, ours, kind, options)
    report("vs_llama", results, {"llama.cpp": version}, options.save)


def measure(runner: asyncio.Runner, ours: Server, kind: str, options: argparse.Namespace) -> Iterator[Pairs]:
    own = default_model(Path.home() / ".cache" / "keypast", lambda message: None)
    weights = own if kind == "Q4_1" else options.weights / f"smollm2-{kind}.gguf"
    for verb, sessions, length in CASES[kind]:
        with Llama(options.llama_server, weights, sessions, length + TOKENS + 8) as peer:
            runner.run(peer.ready("/health"))
            act = decode if verb == "decode" else prefill

            def side(server: Server, act: Act = act, sessions: int = sessions, length: int = length) -> float:
                return act(runner, server, sessions, length)

            what = f"{verb} {sessions} x {length}" + (", ours int8" if kind == "Q8_0" else "")
            pairs = Pairs(what, f"llama.cpp {kind}", "tok/s", goal=GOALS.get((kind, verb, sessions, length)))
            yield interleave(pairs, partial(side, ours), partial(side, peer), options.rounds)


def decode(runner: asyncio.Runner, server: Server, sessions: int, context: int) -> float:
    prompts = [prompt(seed, context) for seed in range(sessions)]
    return runner.run(server.streams(prompts, TOKENS))[0]


def prefill(runner: asyncio.Runner, server: Server, sessions: int, length: int) -> float:
    seconds = [runner.run(server.prefill(prompt(seed, length))) for seed in range(3)]
    return length / sorted(seconds)[1]


if __name__ == "__main__":
    main()
