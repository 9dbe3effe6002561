"""What the backend launches goes through Triton's compiler for an H200, which needs none: the interpreter forgives what
the compiler does not, and tells nothing of how memory is read."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent.parent
STEP = {"rotate_and_write", "decode", "merge_splits"}


def compiled(case: str, dtype: str, cache: Path) -> dict[str, Any]:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)}
    command = [sys.executable, "-m", "tests.engine.compile_triton", case, dtype]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    kernels: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return kernels


@pytest.mark.slow
def test_a_step_reads_keys_and_values_by_16_bytes_ahead_of_their_use(tmp_path: Path) -> None:
    kernels = compiled("steps", "float16", tmp_path)
    assert set(kernels) == STEP
    assert kernels["decode"]["async_16"] >= 16
    assert all(kernel["by_2"] == kernel["stack"] == 0 for kernel in kernels.values())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("case", ["prefill", "masked", "one_row"])
def test_every_kernel_compiles(case: str, dtype: str, tmp_path: Path) -> None:
    kernels = compiled(case, dtype, tmp_path)
    assert set(kernels) == STEP | {"prefill", "probabilities", "rms_norm", "silu_gate"}
    if case == "prefill" and dtype != "float32":
        assert kernels["prefill"]["by_2"] == kernels["prefill"]["stack"] == 0
    assert all(kernel["shared"] <= 227 << 10 for kernel in kernels.values())


def test_nothing_imports_triton_where_there_is_no_gpu() -> None:
    code = (
        "import sys; from pathlib import Path; import engine.loading, engine.team; from engine.attention import choose;"
        "choose('auto', 'cpu', Path.home() / '.cache' / 'keypast', print);"
        "assert 'torch' in sys.modules; assert 'triton' not in sys.modules, 'imported'"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
