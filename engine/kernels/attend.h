// Attention over blocks: rotate and write the new keys and values, then attend one tile of queries chunk by chunk.
//
// A tile's rows are its (query, head) pairs, query-major, taken up to kRows at a time: a group. For a chunk of keys:
//   scores    group x 16 keys at a time, channels in order; a block's keys lie across a register
//   soften    per row: maximum, 2^(score - maximum), sum; masked keys are marked by a negative weight
//   values    group x 16 channels at a time, keys in order
//   merge     the chunk's (maximum, sum, weighted values) into the row's
// What a row starts from are the layer's own keys, chunks that come before the first one of the past.
// Each row's own sequence of operations is the same whatever else is in the tile.
#pragma once
#include "vec.h"

namespace keypast::KEYPAST_VARIANT {

constexpr int kRows = kMostRows;  // per group: 6 x 4 accumulators, 4 keys and a broadcast fill 32 registers
constexpr int kDirectRows = 8;  // tiles up to this size convert keys and values as they read them
constexpr int kVecs = kChunk / kLanes;
constexpr int kAhead = 4;        // vectors of keys or values between fetching and reading
constexpr int kTokensAhead = 4;  // tokens between fetching and reading q, k and v
constexpr float kMasked = -1.0f;
constexpr float kLowest = -__builtin_inff();
constexpr float kLog2E = 1.4426950408889634f;

// How many vectors of accumulators a group of M rows keeps per row, as registers allow.
template <int M>
constexpr int kWide = kWidth == 16 ? 4 : M <= 1 ? 4 : M <= 3 ? 2 : 1;

static inline int64_t padded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }
static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// ---- writing ----

// The first 2 * half channels of a line as two halves: (x1 cos - x2 sin, x2 cos + x1 sin).
static void rotate(const Attend& a, int64_t position, float* line) {
  const int64_t half = a.rotary_half;
  const float *cosines = a.cos + position * half, *sines = a.sin + position * half;
  for (int64_t i = 0; i < half; i += kLanes) {
    const int n = (int)least(kLanes, half - i);
    const Vec x1 = load(line + i, n), x2 = load(line + half + i, n), c = load(cosines + i, n), s = load(sines + i, n);
    store(line + i, x1 * c - x2 * s, n);
    store(line + half + i, x2 * c + x1 * s, n);
  }
}

template <class From, class To>
static void convert(const From* from, To* to, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const int lanes = (int)least(kLanes, n - i);
    store(to + i, load(from + i, lanes), lanes);
  }
}

// One token's channels of one head. A few tokens on, the same head is fetched: strides hide it from the hardware.
static void read_line(const Heads& x, DType type, int64_t token, int64_t head, float* line, int64_t n) {
  const int64_t at = token * x.token_stride + head * x.head_stride;
  typed(type, x.data, [&](auto* data) {
    const auto later = data + at + kTokensAhead * x.token_stride;
    __builtin_prefetch(later);
    __builtin_prefetch(later + n - 1);
    convert(data + at, line, n);
  });
}

template <class T>
static void write_as(const Attend& a, T*, int64_t begin, int64_t end, float* scratch) {
  const int64_t dim = a.head_dim;
  float* line = scratch;
  T* rounded = (T*)(scratch + padded(dim));
  for (int64_t token = begin; token < end; ++token) {
    const int64_t block = a.slots[token] / a.block_size, offset = a.slots[token] % a.block_size;
    for (int64_t head = 0; head < a.kv_heads; ++head) {
      T* keys = (T*)a.k_blocks.data + block * a.k_blocks.block_stride + head * a.k_blocks.head_stride + offset;
      T* values = (T*)a.v_blocks.data + block * a.v_blocks.block_stride + head * a.v_blocks.head_stride + offset * dim;
      read_line(a.k, a.dtype, token, head, line, dim);
      if (a.rotary_half) rotate(a, a.positions[token], line);
      convert(line, rounded, dim);
      for (int64_t d = 0; d < dim; ++d) keys[d * a.block_size] = rounded[d];
      read_line(a.v, a.dtype, token, head, line, dim);
      convert(line, values, dim);
    }
  }
}

