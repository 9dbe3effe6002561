"""Kind `decoder`: token embedding, N blocks, norm and head; token ids in, logits out. Five families as data."""

import numpy as np
import torch
from torch import Tensor, nn

from engine.attention.base import PackedBlocks, Rotary
from engine.attention.view import PagedView
from engine.batch import Array, Row, RowResult
from engine.checkpoints.config import DecoderConfig
from engine.layers import DecoderBlock, FeedForward, LayerNorm, Linear, MultiHeadAttention, RMSNorm
from engine.parallel import Parallel
from engine.sampling import draw
from engine.specs import KVSpec, ModelSpec, TensorSpec
from engine.upload import lines, to_device

HEAD_POSITIONS = 64  # whose logits are held at a time, where nobody wants to see them


def decoder_spec(
    name: str, config: DecoderConfig, *, dtype: str, kv_dtype: str, device: str, fingerprint: str
) -> ModelSpec:
    vocab_size = config.vocab_size
    return ModelSpec(
        name=name,
        kind="decoder",
        inputs=(TensorSpec("token_ids", ("int32", "int64"), values=(0, vocab_size - 1)),),
        outputs=(
            TensorSpec("logits", ("float32",), (vocab_size,), required=False),
            TensorSpec("top_logprobs", ("float32",), required=False),
            TensorSpec("token_logprobs", ("float32",), required=False),
            TensorSpec("next_token", ("int64",), required=False),
        ),
        kv=KVSpec(config.layers, config.kv_heads, config.head_dim, kv_dtype),
        causal=True,
        max_length=config.max_length,
        dtype=dtype,
        device=device,
        fingerprint=fingerprint,
        aligned=True,
        history="token_ids",
        vocab_size=vocab_size,
    )


