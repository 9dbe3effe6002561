"""Everything that only a GPU can tell, in one command of a few minutes: right first, then fast.

    make gpu-check      or, where only torch, triton, numpy and safetensors are: python -m benchmarks.gpu_check

Right: the cases of the tests, run by the compiled kernels; bits that depend on no company; recorded steps against eager
ones. Fast: `gpu_attention` and `gpu_step`, with less where time is short. `--save` leaves the tables in
benchmarks/results. It ends with 0 only if everything was right; without a GPU it says so and ends with 1.

    TRITON_INTERPRET=1 python -m benchmarks.gpu_check --dry-run      without a GPU: less of everything, and no figures
"""

import argparse
import datetime
import os
import platform
import re
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import torch

from benchmarks import gpu_attention, gpu_step
from benchmarks.gpu_timing import DryRun, Gpu, NoGpu
from engine.attention.cuda import TritonBackend, Tuning
from engine.checkpoints.config import DecoderConfig
from engine.runner import ModelRunner
from tests.engine.attention_cases import Case, make
from tests.engine.triton_cases import BRAIN, CASES, HALF, SMALL, check, one_row

RESULTS = Path(__file__).parent / "results"
WORKERS = 8  # processes that check at once: most of their time is the compiler's
LLAMA = Case((0, 511, 512, 2000, 3000), (300, 1, 1, 2, 1), heads=32, kv_heads=8, head_dim=128, rotary_dim=128)
REAL = {
    "llama_float16": replace(LLAMA, dtype=HALF, cache_dtype=HALF),
    "llama_bfloat16": replace(LLAMA, dtype=BRAIN, cache_dtype=BRAIN),
    "llama_bfloat16_over_float16": replace(LLAMA, dtype=BRAIN, cache_dtype=HALF),
    "llama_masked": replace(LLAMA, dtype=HALF, cache_dtype=HALF, causal=False, biased=True, extras=2),
    "wide_head": replace(LLAMA, heads=8, kv_heads=4, head_dim=256, rotary_dim=256, dtype=HALF, cache_dtype=HALF),
}
TINY = replace(
    gpu_step.SMALL, vocab_size=90, hidden_size=32, layers=1, heads=2, kv_heads=1, head_dim=16, intermediate_size=48
)


@dataclass(frozen=True)
class Course:
    """What is run, the most telling first. `attention`: (context, batch). `company`: whose bits depend on none."""

    small: dict[str, Case]
    tuned: dict[str, Case]
    company: Case
    steps: DecoderConfig
    contexts: tuple[int, ...]
    attention: tuple[tuple[int, int], ...]
    models: dict[str, DecoderConfig]
    batches: tuple[int, ...] = (1, 64)
    context: int = 1024


WHOLE = Course(
    CASES,
    CASES | REAL,
    REAL["llama_float16"],
    replace(gpu_step.SMALL, layers=2, vocab_size=1000, max_length=2048),
    (1, 40, 2000),
    ((4096, 32), (4096, 1), (1024, 256), (32768, 8), (4096, 128), (1024, 1), (32768, 32)),
    dict(reversed(gpu_step.MODELS.items())),
)
DRY = Course(
    {"float16": CASES["float16"]},
    {"steps": CASES["steps"]},
    Case((0, 33), (5, 1), heads=4, dtype=HALF, cache_dtype=HALF, rotary_dim=16),
    replace(TINY, max_length=64),
    (1, 40),
    ((40, 2),),
    {"tiny": replace(TINY, max_length=64)},
    (1, 3),
    40,
)


def checks(course: Course, machine: Gpu) -> Iterator[tuple[str, Callable[[], None]]]:
    for name, case in course.small.items():
        yield name, lambda case=case: check(case, SMALL, machine.device)  # type: ignore[misc]
    for name, case in course.tuned.items():
        yield f"{name}, as tuned", lambda case=case: check(case, Tuning(), machine.device)  # type: ignore[misc]
    yield "a row's bits depend on no company", lambda: same_bits(course.company, machine)
    yield "recorded steps give what eager ones give", lambda: same_logits(course, machine)


def same_bits(case: Case, machine: Gpu) -> None:
    """Of a row alone and in a batch, steps and prefills."""
    w = make(case)
    backend = TritonBackend(SMALL if machine.device == "cpu" else Tuning())
    together = w.to(machine.device).attend(backend)
    starts = w.inputs.query_start.tolist()
    for row in range(len(case.past)):
        alone = one_row(w, row).to(machine.device).attend(backend)
        assert torch.equal(alone, together[starts[row] : starts[row + 1]]), f"row {row} differs"


