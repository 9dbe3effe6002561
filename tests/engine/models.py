"""Tiny models of every family, built by transformers, and an engine around one: the oracle and what is tested."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.attention import choose
from engine.attention.base import Backend
from engine.batch import Append, Operation, Want
from engine.checkpoints.weights import Checkpoint
from engine.config import EngineConfig
from engine.engine import Engine
from engine.models.build import load_decoder
from engine.runner import ModelRunner

CACHE = Path.home() / ".cache" / "keypast"  # the built kernels: what `make install` leaves there

COMMON = {
    "vocab_size": 89,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-tied-biased": ("Llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama-linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}}),
    "llama-llama3": ("Llama", {"rope_parameters": LLAMA3}),
    "llama-yarn": ("Llama", {"rope_parameters": YARN}),
    "mistral": ("Mistral", {"head_dim": 16, "sliding_window": None}),
    "qwen2": ("Qwen2", {"use_sliding_window": False}),
    "qwen3": ("Qwen3", {"head_dim": 16, "use_sliding_window": False}),
    "gpt2": (
        "GPT2",
        {"n_embd": 48, "n_layer": 3, "n_head": 6, "n_positions": 256, "vocab_size": 89, "bos_token_id": None},
    ),
}


def reference_model(family: str, seed: int = 0) -> Any:
    """A transformers model in float32, weights random and large enough that logits differ."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers' own deprecations
        import transformers

        name, options = FAMILIES[family]
        common = {} if name == "GPT2" else COMMON
        config = getattr(transformers, f"{name}Config")(**{**common, "eos_token_id": None, **options})
        config._attn_implementation = "eager"
        torch.manual_seed(seed)
        suffix = "LMHeadModel" if name == "GPT2" else "ForCausalLM"
        model = getattr(transformers, f"{name}{suffix}")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * (0.3 if parameter.dim() == 1 else 0.15))
            if parameter.dim() == 1:
                parameter.add_(0.5)
    return model


def reference_logits(model: Any, tokens: list[int]) -> Tensor:
    """float32 (n, vocab) over the whole sequence at once."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logits: Tensor = model(torch.tensor([tokens]), use_cache=False).logits[0].float()
    return logits


class Served:
    """One model in an engine, and its verbs answered at once."""

    def __init__(self, runner: ModelRunner, token_budget: int = 512) -> None:
        self.runner = runner
        self.engine = Engine([runner], EngineConfig(token_budget=token_budget))
        self.name = runner.spec.name

    def open(self, batch_size: int = 1) -> str:
        return self.engine.create_session(self.name, batch_size=batch_size).id

    def finish(self, operation: Operation) -> Any:
        self.engine.submit(operation)
        while self.engine.run_once():
            self.engine.check()
        return operation.future.result(0)

    def append(self, session: str, inputs: dict[str, np.ndarray], want: Want = Want(), **options: Any) -> Any:
        return self.finish(Append(session, inputs, want=want, **options))

    def tokens(self, session: str, *rows: list[int], want: Want = Want(), **options: Any) -> Any:
        return self.append(session, {"token_ids": np.array(rows, dtype=np.int64)}, want, **options)

    def logits(self, session: str, tokens: list[int]) -> Tensor:
        """Appends the tokens; float32 (n, vocab)."""
        return torch.from_numpy(self.tokens(session, tokens, want=Want(logits="all")).outputs["logits"][0])


def backend(name: str) -> Backend:
    def fail(reason: str) -> None:
        raise AssertionError(reason)

    return choose(name, "cpu", CACHE, fail)


def serve_checkpoint(
    path: Path,
    *,
    backend_name: str = "cpu",
    dtype: torch.dtype = torch.float32,
    kv_dtype: str = "float32",
    blocks: int = 200,
    token_budget: int = 512,
    int8: bool = False,
) -> Served:
    checkpoint, kernels = Checkpoint.open(path), backend(backend_name)
    native = backend_name == "cpu"
    model = load_decoder("tiny", checkpoint, device="cpu", dtype=dtype, kv_dtype=kv_dtype, kernels=native, int8=int8)
    return Served(ModelRunner(model, kernels, blocks, 16), token_budget)
