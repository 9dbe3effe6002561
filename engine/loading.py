"""From a model's spec to a runner: the model, a backend that can run here, and a pool of the memory it is given."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from engine.attention import choose
from engine.attention.cpu import CpuBackend
from engine.errors import InvalidInput
from engine.models import build
from engine.models.base import LoadOptions as ModelOptions
from engine.models.base import Progress
from engine.parallel import Parallel
from engine.runner import ModelRunner, Together
from engine.text import Tokenizer


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """`kv_memory` (bytes) is this model's own, on its device; `backend` is auto, or the name of one (see
    engine.attention). `parallel` and `together`: see ModelRunner."""

    cache_dir: Path
    kv_memory: int
    block_size: int = 16
    dtype: str = "auto"
    kv_dtype: str = "float16"
    device: str = "auto"
    backend: str = "auto"
    warn: Callable[[str], None] = print
    quantize: str = "none"
    parallel: Parallel | None = None
    together: Together | None = None


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """`end_ids` are the tokens with which the model ends a reply."""

    runner: ModelRunner
    tokenizer: Tokenizer | None
    end_ids: frozenset[int]


def load_model(name: str, spec: str, options: LoadOptions, progress: Progress) -> LoadedModel:
    """Raises InvalidInput naming the spec's or the checkpoint's fault, and its fix."""
    model_options = ModelOptions(
        options.cache_dir, options.dtype, options.kv_dtype, options.device, options.parallel, options.quantize
    )
    device, _ = model_options.resolve()
    backend = choose(options.backend, device, options.cache_dir, options.warn, progress)
    model_options = replace(model_options, kernels=isinstance(backend, CpuBackend))
    loaded = build(name, spec, model_options, progress)
    model_spec = loaded.model.spec
    block_bytes = model_spec.kv.position_bytes * options.block_size
    if options.parallel is not None and model_spec.device != "cpu":
        block_bytes //= options.parallel.model.size  # each rank has a device of its own; a CPU's memory is everyone's
    blocks = options.kv_memory // block_bytes
    if blocks < 1:
        raise InvalidInput("kv_memory", f"{options.kv_memory} bytes hold no block of {name}, which takes {block_bytes}")
    runner = ModelRunner(loaded.model, backend, blocks + 1, options.block_size, options.parallel, options.together)
    return LoadedModel(runner, loaded.tokenizer, loaded.end_ids)
