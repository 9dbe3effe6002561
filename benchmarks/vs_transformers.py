"""Our engine against transformers' own ways to generate (see `peers/transformers_worker.py`), on the same bfloat16
weights, in turn.

Neither side goes through HTTP. The peer runs in a process of its own with torch's defaults and as many threads; with
--peer-huge-pages it is measured a second time in one whose tensors lie in pages of 2 MB, as ours do ("2M"). Bounds: as
in `vs_llama`.

    python -m benchmarks.vs_transformers [--rounds 5] [--peer-huge-pages] [--save]
"""

import argparse
from functools import partial
from importlib.metadata import version

import torch

from benchmarks.peers.compare import HEADER, Pairs, interleave, report
from benchmarks.peers.ours import OurEngine
from benchmarks.peers.transformers_worker import TransformersPeer

CONTEXT = 256
GOALS = {
    ("generate", 1): 3.5,
    ("generate", 16): 6,
    ("eager", 1): None,
    ("eager", 16): None,
    ("compiled", 1): 2.5,
    ("compiled", 16): 6,
    ("continuous", 16): None,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peer-huge-pages", action="store_true")
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    ours, threads = OurEngine(), torch.get_num_threads()
    results: list[Pairs] = []
    print(HEADER)
    for huge_pages in (False, True) if options.peer_huge_pages else (False,):
        with TransformersPeer(threads, huge_pages=huge_pages) as peer:
            for (way, sessions), goal in GOALS.items():
                peer.step_ms(way, sessions, CONTEXT)  # loads, and compiles
                name = f"transformers {way}{' 2M' * huge_pages}"
                pairs = Pairs(f"decode {sessions} x {CONTEXT}", name, "ms", "less", goal)
                sides = partial(ours.step_ms, sessions, CONTEXT), partial(peer.step_ms, way, sessions, CONTEXT)
                results.append(interleave(pairs, *sides, options.rounds))
    report("vs_transformers", results, {"transformers": version("transformers")}, options.save)


if __name__ == "__main__":
    main()
