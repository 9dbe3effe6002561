// Attention over blocks: rotate and write the new keys and values, then attend one tile of queries chunk by chunk.
//
// A tile's rows are its (query, head) pairs, query-major, taken up to kRows at a time: a group. For a chunk of keys:
//   scores    group x 16 keys at a time, channels in order; a block's keys lie across a register
//   soften    per row: maximum, 2^(score - maximum), sum; masked keys are marked by a negative weight
//   values    group x 16 channels at a time, keys in order
//   merge     the chunk's (maximum, sum, weighted values) into the row's
// What a row starts from are the layer's own keys, chunks that come before the first one of the past.
// Several batch rows' tiles may be attended as one. Of a chunk, the keys that lie in the same blocks for all of them
// are attended by all groups; then each tile attends to the keys behind those, its tail.
// Small tiles of one row's kv heads take turns, 16 keys each: a block holds all heads' keys one behind the other.
// Each row's own sequence of operations is the same whatever else is in the tile, or beside it.
#pragma once
#include "products.h"

namespace keypast::KEYPAST_VARIANT {

constexpr int kRows = kMostRows;  // per group: 6 x 4 accumulators, 4 keys and a broadcast fill 32 registers
constexpr int kVecs = kChunk / kLanes;
constexpr int kAhead = 4;  // vectors of keys or values between fetching and reading them
constexpr int kAheadAside = 1;  // likewise where others are read in between
constexpr int kTokensAhead = 4;  // tokens between fetching and reading q, k and v
constexpr float kLowest = -__builtin_inff();
constexpr float kLog2E = 1.4426950408889634f;

static inline int64_t padded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

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

struct Query {
  int64_t token, limit;  // limit: keys that it sees
  const float* bias;
};

struct View {  // what one or several tiles are, spelled out
  const Attend& a;
  const Company company;
  int64_t group, rows, dim, width, kv_head, first_head;
  Query queries[kTileRows];  // of all tiles