// ---- one tile ----

struct Partial {  // of a chunk, or of all chunks merged so far
  float *peak, *total, *values;  // (rows), (rows), (rows, padded head_dim)
  Partial(float* at, int64_t rows) : peak(at), total(at + padded(rows)), values(at + 2 * padded(rows)) {}
  static int64_t size(int64_t rows, int64_t width) { return 2 * padded(rows) + rows * width; }
};

struct View {  // what a tile is, spelled out
  const Attend& a;
  int64_t group, rows, dim, width, past, present, first_query, first_token, first_head;
  const int32_t* table;

  View(const Attend& args, const Tile& tile) : a(args) {
    group = a.heads / a.kv_heads;
    rows = tile.queries * group;
    dim = a.head_dim;
    width = padded(dim);
    past = a.past_length[tile.row];
    present = a.present_length[tile.row];
    first_query = tile.first;
    first_token = a.query_start[tile.row] + tile.first;
    first_head = tile.kv_head * group;
    table = a.block_table + tile.row * a.table_stride;
  }
  int64_t limit(int64_t row) const {  // keys that a row sees
    return a.causal ? least(past + first_query + row / group + 1, present) : present;
  }
  const float* bias(const Tile& tile, int64_t row) const {
    return a.bias ? a.bias + a.bias_start[tile.row] + (first_query + row / group) * present : nullptr;
  }
};

struct Scratch {
  float *queries, *scores, *keys, *values, *line;
  Partial state, part;
  Scratch(float* at, int64_t rows, int64_t dim, int64_t width)
      : queries(at),
        scores(queries + padded(rows * dim)),
        keys(scores + rows * kChunk),
        values(keys + kChunk * dim),
        line(values + kChunk * width),
        state(line + width, rows),
        part(line + width + Partial::size(rows, width), rows) {}
  static int64_t size(int64_t rows, int64_t dim, int64_t width) {
    return padded(rows * dim) + rows * kChunk + kChunk * (dim + width) + width + 2 * Partial::size(rows, width);
  }
};

// Groups of a tile are equal to within one row.
struct Groups {
  int64_t count, small, extra;
  explicit Groups(int64_t rows) : count((rows + kRows - 1) / kRows), small(rows / count), extra(rows % count) {}
  int64_t first(int64_t i) const { return i * small + least(i, extra); }
  int size(int64_t i) const { return (int)(small + (i < extra)); }
};

// Queries of a group, channel-major (dim, rows), rotated, with the scale and the exponential's base folded in.
static void load_queries(const View& t, const Scratch& s) {
  const Groups groups(t.rows);
  const float scale = t.a.scale * kLog2E;
  for (int64_t i = 0; i < groups.count; ++i) {
    const int64_t first = groups.first(i), size = groups.size(i);
    for (int64_t row = first; row < first + size; ++row) {
      const int64_t token = t.first_token + row / t.group;
      read_line(t.a.q, t.a.dtype, token, t.first_head + row % t.group, s.line, t.dim);
      if (t.a.rotary_half) rotate(t.a, t.a.positions[token], s.line);
      float* to = s.queries + first * t.dim + (row - first);
      for (int64_t d = 0; d < t.dim; ++d) to[d * size] = s.line[d] * scale;
    }
  }
}

// One channel of N vectors of keys against M queries.
template <int M, int N, class T>
KEYPAST_INLINE void score_channel(const float* q, const T* const* keys, int64_t at, Vec (&sums)[M][N]) {
  Vec k[N];
  KEYPAST_UNROLL for (int n = 0; n < N; ++n) k[n] = load(keys[n] + at);
  KEYPAST_UNROLL for (int m = 0; m < M; ++m) {
    const Vec x = set(q[m]);
    KEYPAST_UNROLL for (int n = 0; n < N; ++n) sums[m][n] = fma(x, k[n], sums[m][n]);
  }
}

