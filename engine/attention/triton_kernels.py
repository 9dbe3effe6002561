"""Triton kernels over the block pool. They run on a GPU, and under TRITON_INTERPRET=1 on a CPU, where they are tested.

One arithmetic serves steps and prefills. Keys are read in tiles at absolute positions. SPLIT keys, at absolute
positions too, make one partial result (top, total, acc): the largest score, the sum of 2^(score - top), and the values
so weighed. Partials are merged in order. A step spreads its splits over programs and merges afterwards, a prefill
merges as it goes. A tile or a split of which a query sees nothing changes none of its bits, so what a query gets
depends on no other row, on no chunk boundary and on no table's width.

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


@triton.jit
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
    extra_k,  # float32 (extras, kv_heads, D)
    extra_v,
    tops,  # float32 (R, splits, heads)
    totals,
    accs,  # float32 (R, splits, heads, D)
    q_stride,
    q_head_stride,
    width,
    extras,
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
    HAS_EXTRAS: tl.constexpr,
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
    lane, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    mine = lane < GROUP
    queries, limit, bias_at = _lanes(
        q, first, 0, 1, past_length, present, bias_start, row, kv_head, lane, mine, d, q_stride, q_head_stride,
        GROUP, D, CAUSAL, HAS_BIAS, DOT,
    )  # fmt: skip
    top, total, acc = _partial(
        queries, limit, bias + bias_at, k_blocks, v_blocks, table + row.to(tl.int64) * width, extra_k, extra_v, extras,
        kv_head, split, tl.max(limit, 0), scale, d,
        KV_HEADS, D, BLOCK_D, BLOCK_SIZE, K_KEY, K_CHANNEL, BLOCK_M, BLOCK_N, SPLIT, HAS_BIAS, HAS_EXTRAS,
    )  # fmt: skip
    at = (row.to(tl.int64) * tl.num_programs(2) + split) * KV_HEADS * GROUP + kv_head * GROUP + lane
    tl.store(tops + at, top, mask=mine)
    tl.store(totals + at, total, mask=mine)
    tl.store(accs + at[:, None] * D + d[None, :], acc, mask=mine[:, None] & (d < D)[None, :])


@triton.jit
def merge_splits(
    out,  # (T, heads, D) contiguous
    query_start,
    present_length,
    tops,
    totals,
    accs,
    splits,
    heads,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLIT: tl.constexpr,
):
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


@triton.jit
def prefill(
    out,  # (T, heads, D) contiguous
    q,
    k_blocks,
    v_blocks,
    query_start,
    past_length,
    present_length,
    table,
    bias,
    bias_start,
    extra_k,
    extra_v,
    rows,
    q_stride,
    q_head_stride,
    width,
    extras,
    scale,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    K_KEY: tl.constexpr,
    K_CHANNEL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_EXTRAS: tl.constexpr,
    DOT: tl.constexpr,
):
    """Program (i, h): the i-th tile of BLOCK_M // GROUP queries. Rows of one query are `decode`'s."""
    QUERIES: tl.constexpr = BLOCK_M // GROUP
    tile, kv_head = tl.program_id(0), tl.program_id(1)
    row = _row_of(query_start, tile, rows, QUERIES)
    first = tl.load(query_start + row)
    count = tl.load(query_start + row + 1) - first
    asked = (tile - first // QUERIES - row) * QUERIES  # the tile's first query in its row
    if (count == 1) | (asked >= count):
        return
    present = tl.load(present_length + row)
    lane, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    mine = (lane < QUERIES * GROUP) & (asked + lane // GROUP < count)
    queries, limit, bias_at = _lanes(
        q, first, asked, count, past_length, present, bias_start, row, kv_head, lane, mine, d, q_stride, q_head_stride,
        GROUP, D, CAUSAL, HAS_BIAS, DOT,
    )  # fmt: skip
    end = tl.max(limit, 0)
    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for split in range(tl.maximum(tl.cdiv(end, SPLIT), 1)):
        part_top, part_total, part = _partial(
            queries, limit, bias + bias_at, k_blocks, v_blocks, table + row.to(tl.int64) * width, extra_k, extra_v,
            extras, kv_head, split, end, scale, d,
            KV_HEADS, D, BLOCK_D, BLOCK_SIZE, K_KEY, K_CHANNEL, BLOCK_M, BLOCK_N, SPLIT, HAS_BIAS, HAS_EXTRAS,
        )  # fmt: skip
        top, total, acc = _merge(top, total, acc, part_top, part_total, part)
    token = (first + asked + lane // GROUP).to(tl.int64)
    at = (token * KV_HEADS * GROUP + kv_head * GROUP + lane % GROUP)[:, None] * D + d[None, :]
    tl.store(out + at, _weighed(total, acc).to(out.dtype.element_ty), mask=mine[:, None] & (d < D)[None, :])


@triton.jit
def probabilities(
    out,  # float32, flat: each row's (heads, n_r, present_length[r] + extras), end to end
    out_start,  # int64 (R + 1,)
    q,
    k_blocks,
    query_start,
    past_length,
    present_length,
    table,
    bias,
    bias_start,
    extra_k,
    rows,
    q_stride,
    q_head_stride,
    width,
    extras,
    scale,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    K_KEY: tl.constexpr,
    K_CHANNEL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DOT: tl.constexpr,
):
    """Program (i, h), as in `prefill` but for every row: once over the keys for top and total, once more to write."""
    QUERIES: tl.constexpr = BLOCK_M // GROUP
    tile, kv_head = tl.program_id(0), tl.program_id(1)
    row = _row_of(query_start, tile, rows, QUERIES)
    first = tl.load(query_start + row)
    count = tl.load(query_start + row + 1) - first
    asked = (tile - first // QUERIES - row) * QUERIES
    if asked >= count:
        return
    present = tl.load(present_length + row)
    lane, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    mine = (lane < QUERIES * GROUP) & (asked + lane // GROUP < count)
    queries, limit, bias_at = _lanes(
        q, first, asked, count, past_length, present, bias_start, row, kv_head, lane, mine, d, q_stride, q_head_stride,
        GROUP, D, CAUSAL, HAS_BIAS, DOT,
    )  # fmt: skip
    table += row.to(tl.int64) * width
    lines, end = bias + bias_at, tl.max(limit, 0)
    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, present, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        at = _offsets(table, n, end, kv_head, KV_HEADS, D, BLOCK_SIZE)
        score = _scores(
            queries, limit, lines, k_blocks, at, n, end, scale, d, D, BLOCK_SIZE, K_KEY, K_CHANNEL, HAS_BIAS
        )
        new_top = tl.maximum(top, tl.max(score, 1))
        total = total * tl.exp2(top - _finite(new_top)) + tl.sum(tl.exp2(score - _finite(new_top)[:, None]), 1)
        top = new_top
    for e in range(extras):
        score = _extra_score(queries, extra_k, e, kv_head, scale, d, KV_HEADS, D)
        new_top = tl.maximum(top, score)
        total = total * tl.exp2(top - new_top) + tl.exp2(score - new_top)
        top = new_top
    each = tl.where(total > 0, 1 / tl.where(total > 0, total, 1.0), 0.0)
    columns = present + extras
    head = kv_head * GROUP + lane % GROUP
    line = out + tl.load(out_start + row) + (head.to(tl.int64) * count + asked + lane // GROUP) * columns
    for start in range(0, present, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        at = _offsets(table, n, end, kv_head, KV_HEADS, D, BLOCK_SIZE)
        score = _scores(
            queries, limit, lines, k_blocks, at, n, end, scale, d, D, BLOCK_SIZE, K_KEY, K_CHANNEL, HAS_BIAS
        )
        weight = tl.exp2(score - _finite(top)[:, None]) * each[:, None]
        tl.store(line[:, None] + n[None, :], weight, mask=mine[:, None] & (n < present)[None, :])
    for e in range(extras):
        score = _extra_score(queries, extra_k, e, kv_head, scale, d, KV_HEADS, D)
        tl.store(line + present + e, tl.exp2(score - _finite(top)) * each, mask=mine)


@triton.jit
def _row_of(query_start, tile, rows, QUERIES: tl.constexpr):
    """The row that a tile belongs to: row r's tiles begin at query_start[r] // QUERIES + r, which leaves enough."""
    low, high = 0, rows
    while low < high:
        middle = (low + high) // 2
        if tl.load(query_start + middle) // QUERIES + middle <= tile:
            low = middle + 1
        else:
            high = middle
    return low - 1


@triton.jit
def _lanes(
    q, first, asked, count, past_length, present, bias_start, row, kv_head, lane, mine, d, q_stride, q_head_stride,
    GROUP: tl.constexpr, D: tl.constexpr, CAUSAL: tl.constexpr, HAS_BIAS: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Of each lane: its query (BLOCK_M, BLOCK_D), how many keys it sees at most, where its line of the bias begins."""
    query = asked + lane // GROUP
    token = (first + query).to(tl.int64)
    at = token * q_stride + (kv_head * GROUP + lane % GROUP) * q_head_stride
    queries = (
        tl.load(q + at[:, None] + d[None, :], mask=mine[:, None] & (d < D)[None, :], other=0.0).to(tl.float32).to(DOT)
    )
    limit = present + tl.zeros_like(lane)
    if CAUSAL:
        limit = tl.minimum(limit, tl.load(past_length + row) + query + 1)
    limit = tl.where(mine, limit, 0)
    bias_at = query.to(tl.int64) * present
    if HAS_BIAS:
        bias_at += tl.load(bias_start + row)
    return queries, limit, bias_at


@triton.jit
def _partial(
    queries, limit, bias, k_blocks, v_blocks, table, extra_k, extra_v, extras, kv_head, split, end, scale, d,
    KV_HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_SIZE: tl.constexpr, K_KEY: tl.constexpr,
    K_CHANNEL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_EXTRAS: tl.constexpr,
):  # fmt: skip
    """(top, total, acc) of the split's keys before `end`. The layer's own keys come first in split 0."""
    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if HAS_EXTRAS:
        for e in range(tl.where(split == 0, extras, 0)):
            score = _extra_score(queries, extra_k, e, kv_head, scale, d, KV_HEADS, D)
            value = tl.load(extra_v + (e * KV_HEADS + kv_head) * D + d, mask=d < D, other=0.0)
            ones = tl.full([BLOCK_M], 1.0, tl.float32)
            top, total, acc = _merge(top, total, acc, score, ones, ones[:, None] * value[None, :])
    for start in range(split * SPLIT, tl.minimum(split * SPLIT + SPLIT, end), BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        at = _offsets(table, n, end, kv_head, KV_HEADS, D, BLOCK_SIZE)
        score = _scores(queries, limit, bias, k_blocks, at, n, end, scale, d, D, BLOCK_SIZE, K_KEY, K_CHANNEL, HAS_BIAS)
        new_top = tl.maximum(top, tl.max(score, 1))
        fading = tl.exp2(top - _finite(new_top))
        weight = tl.exp2(score - _finite(new_top)[:, None])
        total = total * fading + tl.sum(weight, 1)
        values = v_blocks + (at + n % BLOCK_SIZE * D)[:, None] + d[None, :]
        value = tl.load(values, mask=(n < end)[:, None] & (d < D)[None, :], other=0.0).to(queries.dtype)
        acc = acc * fading[:, None] + tl.dot(weight.to(queries.dtype), value, input_precision="ieee")
        top = new_top
    return top, total, acc


@triton.jit
def _offsets(table, n, end, kv_head, KV_HEADS: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """Where each key's block begins for this head, in the pool of keys as in that of values."""
    block = tl.load(table + n // BLOCK_SIZE, mask=n < end, other=0).to(tl.int64)
    return (block * KV_HEADS + kv_head) * D * BLOCK_SIZE


@triton.jit
def _scores(
    queries, limit, bias, k_blocks, at, n, end, scale, d,
    D: tl.constexpr, BLOCK_SIZE: tl.constexpr, K_KEY: tl.constexpr,
    K_CHANNEL: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """float32 (BLOCK_M, BLOCK_N); -inf where a lane does not see the key, whatever its slot holds."""
    seen = n[None, :] < limit[:, None]
    keys = k_blocks + (at + n % BLOCK_SIZE * K_KEY)[None, :] + d[:, None] * K_CHANNEL
    key = tl.load(keys, mask=(d < D)[:, None] & (n < end)[None, :], other=0.0)
    score = tl.dot(queries, key.to(queries.dtype), input_precision="ieee") * scale
    if HAS_BIAS:
        score += tl.load(bias[:, None] + n[None, :], mask=seen, other=0.0) * LOG2E
    return tl.where(seen, score, -float("inf"))


@triton.jit
def _extra_score(queries, extra_k, e, kv_head, scale, d, KV_HEADS: tl.constexpr, D: tl.constexpr):
    key = tl.load(extra_k + (e * KV_HEADS + kv_head) * D + d, mask=d < D, other=0.0)
    return tl.sum(queries.to(tl.float32) * key[None, :], 1) * scale


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
