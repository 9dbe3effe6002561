// What the binding, the driver and the kernel variants say to each other: plain structs, no torch, no templates.
#pragma once
#include <cstdint>

namespace keypast {

// Keys are cut at multiples of kChunk by absolute position. Every chunk computes its own maximum, sum and weighted
// values from scratch, and chunks are merged in order, so a query's bits do not depend on how work is shared out.
constexpr int kChunk = 512;
constexpr int kLanes = 16;  // keys (or channels) in one vector, on every instruction set
constexpr int kBeside = 4;  // kv heads attended side by side
constexpr int kTileRows = 96;  // (query, head) pairs in one tile, unless a single query has more heads

enum class DType { f16, bf16, f32 };

inline constexpr int64_t bytes_of(DType type) { return type == DType::f32 ? 4 : 2; }

// Rows of the last axis under up to two leading axes: row i starts at element
// (i / inner) * outer_stride + (i % inner) * inner_stride.
struct Rows {
  void* data;
  int64_t inner, outer_stride, inner_stride;
};

struct Heads {  // (tokens, heads, head_dim), last axis contiguous
  void* data;
  int64_t token_stride, head_stride;
};

struct Pool {  // (blocks, kv_heads, ...), the last two axes contiguous
  void* data;
  int64_t block_stride, head_stride;
};

struct Attend {
  Heads q, k, v;  // of `tokens` queries, `written` keys and values
  Pool k_blocks, v_blocks;
  void* out;  // (tokens, heads * head_dim), contiguous
  DType dtype, cache_dtype;
  const int32_t *query_start, *past_length, *present_length, *block_table;
  const int64_t *positions, *slots;
  const float *bias, *cos, *sin;  // each may be null
  const int64_t* bias_start;
  // The layer's own keys and values, (extras, kv_heads, head_dim), contiguous: every query sees them, nothing hides them.
  const float *extra_k, *extra_v;
  int64_t tokens, written, extras, rows, heads, kv_heads, head_dim, blocks, block_size, table_width, table_stride;
  int64_t rotary_half, rotary_length;
  bool causal;
  float scale;
};

// Queries [first, first + queries) of a row, for all the query heads that read one kv head.
struct Tile {
  int32_t row, kv_head, first, queries;
  int32_t chunks;    // chunks its longest-sighted query sees
  int64_t partials;  // offset of its chunk partials when several tasks share the tile, else -1
};

// Tiles of one kv head whose chunks are attended together: keys that lie in the same blocks for all are read once.
struct Company {
  const Tile* tiles;
  const int32_t* members;  // indices of `tiles`
  int64_t count;
};

struct Norm {
  Rows x, residual;  // residual.data may be null
  void* weight;
  void *out, *sum;  // contiguous; sum is used only with a residual
  DType dtype, weight_dtype;
  int64_t rows, width;
  float eps;
};

struct Gate {
  Rows x;
  void* out;  // contiguous (rows, width)
  DType dtype;
  int64_t rows, width;  // x rows hold 2 * width
};

// y = x W^T + b. W is stored as [blocks of kOutputs outputs][groups of kGroup inputs], padded with zeros. Inside a group:
// f32, f16: [kGroup inputs][kOutputs outputs]
// bf16:     [kGroup / 2 pairs][kOutputs outputs][2 inputs]
// int8:     a bfloat16 scale for each output, then [2 halves][kGroup / 2 pairs][16 outputs][2 inputs]
constexpr int kGroup = 32;
constexpr int kOutputs = 32;
constexpr int64_t kRowsAtOnce = 192;  // of a linear: their inputs stay in the second cache while weights pass by

enum class WeightType { f16, bf16, f32, int8 };

inline constexpr int64_t group_bytes(WeightType type) {
  const int64_t size = type == WeightType::int8 ? 1 : type == WeightType::f32 ? 4 : 2;
  return kOutputs * kGroup * size + (type == WeightType::int8 ? 2 * kOutputs : 0);
}

struct Weight {
  const char* data;
  const float* bias;  // (out,)
  int64_t in, out;
  WeightType type;
  int64_t groups() const { return (in + kGroup - 1) / kGroup; }
  int64_t blocks() const { return (out + kOutputs - 1) / kOutputs; }
  int64_t block_bytes() const { return groups() * group_bytes(type); }
  const char* block(int64_t i) const { return data + i * block_bytes(); }
};

struct Linear {
  Weight weight;
  Rows x;       // (rows, in)
  void* out;    // (rows, out), contiguous
  DType dtype, out_dtype;
  int64_t rows;
  float* scratch;  // scratch_floats(), for x as the products want it
  int64_t width() const { return weight.groups() * kGroup; }
  // Integers have a scale a group, which lie behind all the values.
  int64_t scratch_floats() const { return rows * (width() + weight.groups()); }
};

struct DecoderBlock {  // of sizes that all blocks share
  void *attention_norm, *q_norm, *k_norm, *feed_forward_norm;  // q_norm and k_norm may be null
  Weight qkv, o_proj, gate_up, down_proj;
};

struct Decoder {
  const DecoderBlock* blocks;
  void* x;      // (tokens, hidden), the residual stream, in place
  void* delta;  // (tokens, hidden), what the last block gives and nobody has added
  void* qkv;    // (tokens, heads + 2 * kv_heads, head_dim)
  // Over the first layer's pool; each further one lies these many bytes on. It reads q and k in qkv, or with head norms
  // where those put them, (tokens, heads, head_dim) contiguous.
  Attend attend;
  int64_t k_layer_bytes, v_layer_bytes;
  int64_t layers, hidden, inner;
  DType norm_dtype;  // of norms' weights
  float eps;
};

// The same source compiled for one instruction set.
struct Variant {
  const char* name;
  // Floats of scratch one thread needs, and of one chunk's partial, for a tile of `rows` (query, head) rows.
  int64_t (*scratch_size)(const Attend&, int64_t rows);
  int64_t (*partial_size)(const Attend&, int64_t rows);
  void (*write)(const Attend&, int64_t first_token, int64_t last_token, float* scratch);
  // Attends chunks [begin, end), for up to kBeside companies: several of them are one tile each, of different heads of
  // the same queries, and each has its own scratch_size() of `scratch`. A tile with a place in `partials` leaves one per
  // chunk there; one without, which is alone in its company, is finished.
  void (*attend)(const Attend&, const Company*, int64_t companies, int begin, int end, float* scratch,
                 float* partials);
  // Of a tile that left partials: makes its output of them.
  void (*merge)(const Attend&, const Tile&, float* scratch, float* partials);
  void (*rms_norm)(const Norm&, int64_t begin, int64_t end);
  void (*silu_gate)(const Gate&, int64_t begin, int64_t end);
  // A linear's inputs as its products want them, rows [begin, end).
  void (*prepare)(const Linear&, int64_t begin, int64_t end);
  // Outputs of blocks [begin, end) for prepared rows. Block `next`, if there is one, is what the same thread does next.
  void (*multiply)(const Linear&, int64_t begin, int64_t end, int64_t next);
};

// Variants this machine can run, best first; terminated by null.
const Variant* const* variants();
const Variant& chosen();
bool choose(const char* name);  // false: no such variant here

// The drivers: share the work out over at most `threads` threads.
void attend(const Attend& args, int threads);
void rms_norm(const Norm& args, int threads);
void silu_gate(const Gate& args, int threads);
void linear(Linear args, int threads);  // brings its own scratch
void decoder(const Decoder& args, int threads);

}  // namespace keypast