// scores[m][16 n ..] = sum over d of q[d][m] * keys[n][d][0:16]
template <int M, int N, bool kFetch, class T>
KEYPAST_INLINE void score_tile(const float* q, const T* const* keys, int64_t stride, int64_t dim, float* scores) {
  // A line of the cache holds kStep channels of these 16 keys, or one channel of theirs and their neighbours': fetching
  // every kStep-th channel, from n % kStep on, reaches every line either way.
  constexpr int kStep = 4 / sizeof(T);
  Vec sums[M][N];
  KEYPAST_UNROLL for (int m = 0; m < M; ++m)
    KEYPAST_UNROLL for (int n = 0; n < N; ++n) sums[m][n] = set(0.0f);
  int64_t d = 0;
  for (; d + kStep <= dim; d += kStep) {
    if (kFetch)
      KEYPAST_UNROLL for (int n = 0; n < N; ++n) __builtin_prefetch(keys[n + kAhead] + (d + n % kStep) * stride);
    KEYPAST_UNROLL for (int i = 0; i < kStep; ++i) score_channel(q + (d + i) * M, keys, (d + i) * stride, sums);
  }
  for (; d < dim; ++d) score_channel(q + d * M, keys, d * stride, sums);
  KEYPAST_UNROLL for (int m = 0; m < M; ++m)
    KEYPAST_UNROLL for (int n = 0; n < N; ++n) store(scores + m * kChunk + n * kLanes, sums[m][n]);
}

template <int M, bool kFetch, class T>
static void score_group(const float* q, const T* const* keys, int64_t stride, int64_t dim, int vecs, float* scores) {
  int n = 0;
  if constexpr (kWide<M> >= 4)
    for (; vecs - n >= 4; n += 4) score_tile<M, 4, kFetch>(q, keys + n, stride, dim, scores + n * kLanes);
  if constexpr (kWide<M> >= 2)
    for (; vecs - n >= 2; n += 2) score_tile<M, 2, kFetch>(q, keys + n, stride, dim, scores + n * kLanes);
  for (; n < vecs; ++n) score_tile<M, 1, kFetch>(q, keys + n, stride, dim, scores + n * kLanes);
}

// sums[m][16 n ..] = sum over keys j in order of weights[m][j] * values[j][16 n ..]. From key `whole` on, masked keys
// are stepped over one by one: what lies in their slots must not be touched.
template <int M, int N, bool kFetch, class T>
KEYPAST_INLINE void value_tile(const float* weights, const T* const* values, int64_t offset, int64_t stride, int whole,
                               int keys, float* sums, int64_t sums_stride) {
  Vec acc[M][N];
  KEYPAST_UNROLL for (int m = 0; m < M; ++m)
    KEYPAST_UNROLL for (int n = 0; n < N; ++n) acc[m][n] = set(0.0f);
  int key = 0;
  while (key < whole) {
    const T* row = values[key / kLanes] + offset;
    const T* later = values[key / kLanes + (kFetch ? kAhead : 0)] + offset;
    const int end = (int)least(key + kLanes, whole);
    for (; key < end; ++key, row += stride, later += stride) {
      if (kFetch)
        KEYPAST_UNROLL for (int i = 0; i < N * kLanes; i += 64 / sizeof(T)) __builtin_prefetch(later + i);
      Vec v[N];
      KEYPAST_UNROLL for (int n = 0; n < N; ++n) v[n] = load(row + n * kLanes);
      KEYPAST_UNROLL for (int m = 0; m < M; ++m) {
        const Vec w = set(weights[m * kChunk + key]);
        KEYPAST_UNROLL for (int n = 0; n < N; ++n) acc[m][n] = fma(w, v[n], acc[m][n]);
      }
    }
  }
  for (; key < keys; ++key) {
    const T* row = values[key / kLanes] + offset + key % kLanes * stride;
    KEYPAST_UNROLL for (int m = 0; m < M; ++m) {
      const float weight = weights[m * kChunk + key];
      if (weight < 0) continue;
      const Vec w = set(weight);
      KEYPAST_UNROLL for (int n = 0; n < N; ++n) acc[m][n] = fma(w, load(row + n * kLanes), acc[m][n]);
    }
  }
  KEYPAST_UNROLL for (int m = 0; m < M; ++m)
    KEYPAST_UNROLL for (int n = 0; n < N; ++n) store(sums + m * sums_stride + n * kLanes, acc[m][n]);
}

