"""OpenVINO GenAI on the same weights, run by an interpreter that has it: a JSON request a line in, a JSON reply out.

{"prefill": 512}                          -> {"tok_s": ..}    median of three prompts, one new token each
{"sessions": 16, "context": 256}          -> {"step_ms": ..}  median step of a continuous batch, all decoding
"""

import json
import statistics
import sys
import time
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as genai

TOKENS = 48  # decoded by every session


def main() -> None:
    path, threads = sys.argv[1], int(sys.argv[2])
    options = {"INFERENCE_PRECISION_HINT": "bf16", "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    scheduler = genai.SchedulerConfig()
    scheduler.cache_size = 2  # GB
    scheduler.max_num_seqs = 64
    scheduler.max_num_batched_tokens = 4096
    scheduler.enable_prefix_caching = False
    batched = genai.ContinuousBatchingPipeline(path, scheduler, "CPU", options)
    single = genai.LLMPipeline(path, "CPU", **options)
    print(json.dumps({"version": genai.__version__}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        reply = prefill(single, asked["prefill"]) if "prefill" in asked else decode(batched, **asked)
        print(json.dumps(reply), flush=True)


def prompt(seed: int, length: int) -> Any:
    return ov.Tensor(np.random.default_rng(seed).integers(100, 40_000, (1, length)))


def config(tokens: int) -> Any:
    settings = genai.GenerationConfig()
    settings.max_new_tokens = tokens
    settings.min_new_tokens = tokens
    settings.ignore_eos = True
    settings.do_sample = False
    return settings


def prefill(pipeline: Any, length: int) -> dict[str, float]:
    seconds = []
    for seed in range(3):
        ids = prompt(seed, length)
        mask = ov.Tensor(np.ones((1, length), dtype=np.int64))
        started = time.perf_counter()
        pipeline.generate(genai.TokenizedInputs(ids, mask), config(1))
        seconds.append(time.perf_counter() - started)
    return {"tok_s": length / statistics.median(seconds)}


def decode(pipeline: Any, sessions: int, context: int) -> dict[str, float]:
    handles = [pipeline.add_request(seed, prompt(seed, context), config(TOKENS)) for seed in range(sessions)]
    steps = []
    while pipeline.has_non_finished_requests():
        started = time.perf_counter()
        pipeline.step()
        steps.append((time.perf_counter() - started) * 1e3)
    for handle in handles:
        handle.read_all()
    return {"step_ms": statistics.median(steps[-TOKENS + 4 :])}


main()
