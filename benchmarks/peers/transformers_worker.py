"""transformers' own ways to generate, on the same bfloat16 weights: a JSON request a line in, a JSON reply out.

    generate          `generate`, greedy, with a StaticCache
    eager, compiled   the same as a loop of `model(...)`, without what `generate` does around it; through torch.compile
    continuous        `generate_batch`, its continuous batching over a paged cache

{"way": "eager", "sessions": 16, "context": 256}   -> {"step_ms": ..}   median; of continuous batching the mean
"""

import logging
import statistics
import time
from functools import cache as once
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.peers.servers import prompt
from benchmarks.peers.worker import TorchWorker, serve
from engine.checkpoints.gguf import convert, default_model

STEPS = 16
PAGE = 256  # positions, its default


class TransformersPeer(TorchWorker):
    def __init__(self, threads: int, *, huge_pages: bool) -> None:
        super().__init__("benchmarks.peers.transformers_worker", threads, huge_pages=huge_pages)

    def step_ms(self, way: str, sessions: int, context: int) -> float:
        return float(self.ask({"way": way, "sessions": sessions, "context": context})["step_ms"])


def load() -> Any:
    cache = Path.home() / ".cache" / "keypast"
    path = convert(default_model(cache, lambda message: None), cache)
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()


class Generate(transformers.generation.BaseStreamer):  # type: ignore[misc]
    """It is its own streamer: it is given the prompts, then each step's tokens."""

    def __init__(self) -> None:
        self.model = load()
        self._arrivals: list[float] = []

    def put(self, value: object) -> None:
        self._arrivals.append(time.perf_counter())

    def end(self) -> None: ...

    def step_ms(self, sessions: int, context: int) -> float:
        """Median of steps of one batch whose rows are all `context` long."""
        self._arrivals = []
        ids = torch.tensor([prompt(seed, context) for seed in range(sessions)])
        self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=STEPS + 1,
            min_new_tokens=STEPS + 1,
            do_sample=False,
            cache_implementation="static",
            pad_token_id=0,
            streamer=self,
        )
        tokens = self._arrivals[1:]
        assert len(tokens) == STEPS + 1, f"{len(tokens)} tokens"
        return statistics.median((after - before) * 1e3 for before, after in pairwise(tokens))


class Loop:
    def __init__(self, compiled: bool) -> None:
        self.model = load()
        self._call: Any = torch.compile(self.model, fullgraph=True) if compiled else self.model
        self._caches: dict[tuple[int, int], Any] = {}

    @torch.inference_mode()
    def step_ms(self, sessions: int, context: int) -> float:
        """Median of greedy steps of one batch whose rows are all `context` long."""
        ids = torch.tensor([prompt(seed, context) for seed in range(sessions)])
        cache = self._caches.setdefault((sessions, context), self._new_cache(context))
        cache.reset()
        tokens = self.model(ids, past_key_values=cache, cache_position=torch.arange(context)).logits[:, -1:].argmax(-1)
        times = []
        for at in range(context, context + STEPS):
            started = time.perf_counter()
            logits = self._call(tokens, past_key_values=cache, cache_position=torch.tensor([at])).logits
            tokens = logits[:, -1:].argmax(-1)
            times.append((time.perf_counter() - started) * 1e3)
        return statistics.median(times)

    def _new_cache(self, context: int) -> Any:
        return transformers.StaticCache(config=self.model.config, max_cache_len=context + STEPS)


class ContinuousBatching:
    """Its manager begins and ends with every call, so that its thread takes nothing while another side is measured."""

    def __init__(self) -> None:
        self.model = load()
        logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)  # would measure memory; is told below

    def step_ms(self, sessions: int, context: int) -> float:
        """Mean of steps in which every session decodes: one batch takes all the prompts."""
        settings = transformers.ContinuousBatchingConfig(
            num_blocks=sessions * (-(-(context + STEPS + 1) // PAGE) + 1),
            page_size=PAGE,
            max_batch_tokens=sessions * context,
        )
        told = self.model.generate_batch(
            [prompt(seed, context) for seed in range(sessions)],
            generation_config=transformers.GenerationConfig(
                max_new_tokens=STEPS + 1, do_sample=False, eos_token_id=-1, pad_token_id=0
            ),
            continuous_batching_config=settings,
            record_timestamps=True,
            warmup=False,
        )
        arrivals: list[list[float]] = [request.timestamps for request in told.values()]
        if len(arrivals) != sessions or any(len(times) != STEPS + 1 for times in arrivals):
            raise RuntimeError(f"generate_batch gave {[len(times) for times in arrivals]} tokens")
        start, end = max(times[0] for times in arrivals), min(times[-1] for times in arrivals)
        steps = sum(start < at <= end for at in arrivals[0])
        return (end - start) * 1e3 / steps


@once
def peer(way: str) -> Generate | Loop | ContinuousBatching:
    if way == "generate":
        return Generate()
    return ContinuousBatching() if way == "continuous" else Loop(way == "compiled")


def main() -> None:
    transformers.utils.logging.disable_progress_bar()
    serve(lambda asked: {"step_ms": peer(asked["way"]).step_ms(asked["sessions"], asked["context"])})


if __name__ == "__main__":
    main()
