"""The engine's settings: frozen, checked once, passed in. Nothing here reads the environment."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Bounds of one turn of the engine and of its queues."""

    block_size: int = 16  # positions a block; 16 keys fill one AVX-512 register
    max_rows: int = 256  # rows of one batch
    token_budget: int = 512  # new positions of one batch; a longer causal append runs in chunks of at most this
    max_waiting: int = 4096  # appends waiting in the engine
    max_waiting_per_session: int = 16
    gather_share: float = 0.0  # of a batch's time that the next may wait for those who stepped in it
    wait_seconds: float = 30.0  # an append that got no blocks by then is refused
    max_sessions: int = 65536
    tombstones: int = 65536  # gone sessions that still answer 410
    max_past_bytes: int = 1 << 30  # of one exported past

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if name != "gather_share" and getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