template <int M, bool kFetch, class T>
static void value_group(const float* weights, const T* const* values, int64_t stride, int whole, int keys, float* sums,
                        int64_t width) {
  int64_t i = 0;
  if constexpr (kWide<M> >= 4)
    for (; width - i >= 4 * kLanes; i += 4 * kLanes)
      value_tile<M, 4, kFetch>(weights, values, i, stride, whole, keys, sums + i, width);
  if constexpr (kWide<M> >= 2)
    for (; width - i >= 2 * kLanes; i += 2 * kLanes)
      value_tile<M, 2, kFetch>(weights, values, i, stride, whole, keys, sums + i, width);
  for (; i < width; i += kLanes) value_tile<M, 1, kFetch>(weights, values, i, stride, whole, keys, sums + i, width);
}

// Adds a row's bias; a key whose bias is -inf scores -inf, whatever it scored.
static void add_bias(float* s, int keys, const float* bias) {
  for (int i = 0; i < keys; i += kLanes) {
    const Vec b = load(bias + i, keys - i);
    store(s + i, hide(fma(b, set(kLog2E), load(s + i)), b, set(kLowest)));
  }
}

// Marks the weights of keys whose bias is -inf. Returns how many keys stand before the first of them.
static int mark_biased(float* s, int keys, const float* bias) {
  int whole = keys;
  for (int i = keys - 1; i >= 0; --i)
    if (bias[i] == kLowest) s[i] = kMasked, whole = i;
  return whole;
}

// Turns a row's `keys` scores into weights and gives their maximum and sum; marks the keys it does not see, up to
// `padding`. Returns how many keys stand before the first one marked.
static int soften(float* s, int keys, int padding, const float* bias, float* peak_out, float* total_out) {
  const int vecs = keys > 0 ? (keys + kLanes - 1) / kLanes : 0, lanes = keys - (vecs - 1) * kLanes;
  if (bias) add_bias(s, keys, bias);
  float* last = s + (vecs - 1) * kLanes;
  if (vecs) store(last, first(load(last), lanes, set(kLowest)));
  Vec top = set(kLowest);
  for (int i = 0; i < vecs; ++i) top = max(load(s + i * kLanes), top);
  float highest = peak(top);
  if (highest == kLowest)  // every key masked, or not a number: the maximum passes over those
    for (int i = 0; i < keys; ++i)
      if (s[i] != s[i]) highest = s[i];
  const bool none = highest == kLowest;
  Vec total = set(0.0f);
  for (int i = 0; i < vecs && !none; ++i) {
    const Vec weights = exp2(load(s + i * kLanes) - set(highest));
    total = total + weights;
    store(s + i * kLanes, weights);
  }
  *peak_out = highest;
  *total_out = sum(total);
  if (vecs) store(last, first(load(last), lanes, set(kMasked)));
  for (int i = none ? 0 : vecs; i * kLanes < padding; ++i) store(s + i * kLanes, set(kMasked));
  return none ? 0 : bias ? mark_biased(s, keys, bias) : keys;
}

