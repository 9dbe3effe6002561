"""Our engine against OpenVINO GenAI, both in process, on the same weights in bfloat16, in turn.

OpenVINO has no server of its own here, so neither side goes through HTTP. Its pipelines run in a process of their own
that is idle while ours works. Bounds: as in `vs_llama`.

    python -m benchmarks.vs_openvino --python PATH --model DIR [--rounds 5] [--save]

PATH is an interpreter with openvino-genai, DIR what optimum-cli exported (`make bench-peers` makes both).
"""

import argparse
import os
from functools import partial
from pathlib import Path

from benchmarks.peers.compare import HEADER, Pairs, interleave, report
from benchmarks.peers.ours import OurEngine
from benchmarks.peers.worker import Worker

WORKER = Path(__file__).parent / "peers" / "openvino_worker.py"
DECODE = {(1, 256): None, (16, 256): 1.3, (4, 2048): None}  # (sessions, context): goal
PREFILL = {512: 1.0, 2048: 1.0}


class OpenVINO(Worker):
    def __init__(self, python: Path, model: Path) -> None:
        super().__init__([str(python), str(WORKER), str(model), str(os.cpu_count())])
        self.version = str(self.read()["version"])

    def step_ms(self, sessions: int, context: int) -> float:
        return float(self.ask({"sessions": sessions, "context": context})["step_ms"])

    def prefill(self, length: int) -> float:
        return float(self.ask({"prefill": length})["tok_s"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    ours = OurEngine()
    results: list[Pairs] = []
    print(HEADER)
    with OpenVINO(options.python, options.model) as peer:
        for (sessions, context), goal in DECODE.items():
            pairs = Pairs(f"decode {sessions} x {context}", "OpenVINO GenAI batch", "ms", "less", goal)
            sides = partial(ours.step_ms, sessions, context), partial(peer.step_ms, sessions, context)
            results.append(interleave(pairs, *sides, options.rounds))
        for length, goal in PREFILL.items():
            pairs = Pairs(f"prefill {length}", "OpenVINO GenAI", "tok/s", "more", goal)
            sides = partial(ours.prefill, length), partial(peer.prefill, length)
            results.append(interleave(pairs, *sides, options.rounds))
        report("vs_openvino", results, {"openvino-genai": peer.version}, options.save)


if __name__ == "__main__":
    main()
