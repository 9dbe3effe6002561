"""Our engine against OpenVINO GenAI, both in process, on the same weights in bfloat16, in turn.

OpenVINO has no server of its own here, so neither side goes through HTTP. Its pipelines run in a process of their own
that is idle while ours works. Bounds: as in `vs_llama`.

    python -m benchmarks.vs_openvino --python PATH --model DIR [--rounds 5] [--save]

PATH is an interpreter with openvino-genai, DIR what optimum-cli exported (`make bench-peers` makes both).
"""

import argparse
import json
import os
import subprocess
from functools import partial
from pathlib import Path
from typing import Any, Self

from benchmarks.peers.compare import HEADER, Pairs, interleave, report
from benchmarks.peers.ours import OurEngine

WORKER = Path(__file__).parent / "peers" / "openvino_worker.py"
DECODE = {(1, 256): None, (16, 256): 1.3, (4, 2048): None}  # (sessions, context): goal
PREFILL = {512: 1.0, 2048: 1.0}


class OpenVINO:
    def __init__(self, python: Path, model: Path) -> None:
        command = [str(python), str(WORKER), str(model), str(os.cpu_count())]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.version = str(self._read()["version"])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._process.kill()
        self._process.wait()

    def step_ms(self, sessions: int, context: int) -> float:
        return float(self._ask({"sessions": sessions, "context": context})["step_ms"])

    def prefill(self, length: int) -> float:
        return float(self._ask({"prefill": length})["tok_s"])

    def _ask(self, request: dict[str, int]) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                reply: dict[str, Any] = json.loads(line)
                return reply
        raise SystemExit("OpenVINO's process ended")


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