class DecoderModel(nn.Module):
    def __init__(self, spec: ModelSpec, config: DecoderConfig, rotary: Rotary | None) -> None:
        super().__init__()
        self.spec = spec
        self.rotary = rotary
        self.embed = _embedding(config.vocab_size, config.hidden_size)
        learned = config.positions == "learned"
        self.positions = _embedding(config.max_length, config.hidden_size) if learned else None
        self.blocks = nn.ModuleList(_block(config, getattr(torch, spec.dtype)) for _ in range(config.layers))
        self.norm = _norm(config)
        self.head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self._eps = config.norm_eps
        self._packed: PackedBlocks | None = None

    def shard(self, parallel: Parallel) -> None:
        """Cuts the blocks; embedding, norm and head stay whole on every rank. Before `pack`. Raises InvalidInput."""
        for block in self.blocks:
            assert isinstance(block, DecoderBlock)
            block.shard(parallel)

    def pack(self) -> None:
        for block in self.blocks:
            assert isinstance(block, DecoderBlock)
            block.pack()
        self.head.pack()
        self._packed = self._pack_blocks()

    def forward(self, inputs: dict[str, Tensor], kv: PagedView) -> Tensor:
        """token_ids (T,) -> the last block's residual stream (T, H), before the final norm."""
        x: Tensor = self.embed(inputs["token_ids"])
        if self.positions is not None:
            x = x + self.positions(kv.inputs.positions)
        if self._packed is not None:
            hidden = kv.decoder_blocks(x, self._packed, self.rotary)
            if hidden is not None:
                return hidden
        delta = None
        for layer, block in enumerate(self.blocks):
            x, delta = block(x, delta, kv, layer, self.rotary)
        return x if delta is None else x + delta

    def _pack_blocks(self) -> PackedBlocks | None:
        weights: list[Tensor | None] = []
        for block in self.blocks:
            assert isinstance(block, DecoderBlock)
            own = block.packed_weights()
            if own is None:
                return None
            weights += own
            attention = block.attention
        return PackedBlocks(weights, attention.heads, attention.scale, self._eps)

    def outputs(
        self, hidden: Tensor, rows: list[Row], starts: list[int], kv: PagedView, logits: Tensor | None = None
    ) -> list[RowResult]:
        """Only the positions whose logits somebody wants go through the head. A row's tail is its last hidden state."""
        ends = [start + row.count + int(row.replay) for row, start in zip(rows, starts, strict=True)]
        in_step = ends == list(range(1, len(hidden) + 1))  # each row is the hidden state of its own place
        if in_step:
            tails = hidden
        elif all(end > start for start, end in zip(starts, ends, strict=True)):
            tails = lines(hidden, [end - 1 for end in ends])
        else:
            pairs = zip(rows, starts, ends, strict=True)
            tails = torch.stack([row.tail if end == start else hidden[end - 1] for row, start, end in pairs])
        own = list(tails)
        if len(rows) > 1 or logits is not None:  # the next recorded pass overwrites `hidden`
            # Each on its own: a view would keep the whole batch's while one session idles. In few kernels: times 1.
            own = list(torch._foreach_mul(own, 1))
        results = [RowResult(tail=tail if row.last else None) for row, tail in zip(rows, own, strict=True)]
        wanting = [index for index, row in enumerate(rows) if _wants_last(row)]
        if wanting:
            made = logits if in_step else None
            last = self.logits(lines(tails, wanting), kv) if made is None else lines(made, wanting)
            self._last_outputs(last, [rows[index] for index in wanting], [results[index] for index in wanting])
        for row, start, end, result in zip(rows, starts, ends, results, strict=True):
            if row.work.want.logits == "all" and row.count:
                result.positions["logits"] = self.logits(hidden[end - row.count : end], kv).cpu().numpy()
            if row.work.want.token_logprobs:
                result.positions.update(self._token_logprobs(hidden[start:end], row, kv))
        return results

    def _token_logprobs(self, hidden: Tensor, row: Row, kv: PagedView) -> dict[str, Array]:
        """Of the tokens given after the row's positions, float32: a chunk tells of the first of the next one, and of
        its own first only when it begins. Nothing foretells the first of an empty past: NaN. If they are wanted, the k
        likeliest in the place of each, too: ids (n, k) int64, -1 for that first, and theirs, float32."""
        done = row.start - row.work.past_length[row.index]
        end = min(done + row.count + 1, row.work.new[row.index])
        tokens = torch.from_numpy(row.work.inputs["token_ids"][row.index, done + (done > 0) : end])
        given = to_device(tokens, hidden.device)
        logprobs = torch.full((len(given),), torch.nan)
        k = row.work.want.token_top_logprobs
        top_ids, top_logprobs = torch.full((len(given), k), -1), torch.full((len(given), k), torch.nan)
        if done == 0 and row.tail is not None:
            hidden = torch.cat([row.tail[None], hidden])
        first = int(row.start == 0)
        for at in range(first, len(given), HEAD_POSITIONS):
            tokens = given[at : at + HEAD_POSITIONS].long()
            logits = self.logits(hidden[at - first :][: len(tokens)], kv)
            total = logits.logsumexp(-1)
            logprobs[at : at + len(tokens)] = logits.gather(1, tokens[:, None])[:, 0] - total
            if k:
                likeliest = logits.topk(k)
                top_ids[at : at + len(tokens)] = likeliest.indices
                top_logprobs[at : at + len(tokens)] = likeliest.values - total[:, None]
        told = {"token_logprobs": logprobs.numpy()}
        top = {"token_top_ids": top_ids.numpy(), "token_top_logprobs": top_logprobs.numpy()}
        return told | top if k else told

    def logits(self, hidden: Tensor, kv: PagedView) -> Tensor:
        """hidden (R, H) -> float32 (R, V)."""
        normed, _ = self.norm(hidden, None, kv.backend)
        return self.head.scores(normed)

    def _last_outputs(self, logits: Tensor, rows: list[Row], results: list[RowResult]) -> None:
        """What is read of the device is read for all rows at once: each time, the host waits."""
        wants = [row.work.want for row in rows]
        if any(want.sample is not None for want in wants):
            self._draw(logits, rows, results)
        if asked := [index for index, want in enumerate(wants) if want.logits == "last"]:
            for index, own in zip(asked, lines(logits, asked).cpu().numpy(), strict=True):
                results[index].once["logits"] = own
        if asked := [index for index, want in enumerate(wants) if want.top_logprobs]:
            most = max(wants[index].top_logprobs for index in asked)
            top = torch.log_softmax(lines(logits, asked), -1).topk(most)
            ids, values = torch.stack([top.indices.double(), top.values.double()]).cpu().numpy().tolist()
            for index, which, value in zip(asked, ids, values, strict=True):
                pairs = list(zip(map(int, which), value, strict=True))
                results[index].once["top_logprobs"] = pairs[: wants[index].top_logprobs]

    def _draw(self, logits: Tensor, rows: list[Row], results: list[RowResult]) -> None:
        """The next tokens of those that want one, and their log-probabilities."""
        samples = {index: row.work.want.sample for index, row in enumerate(rows) if row.work.want.sample is not None}
        drawing = list(samples)
        histories = [
            _history(rows[index]) if sample.repetition_penalty != 1 else None for index, sample in samples.items()
        ]
        own = lines(logits, drawing)
        keys = [(rows[index].index, rows[index].stop) for index in drawing]
        tokens = draw(own, list(samples.values()), histories, keys)
        told = tokens
        if scored := [at for at, index in enumerate(drawing) if rows[index].work.want.logprob]:
            likely = torch.log_softmax(lines(own, scored), -1).gather(1, lines(tokens, scored).unsqueeze(1))
            told = torch.cat([tokens.double(), likely.squeeze(1).double()])
        numbers = told.cpu().numpy().tolist()
        for index, number in zip(drawing, numbers, strict=False):
            results[index].once["next_token"] = int(number)
        for at, number in zip(scored, numbers[len(drawing) :], strict=True):
            results[drawing[at]].once["logprob"] = number


def _wants_last(row: Row) -> bool:
    want = row.work.want
    return row.last and (want.logits == "last" or want.top_logprobs > 0 or want.sample is not None)


def _history(row: Row) -> Tensor:
    """The row's ids up to its stop, this append's included."""
    assert row.history is not None
    past = np.frombuffer(row.history, dtype=np.int64) if row.history else np.zeros(0, np.int64)
    new = row.stop - row.work.past_length[row.index]
    appended = row.work.inputs["token_ids"][row.index, :new] if new else past[:0]
    return torch.from_numpy(np.concatenate([past, appended]))


def _block(config: DecoderConfig, dtype: torch.dtype) -> DecoderBlock:
    attention = MultiHeadAttention(
        config.hidden_size,
        config.heads,
        kv_heads=config.kv_heads,
        head_dim=config.head_dim,
        qkv_bias=config.qkv_bias,
        output_bias=config.output_bias,
        qk_norm=config.norm_eps if config.qk_norm else None,
        compute_dtype=dtype,
    )
    feed_forward = FeedForward(config.hidden_size, config.intermediate_size, config.activation, bias=config.mlp_bias)
    return DecoderBlock(_norm(config), attention, _norm(config), feed_forward)


def _norm(config: DecoderConfig) -> RMSNorm | LayerNorm:
    if config.norm == "rms":
        return RMSNorm(config.hidden_size, config.norm_eps)
    return LayerNorm(config.hidden_size, eps=config.norm_eps)


def _embedding(rows: int, size: int) -> nn.Embedding:
    """Of any values: drawing them, even on the meta device, makes torch import its compiler (1 s, 200 MB)."""
    return nn.Embedding(rows, size, _weight=torch.empty(rows, size))
