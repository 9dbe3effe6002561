"""A whole decode step on a GPU: random float16 weights in the shapes of Llama 3.2 1B and Llama 3.1 8B, played back.

Timed on the host's clock, from plain arrays to the next tokens on the host: fill and upload, the recording, the argmax,
the copy back. The floor is what a step must read, weights (without the embedding, of which it reads a row) and past,
over the bandwidth that a plain copy reaches on this device. `overhead` is the share of the step that is not the
recording itself, which is timed alone on the device.

    python -m benchmarks.gpu_step [--models 1b 8b] [--batch 1 64] [--context 1024]
"""

import argparse
import json
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu_timing import Gpu, NoGpu
from engine.attention.base import Rotary
from engine.attention.cuda import TritonBackend
from engine.batch import Array
from engine.checkpoints.config import DecoderConfig
from engine.models.decoder import DecoderModel, decoder_spec
from engine.models.rotary import rotary_tables
from engine.runner import ModelRunner, Plan

BLOCK = 16
LARGE = DecoderConfig(
    architecture="LlamaForCausalLM",
    vocab_size=128256,
    hidden_size=4096,
    layers=32,
    heads=32,
    kv_heads=8,
    head_dim=128,
    intermediate_size=14336,
    max_length=8192,
    norm="rms",
    norm_eps=1e-5,
    activation="silu_gate",
    positions="rotary",
    rope_theta=500000.0,
    rope_scaling=None,
    qkv_bias=False,
    output_bias=False,
    mlp_bias=False,
    qk_norm=False,
    tied_head=False,
    eos_token_ids=(),
    bos_token_id=None,
)
SMALL = replace(LARGE, hidden_size=2048, layers=16, head_dim=64, intermediate_size=8192, tied_head=True)
MODELS = {"1b": SMALL, "8b": LARGE}


@dataclass
class Result:
    """`of_floor`: floor / ms. Bytes are of one step."""

    model: str
    batch: int
    context: int
    ms: float
    eager_ms: float
    floor_ms: float
    of_floor: float
    tokens_per_second: float
    overhead: float


def random_model(config: DecoderConfig, device: str, dtype: str = "float16") -> DecoderModel:
    spec = decoder_spec("random", config, dtype=dtype, kv_dtype="float16", device=device, fingerprint="")
    with torch.device(device):
        rotary = Rotary(*rotary_tables(config))
    with torch.device("meta"):
        model = DecoderModel(spec, config, rotary)
    generator = torch.Generator(device).manual_seed(0)
    kind = getattr(torch, dtype)
    tensors = {
        key: torch.ones(tensor.shape, dtype=kind, device=device)
        if tensor.dim() == 1
        else torch.empty(tensor.shape, dtype=kind, device=device).normal_(0, 0.02, generator=generator)
        for key, tensor in model.state_dict().items()
    }
    if config.tied_head:
        tensors["head.weight"] = tensors["embed.weight"]
    model.load_state_dict(tensors, assign=True)
    model.requires_grad_(False).eval()
    model.pack()
    return model


def step_plan(batch: int, context: int) -> Plan:
    """Every row's position `context` - 1, over blocks of its own."""
    width = -(-context // BLOCK)
    table = (np.random.default_rng(0).permutation(batch * width).astype(np.int32) + 1).reshape(batch, width)
    last = np.full(batch, context - 1)
    attention: dict[str, Array] = {
        "query_start": np.arange(batch + 1, dtype=np.int32),
        "past_length": last.astype(np.int32),
        "present_length": last.astype(np.int32) + 1,
        "block_table": table,
        "positions": last,
        "slots": table[:, -1].astype(np.int64) * BLOCK + (context - 1) % BLOCK,
    }
    return Plan([], attention, {"token_ids": np.arange(batch) + 1}, need_weights=False, steps=True)


def step_bytes(config: DecoderConfig, batch: int, context: int) -> int:
    """float16 weights and past that a step reads, each once."""
    spec = decoder_spec("sizes", config, dtype="float16", kv_dtype="float16", device="cpu", fingerprint="")
    with torch.device("meta"):
        model = DecoderModel(spec, config, None)
    # Of the embedding a step reads a line a row; where it is tied, the head is what is counted.
    read = sum(parameter.numel() for parameter in model.parameters()) - model.embed.weight.numel()
    return 2 * read + batch * context * spec.kv.position_bytes


@torch.inference_mode()
def logits_of(runner: ModelRunner, plan: Plan) -> Tensor:
    made = runner.execute(plan)
    logits = made.logits if made.logits is not None else runner.model.logits(made.hidden, made.view)
    assert logits is not None
    return logits


def next_tokens(runner: ModelRunner, plan: Plan) -> list[int]:
    tokens: list[int] = logits_of(runner, plan).argmax(-1).tolist()
    return tokens


def measure(
    name: str, config: DecoderConfig, model: DecoderModel, batch: int, context: int, bandwidth: float, machine: Gpu
) -> Result:
    blocks = batch * -(-context // BLOCK) + 1
    plan, backend = step_plan(batch, context), TritonBackend()
    eager = ModelRunner(model, backend, blocks, BLOCK)
    runner = ModelRunner(model, backend, blocks, BLOCK)
    for each in (eager, runner):
        each.zero(list(range(blocks)))
        each.rehearse(1, 1)
    runner.record_steps(machine.graphs(), batch, lambda text: None)
    eager_ms = machine.wall_milliseconds(lambda: next_tokens(eager, plan), times=5)
    ms = machine.wall_milliseconds(lambda: next_tokens(runner, plan))
    alone = machine.milliseconds([runner.replay_of(plan)] * 5)
    floor = step_bytes(config, batch, context) / bandwidth * 1e3
    return Result(name, batch, context, ms, eager_ms, floor, floor / ms, batch / ms * 1e3, 1 - alone / ms)


HEADER = """| model | batch | context | ms | eager, ms | floor, ms | of floor | tokens/s | overhead |
|---|---|---|---|---|---|---|---|---|"""


def line(r: Result) -> str:
    return (
        f"| {r.model} | {r.batch} | {r.context} | {r.ms:.3f} | {r.eager_ms:.3f} | {r.floor_ms:.3f} | {r.of_floor:.2f} |"
        f" {r.tokens_per_second:.0f} | {r.overhead:.1%} |"
    )


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_step")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--context", type=int, nargs="+", default=[1024])
    return parser


def main(arguments: list[str] | None = None) -> int:
    given = parser().parse_args(arguments)
    try:
        machine = Gpu()
    except NoGpu as reason:
        print(reason)
        return 1
    bandwidth, results = machine.copy_bandwidth(), []
    print(f"{machine.name}: a copy reaches {bandwidth / 1e12:.2f} TB/s\n{HEADER}")
    with torch.inference_mode():
        for chosen in given.models:
            config = MODELS[chosen]
            model = random_model(config, machine.device)
            for context in given.context:
                for batch in given.batch:
                    results.append(measure(chosen, config, model, batch, context, bandwidth, machine))
                    print(line(results[-1]), flush=True)
            del model
            machine.release()
    print(json.dumps({"device": machine.name, "copy": bandwidth, "results": [asdict(result) for result in results]}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
