"""What the backend launches goes through Triton's compiler for an A100 and an H200, which needs neither of them: the
interpreter forgives what the compiler does not, and tells nothing of how memory is read."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent.parent
STEP = {"rotate_and_write", "decode", "merge_splits"}


SHARED = {"80": 99 << 10, "90": 227 << 10}  # bytes; the small GPUs, 86 and 89, run what an A100 does, in 99 KiB


def compiled(case: str, dtype: str, cache: Path) -> dict[str, dict[str, Any]]:
    """By architecture, what each kernel became."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)}
    command = [sys.executable, "-m", "tests.engine.compile_triton", case, dtype]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    made: dict[str, dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    assert set(made) == set(SHARED)
    for architecture, kernels in made.items():
        assert all(kernel["shared"] <= SHARED[architecture] for kernel in kernels.values()), kernels
    return made


@pytest.mark.slow
def test_a_step_reads_keys_and_values_by_16_bytes_ahead_of_their_use(tmp_path: Path) -> None:
    for kernels in compiled("steps", "float16", tmp_path).values():
        assert set(kernels) == STEP
        assert kernels["decode"]["async_16"] >= 16
        assert all(kernel["by_2"] == kernel["stack"] == 0 for kernel in kernels.values())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("case", ["prefill", "masked", "one_row", "wide"])
def test_every_kernel_compiles(case: str, dtype: str, tmp_path: Path) -> None:
    made = compiled(case, dtype, tmp_path)
    for kernels in made.values():
        assert set(kernels) == STEP | {"prefill", "probabilities", "rms_norm", "silu_gate"}
    if case == "prefill" and dtype != "float32":
        assert made["90"]["prefill"]["by_2"] == made["90"]["prefill"]["stack"] == 0


@pytest.mark.slow
def test_no_batch_has_a_kernel_compiled_for_it_alone() -> None:
    """Numbers of rows, widths of tables and numbers of splits that are 1, 16 or any other are the same to a kernel."""
    code = (
        "from engine.attention import triton_kernels as kernels;"
        "free = {name: {each.name for each in getattr(kernels, name).params if each.do_not_specialize}"
        "        for name in ('decode', 'merge_splits', 'prefill', 'probabilities')};"
        "assert free == {'decode': {'width'}, 'merge_splits': {'splits'}, 'prefill': {'rows', 'width'},"
        "                'probabilities': {'rows', 'width'}}, free"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "0"}, check=True)


def test_nothing_imports_triton_where_there_is_no_gpu() -> None:
    code = (
        "import sys; from pathlib import Path; import engine.loading, engine.team; from engine.attention import choose;"
        "choose('auto', 'cpu', Path.home() / '.cache' / 'keypast', print);"
        "assert 'torch' in sys.modules; assert 'triton' not in sys.modules, 'imported'"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