  View(const Attend& args, const Company& tiles) : a(args), company(tiles) {
    group = a.heads / a.kv_heads;
    dim = a.head_dim;
    width = padded(dim);
    kv_head = tile(0).kv_head;
    first_head = kv_head * group;
    int64_t n = 0;
    for (int64_t m = 0; m < company.count; ++m)
      for (int64_t i = 0; i < tile(m).queries; ++i) queries[n++] = query_of(tile(m).row, tile(m).first + i);
    rows = n * group;
  }
  Query query_of(int64_t row, int64_t i) const {
    const int64_t present = a.present_length[row];
    return {a.query_start[row] + i, a.causal ? least(a.past_length[row] + i + 1, present) : present,
            a.bias ? a.bias + a.bias_start[row] + i * present : nullptr};
  }
  const Tile& tile(int64_t m) const { return company.tiles[company.members[m]]; }
  const int32_t* table(int64_t m) const { return a.block_table + tile(m).row * a.table_stride; }
  int64_t limit(int64_t row) const { return queries[row / group].limit; }
  int64_t limit(int64_t row, int64_t end) const {  // of rows [row, end)
    int64_t top = 0;
    for (int64_t i = row / group; i * group < end; ++i) top = most(top, queries[i].limit);
    return top;
  }
  // How many of `keys` keys from a chunk's start on lie in the same blocks for all tiles: whole vectors, or all keys.
  int common(int64_t start, int keys) const {
    if (company.count == 1) return keys;
    int64_t same = keys;
    for (int64_t m = 0, row = 0; m < company.count; row += tile(m++).queries * group) {
      same = least(same, limit(row, row + tile(m).queries * group) - start);
      const int64_t first = start / a.block_size, end = (start + most(same, 0) + a.block_size - 1) / a.block_size;
      int64_t block = first;
      while (block < end && table(m)[block] == table(0)[block]) ++block;
      if (block < end) same = least(same, block * a.block_size - start);
    }
    return (int)(most(same, 0) / kLanes * kLanes);
  }
};

struct Scratch {  // queries, keys and values packed as the products want them, each step in the space of a float
  float *queries, *scores, *keys, *values, *line;
  int32_t* whole;  // of each row in a chunk, keys before the first one masked
  Partial state, part;
  Scratch(float* at, int64_t rows, int64_t dim, int64_t width)
      : queries(at),
        scores(queries + padded(rows * dim)),
        keys(scores + rows * kChunk),
        values(keys + kChunk * dim),
        line(values + kChunk * width),
        whole((int32_t*)(line + width)),
        state(line + width + padded(rows), rows),
        part(state.peak + Partial::size(rows, width), rows) {}
  static int64_t size(int64_t rows, int64_t dim, int64_t width) {
    return padded(rows * dim) + rows * kChunk + kChunk * (dim + width) + width + padded(rows) +
           2 * Partial::size(rows, width);
  }
};

template <class Products>
static inline typename Products::Packed* packed(float* at) {
  return (typename Products::Packed*)at;
}
template <class Products>
static inline int64_t steps_of(int64_t n) {
  return (n + Products::step - 1) / Products::step;
}

// Groups are equal to within one row.
struct Groups {
  int64_t count, small, extra;
  explicit Groups(int64_t rows) : count((rows + kRows - 1) / kRows), small(rows / count), extra(rows % count) {}
  int64_t first(int64_t i) const { return i * small + least(i, extra); }
  int size(int64_t i) const { return (int)(small + (i < extra)); }
};

// As the products want them, rotated, with the scale and the exponential's base folded in.
template <class Products>
static void load_queries(const View& t, const Scratch& s) {
  const Groups groups(t.rows);
  const Vec scale = set(t.a.scale * kLog2E);
  const int64_t steps = steps_of<Products>(t.dim);
  for (int64_t i = 0; i < groups.count; ++i) {
    const int64_t first = groups.first(i), size = groups.size(i);
    for (int64_t row = first; row < first + size; ++row) {
      const int64_t token = t.queries[row / t.group].token;
      read_line(t.a.q, t.a.dtype, token, t.first_head + row % t.group, s.line, t.dim);
      if (t.a.rotary_half) rotate(t.a, t.a.positions[token], s.line);
      for (int64_t d = 0; d < t.dim; d += kLanes) store(s.line + d, load(s.line + d) * scale);
      Products::put_queries(s.line, t.dim, packed<Products>(s.queries) + first * steps + (row - first), size);
    }
  }
}

// Adds a row's bias; a key whose bias is -inf scores -inf, whatever it scored.
static void add_bias(float* s, int keys, const float* bias) {
  for (int i = 0; i < keys; i += kLanes) {
    const Vec b = load(bias + i, keys - i);
    store(s + i, hide(fma(b, set(kLog2E), load(s + i)), b, set(kLowest)));
  }
}

// Marks the weights of keys whose bias is -inf. Returns how many keys stand before the first of them.
template <class Products>
static int mark_biased(float* s, int keys, const float* bias) {
  int whole = keys;
  for (int i = keys - 1; i >= 0; --i)
    if (bias[i] == kLowest) Products::mask(s, i), whole = i;
  return whole;
}

// Turns a row's `keys` scores into weights and gives their maximum and sum; marks the keys it does not see, up to
// `padding`. Returns how many keys stand before the first one marked.
template <class Products>
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
  *peak_out = highest;
  *total_out = none ? 0.0f : sum(Products::weigh(s, vecs, set(highest)));
  for (int i = none ? 0 : keys / kLanes; i * kLanes < padding; ++i)
    Products::mask_behind(s, i, none ? 0 : (int)most(0, keys - i * kLanes));
  return none ? 0 : bias ? mark_biased<Products>(s, keys, bias) : keys;
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
    const int64_t token = t.queries[row / t.group].token, head = t.first_head + row % t.group;
    const int64_t at = (token * t.a.heads + head) * t.dim;
    const Vec factor = set(state.peak[row] == kLowest ? 0.0f : 1.0f / state.total[row]);
    float* values = state.values + row * t.width;
    for (int64_t i = 0; i < t.width; i += kLanes) store(values + i, load(values + i) * factor);
    typed(t.a.dtype, t.a.out, [&](auto* out) { convert(values, out + at, t.dim); });
  }
}

// Where one chunk's keys and values are read from, 16 keys at a time: the cache itself, or packed copies as floats.
// `keys` and `values` lie in the order of reading: what is read `ahead` vectors later stands `ahead` further on.
template <class T>
struct Source {
  const T* order[2 * kVecs + kAhead];
  const T **keys, **values;
  int64_t key_stride, value_stride;  // from channel to channel, from key to key
  int begin = 0;                     // the key of the chunk that these start with
  int ahead = kAhead;                // at most; how far to fetch
};

