"""Everything that only a GPU can tell, in one command of a few minutes: right first, then fast.

    make gpu-check      or, where only torch, triton, numpy and safetensors are: python -m benchmarks.gpu_check

Right: the cases of the tests, run by the compiled kernels; bits that depend on no company; recorded steps against eager
ones. Fast: `gpu_attention` and `gpu_step`, with less where time is short. `--save` leaves the tables in
benchmarks/results. It ends with 0 only if everything was right; without a GPU it says so and ends with 1.
"""

import argparse
import datetime
import platform
import re
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import gpu_attention, gpu_step
from benchmarks.gpu_timing import NoGpu, copy_bandwidth, device_name
from engine.attention.cuda import TritonBackend, Tuning
from engine.graphs import CudaGraphs
from engine.runner import ModelRunner
from tests.engine.attention_cases import Case, make
from tests.engine.triton_cases import BRAIN, CASES, HALF, SMALL, check, one_row

RESULTS = Path(__file__).parent / "results"
LLAMA = Case((0, 511, 512, 2000, 1), (300, 1, 1, 2, 700), heads=32, kv_heads=8, head_dim=128, rotary_dim=128)
REAL = {
    "llama_float16": replace(LLAMA, dtype=HALF, cache_dtype=HALF),
    "llama_bfloat16": replace(LLAMA, dtype=BRAIN, cache_dtype=BRAIN),
    "llama_bfloat16_over_float16": replace(LLAMA, dtype=BRAIN, cache_dtype=HALF),
    "llama_masked": replace(LLAMA, dtype=HALF, cache_dtype=HALF, causal=False, biased=True, extras=2),
}


def checks() -> Iterator[tuple[str, Callable[[], None]]]:
    for name, case in CASES.items():
        yield name, lambda case=case: check(case, SMALL, "cuda")  # type: ignore[misc]
    for name, case in (CASES | REAL).items():
        yield f"{name}, as tuned", lambda case=case: check(case, Tuning(), "cuda")  # type: ignore[misc]
    yield "a row's bits depend on no company", same_bits
    yield "recorded steps give what eager ones give", same_tokens


def same_bits() -> None:
    """Of a row alone and in a batch, steps and prefills; and of a step and the same position in a prefill."""
    w = make(replace(REAL["llama_float16"], past=(0, 511, 512, 2000, 3000), new=(300, 1, 1, 2, 1)))
    backend = TritonBackend()
    together = w.to("cuda").attend(backend)
    starts = w.inputs.query_start.tolist()
    for row in range(5):
        alone = one_row(w, row).to("cuda").attend(backend)
        assert torch.equal(alone, together[starts[row] : starts[row + 1]]), f"row {row} differs"


def same_tokens() -> None:
    config = replace(gpu_step.SMALL, layers=2, vocab_size=1000, max_length=2048)
    model = gpu_step.random_model(config, "cuda")
    for batch in (1, 3, 8):
        tokens = []
        for recorded in (False, True):
            runner = ModelRunner(model, TritonBackend(), 8 * 128 + 1, gpu_step.BLOCK)
            runner.zero(list(range(runner.blocks)))
            if recorded:
                runner.record_steps(CudaGraphs(), 8, lambda text: None)
            plans = [gpu_step.step_plan(batch, context) for context in (1, 40, 2000)]
            tokens.append([gpu_step.next_tokens(runner, plan) for plan in plans])
        assert tokens[0] == tokens[1], f"batch {batch}: {tokens}"


def run_checks() -> list[str]:
    """Lines of the table; a failed check's line has what was raised."""
    lines = []
    for name, run in checks():
        try:
            with torch.inference_mode():
                run()
            lines.append(f"| {name} | right |")
        except Exception as error:  # one wrong kernel does not keep the others from being told of
            traceback.print_exc()
            lines.append(f"| {name} | **wrong**: {str(error).splitlines()[0] if str(error) else repr(error)} |")
        print(lines[-1], flush=True)
    return lines


def run_benchmarks(bandwidth: float, deadline: float) -> list[str]:
    """The tables' lines, the most telling cases first; what there was no time for is said."""
    lines = ["", "## Decode attention", "", gpu_attention.HEADER]
    left_out = 0
    print(gpu_attention.HEADER)
    for context, batch in [(4096, 32), (4096, 1), (1024, 256), (32768, 8), (4096, 128), (1024, 1), (32768, 32)]:
        if time.monotonic() > deadline - 150 or not gpu_attention.fits(batch, context):
            left_out += 1
            continue
        lines.append(gpu_attention.line(gpu_attention.measure(batch, context, bandwidth)))
        torch.cuda.empty_cache()
        print(lines[-1], flush=True)
    lines += ["", "## Steps", "", gpu_step.HEADER]
    print(gpu_step.HEADER)
    for name, config in reversed(gpu_step.MODELS.items()):
        if time.monotonic() > deadline - 40:
            left_out += 2
            continue
        model = gpu_step.random_model(config, "cuda")
        for batch in (1, 64):
            lines.append(gpu_step.line(gpu_step.measure(name, model, batch, 1024, bandwidth)))
            print(lines[-1], flush=True)
        del model
        torch.cuda.empty_cache()
    return [*lines, "", f"Left out for time or room: {left_out}."]


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check")
    parser.add_argument("--only", choices=["right", "fast"], help="the checks alone, or the benchmarks alone")
    parser.add_argument("--minutes", type=float, default=8.0, help="benchmarks that would pass it are left out")
    parser.add_argument("--save", action="store_true", help=f"write the tables to {RESULTS.name}/gpu-DEVICE-DATE.md")
    return parser


def main(arguments: list[str] | None = None) -> int:
    given = parser().parse_args(arguments)
    deadline = time.monotonic() + given.minutes * 60
    try:
        name = device_name()
    except NoGpu as reason:
        print(reason)
        return 1
    import triton

    day = datetime.datetime.now(tz=datetime.UTC).date()
    lines = [f"# {name}", "", f"{day}, torch {torch.__version__}, triton {triton.__version__}, {platform.machine()}"]
    if given.only != "fast":
        lines += ["", "## Right", "", "| case | |", "|---|---|", *run_checks()]
    if given.only != "right":
        bandwidth = copy_bandwidth()
        lines += ["", f"A copy within the device reaches {bandwidth / 1e12:.2f} TB/s, read and written together."]
        print(lines[-1])
        with torch.inference_mode():
            lines += run_benchmarks(bandwidth, deadline)
    if given.save:
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"gpu-{re.sub(r'[^a-z0-9]+', '-', name.lower())}-{day}.md"
        path.write_text("\n".join(lines) + "\n")
        print(f"written: {path}")
    return 1 if any("**wrong**" in each for each in lines) else 0


if __name__ == "__main__":
    raise SystemExit(main())