// Folds one chunk into what the chunks before it gave. A chunk of which a row saw nothing leaves that row as it was.
static void merge_into(const Partial& state, const Partial& part, int64_t rows, int64_t width) {
  for (int64_t row = 0; row < rows; ++row) {
    const float old_peak = state.peak[row], new_peak = part.peak[row];
    if (new_peak == kLowest) continue;
    const float peak = new_peak > old_peak ? new_peak : old_peak;
    const Vec keep = exp2(set(old_peak - peak)), add = exp2(set(new_peak - peak));
    state.peak[row] = peak;
    state.total[row] = state.total[row] * any(keep) + part.total[row] * any(add);
    float* to = state.values + row * width;
    const float* from = part.values + row * width;
    for (int64_t i = 0; i < width; i += kLanes) store(to + i, fma(load(from + i), add, load(to + i) * keep));
  }
}

static void clear(const Partial& state, int64_t rows, int64_t width) {
  for (int64_t row = 0; row < rows; ++row) state.peak[row] = kLowest, state.total[row] = 0.0f;
  memset(state.values, 0, rows * width * sizeof(float));
}

static void finish(const View& t, const Partial& state) {
  for (int64_t row = 0; row < t.rows; ++row) {
    const int64_t token = t.first_token + row / t.group, head = t.first_head + row % t.group;
    const int64_t at = (token * t.a.heads + head) * t.dim;
    const Vec factor = set(state.peak[row] == kLowest ? 0.0f : 1.0f / state.total[row]);
    float* values = state.values + row * t.width;
    for (int64_t i = 0; i < t.width; i += kLanes) store(values + i, load(values + i) * factor);
    typed(t.a.dtype, t.a.out, [&](auto* out) { convert(values, out + at, t.dim); });
  }
}

// Where one chunk's keys and values are read from, 16 keys at a time: the cache itself, or packed copies as floats.
// `keys` and `values` lie in the order of reading, so that what is read kAhead vectors later stands kAhead further on.
template <class T>
struct Source {
  const T* order[2 * kVecs + kAhead];
  const T **keys, **values;
  int64_t key_stride, value_stride;  // from channel to channel, from key to key
};

// `seen` is how far the task's keys go: behind this chunk come the first keys of the next one, or nothing of use.
template <class T>
static void locate(const View& t, int64_t start, int vecs, int64_t kv_head, int64_t seen, Source<T>* source) {
  const Attend& a = t.a;
  const T *k = (const T*)a.k_blocks.data + kv_head * a.k_blocks.head_stride,
          *v = (const T*)a.v_blocks.data + kv_head * a.v_blocks.head_stride;
  source->keys = source->order;
  source->values = source->order + vecs;
  int64_t index = start / a.block_size, offset = start % a.block_size;
  for (int i = 0; i < vecs + kAhead; ++i) {
    const int64_t block = start + i * kLanes < seen ? t.table[index] : 0;
    const T* at = k + block * a.k_blocks.block_stride + offset;
    if (i < vecs) {
      source->keys[i] = at;
      source->values[i] = v + block * a.v_blocks.block_stride + offset * t.dim;
    } else {
      source->values[i] = at;
    }
    offset += kLanes;
    if (offset == a.block_size) offset = 0, ++index;
  }
  source->key_stride = a.block_size;
  source->value_stride = t.dim;
}

// One key at a time, for block sizes that vectors do not divide.
template <class T>
static void pack_keys(const View& t, int64_t start, int keys, int64_t kv_head, const Scratch& s) {
  const Attend& a = t.a;
  for (int j = 0; j < keys; ++j) {
    const int64_t block = t.table[(start + j) / a.block_size], offset = (start + j) % a.block_size;
    const T* k = (const T*)a.k_blocks.data + block * a.k_blocks.block_stride + kv_head * a.k_blocks.head_stride;
    const T* v = (const T*)a.v_blocks.data + block * a.v_blocks.block_stride + kv_head * a.v_blocks.head_stride;
    float* to = s.keys + j / kLanes * t.dim * kLanes + j % kLanes;
    for (int64_t d = 0; d < t.dim; ++d) store(to + d * kLanes, load(k + offset + d * a.block_size, 1), 1);
    for (int64_t i = 0; i < t.dim; i += kLanes)
      store(s.values + j * t.width + i, load(v + offset * t.dim + i, (int)least(kLanes, t.dim - i)));
  }
}

