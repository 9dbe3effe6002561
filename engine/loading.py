"""From a model's spec to a runner: the model, a backend that can run here, and a pool of the memory it is given."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from engine.attention import choose
from engine.attention.base import Backend
from engine.attention.cpu import CpuBackend
from engine.errors import InvalidInput
from engine.gpu import CudaGpu, Gpu
from engine.models import build
from engine.models.base import LoadOptions as ModelOptions
from engine.models.base import Model, Progress
from engine.runner import ModelRunner, Together
from engine.text import Tokenizer


@dataclass(frozen=True, kw_only=True)
class LoadOptions(ModelOptions):
    """`kv_memory` (bytes) is this model's own, on its device. `kv_share`: on a GPU that holds the model whole, in place
    of it, this share of what is left once the weights are there and the largest batch has its room: `token_budget` new
    positions, or `max_rows` rows. `graphs`: steps are recorded there. `gpu`: the one to ask; found if not given.
    `backend` is auto, or the name of one (see engine.attention). `exact`: refuse where an output's bits could depend on
    anything but its session's own positions. `together`: see ModelRunner.
    """

    kv_memory: int
    kv_share: float | None = None
    block_size: int = 16
    max_rows: int = 256
    token_budget: int = 512
    graphs: bool = True
    gpu: Gpu | None = None
    backend: str = "auto"
    warn: Callable[[str], None] = print
    exact: bool = False
    together: Together | None = None


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """`end_ids` are the tokens with which the model ends a reply."""

    runner: ModelRunner
    tokenizer: Tokenizer | None
    end_ids: frozenset[int]


def load_model(name: str, spec: str, options: LoadOptions, progress: Progress) -> LoadedModel:
    """Raises InvalidInput naming the spec's or the checkpoint's fault, and its fix."""
    device, _ = options.resolve()
    backend = choose(
        options.backend,
        device,
        options.cache_dir,
        options.warn,
        progress,
        recorded=options.graphs and options.parallel is None,
    )
    options = replace(options, kernels=isinstance(backend, CpuBackend))
    if options.exact:
        _check_exact(options)
    with _room("model", f"{name} does not fit into the device's memory; use a smaller one, or model_parallel"):
        loaded = build(name, spec, options, progress)
    model_spec = loaded.model.spec
    gpu = options.gpu
    if gpu is None and model_spec.device != "cpu":
        gpu = CudaGpu()
    memory = options.kv_memory
    if gpu is not None and options.kv_share is not None and options.parallel is None:
        with _room("max_rows", f"a batch of {name} does not fit beside its weights; lower it, or token_budget"):
            memory = _left(loaded.model, backend, gpu, options, options.kv_share)
        progress(f"{name}: {memory / (1 << 30):.1f} GiB for keys and values")
    block_bytes = model_spec.kv.position_bytes * options.block_size
    if options.parallel is not None and model_spec.device != "cpu":
        block_bytes //= options.parallel.model.size  # each rank has a device of its own; a CPU's memory is everyone's
    blocks = memory // block_bytes
    if blocks < 1:
        raise InvalidInput("kv_memory", f"{memory} bytes hold no block of {name}, which takes {block_bytes}")
    with _room("kv_memory", f"{memory} bytes do not fit beside the weights of {name} and its recorded steps; lower it"):
        runner = ModelRunner(loaded.model, backend, blocks + 1, options.block_size, options.parallel, options.together)
        if gpu is not None and options.graphs and backend.recordable:
            runner.record_steps(gpu.graphs(), options.max_rows, lambda text: progress(f"{name}: {text}"))
    return LoadedModel(runner, loaded.tokenizer, loaded.end_ids)


@contextmanager
def _room(field: str, fix: str) -> Iterator[None]:
    """Raises InvalidInput about `field` where the device has too little memory for the body."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise InvalidInput(field, fix) from error


def _left(model: Model, backend: Backend, gpu: Gpu, options: LoadOptions, share: float) -> int:
    """Bytes for the past. Recorded steps keep their room, so it is left beside a prefill's."""
    rehearsal = ModelRunner(model, backend, 1, options.block_size)
    prefill = gpu.peak(lambda: rehearsal.rehearse(1, min(options.token_budget, model.spec.max_length)))
    step = gpu.peak(lambda: rehearsal.rehearse(options.max_rows, 1))
    return int(max(0, gpu.free() - prefill - step) * share)


def _check_exact(options: LoadOptions) -> None:
    """Sums of the native kernels run in one order, by absolute position and row by row; two ranks' have no other.
    Raises InvalidInput that names what differs elsewhere."""
    if not options.kernels:
        differs = "linears and attention without the native kernels, whose sums' order depends on the number of rows"
    elif options.parallel is not None and options.parallel.model.size > 2:
        differs = f"the sum over {options.parallel.model.size} ranks, whose order depends on the number of rows"
    else:
        return
    raise InvalidInput(
        "exact", f"cannot be promised here: {differs}; serve on the CPU with at most 2 ranks, or leave it"
    )
