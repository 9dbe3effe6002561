"""Compiles what the backend launches for an A100 and an H200, without one: run in a process of its own, where kernels
are real.

python -m tests.engine.compile_triton CASE DTYPE   (a case of COMPILED; prints a JSON line: by architecture, what each
                                                    kernel became)
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from engine.attention import triton_kernels
from engine.attention.cuda import TritonBackend
from tests.engine.attention_cases import Case, make

LLAMA = Case((700, 30), (1, 1), heads=32, kv_heads=8, head_dim=128, rotary_dim=128)
COMPILED = {
    "steps": LLAMA,
    "prefill": replace(LLAMA, new=(1, 40)),
    "masked": replace(LLAMA, new=(1, 40), biased=True, causal=False, extras=1),
    "one_row": Case((20,), (7,), heads=1, kv_heads=1, head_dim=64, extras=1),
    "wide": replace(LLAMA, new=(1, 40), heads=8, kv_heads=4, head_dim=256, rotary_dim=256, biased=True),
}
ARCHITECTURES = (80, 90)
NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int32: "i32", torch.int64: "i64"}


class Recorder:
    """Stands where the kernels do and keeps what they are launched with."""

    def __init__(self) -> None:
        self.launches: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def __getattr__(self, name: str) -> "Recorder.Kernel":
        return Recorder.Kernel(self, name)

    class Kernel:
        def __init__(self, recorder: "Recorder", name: str) -> None:
            self.recorder, self.name = recorder, name

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            def launch(*arguments: Any, **named: Any) -> None:
                self.recorder.launches[self.name] = arguments, named

            return launch


def compiled(name: str, arguments: tuple[Any, ...], named: dict[str, Any], architecture: int) -> dict[str, Any]:
    """As Triton's launcher would: integers that are 1 are constants, multiples of 16 are known as such, but for those
    that are not specialised for."""
    kernel = getattr(triton_kernels, name)
    options = {key: named[key] for key in ("num_warps", "num_stages") if key in named}
    given = dict(zip(kernel.arg_names, arguments, strict=False))
    given |= {key: value for key, value in named.items() if key not in options}
    given = {key: given.pop(key) for key in kernel.arg_names} | given  # what no argument takes fails to compile
    signature, constants, attributes = {}, {}, {}
    for index, (key, value) in enumerate(given.items()):
        divisible = False
        if isinstance(value, Tensor):
            signature[key], divisible = f"*{NAMES[value.dtype]}", True
        elif key.isupper() or (value == 1 and not kernel.params[index].do_not_specialize):
            signature[key], constants[(index,)] = "constexpr", value
        else:
            signature[key] = "fp32" if isinstance(value, float) else "i32"
            divisible = isinstance(value, int) and value % 16 == 0 and not kernel.params[index].do_not_specialize
        if divisible:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    made = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    return {"stack": stack_bytes(made.asm["cubin"]), "shared": made.metadata.shared, **loads(made.asm["ptx"])}


def stack_bytes(cubin: bytes) -> int:
    """Of a thread: what registers had no room for."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        told = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return max(map(int, re.findall(r"STACK:(\d+)", told)))


def loads(ptx: str) -> dict[str, int]:
    """How many instructions read the device's memory 2 bytes at a time, and how many 16, past the registers."""
    return {"by_2": len(re.findall(r"ld\.global\.b16", ptx)), "async_16": len(re.findall(r"cp\.async\.cg", ptx))}


def main() -> None:
    case = replace(COMPILED[sys.argv[1]], dtype=getattr(torch, sys.argv[2]), cache_dtype=getattr(torch, sys.argv[2]))
    w = make(case)
    w = replace(w, k_blocks=w.k_blocks.transpose(2, 3).contiguous().transpose(2, 3))
    w = replace(w, inputs=replace(w.inputs, steps=sys.argv[1] == "steps"))
    recorder = Recorder()
    backend = TritonBackend(kernels=recorder)
    w.attend(backend)
    if sys.argv[1] != "steps":
        backend.probabilities(w.q, w.k_blocks, w.inputs, w.rotary, w.scoring)
        backend.rms_norm(w.q, w.q[0, 0], 1e-5, w.q)
        backend.silu_gate(w.q)
    launches = recorder.launches.items()
    made = {each: {name: compiled(name, *launch, each) for name, launch in launches} for each in ARCHITECTURES}
    print(json.dumps(made))


if __name__ == "__main__":
    main()