// Converts and packs once what all groups of a tile then read.
template <class T>
static void pack_vecs(const View& t, const Source<T>& from, int keys, const Scratch& s) {
  for (int i = 0; i * kLanes < keys; ++i)
    for (int64_t d = 0; d < t.dim; ++d) {
      __builtin_prefetch(from.keys[i + kAhead] + d * from.key_stride);
      store(s.keys + (i * t.dim + d) * kLanes, load(from.keys[i] + d * from.key_stride));
    }
  for (int j = 0; j < keys; ++j) {
    const T* row = from.values[j / kLanes] + j % kLanes * from.value_stride;
    const T* later = from.values[j / kLanes + kAhead] + j % kLanes * from.value_stride;
    for (int64_t i = 0; i < t.dim; i += kLanes) {
      __builtin_prefetch(later + i);
      store(s.values + j * t.width + i, load(row + i, (int)least(kLanes, t.dim - i)));
    }
  }
}

static void locate_packed(const View& t, int vecs, const Scratch& s, Source<float>* source) {
  source->keys = source->order;
  source->values = source->order + vecs;
  for (int i = 0; i < vecs; ++i) {
    source->keys[i] = s.keys + i * t.dim * kLanes;
    source->values[i] = s.values + i * t.width * kLanes;
  }
  source->key_stride = kLanes;
  source->value_stride = t.width;
}

template <bool kFetch, class T>
static void attend_chunk(const View& t, const Tile& tile, int64_t start, const Source<T>& source, const Scratch& s,
                         const Partial& part) {
  const Groups groups(t.rows);
  constexpr int kPanel = 4;  // vectors of keys that stay in the nearest cache while every group reads them
  const auto seen = [&](int64_t row) { return (int)most(0, least(kChunk, t.limit(row) - start)); };
  for (int panel = 0; panel * kLanes < seen(t.rows - 1); panel += kPanel)
    for (int64_t i = 0; i < groups.count; ++i) {
      const int64_t row = groups.first(i);
      const int vecs = (seen(row + groups.size(i) - 1) + kLanes - 1) / kLanes - panel;
      if (vecs <= 0) continue;
      sized(groups.size(i), [&](auto m) {
        score_group<m.value, kFetch>(s.queries + row * t.dim, source.keys + panel, source.key_stride, t.dim,
                                     vecs < kPanel ? vecs : kPanel, s.scores + row * kChunk + panel * kLanes);
      });
    }
  for (int64_t i = 0; i < groups.count; ++i) {
    const int64_t begin = groups.first(i), end = begin + groups.size(i);
    const int keys = seen(end - 1);
    int whole = keys;
    for (int64_t row = begin; row < end; ++row) {
      const float* bias = t.bias(tile, row);
      const int clear = soften(s.scores + row * kChunk, seen(row), keys, bias ? bias + start : nullptr, part.peak + row,
                               part.total + row);
      whole = (int)least(whole, clear);
    }
    sized(groups.size(i), [&](auto m) {
      value_group<m.value, kFetch>(s.scores + begin * kChunk, source.values, source.value_stride, whole, keys,
                                   part.values + begin * t.width, t.width);
    });
  }
}

static void pack_extras(const View& t, int64_t start, int keys, int64_t kv_head, const Scratch& s) {
  for (int j = 0; j < keys; ++j) {
    const int64_t at = ((start + j) * t.a.kv_heads + kv_head) * t.dim;
    float* to = s.keys + j / kLanes * t.dim * kLanes + j % kLanes;
    for (int64_t d = 0; d < t.dim; ++d) to[d * kLanes] = t.a.extra_k[at + d];
    for (int64_t i = 0; i < t.dim; i += kLanes)
      store(s.values + j * t.width + i, load(t.a.extra_v + at + i, (int)least(kLanes, t.dim - i)));
  }
}

