"""Triton kernels over the block pool. They run on a GPU, and under TRITON_INTERPRET=1 on a CPU, where they are tested.

One arithmetic serves steps and prefills. Keys are read in tiles at absolute positions. SPLIT keys, at absolute
positions too, make one partial result (top, total, acc): the largest score, the sum of 2^(score - top), and the values
so weighed. Partials are merged in order. A step spreads its splits over programs and merges afterwards, a prefill
merges as it goes. A tile or a split of which a query sees nothing changes none of its bits, so what a query gets
depends on no other row, on no boundary between a prefill's chunks and on no table's width. Within a tile a step's
program adds in another order than a prefill's: they use other instructions of the tensor cores.

What differs from batch to batch is not specialised for: no kernel is compiled while sessions wait.

Lanes: a program holds BLOCK_M lanes of one kv head; lane i is query i // GROUP, query head kv_head * GROUP + i % GROUP.
Scores are in units of log2(e), so that exp2 serves. Nothing reads a length on the host.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def rotate_and_write(
    q,  # (T, heads, D), any strides but the last
    k,  # (S, kv_heads, D)
    v,
    q_out,  # (T, heads, D) contiguous, only written where HALF
    k_blocks,  # (blocks, kv_heads, D, BLOCK_SIZE), inside a block of any strides
    v_blocks,  # (blocks, kv_heads, BLOCK_SIZE, D)
    slots,  # int64 (S,)
    positions,  # int64 (T,)
    cos,  # float32 (max_length, HALF)
    sin,
    heads,
    q_stride,
    q_head_stride,
    k_stride,
    k_head_stride,
    v_stride,
    v_head_stride,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    K_KEY: tl.constexpr,  # strides of a key and of a channel in a block of K
    K_CHANNEL: tl.constexpr,
    HALF: tl.constexpr,  # rotary_dim / 2; 0: nothing is rotated and q is not looked at
):
    """Program (t, h): key and value of head h of token t to their slot, then of the query's heads."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d = tl.arange(0, BLOCK_D)
    if head < KV_HEADS:
        slot = tl.load(slots + token)
        base = (slot // BLOCK_SIZE * KV_HEADS + head) * D * BLOCK_SIZE
        key = _rotated(k + token * k_stride + head * k_head_stride, positions, cos, sin, token, d, D, HALF)
        at = k_blocks + base + d * K_CHANNEL + slot % BLOCK_SIZE * K_KEY
        tl.store(at, key.to(k_blocks.dtype.element_ty), mask=d < D)
        value = tl.load(v + token * v_stride + head * v_head_stride + d, mask=d < D).to(tl.float32)
        tl.store(v_blocks + base + slot % BLOCK_SIZE * D + d, value.to(v_blocks.dtype.element_ty), mask=d < D)
    else:
        head -= KV_HEADS
        query = _rotated(q + token * q_stride + head * q_head_stride, positions, cos, sin, token, d, D, HALF)
        tl.store(q_out + (token * heads + head) * D + d, query.to(q_out.dtype.element_ty), mask=d < D)


@triton.jit
def _rotated(x, positions, cos, sin, token, d, D: tl.constexpr, HALF: tl.constexpr):
    """One head's channels in float32, the first 2 * HALF of them turned by the token's position."""
    own = tl.load(x + d, mask=d < D, other=0.0).to(tl.float32)
    if HALF > 0:
        position = tl.load(positions + token)
        turned = d < 2 * HALF
        other = tl.load(x + tl.where(d < HALF, d + HALF, d - HALF), mask=turned, other=0.0).to(tl.float32)
        at = position * HALF + d % HALF
        cosine, sine = tl.load(cos + at, mask=turned, other=1.0), tl.load(sin + at, mask=turned, other=0.0)
        own = tl.where(d < HALF, own * cosine - other * sine, tl.where(turned, own * cosine + other * sine, own))
    return own


@triton.jit(do_not_specialize=("width",))
def decode(
    q,  # (T, heads, D)
    k_blocks,
    v_blocks,
    query_start,  # int32 (R + 1,)
    past_length,  # int32 (R,)
    present_length,  # int32 (R,)
    table,  # int32 (R, W)
    bias,  # float32, flat
    bias_start,  # int64 (R + 1,)
    extra_k,  # float32 (EXTRAS, kv_heads, D)
    extra_v,
    tops,  # float32 (R, splits, heads)
    totals,
    accs,  # float32 (R, splits, heads, D)
    q_stride,
    q_head_stride,
    width,
    scale,  # in units of log2(e)
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    K_KEY: tl.constexpr,  # strides of a key and of a channel in a block of K
    K_CHANNEL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EXTRAS: tl.constexpr,
    DOT: tl.constexpr,  # dtype of products
):
    """Program (r, h, s): split s of row r's only query, as a partial. Rows of another number of queries are passed."""
    row, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first = tl.load(query_start + row)
    present = tl.load(present_length + row)
    if tl.load(query_start + row + 1) - first != 1:
        return
    if (split > 0) & (split * SPLIT >= present):
        return
    mine, queries, _, head, limit, line = _lanes(
        q, bias, bias_start, past_length, present, row, first, 1, 0, kv_head, q_stride, q_head_stride,
        BLOCK_M, GROUP, D, BLOCK_D, CAUSAL, HAS_BIAS, DOT,
    )  # fmt: skip
    top, total, acc = _partial(
        queries, limit, line, k_blocks, v_blocks, table + row.to(tl.int64) * width, extra_k, extra_v, kv_head, split,
        tl.max(limit, 0), scale, KV_HEADS, D, BLOCK_SIZE, BLOCK_N, K_KEY, K_CHANNEL, SPLIT, HAS_BIAS, EXTRAS,
    )  # fmt: skip
    at, d = (row.to(tl.int64) * tl.num_programs(2) + split) * KV_HEADS * GROUP + head, tl.arange(0, BLOCK_D)
    tl.store(tops + at, top, mask=mine)
    tl.store(totals + at, total, mask=mine)
    tl.store(accs + at[:, None] * D + d[None, :], acc, mask=mine[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=("splits",))
def merge_splits(
    out,  # (T, heads, D) contiguous
    query_start, present_length, tops, totals, accs, splits, heads,
    D: tl.constexpr, BLOCK_D: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Program (r, h): the partials of row r's only query and query head h, merged in order."""
    row, head = tl.program_id(0), tl.program_id(1)
    first = tl.load(query_start + row)
    if tl.load(query_start + row + 1) - first != 1:
        return
    used = tl.maximum(tl.cdiv(tl.load(present_length + row), SPLIT), 1)
    d = tl.arange(0, BLOCK_D)
    top = tl.full([1], -float("inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    acc = tl.zeros([1, BLOCK_D], tl.float32)
    for split in tl.range(0, used, num_stages=4):
        at = (row.to(tl.int64) * splits + split) * heads + head + tl.zeros([1], tl.int64)
        part = tl.load(accs + at[:, None] * D + d[None, :], mask=(d < D)[None, :], other=0.0)
        top, total, acc = _merge(top, total, acc, tl.load(tops + at), tl.load(totals + at), part)
    at = (first.to(tl.int64) * heads + head) * D + d[None, :]
    tl.store(out + at, _weighed(total, acc).to(out.dtype.element_ty), mask=(d < D)[None, :])


@triton.jit(do_not_specialize=("rows", "width"))
def prefill(
    out,  # (T, heads, D) contiguous
    q, k_blocks, v_blocks, query_start, past_length, present_length, table, bias, bias_start, extra_k, extra_v, rows,
    q_stride, q_head_stride, width, scale,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    K_KEY: tl.constexpr, K_CHANNEL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_BIAS: tl.constexpr, EXTRAS: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Program (i, h): the i-th tile of BLOCK_M // GROUP queries. Rows of one query are `decode`'s."""
    kv_head = tl.program_id(1)
    row, first, count, asked = _tile_of(query_start, tl.program_id(0), rows, BLOCK_M // GROUP)
    if (count == 1) | (asked >= count):
        return
    present = tl.load(present_length + row)
    mine, queries, query, head, limit, line = _lanes(
        q, bias, bias_start, past_length, present, row, first, count, asked, kv_head, q_stride, q_head_stride,
        BLOCK_M, GROUP, D, BLOCK_D, CAUSAL, HAS_BIAS, DOT,
    )  # fmt: skip
    end = tl.max(limit, 0)
    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for split in range(tl.maximum(tl.cdiv(end, SPLIT), 1)):
        part_top, part_total, part = _partial(
            queries, limit, line, k_blocks, v_blocks, table + row.to(tl.int64) * width, extra_k, extra_v, kv_head,
            split, end, scale, KV_HEADS, D, BLOCK_SIZE, BLOCK_N, K_KEY, K_CHANNEL, SPLIT, HAS_BIAS, EXTRAS,
        )  # fmt: skip
        top, total, acc = _merge(top, total, acc, part_top, part_total, part)
    at, d = (first + query).to(tl.int64) * KV_HEADS * GROUP + head, tl.arange(0, BLOCK_D)
    given = _weighed(total, acc).to(out.dtype.element_ty)
    tl.store(out + at[:, None] * D + d[None, :], given, mask=mine[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=("rows", "width"))
def probabilities(
    out,  # float32, flat: each row's (heads, n_r, present_length[r] + EXTRAS), end to end
    out_start,  # int64 (R + 1,)
    q, k_blocks, query_start, past_length, present_length, table, bias, bias_start, extra_k, rows,
    q_stride, q_head_stride, width, scale,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    K_KEY: tl.constexpr, K_CHANNEL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_BIAS: tl.constexpr, EXTRAS: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Program (i, h), as in `prefill` but for every row: once over the keys for top and total, once more to write."""
    kv_head = tl.program_id(1)
    row, first, count, asked = _tile_of(query_start, tl.program_id(0), rows, BLOCK_M // GROUP)
    if asked >= count:
        return
    present = tl.load(present_length + row)
    mine, queries, query, head, limit, line = _lanes(
        q, bias, bias_start, past_length, present, row, first, count, asked, kv_head, q_stride, q_head_stride,
        BLOCK_M, GROUP, D, BLOCK_D, CAUSAL, HAS_BIAS, DOT,
    )  # fmt: skip
    table += row.to(tl.int64) * width
    end = tl.max(limit, 0)
    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, end, BLOCK_N):
        score, _at = _scores(
            queries, limit, line, k_blocks, table, start, end, kv_head, scale,
            KV_HEADS, D, BLOCK_SIZE, BLOCK_N, K_KEY, K_CHANNEL, HAS_BIAS,
        )  # fmt: skip
        top, total, _fading, _weight = _grown(top, total, score)
    for e in tl.static_range(EXTRAS):
        own = _extra_score(queries, extra_k, e, kv_head, scale, KV_HEADS, D)
        top, total, _its_fading, _its_weight = _grown(top, total, own[:, None])
    each = tl.where(total > 0, 1 / tl.where(total > 0, total, 1.0), 0.0)
    columns = present + EXTRAS
    target = out + tl.load(out_start + row) + (head.to(tl.int64) * count + query) * columns
    for start in range(0, present, BLOCK_N):
        score, _at = _scores(
            queries, limit, line, k_blocks, table, start, end, kv_head, scale,
            KV_HEADS, D, BLOCK_SIZE, BLOCK_N, K_KEY, K_CHANNEL, HAS_BIAS,
        )  # fmt: skip
        n = start + tl.arange(0, BLOCK_N)
        weight = tl.exp2(score - _finite(top)[:, None]) * each[:, None]
        tl.store(target[:, None] + n[None, :], weight, mask=mine[:, None] & (n < present)[None, :])
    for e in tl.static_range(EXTRAS):
        own = _extra_score(queries, extra_k, e, kv_head, scale, KV_HEADS, D)
        tl.store(target + present + e, tl.exp2(own - _finite(top)) * each, mask=mine)


@triton.jit
def _tile_of(query_start, tile, rows, QUERIES: tl.constexpr):
    """A tile's row, that row's first query, how many it has, and which of them the tile begins with: row r's tiles
    begin at query_start[r] // QUERIES + r, which leaves enough."""
    low, high = 0, rows
    while low < high:
        middle = (low + high) // 2
        if tl.load(query_start + middle) // QUERIES + middle <= tile:
            low = middle + 1
        else:
            high = middle
    row = low - 1
    first = tl.load(query_start + row)
    return row, first, tl.load(query_start + row + 1) - first, (tile - first // QUERIES - row) * QUERIES


@triton.jit
def _lanes(
    q, bias, bias_start, past_length, present, row, first, count, asked, kv_head, q_stride, q_head_stride,
    BLOCK_M: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_BIAS: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Of each lane: whether it has a query, that query (BLOCK_M, BLOCK_D), its number in the row and its head, how many
    keys it sees at most, and where its line of the bias begins."""
    lane, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    query, head = asked + lane // GROUP, kv_head * GROUP + lane % GROUP
    mine = (lane < BLOCK_M // GROUP * GROUP) & (query < count)
    at = (first + query).to(tl.int64) * q_stride + head * q_head_stride
    queries = tl.load(q + at[:, None] + d[None, :], mask=mine[:, None] & (d < D)[None, :], other=0.0)
    limit = present + tl.zeros_like(lane)
    if CAUSAL:
        limit = tl.minimum(limit, tl.load(past_length + row) + query + 1)
    line = query.to(tl.int64) * present
    if HAS_BIAS:
        line += tl.load(bias_start + row)
    return mine, queries.to(tl.float32).to(DOT), query, head, tl.where(mine, limit, 0), bias + line


@triton.jit
def _partial(
    queries, limit, line, k_blocks, v_blocks, table, extra_k, extra_v, kv_head, split, end, scale,
    KV_HEADS: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr, K_KEY: tl.constexpr,
    K_CHANNEL: tl.constexpr, SPLIT: tl.constexpr, HAS_BIAS: tl.constexpr, EXTRAS: tl.constexpr,
):  # fmt: skip
    """(top, total, acc) of the split's keys before `end`. The layer's own keys come first in split 0."""
    BLOCK_M: tl.constexpr = queries.shape[0]
    BLOCK_D: tl.constexpr = queries.shape[1]
    d = tl.arange(0, BLOCK_D)
    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if EXTRAS > 0:
        for e in range(tl.where(split == 0, EXTRAS, 0)):
            score = _extra_score(queries, extra_k, e, kv_head, scale, KV_HEADS, D)
            value = tl.load(extra_v + (e * KV_HEADS + kv_head) * D + d, mask=d < D, other=0.0)
            ones = tl.full([BLOCK_M], 1.0, tl.float32)
            top, total, acc = _merge(top, total, acc, score, ones, ones[:, None] * value[None, :])
    for start in range(split * SPLIT, tl.minimum(split * SPLIT + SPLIT, end), BLOCK_N):
        score, at = _scores(
            queries, limit, line, k_blocks, table, start, end, kv_head, scale,
            KV_HEADS, D, BLOCK_SIZE, BLOCK_N, K_KEY, K_CHANNEL, HAS_BIAS,
        )  # fmt: skip
        top, total, fading, weight = _grown(top, total, score)
        n = start + tl.arange(0, BLOCK_N)
        values = v_blocks + (at + n % BLOCK_SIZE * D)[:, None] + d[None, :]
        value = tl.load(values, mask=(n < end)[:, None] & (d < D)[None, :], other=0.0).to(queries.dtype)
        acc = acc * fading[:, None] + tl.dot(weight.to(queries.dtype), value, input_precision="ieee")
    return top, total, acc


@triton.jit
def _scores(
    queries, limit, line, k_blocks, table, start, end, kv_head, scale,
    KV_HEADS: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr, K_KEY: tl.constexpr,
    K_CHANNEL: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """float32 (BLOCK_M, BLOCK_N) of the keys from `start`; -inf where a lane does not see the key, whatever its slot
    holds. And where each key's block begins for this head, in the pool of keys as in that of values."""
    n, d = start + tl.arange(0, BLOCK_N), tl.arange(0, queries.shape[1])
    seen = n[None, :] < limit[:, None]
    block = tl.load(table + n // BLOCK_SIZE, mask=n < end, other=0).to(tl.int64)
    at = (block * KV_HEADS + kv_head) * D * BLOCK_SIZE
    keys = k_blocks + (at + n % BLOCK_SIZE * K_KEY)[None, :] + d[:, None] * K_CHANNEL
    key = tl.load(keys, mask=(d < D)[:, None] & (n < end)[None, :], other=0.0)
    score = tl.dot(queries, key.to(queries.dtype), input_precision="ieee") * scale
    if HAS_BIAS:
        score += tl.load(line[:, None] + n[None, :], mask=seen, other=0.0) * LOG2E
    return tl.where(seen, score, -float("inf")), at


@triton.jit
def _extra_score(queries, extra_k, e, kv_head, scale, KV_HEADS: tl.constexpr, D: tl.constexpr):
    d = tl.arange(0, queries.shape[1])
    key = tl.load(extra_k + (e * KV_HEADS + kv_head) * D + d, mask=d < D, other=0.0)
    return tl.sum(queries.to(tl.float32) * key[None, :], 1) * scale


@triton.jit
def _grown(top, total, score):
    """top and total with a tile's scores; by how much what was summed before fades; the tile's weights."""
    new_top = tl.maximum(top, tl.max(score, 1))
    fading = tl.exp2(top - _finite(new_top))
    weight = tl.exp2(score - _finite(new_top)[:, None])
    return new_top, total * fading + tl.sum(weight, 1), fading, weight


@triton.jit
def _merge(top, total, acc, other_top, other_total, other):
    new_top = tl.maximum(top, other_top)
    own, its = tl.exp2(top - _finite(new_top)), tl.exp2(other_top - _finite(new_top))
    return new_top, total * own + other_total * its, acc * own[:, None] + other * its[:, None]


@triton.jit
def _finite(top):
    """0 in place of -inf: nothing was seen yet, and -inf - -inf would be no number."""
    return tl.where(top == -float("inf"), 0.0, top)


@triton.jit
def _weighed(total, acc):
    """A query that saw nothing gets zeros."""
    return tl.where(total[:, None] > 0, acc / tl.where(total > 0, total, 1.0)[:, None], 0.0)


@triton.jit
def rms_norm(
    x,  # (T, H) contiguous
    residual,  # (T, H) contiguous, looked at only where HAS_RESIDUAL
    weight,  # (H,)
    normed,  # (T, H)
    summed,  # (T, H), written only where HAS_RESIDUAL
    eps,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    """Program (t): one token's channels."""
    h = tl.arange(0, BLOCK_H)
    at = tl.program_id(0).to(tl.int64) * H + h
    own = tl.load(x + at, mask=h < H, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        own += tl.load(residual + at, mask=h < H, other=0.0).to(tl.float32)
        rounded = own.to(summed.dtype.element_ty)
        tl.store(summed + at, rounded, mask=h < H)
        own = rounded.to(tl.float32)
    own *= tl.rsqrt(tl.sum(own * own, 0) / H + eps)
    own *= tl.load(weight + h, mask=h < H, other=0.0).to(tl.float32)
    tl.store(normed + at, own.to(normed.dtype.element_ty), mask=h < H)


@triton.jit
def silu_gate(x, out, F: tl.constexpr, BLOCK: tl.constexpr):
    """Program (t, i): BLOCK features of one token; x (T, 2F) contiguous, out (T, F)."""
    token, f = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(x + token * 2 * F + f, mask=f < F, other=0.0).to(tl.float32)
    up = tl.load(x + token * 2 * F + F + f, mask=f < F, other=0.0).to(tl.float32)
    tl.store(out + token * F + f, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=f < F)
