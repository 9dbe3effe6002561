"""`make gpu-check` where there is no GPU: it says so, and what it would measure is put together rightly."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_attention, gpu_check, gpu_step
from benchmarks.gpu_timing import DryRun
from engine.attention.cuda import TritonBackend
from engine.attention.sdpa import SdpaBackend
from engine.runner import ModelRunner
from tests.engine.attention_cases import Case
from tests.engine.fake_device import FakeDevice
from tests.engine.triton_cases import SMALL

ROOT = Path(__file__).parent.parent
ABSENT = "fastapi pydantic uvicorn httpx anyio typer rich tokenizers gguf jinja2 transformers pytest hypothesis"


@pytest.mark.parametrize("main", [gpu_check.main, gpu_attention.main, gpu_step.main])
def test_without_a_gpu_it_says_so_and_fails(
    main: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str]
) -> None:
    """On a machine with one, the tests' interpreter is in the way, and that is said."""
    assert main([]) == 1
    told = capsys.readouterr().out
    assert told.startswith("there is no GPU here that torch can use") or "TRITON_INTERPRET is set" in told
    assert len(told.splitlines()) == 1


def without_others(arguments: list[str]) -> "subprocess.CompletedProcess[str]":
    """The check where what is not torch, triton, numpy, safetensors, nor torch's own, is refused."""
    code = (
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.partition('.')[0] in {ABSENT.split()!r}: raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "from benchmarks.gpu_check import main\n"
        f"sys.exit(main({arguments!r}))"
    )
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)


def test_it_needs_nothing_but_torch_triton_numpy_and_safetensors() -> None:
    done = without_others([])
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.slow
def test_a_dry_run_walks_the_whole_way(tmp_path: Path) -> None:
    """Checks, both benchmarks and the table that they leave."""
    done = without_others(["--dry-run", "--save", str(tmp_path)])
    assert done.returncode == 0, done.stdout + done.stderr
    (written,) = tmp_path.glob("gpu-dry-run-no-gpu-*.md")
    table = written.read_text()
    assert table.count("| right |") == 4
    assert "**wrong**" not in table
    assert "| 2 | 40 |" in table  # of attention, and the peers that are there
    assert "ModuleNotFoundError: No module named 'flashinfer'" in table
    assert "| tiny | 1 | 40 |" in table
    assert "| tiny | 3 | 40 |" in table
    assert "Left out for time or room: 0." in table


@pytest.mark.slow
def test_a_check_that_fails_is_told_of_and_the_others_run(capsys: pytest.CaptureFixture[str]) -> None:
    broken = replace(gpu_check.DRY, small={"broken": Case((1,), (1,), heads=3, kv_heads=2)})
    lines = gpu_check.run_checks(broken, DryRun())
    assert lines[0].startswith("| broken | **wrong**: ")
    assert sum(line.endswith("| right |") for line in lines) == 3
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--batch", "many"], ["--context"], ["--models", "70b"], ["--only", "half"]])
def test_arguments_that_mean_nothing_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for module in (gpu_check, gpu_attention, gpu_step):
        with pytest.raises(SystemExit):
            module.parser().parse_args(arguments)
    assert "usage: python -m benchmarks.gpu_" in capsys.readouterr().err


def test_the_attention_that_is_timed_is_attention() -> None:
    case = gpu_attention.Decode(1, 20, DryRun())
    assert case.bytes == 2 * 20 * 8 * 128 * 2
    expected = case.attend(SdpaBackend(), 0).float()
    torch.testing.assert_close(case.attend(TritonBackend(SMALL), 0).float(), expected, rtol=4e-3, atol=4e-3)


@torch.inference_mode()
def test_the_step_that_is_timed_is_a_step() -> None:
    config = replace(
        gpu_step.SMALL, vocab_size=50, hidden_size=32, layers=1, heads=2, kv_heads=1, head_dim=8, intermediate_size=48
    )
    model = gpu_step.random_model(replace(config, max_length=32), "cpu", "float32")
    plan, tokens = gpu_step.step_plan(2, 17), []
    for recorded in (False, True):
        runner = ModelRunner(model, TritonBackend(SMALL), 2 * 2 + 1, gpu_step.BLOCK)
        runner.rehearse(1, 1)
        runner.zero(list(range(runner.blocks)))
        if recorded:
            runner.record_steps(FakeDevice(), 2, lambda text: None)
            runner.replay_of(plan)()
        tokens.append(gpu_step.next_tokens(runner, plan))
    assert tokens[0] == tokens[1]
    assert len(set(tokens[0])) > 1


@pytest.mark.parametrize(("name", "parameters"), [("1b", 1_235_814_400), ("8b", 8_030_261_248 - 128256 * 4096)])
def test_what_a_step_must_read(name: str, parameters: int) -> None:
    """As many weights as the models are said to have; the larger one's embedding is not its head, and is not read."""
    past = 2 * (16 * 8 * 64 if name == "1b" else 32 * 8 * 128) * 2
    assert gpu_step.step_bytes(gpu_step.MODELS[name], 3, 10) == 2 * parameters + 3 * 10 * past


class Elsewhere(DryRun):
    device = "cuda"


@pytest.mark.slow
def test_on_a_gpu_each_check_is_another_processs(capsys: pytest.CaptureFixture[str]) -> None:
    """Which has none here, and says so of each."""
    lines = gpu_check.run_checks(replace(gpu_check.DRY, tuned={}), Elsewhere())
    assert len(lines) == 3
    assert all("**wrong**: NoGpu(" in line for line in lines)
