"""From settings to an engine over loaded models. torch is imported here, when the first model is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from engine.config import EngineConfig
from engine.engine import Engine
from service.host import host_memory
from service.lifecycle import Loaded, Progress
from service.logs import logger
from service.settings import Settings, parse_memory
from service.text import TextModel

if TYPE_CHECKING:
    from engine.loading import LoadedModel


def load_models(settings: Settings, progress: Progress) -> Loaded:
    """Raises InvalidInput, whose message names the fault and its fix; RanksLost when a rank ends meanwhile."""
    progress("starting torch")
    from engine.loading import LoadOptions, load_model
    from engine.team import Team

    memory = parse_memory(settings.kv_memory, free_memory(settings.device))
    options = LoadOptions(
        cache_dir=settings.cache_dir.expanduser(),
        kv_memory=memory // len(settings.models),
        kv_share=None if settings.kv_share is None else settings.kv_share / len(settings.models),
        max_rows=settings.max_rows,
        token_budget=settings.token_budget,
        graphs=settings.cuda_graphs,
        block_size=settings.block_size,
        dtype=settings.dtype,
        kv_dtype=settings.kv_dtype,
        quantize=settings.quantize,
        device=settings.device,
        backend=settings.attention_backend,
        exact=settings.exact,
        warn=logger.warning,
    )
    if settings.model_parallel == 1:
        return _over(
            {name: load_model(name, spec, options, progress) for name, spec in settings.models.items()}, settings
        )
    progress(f"starting {settings.model_parallel} ranks")
    team = Team(settings.model_parallel, "cuda" if on_gpu(settings.device) else "cpu", settings.rank_seconds)
    try:
        models = {name: team.load(name, spec, options, progress) for name, spec in settings.models.items()}
        loaded = _over(models, settings, team.close)
    except BaseException:
        team.close()
        raise
    team.watch(loaded.engine.fail)
    return loaded


def _over(models: Mapping[str, LoadedModel], settings: Settings, close: Callable[[], object] = lambda: None) -> Loaded:
    config = EngineConfig(
        block_size=settings.block_size,
        max_rows=settings.max_rows,
        token_budget=settings.token_budget,
        guard_positions=settings.guard_positions,
        max_waiting=settings.max_waiting,
        max_waiting_per_session=settings.max_waiting_per_session,
        gather_share=settings.gather_share,
        wait_seconds=settings.wait_seconds,
        max_sessions=settings.max_sessions,
        max_past_bytes=settings.max_past_bytes,
        event_ring=settings.event_ring,
        tombstones=settings.tombstones,
        tombstone_seconds=settings.tombstone_seconds,
        evict=settings.evict,
        zero_freed=settings.zero_freed,
        quota=settings.quota,
        quotas=settings.tenant_quotas,
        replay_bytes=settings.replay_bytes,
        replay_bytes_per_session=settings.replay_bytes_per_session,
    )
    texts = {
        name: TextModel(model.tokenizer, model.end_ids) for name, model in models.items() if model.tokenizer is not None
    }
    return Loaded(Engine([model.runner for model in models.values()], config), texts, close)


def on_gpu(device: str) -> bool:
    import torch

    return device == "cuda" or (device == "auto" and torch.cuda.is_available())


def free_memory(device: str) -> int:
    """Bytes free where the keys and values will be."""
    if on_gpu(device):
        import torch

        free: int = torch.cuda.mem_get_info()[0]
        return free
    return host_memory()