def same_logits(course: Course, machine: Gpu) -> None:
    """Closely: a recording has more rows than the step, for which the products of matrices may take another way."""
    model = gpu_step.random_model(course.steps, machine.device)
    for batch in (*course.batches[:1], 3, 8):
        given = []
        for recorded in (False, True):
            runner = ModelRunner(model, TritonBackend(), 8 * 128 + 1, gpu_step.BLOCK)
            runner.zero(list(range(runner.blocks)))
            if recorded:
                runner.record_steps(machine.graphs(), 8, lambda text: None)
            plans = [gpu_step.step_plan(batch, context) for context in course.contexts]
            given.append([gpu_step.logits_of(runner, plan).to("cpu", torch.float64) for plan in plans])
        for eager, played in zip(*given, strict=True):
            assert eager.isfinite().all()
            torch.testing.assert_close(played, eager, rtol=2e-2, atol=2e-2)


def run_check(index: int) -> str:
    """A line of the table; a failed check's has what was raised. In a process of its own on a GPU."""
    return _told(*list(checks(WHOLE, Gpu()))[index])


@torch.inference_mode()
def _told(name: str, run: Callable[[], None]) -> str:
    try:
        run()
        return f"| {name} | right |"
    except Exception as error:  # one wrong kernel does not keep the others from being told of
        traceback.print_exc()
        return f"| {name} | **wrong**: {str(error).splitlines()[0] if str(error) else repr(error)} |"


def run_checks(course: Course, machine: Gpu) -> list[str]:
    """Lines of the table. On a GPU other processes run them, so that a kernel that ruins its context ruins no more."""
    names = [name for name, _ in checks(course, machine)]
    if machine.device == "cpu":
        lines = [_told(*each) for each in checks(course, machine)]
        print(*lines, sep="\n", flush=True)
        return lines
    workers = max(1, min(WORKERS, (os.cpu_count() or 1) // 2))
    lines = []
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        futures = [pool.submit(run_check, index) for index in range(len(names))]
        for name, future in zip(names, futures, strict=True):
            error = future.exception()
            lines.append(future.result() if error is None else f"| {name} | **wrong**: {error!r} |")
            print(lines[-1], flush=True)
    return lines


def run_benchmarks(course: Course, machine: Gpu, bandwidth: float, deadline: float) -> list[str]:
    """The tables' lines, the most telling cases first; what there was no time for is said."""
    lines = ["", "## Decode attention", "", gpu_attention.HEADER]
    left_out = 0
    print(gpu_attention.HEADER)
    for context, batch in course.attention:
        if time.monotonic() > deadline - 150 or not gpu_attention.fits(batch, context, machine):
            left_out += 1
            continue
        lines.append(gpu_attention.line(gpu_attention.measure(batch, context, bandwidth, machine)))
        machine.release()
        print(lines[-1], flush=True)
    lines += ["", "## Steps", "", gpu_step.HEADER]
    print(gpu_step.HEADER)
    for name, config in course.models.items():
        if time.monotonic() > deadline - 40:
            left_out += len(course.batches)
            continue
        model = gpu_step.random_model(config, machine.device)
        for batch in course.batches:
            result = gpu_step.measure(name, config, model, batch, course.context, bandwidth, machine)
            lines.append(gpu_step.line(result))
            print(lines[-1], flush=True)
        del model
        machine.release()
    return [*lines, "", f"Left out for time or room: {left_out}."]


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check")
    parser.add_argument("--only", choices=["right", "fast"], help="the checks alone, or the benchmarks alone")
    parser.add_argument("--minutes", type=float, default=8.0, help="benchmarks that would pass it are left out")
    parser.add_argument(
        "--save", type=Path, nargs="?", const=RESULTS, metavar="FOLDER",
        help=f"write the tables to gpu-DEVICE-DATE.md there, or in {RESULTS.name}",
    )  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="no GPU: walk the whole way in Triton's interpreter")
    return parser


def main(arguments: list[str] | None = None) -> int:
    given = parser().parse_args(arguments)
    deadline = time.monotonic() + given.minutes * 60
    try:
        machine, course = (DryRun(), DRY) if given.dry_run else (Gpu(), WHOLE)
    except NoGpu as reason:
        print(reason)
        return 1
    import triton

    day = datetime.datetime.now(tz=datetime.UTC).date()
    versions = f"torch {torch.__version__}, triton {triton.__version__}, {platform.machine()}"
    lines = [f"# {machine.name}", "", f"{day}, {versions}"]
    if given.only != "fast":
        lines += ["", "## Right", "", "| case | |", "|---|---|", *run_checks(course, machine)]
    if given.only != "right":
        bandwidth = machine.copy_bandwidth()
        lines += ["", f"A copy within the device reaches {bandwidth / 1e12:.2f} TB/s, read and written together."]
        print(lines[-1])
        with torch.inference_mode():
            lines += run_benchmarks(course, machine, bandwidth, deadline)
    if given.save is not None:
        given.save.mkdir(exist_ok=True)
        path = given.save / f"gpu-{re.sub(r'[^a-z0-9]+', '-', machine.name.lower())}-{day}.md"
        path.write_text("\n".join(lines) + "\n")
        print(f"written: {path}")
    return 1 if any("**wrong**" in each for each in lines) else 0


if __name__ == "__main__":
    raise SystemExit(main())
