"""Builds the CPU kernels ahead of time and loads them as `torch.ops.keypast`.

One object per instruction set from the same source, one for the driver and one for the binding, compiled side by side
and linked into `<cache>/kernels/<digest>/keypast.so`. The digest covers all that shapes the result: a changed source,
torch or Python builds anew, an unchanged one only loads. Which instruction set runs is decided by the machine that
loads the library, not by the one that built it.
"""

import argparse
import contextlib
import hashlib
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

SOURCES = Path(__file__).parent
LIBRARY = "keypast.so"
COMMON_FLAGS = ("-O2", "-fPIC", "-fopenmp", "-DNDEBUG", "-Wno-psabi")
# Contraction would let the compiler round the same expression differently in two places.
VARIANT_FLAGS = ("-std=c++17", "-ffp-contract=off", "-fno-math-errno")
X86_VARIANTS = {
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
}


class KernelUnavailable(Exception):
    """The kernels can be neither found nor built here; `str(error)` says why in one line."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """The kernels of this process: `isa` is what they were loaded with, `seconds` is 0.0 if nothing was built."""

    library: Path
    isa: str
    seconds: float


_loaded: Loaded | None = None  # operators are registered once per process, whatever the cache


def find(cache_dir: Path) -> Path:
    """Where the kernels of this torch and these sources are, once they are built."""
    return cache_dir / "kernels" / digest() / LIBRARY


def load(cache_dir: Path, compiler: str = "g++", progress: Callable[[str], None] | None = None) -> Loaded:
    """Loads the kernels, building them first unless `cache_dir` holds them. Raises KernelUnavailable."""
    global _loaded
    if _loaded is None:
        started = time.monotonic()
        library = find(cache_dir)
        built = not library.exists()
        if built:
            build(library, compiler, progress)
        try:
            torch.ops.load_library(library)  # type: ignore[no-untyped-call]
        except OSError as error:
            raise KernelUnavailable(f"cannot load {library}: {error}") from error
        _loaded = Loaded(library, torch.ops.keypast.isa(), time.monotonic() - started if built else 0.0)
    return _loaded


def variants() -> dict[str, tuple[str, ...]]:
    """Flags of each instruction set that is built for this kind of machine."""
    x86 = platform.machine() in ("x86_64", "AMD64")
    return {**(X86_VARIANTS if x86 else {}), "portable": ()}


def units() -> dict[str, tuple[str, ...]]:
    """Source and flags of each object; torch's include paths are added to the binding's when it is compiled."""
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    kernels = {
        f"variant-{name}": ("variant.cpp", f"-DKEYPAST_VARIANT={name}", *VARIANT_FLAGS, *flags)
        for name, flags in variants().items()
    }
    others = {name: (f"{name}.cpp", "-std=c++20", abi) for name in ("bind", "drive", "decoder")}
    return {**others, **kernels}


def digest() -> str:
    """Names a build by everything it is made from."""
    parts = [torch.__version__, platform.python_version(), platform.machine(), repr(COMMON_FLAGS), repr(units())]
    parts += [path.name + "\n" + path.read_text() for path in sorted(SOURCES.glob("*.[ch]*"))]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def build(library: Path, compiler: str, progress: Callable[[str], None] | None = None) -> None:
    """Compiles beside the target and moves the whole library into place, so that racing builds cannot meet."""
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent, prefix="build-") as work:
            objects = compile_units(Path(work), compiler, progress)
            linked = Path(work) / LIBRARY
            wait(start([compiler, "-shared", "-o", str(linked), *map(str, objects), *link_flags()]), "linking")
            os.replace(linked, library)
    except OSError as error:
        raise KernelUnavailable(f"cannot build in {library.parent}: {error}") from error


def compile_units(work: Path, compiler: str, progress: Callable[[str], None] | None = None) -> list[Path]:
    """Compiles every unit at once and returns the objects."""
    running = []
    with contextlib.ExitStack() as stack:
        for name, (source, *flags) in units().items():
            includes = [f"-isystem{path}" for path in _torch_headers()] if name == "bind" else []
            target = work / f"{name}.o"
            process = start(
                [compiler, *COMMON_FLAGS, *flags, *includes, "-c", str(SOURCES / source), "-o", str(target)]
            )
            stack.enter_context(process)
            stack.callback(process.kill)  # when another one failed
            running.append((name, target, process))
        for done, (name, _, process) in enumerate(running):
            if progress is not None:
                progress(f"building the CPU kernels, once {done}/{len(running)} files")
            wait(process, f"compiling {name}")
    return [target for _, target, _ in running]


def _torch_headers() -> list[Path]:
    """As torch.utils.cpp_extension lists them; importing that is slow, and warns where nvcc is but no GPU."""
    include = Path(torch.__file__).parent / "include"
    return [include, include / "torch" / "csrc" / "api" / "include"]


def link_flags() -> list[str]:
    """Torch's libraries, and the very OpenMP runtime that torch has loaded: two in one process fight for the cores."""
    root = Path(torch.__file__).parent
    bundled = [
        path for folder in (root / "lib", root.parent / "torch.libs") for path in sorted(folder.glob("libgomp*"))
    ]
    openmp = [str(bundled[0])] if bundled else ["-fopenmp"]
    return [f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10", *openmp]


def start(command: list[str]) -> subprocess.Popen[str]:
    try:
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except OSError as error:
        raise KernelUnavailable(f"no C++ compiler: cannot run {command[0]!r}") from error


def wait(process: subprocess.Popen[str], what: str) -> None:
    output, _ = process.communicate()
    if process.returncode != 0:
        errors = [line for line in output.splitlines() if "error" in line] or output.splitlines() or ["no output"]
        raise KernelUnavailable(f"{what} failed: {errors[0].strip()}")


def _tell(message: str) -> None:
    """One line that is written over, for whoever looks on."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{message}")
        sys.stderr.flush()


def main(argv: list[str] | None = None) -> None:
    """`python -m engine.kernels.build`: builds ahead of the first start."""
    parser = argparse.ArgumentParser(description="Build the CPU kernels.")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "keypast")
    parser.add_argument("--compiler", default="g++")
    arguments = parser.parse_args(argv)
    try:
        loaded = load(arguments.cache, arguments.compiler, _tell)
    except KernelUnavailable as error:
        _tell("")
        sys.exit(f"kernels unavailable: {error}")
    _tell("")
    made = f"built in {loaded.seconds:.0f} s" if loaded.seconds else "already built"
    sys.stdout.write(f"kernels {made}: {loaded.library} ({loaded.isa} on this machine)\n")


if __name__ == "__main__":
    main()