// Keys from `start` on as a tile's table places them. `seen` is how far a task's keys go: behind these vectors come the
// first keys of the next chunk, or nothing of use.
template <class T>
static void locate(const View& t, const int32_t* table, int64_t start, int vecs, int64_t seen, Source<T>* source) {
  const Attend& a = t.a;
  const T *k = (const T*)a.k_blocks.data + t.kv_head * a.k_blocks.head_stride,
          *v = (const T*)a.v_blocks.data + t.kv_head * a.v_blocks.head_stride;
  source->keys = source->order;
  source->values = source->order + vecs;
  int64_t index = start / a.block_size, offset = start % a.block_size;
  for (int i = 0; i < vecs + kAhead; ++i) {
    const int64_t block = start + i * kLanes < seen ? table[index] : 0;
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
template <class Products, class T>
static void pack_keys(const View& t, int64_t start, int keys, const Scratch& s) {
  const Attend& a = t.a;
  const auto value = [](const T* at) { return any(load(at, 1)); };
  for (int j = 0; j < keys; ++j) {
    const int64_t block = t.table(0)[(start + j) / a.block_size], offset = (start + j) % a.block_size;
    const T* k = (const T*)a.k_blocks.data + block * a.k_blocks.block_stride + t.kv_head * a.k_blocks.head_stride;
    const T* v = (const T*)a.v_blocks.data + block * a.v_blocks.block_stride + t.kv_head * a.v_blocks.head_stride;
    for (int64_t d = 0; d < t.dim; ++d)
      Products::put_key(packed<Products>(s.keys), packed<Products>(s.values), j, d, t.dim, t.width,
                        value(k + offset + d * a.block_size), value(v + offset * t.dim + d));
  }
}

static inline int at_most_two(int64_t n) { return n < 2 ? (int)n : 2; }

// Converts and packs once what all groups of a tile then read.
template <class Products, class T>
static void pack_vecs(const View& t, const Source<T>& from, int keys, const Scratch& s) {
  constexpr int kStep = Products::step;
  const int64_t stride = from.key_stride;
  auto to = packed<Products>(s.keys);
  for (int i = 0; i * kLanes < keys; ++i)
    for (int64_t d = 0; d < t.dim; d += kStep, to += kLanes) {
      __builtin_prefetch(from.keys[i + from.ahead] + d * stride);
      Products::put_channels(from.keys[i] + d * stride, stride, at_most_two(t.dim - d), to);
    }
  to = packed<Products>(s.values);
  for (int j = 0; j < keys; j += kStep, to += t.width) {
    const T* row = from.values[j / kLanes] + j % kLanes * from.value_stride;
    const T* later = from.values[j / kLanes + from.ahead] + j % kLanes * from.value_stride;
    for (int64_t i = 0; i < t.dim; i += kLanes) {
      __builtin_prefetch(later + i * kStep);
      Products::put_values(row + i, from.value_stride, (int)least(kLanes, t.dim - i), to + i);
    }
  }
}

template <class Products>
static void locate_packed(const View& t, int vecs, const Scratch& s, Source<typename Products::Packed>* source) {
  source->keys = source->order;
  source->values = source->order + vecs;
  for (int i = 0; i < vecs; ++i) {
    source->keys[i] = packed<Products>(s.keys) + i * steps_of<Products>(t.dim) * kLanes;
    source->values[i] = packed<Products>(s.values) + i * t.width * kLanes / Products::step;
  }
  source->key_stride = kLanes;
  source->value_stride = t.width;
}

// Rows [first, end) and, of the chunk at `start`, the keys [begin, until) that they attend to.
struct Span {
  int64_t first, end, start;
  int begin, until;
};

// Calls f with the span's rows of each group, `row` to `end`, which are neighbours in the group's queries.
template <class F>
static void each_group(const View& t, const Span& span, F f) {
  const Groups groups(t.rows);
  for (int64_t i = 0; i < groups.count; ++i) {
    const int64_t first = groups.first(i), row = most(first, span.first), end = least(groups.first(i + 1), span.end);
    if (row < end) f(row, end, first, groups.size(i));
  }
}

template <class Products, bool kFetch, class T>
static void score_span(const View& t, const Span& span, const Source<T>& source, const Scratch& s) {
  constexpr int kPanel = 4;  // vectors of keys that stay in the nearest cache while every group reads them
  for (int panel = 0; span.begin + panel * kLanes < span.until; panel += kPanel)
    each_group(t, span, [&](int64_t row, int64_t end, int64_t first, int64_t size) {
      const int64_t seen = least(span.until, t.limit(row, end) - span.start) - span.begin;
      const int vecs = (int)((seen + kLanes - 1) / kLanes) - panel;
      if (vecs <= 0) return;
      sized((int)(end - row), [&](auto m) {
        const auto queries = packed<Products>(s.queries) + first * steps_of<Products>(t.dim) + (row - first);
        const T* const* keys = source.keys + (span.begin - source.begin) / kLanes + panel;
        score_group<Products, m.value, kFetch>(queries, size, keys, source.ahead, source.key_stride, t.dim,
                                               vecs < kPanel ? vecs : kPanel,
                                               s.scores + row * kChunk + span.begin + panel * kLanes);
      });
    });
}

template <class Products>
static void soften_rows(const View& t, const Span& chunk, const Scratch& s, const Partial& part) {
  each_group(t, chunk, [&](int64_t first, int64_t end, int64_t, int64_t) {
    const int padding = (int)least(chunk.until, t.limit(first, end) - chunk.start);
    for (int64_t row = first; row < end; ++row) {
      const float* bias = t.queries[row / t.group].bias;
      const int keys = (int)most(0, least(chunk.until, t.limit(row) - chunk.start));
      s.whole[row] = soften<Products>(s.scores + row * kChunk, keys, padding, bias ? bias + chunk.start : nullptr,
                                      part.peak + row, part.total + row);
    }
  });
}

template <class Products, bool kFetch, class T>
static void value_span(const View& t, const Span& span, const Source<T>& source, const Scratch& s,
                       const Partial& part) {
  each_group(t, span, [&](int64_t row, int64_t end, int64_t, int64_t) {
    const int until = (int)most(span.begin, least(span.until, t.limit(row, end) - span.start));
    int whole = until;
    for (int64_t i = row; i < end; ++i) whole = (int)least(whole, s.whole[i]);
    const Keys keys = {span.begin, (int)most(span.begin, whole), until};
    const T* const* values = source.values + (span.begin - source.begin) / kLanes;
    sized((int)(end - row), [&](auto m) {
      value_group<Products, m.value, kFetch>(s.scores + row * kChunk, values, source.ahead, source.value_stride, keys,
                                             part.values + row * t.width, t.width);
    });
  });
}

// Calls f with what each tile of several sees of a chunk from key `common` on.
template <class T, class F>
static void each_tail(const View& t, const Span& chunk, int common, F f) {
  if (t.company.count == 1) return;
  for (int64_t m = 0, row = 0, end; m < t.company.count; ++m, row = end) {
    end = row + t.tile(m).queries * t.group;
    const int until = (int)least(chunk.until, t.limit(row, end) - chunk.start);
    if (until <= common) continue;
    Source<T> source;
    const int64_t start = chunk.start + common;
    locate(t, t.table(m), start, (until - common + kLanes - 1) / kLanes, chunk.start + until, &source);
    source.begin = common;
    f(Span{row, end, chunk.start, common, until}, source);
  }
}

// One of those that attend to the same keys side by side, each for its head: its rows and where they work.
struct Side {
  View t;
  Scratch s;
  Partial part;
};

// Calls f with each side and the keys [begin, until) that are its next. Several sides read one run of memory together,
// which comes faster than its pieces would.
template <class F>
static void in_turns(const Side* sides, int64_t count, int keys, F f) {
  const int stride = count > 1 ? kLanes : kChunk;
  for (int begin = 0; begin < keys; begin += stride)
    for (int64_t i = 0; i < count; ++i) f(i, begin, (int)least(begin + stride, keys));
}

// Attends to a chunk of which each side's `source` has the first `common` keys; T is what the cache holds.
template <class Products, bool kFetch, class T, class From>
static void attend_chunk(Side* sides, int64_t count, const Span& chunk, int common, const Source<From>* sources) {
  in_turns(sides, count, common, [&](int64_t i, int begin, int until) {
    const Span some = {chunk.first, chunk.end, chunk.start, begin, until};
    score_span<Products, kFetch>(sides[i].t, some, sources[i], sides[i].s);
  });
  for (int64_t i = 0; i < count; ++i) {
    const Side& side = sides[i];
    each_tail<T>(side.t, chunk, common, [&](const Span& tail, const Source<T>& own) {
      score_span<Products, true>(side.t, tail, own, side.s);
    });
    soften_rows<Products>(side.t, chunk, side.s, side.part);
  }
  in_turns(sides, count, common, [&](int64_t i, int begin, int until) {
    const Span some = {chunk.first, chunk.end, chunk.start, begin, until};
    value_span<Products, kFetch>(sides[i].t, some, sources[i], sides[i].s, sides[i].part);
  });
  for (int64_t i = 0; i < count; ++i) {
    const Side& side = sides[i];
    each_tail<T>(side.t, chunk, common, [&](const Span& tail, const Source<T>& own) {
      value_span<Products, true>(side.t, tail, own, side.s, side.part);
    });
  }
}

template <class Products>
static void pack_extras(const View& t, int64_t start, int keys, const Scratch& s) {
  for (int j = 0; j < keys; ++j) {
    const int64_t at = ((start + j) * t.a.kv_heads + t.kv_head) * t.dim;
    for (int64_t d = 0; d < t.dim; ++d)
      Products::put_key(packed<Products>(s.keys), packed<Products>(s.values), j, d, t.dim, t.width, t.a.extra_k[at + d],
                        t.a.extra_v[at + d]);
  }
}

// What every row of a tile has seen before the first chunk: nothing, or the layer's own keys. The queries are loaded
// already.
template <class Products, class T>
static void begin_rows(const View& t, const T*, const Scratch& s) {
  clear(s.state, t.rows, t.width);
  if (!t.a.extras) return;
  View own = t;
  for (Query& query : own.queries) query.limit = t.a.extras, query.bias = nullptr;
  for (int64_t start = 0; start < t.a.extras; start += kChunk) {
    const int keys = (int)least(kChunk, t.a.extras - start);
    Source<typename Products::Packed> copies;
    pack_extras<Products>(own, start, keys, s);
    locate_packed<Products>(own, (keys + kLanes - 1) / kLanes, s, &copies);
    Side side{own, s, s.part};
    attend_chunk<Products, false, T>(&side, 1, {0, t.rows, start, 0, keys}, keys, &copies);
    merge_into(s.state, s.part, t.rows, t.width);
  }
}

// Where one of a tile's chunks leaves its partial.
static Partial place_of(const View& t, int64_t m, int chunk, float* partials) {
  const int64_t rows = t.tile(m).queries * t.group;
  return {partials + t.tile(m).partials + chunk * Partial::size(rows, t.width), rows};
}

// What was computed together goes to each tile's own place.
static void hand_out(const View& t, int chunk, const Partial& part, float* partials) {
  for (int64_t m = 0, row = 0; m < t.company.count; row += t.tile(m++).queries * t.group) {
    const int64_t rows = t.tile(m).queries * t.group;
    const Partial own = place_of(t, m, chunk, partials);
    memcpy(own.peak, part.peak + row, rows * sizeof(float));
    memcpy(own.total, part.total + row, rows * sizeof(float));
    memcpy(own.values, part.values + row * t.width, rows * t.width * sizeof(float));
  }
}

template <class Products, class T>
static void attend_as(const Attend& a, const T* pool, const Company* companies, int64_t count, int begin, int end,
                      float* scratch, float* partials) {
  const auto side = [&](int64_t i) {
    const View t(a, companies[least(i, count - 1)]);
    const Scratch s(scratch + i * Scratch::size(t.rows, t.dim, t.width), t.rows, t.dim, t.width);
    return Side{t, s, s.part};
  };
  Side sides[] = {side(0), side(1), side(2), side(3)};
  static_assert(sizeof sides == kBeside * sizeof(Side));
  const View& t = sides[0].t;
  const bool even = a.block_size % kLanes == 0;  // no vector of keys crosses a block's end
  const bool direct = even && t.dim == t.width && (t.rows <= Products::direct_rows || sizeof(T) == sizeof(float));
  const bool alone = t.company.count == 1, finished = t.tile(0).partials < 0;
  const int64_t seen = least((int64_t)end * kChunk, t.limit(0, t.rows));
  for (Side* own = sides; own < sides + count; ++own) {
    load_queries<Products>(own->t, own->s);
    if (finished) begin_rows<Products>(own->t, pool, own->s);
  }
  for (int chunk = begin; chunk < end; ++chunk) {
    const int64_t start = (int64_t)chunk * kChunk;
    const int keys = (int)least(kChunk, seen - start), common = t.common(start, keys);
    const int vecs = (common + kLanes - 1) / kLanes;
    const Span all = {0, t.rows, start, 0, keys};
    Source<T> sources[kBeside];
    for (int64_t i = 0; i < count; ++i) {
      const View& own = sides[i].t;
      if (!finished && alone) sides[i].part = place_of(own, 0, chunk, partials);
      if (count > 1) sources[i].ahead = kAheadAside;
      if (even) locate(own, own.table(0), start, vecs, common == keys ? seen : start + common, &sources[i]);
    }
    if (direct) {
      attend_chunk<Products, true, T>(sides, count, all, common, sources);
    } else {
      Source<typename Products::Packed> copies[kBeside];
      for (int64_t i = 0; i < count; ++i) {
        if (even) pack_vecs<Products>(sides[i].t, sources[i], common, sides[i].s);
        else pack_keys<Products, T>(sides[i].t, start, common, sides[i].s);
        locate_packed<Products>(sides[i].t, vecs, sides[i].s, &copies[i]);
      }
      attend_chunk<Products, false, T>(sides, count, all, common, copies);
    }
    for (int64_t i = 0; i < count; ++i) {
      if (finished) merge_into(sides[i].s.state, sides[i].part, t.rows, t.width);
      else if (!alone) hand_out(sides[i].t, chunk, sides[i].part, partials);
    }
  }
  for (int64_t i = 0; finished && i < count; ++i) finish(sides[i].t, sides[i].s.state);
}

// ---- what the driver calls ----

static int64_t scratch_size(const Attend& a, int64_t rows) {
  return Scratch::size(rows, a.head_dim, padded(a.head_dim));
}

static int64_t partial_size(const Attend& a, int64_t rows) { return Partial::size(rows, padded(a.head_dim)); }

static void write(const Attend& a, int64_t begin, int64_t end, float* scratch) {
  typed(a.cache_dtype, a.k_blocks.data, [&](auto* pool) { write_as(a, pool, begin, end, scratch); });
}

// Calls f with the products to use and a pointer of what the cache holds. Models of bfloat16 round each result to it
// anyway, so they multiply pairs of it where the processor does; a past in float32 asks for more.
template <bool kBf16, class F>
static void with_products(const Attend& a, F f) {
  typed(a.cache_dtype, a.k_blocks.data, [&](auto* pool) {
#if defined(__AVX512F__)
    if constexpr (kBf16 && sizeof(*pool) == 2)
      if (a.dtype == DType::bf16) return f(InPairs{}, pool);
#endif
    f(InFloats{}, pool);
  });
}

template <bool kBf16>
static void attend(const Attend& a, const Company* companies, int64_t count, int begin, int end, float* scratch,
                   float* partials) {
  with_products<kBf16>(a, [&](auto products, auto* pool) {
    attend_as<decltype(products)>(a, pool, companies, count, begin, end, scratch, partials);
  });
}

template <bool kBf16>
static void merge(const Attend& a, const Tile& tile, float* scratch, float* partials) {
  const int32_t itself = 0;
  const View t(a, {&tile, &itself, 1});
  const Scratch s(scratch, t.rows, t.dim, t.width);
  with_products<kBf16>(a, [&](auto products, auto* pool) {
    if (a.extras) load_queries<decltype(products)>(t, s);
    begin_rows<decltype(products)>(t, pool, s);
  });
  for (int chunk = 0; chunk < tile.chunks; ++chunk)
    merge_into(s.state, place_of(t, 0, chunk, partials), t.rows, t.width);
  finish(t, s.state);
}

}  // namespace keypast::KEYPAST_VARIANT