// What every row has seen before the first chunk: nothing, or the layer's own keys. The queries are loaded already.
static void begin_rows(const View& t, const Tile& tile, const Scratch& s) {
  clear(s.state, t.rows, t.width);
  if (!t.a.extras) return;
  Attend unmasked = t.a;
  unmasked.causal = false, unmasked.bias = nullptr;
  View own(unmasked, tile);
  own.present = t.a.extras;
  for (int64_t start = 0; start < own.present; start += kChunk) {
    const int keys = (int)least(kChunk, own.present - start);
    Source<float> copies;
    pack_extras(own, start, keys, tile.kv_head, s);
    locate_packed(own, (keys + kLanes - 1) / kLanes, s, &copies);
    attend_chunk<false>(own, tile, start, copies, s, s.part);
    merge_into(s.state, s.part, t.rows, t.width);
  }
}

template <class T>
static void attend_as(const Attend& a, const T*, const Tile& tile, int begin, int end, float* scratch,
                      float* partials) {
  const View t(a, tile);
  const Scratch s(scratch, t.rows, t.dim, t.width);
  const bool even = a.block_size % kLanes == 0;  // no vector of keys crosses a block's end
  const bool direct = even && t.dim == t.width && (t.rows <= kDirectRows || sizeof(T) == sizeof(float));
  load_queries(t, s);
  if (!partials) begin_rows(t, tile, s);
  for (int chunk = begin; chunk < end; ++chunk) {
    const int64_t start = (int64_t)chunk * kChunk;
    const int keys = (int)least(kChunk, t.limit(t.rows - 1) - start), vecs = (keys + kLanes - 1) / kLanes;
    const int64_t size = Partial::size(t.rows, t.width);
    const Partial part = partials ? Partial(partials + (chunk - begin) * size, t.rows) : s.part;
    Source<T> source;
    if (even) locate(t, start, vecs, tile.kv_head, least((int64_t)end * kChunk, t.limit(t.rows - 1)), &source);
    if (direct) {
      attend_chunk<true>(t, tile, start, source, s, part);
    } else {
      Source<float> copies;
      if (even) pack_vecs(t, source, keys, s);
      else pack_keys<T>(t, start, keys, tile.kv_head, s);
      locate_packed(t, vecs, s, &copies);
      attend_chunk<false>(t, tile, start, copies, s, part);
    }
    if (!partials) merge_into(s.state, part, t.rows, t.width);
  }
  if (!partials) finish(t, s.state);
}

// ---- what the driver calls ----

static int64_t scratch_size(const Attend& a, int64_t rows) {
  return Scratch::size(rows, a.head_dim, padded(a.head_dim));
}

static int64_t partial_size(const Attend& a, int64_t rows) { return Partial::size(rows, padded(a.head_dim)); }

static void write(const Attend& a, int64_t begin, int64_t end, float* scratch) {
  typed(a.cache_dtype, a.k_blocks.data, [&](auto* pool) { write_as(a, pool, begin, end, scratch); });
}

static void attend(const Attend& a, const Tile& tile, int begin, int end, float* scratch, float* partials) {
  typed(a.cache_dtype, a.k_blocks.data, [&](auto* pool) { attend_as(a, pool, tile, begin, end, scratch, partials); });
}

static void merge(const Attend& a, const Tile& tile, float* scratch, const float* partials) {
  const View t(a, tile);
  const Scratch s(scratch, t.rows, t.dim, t.width);
  if (a.extras) load_queries(t, s);
  begin_rows(t, tile, s);
  for (int chunk = 0; chunk < tile.chunks; ++chunk)
    merge_into(s.state, Partial(const_cast<float*>(partials) + chunk * Partial::size(t.rows, t.width), t.rows), t.rows,
               t.width);
  finish(t, s.state);
}

}  // namespace keypast::KEYPAST_VARIANT
