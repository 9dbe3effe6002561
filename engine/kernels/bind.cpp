// The operators as torch sees them: checks shapes and types, fills in plain structs. The only file that reads torch.
#include <ATen/Parallel.h>
#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "kernels.h"

namespace {

using at::Tensor;
using std::optional;

keypast::DType type_of(const Tensor& x, const char* name) {
  switch (x.scalar_type()) {
    case at::kHalf: return keypast::DType::f16;
    case at::kBFloat16: return keypast::DType::bf16;
    case at::kFloat: return keypast::DType::f32;
    default:
      TORCH_CHECK(false, "keypast: ", name, " must be float16, bfloat16 or float32, not ", x.scalar_type());
  }
}

template <class T>
const T* vector_of(const Tensor& x, const char* name, int64_t length) {
  const bool fits = x.dim() == 1 && x.numel() == length && x.is_contiguous();
  TORCH_CHECK(fits, "keypast: ", name, " must be contiguous (", length, ",), not ", x.sizes());
  return x.const_data_ptr<T>();
}

keypast::Heads heads_of(const Tensor& x, const char* name) {
  TORCH_CHECK(x.dim() == 3 && (x.stride(2) == 1 || x.size(2) == 1), "keypast: ", name,
              " must be (T, heads, head_dim) with a contiguous last axis, not ", x.sizes());
  return {x.data_ptr(), x.stride(0), x.stride(1)};
}

keypast::Pool pool_of(const Tensor& x, const char* name, at::IntArrayRef shape) {
  TORCH_CHECK(x.sizes() == shape, "keypast: ", name, " must be ", shape, ", not ", x.sizes());
  const bool packed = (x.stride(3) == 1 || x.size(3) == 1) && (x.stride(2) == x.size(3) || x.size(2) == 1);
  TORCH_CHECK(packed, "keypast: ", name, " must be contiguous inside a block");
  return {x.data_ptr(), x.stride(0), x.stride(1)};
}

void set_rotary(const optional<Tensor>& cos, const optional<Tensor>& sin, keypast::Attend* a) {
  if (!cos) return;
  TORCH_CHECK(sin && cos->dim() == 2 && cos->sizes() == sin->sizes() && cos->is_contiguous() && sin->is_contiguous() &&
                  2 * cos->size(1) <= a->head_dim,
              "keypast: cos and sin must both be contiguous (max_length, rotary_dim / 2)");
  a->cos = cos->const_data_ptr<float>();
  a->sin = sin->const_data_ptr<float>();
  a->rotary_length = cos->size(0);
  a->rotary_half = cos->size(1);
}

void set_bias(const optional<Tensor>& bias, const optional<Tensor>& start, keypast::Attend* a) {
  if (!bias) return;
  TORCH_CHECK(start, "keypast: bias needs bias_start");
  a->bias = vector_of<float>(*bias, "bias", bias->numel());
  a->bias_start = vector_of<int64_t>(*start, "bias_start", a->rows + 1);
  TORCH_CHECK(a->bias_start[0] == 0 && a->bias_start[a->rows] <= bias->numel(), "keypast: bias_start outruns bias");
}

void set_extras(const optional<Tensor>& k, const optional<Tensor>& v, keypast::Attend* a) {
  TORCH_CHECK(k.has_value() == v.has_value(), "keypast: extra_k and extra_v come together");
  if (!k) return;
  const auto fits = [&](const Tensor& x) {
    return x.dim() == 3 && x.size(1) == a->kv_heads && x.size(2) == a->head_dim && x.is_contiguous() &&
           x.scalar_type() == at::kFloat;
  };
  TORCH_CHECK(fits(*k) && fits(*v) && k->size(0) == v->size(0),
              "keypast: extra_k and extra_v must both be contiguous float32 (E, ", a->kv_heads, ", ", a->head_dim,
              "), not ", k->sizes(), " and ", v->sizes());
  a->extra_k = k->const_data_ptr<float>();
  a->extra_v = v->const_data_ptr<float>();
  a->extras = k->size(0);
}

keypast::Attend attend_of(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& k_blocks,
                          const Tensor& v_blocks, const Tensor& query_start, const Tensor& past_length,
                          const Tensor& present_length, const Tensor& block_table, const Tensor& positions,
                          const Tensor& slots, const optional<Tensor>& cos, const optional<Tensor>& sin, double scale,
                          const Tensor& out) {
  keypast::Attend a{};
  a.q = heads_of(q, "q"), a.k = heads_of(k, "k"), a.v = heads_of(v, "v");
  a.tokens = q.size(0), a.heads = q.size(1), a.head_dim = q.size(2);
  a.written = k.size(0), a.kv_heads = k.size(1);
  const bool alike = k.sizes() == v.sizes() && k.size(2) == a.head_dim;
  TORCH_CHECK(alike && a.kv_heads > 0 && a.heads % a.kv_heads == 0, "keypast: q ", q.sizes(), ", k ", k.sizes(), ", v ",
              v.sizes(), " do not go together");
  TORCH_CHECK(k_blocks.dim() == 4 && k_blocks.numel() > 0, "keypast: k_blocks must have 4 axes, none of them empty");
  a.blocks = k_blocks.size(0), a.block_size = k_blocks.size(3);
  a.k_blocks = pool_of(k_blocks, "k_blocks", {a.blocks, a.kv_heads, a.head_dim, a.block_size});
  a.v_blocks = pool_of(v_blocks, "v_blocks", {a.blocks, a.kv_heads, a.block_size, a.head_dim});
  a.dtype = type_of(q, "q"), a.cache_dtype = type_of(k_blocks, "k_blocks");
  TORCH_CHECK(q.scalar_type() == k.scalar_type() && q.scalar_type() == v.scalar_type() &&
                  k_blocks.scalar_type() == v_blocks.scalar_type(),
              "keypast: q, k, v share one type, and k_blocks and v_blocks another");
  TORCH_CHECK(block_table.dim() == 2 && (block_table.stride(1) == 1 || block_table.size(1) == 1),
              "keypast: block_table must be (rows, W) with a contiguous last axis");
  a.rows = block_table.size(0), a.table_width = block_table.size(1), a.table_stride = block_table.stride(0);
  a.block_table = block_table.const_data_ptr<int32_t>();
  a.query_start = vector_of<int32_t>(query_start, "query_start", a.rows + 1);
  a.past_length = vector_of<int32_t>(past_length, "past_length", a.rows);
  a.present_length = vector_of<int32_t>(present_length, "present_length", a.rows);
  a.positions = vector_of<int64_t>(positions, "positions", a.tokens);
  a.slots = vector_of<int64_t>(slots, "slots", a.written);
  set_rotary(cos, sin, &a);
  a.causal = true, a.scale = static_cast<float>(scale), a.out = out.data_ptr();
  return a;
}

Tensor attend(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& k_blocks, const Tensor& v_blocks,
              const Tensor& query_start, const Tensor& past_length, const Tensor& present_length,
              const Tensor& block_table, const Tensor& positions, const Tensor& slots, bool causal,
              const optional<Tensor>& bias, const optional<Tensor>& bias_start, const optional<Tensor>& cos,
              const optional<Tensor>& sin, double scale, const optional<Tensor>& extra_k,
              const optional<Tensor>& extra_v) {
  TORCH_CHECK(q.dim() == 3, "keypast: q must be (T, heads, head_dim), not ", q.sizes());
  Tensor out = at::empty({q.size(0), q.size(1) * q.size(2)}, q.options());
  keypast::Attend a = attend_of(q, k, v, k_blocks, v_blocks, query_start, past_length, present_length, block_table,
                                positions, slots, cos, sin, scale, out);
  a.causal = causal;
  set_bias(bias, bias_start, &a);
  set_extras(extra_k, extra_v, &a);
  keypast::attend(a, at::get_num_threads());
  return out;
}

// Up to two leading axes as they stand; more are folded into one, copying if they must be.
Tensor foldable(const Tensor& x) {
  TORCH_CHECK(x.dim() > 0 && x.size(-1) > 0, "keypast: the last axis must not be empty");
  const Tensor y = x.dim() > 3 ? x.reshape({-1, x.size(-1)}) : x;
  return y.stride(-1) == 1 || y.size(-1) == 1 ? y : y.contiguous();
}

keypast::Rows rows_of(const Tensor& x) {
  const int64_t n = x.dim();
  if (n == 1) return {x.data_ptr(), 1, 0, 0};
  if (n == 2) return {x.data_ptr(), 1, x.stride(0), 0};
  return {x.data_ptr(), std::max<int64_t>(1, x.size(1)), x.stride(0), x.stride(1)};
}

keypast::Norm norm_of(const Tensor& x, const Tensor& weight, double eps, const Tensor& out) {
  keypast::Norm a{};
  a.width = x.size(-1), a.rows = x.numel() / a.width, a.eps = static_cast<float>(eps);
  const bool fits = weight.dim() == 1 && weight.size(0) == a.width && weight.is_contiguous();
  TORCH_CHECK(fits, "keypast: weight must be (", a.width, ",), not ", weight.sizes());
  a.x = rows_of(x), a.weight = weight.data_ptr(), a.out = out.data_ptr();
  a.dtype = type_of(x, "x"), a.weight_dtype = type_of(weight, "weight");
  return a;
}

Tensor rms_norm(const Tensor& input, const Tensor& weight, double eps) {
  const Tensor x = foldable(input);
  Tensor out = at::empty(input.sizes(), input.options());
  keypast::rms_norm(norm_of(x, weight, eps, out), at::get_num_threads());
  return out;
}

std::tuple<Tensor, Tensor> add_rms_norm(const Tensor& input, const Tensor& other, const Tensor& weight, double eps) {
  TORCH_CHECK(input.sizes() == other.sizes() && input.scalar_type() == other.scalar_type(),
              "keypast: x and residual must have one shape and type");
  const Tensor x = foldable(input), residual = foldable(other);
  Tensor out = at::empty(input.sizes(), input.options()), sum = at::empty(input.sizes(), input.options());
  keypast::Norm a = norm_of(x, weight, eps, out);
  a.residual = rows_of(residual), a.sum = sum.data_ptr();
  keypast::rms_norm(a, at::get_num_threads());
  return {out, sum};
}

Tensor silu_gate(const Tensor& input) {
  const Tensor x = foldable(input);
  TORCH_CHECK(x.size(-1) % 2 == 0, "keypast: the last axis holds gate and up side by side, so its length is even");
  std::vector<int64_t> shape = input.sizes().vec();
  shape.back() /= 2;
  Tensor out = at::empty(shape, input.options());
  keypast::Gate a{};
  a.width = shape.back(), a.rows = out.numel() / a.width;
  a.x = rows_of(x), a.out = out.data_ptr(), a.dtype = type_of(x, "x");
  keypast::silu_gate(a, at::get_num_threads());
  return out;
}

keypast::WeightType weight_type_of(const Tensor& weight) {
  if (weight.scalar_type() == at::kChar) return keypast::WeightType::int8;
  switch (type_of(weight, "a packed weight")) {
    case keypast::DType::f16: return keypast::WeightType::f16;
    case keypast::DType::bf16: return keypast::WeightType::bf16;
    case keypast::DType::f32: return keypast::WeightType::f32;
  }
  return {};
}

// A packed weight with its bias, which says how many outputs there are.
keypast::Weight weight_of(const optional<Tensor>& weight, const optional<Tensor>& bias, int64_t in) {
  TORCH_CHECK(weight && bias, "keypast: linears need a packed weight and a bias");
  TORCH_CHECK(bias->scalar_type() == at::kFloat, "keypast: bias must be float32, not ", bias->scalar_type());
  keypast::Weight w{};
  w.in = in, w.out = bias->numel(), w.type = weight_type_of(*weight);
  const std::vector<int64_t> shape{w.blocks(), w.groups(), keypast::group_bytes(w.type) / weight->element_size()};
  const bool fits = weight->sizes() == at::IntArrayRef(shape) && weight->is_contiguous();
  TORCH_CHECK(fits, "keypast: the packed weight of ", w.in, " inputs and ", w.out, " outputs must be contiguous ",
              at::IntArrayRef(shape), ", not ", weight->sizes());
  w.data = static_cast<const char*>(weight->const_data_ptr());
  w.bias = vector_of<float>(*bias, "bias", w.out);
  return w;
}

Tensor linear(const Tensor& input, const Tensor& weight, const Tensor& bias, optional<at::ScalarType> out_dtype) {
  const Tensor x = foldable(input);
  keypast::Linear a{};
  a.weight = weight_of(weight, bias, x.size(-1));
  std::vector<int64_t> shape = input.sizes().vec();
  shape.back() = a.weight.out;
  Tensor out = at::empty(shape, input.options().dtype(out_dtype.value_or(input.scalar_type())));
  a.x = rows_of(x), a.out = out.data_ptr(), a.rows = x.numel() / x.size(-1);
  a.dtype = type_of(x, "x"), a.out_dtype = type_of(out, "out_dtype");
  keypast::linear(a, at::get_num_threads());
  return out;
}

constexpr size_t per_block = 12;  // tensors a block has in `weights`

// The list of weights in order, block by block.
struct BlockReader {
  const c10::List<optional<Tensor>>& weights;
  bool head_norms;
  keypast::DType norm_dtype = keypast::DType::f32;
  size_t at = 0;

  void* norm(int64_t size, bool given = true) {
    const optional<Tensor> weight = weights.get(at++);
    TORCH_CHECK(weight.has_value() == given, "keypast: blocks must be alike in their norms");
    if (!given) return nullptr;
    const bool fits = weight->dim() == 1 && weight->size(0) == size && weight->is_contiguous();
    TORCH_CHECK(fits, "keypast: a norm's weight must be (", size, ",), not ", weight->sizes());
    const keypast::DType dtype = type_of(*weight, "a norm's weight");
    TORCH_CHECK(at == 1 || dtype == norm_dtype, "keypast: blocks must be alike in their norms");
    norm_dtype = dtype;
    return weight->data_ptr();
  }

  keypast::Weight linear(int64_t in, int64_t out) {
    const optional<Tensor> weight = weights.get(at++), bias = weights.get(at++);
    const keypast::Weight w = weight_of(weight, bias, in);
    TORCH_CHECK(out < 0 || w.out == out, "keypast: a linear gives ", w.out, " outputs where ", out, " are needed");
    return w;
  }

  keypast::DecoderBlock block(int64_t hidden, int64_t heads, int64_t kv_heads, int64_t head_dim) {
    keypast::DecoderBlock b{};
    b.attention_norm = norm(hidden);
    b.qkv = linear(hidden, (heads + 2 * kv_heads) * head_dim);
    b.q_norm = norm(head_dim, head_norms);
    b.k_norm = norm(head_dim, head_norms);
    b.o_proj = linear(heads * head_dim, hidden);
    b.feed_forward_norm = norm(hidden);
    b.gate_up = linear(hidden, -1);
    b.down_proj = linear(b.gate_up.out / 2, hidden);
    return b;
  }
};

// Every block of a decoder in one call: what engine/layers.py does one operator after another.
Tensor decoder_blocks(const Tensor& embedded, const c10::List<optional<Tensor>>& weights, const Tensor& k_pool,
                      const Tensor& v_pool, const Tensor& query_start, const Tensor& past_length,
                      const Tensor& present_length, const Tensor& block_table, const Tensor& positions,
                      const Tensor& slots, const optional<Tensor>& cos, const optional<Tensor>& sin, int64_t heads,
                      double scale, double eps) {
  const int64_t tokens = embedded.size(0), kv_heads = k_pool.size(2), head_dim = k_pool.size(3);
  keypast::Decoder d{};
  d.hidden = embedded.size(1), d.layers = k_pool.size(0), d.eps = static_cast<float>(eps);
  TORCH_CHECK(weights.size() == per_block * d.layers && d.layers > 0, "keypast: ", weights.size(), " weights for ",
              d.layers, " layers");
  BlockReader reader{weights, weights.get(3).has_value()};
  std::vector<keypast::DecoderBlock> blocks;
  for (int64_t layer = 0; layer < d.layers; ++layer) {
    blocks.push_back(reader.block(d.hidden, heads, kv_heads, head_dim));
    TORCH_CHECK(blocks[layer].gate_up.out == blocks[0].gate_up.out, "keypast: blocks must be alike in their sizes");
  }
  d.blocks = blocks.data(), d.inner = blocks[0].down_proj.in, d.norm_dtype = reader.norm_dtype;
  const auto empty = [&](at::IntArrayRef shape) { return at::empty(shape, embedded.options()); };
  const Tensor x = embedded.clone(at::MemoryFormat::Contiguous), delta = empty(x.sizes());
  const Tensor qkv = empty({tokens, heads + 2 * kv_heads, head_dim}), attended = empty({tokens, heads * head_dim});
  const Tensor q = reader.head_norms ? empty({tokens, heads, head_dim}) : qkv.narrow(1, 0, heads);
  const Tensor k = reader.head_norms ? empty({tokens, kv_heads, head_dim}) : qkv.narrow(1, heads, kv_heads);
  const Tensor v = qkv.narrow(1, heads + kv_heads, kv_heads);
  d.x = x.data_ptr(), d.delta = delta.data_ptr(), d.qkv = qkv.data_ptr();
  d.attend = attend_of(q, k, v, k_pool.select(0, 0), v_pool.select(0, 0), query_start, past_length, present_length,
                       block_table, positions, slots, cos, sin, scale, attended);
  d.k_layer_bytes = k_pool.stride(0) * k_pool.element_size();
  d.v_layer_bytes = v_pool.stride(0) * v_pool.element_size();
  keypast::decoder(d, at::get_num_threads());
  return x.add_(delta);
}

std::string isa() { return keypast::chosen().name; }

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (auto v = keypast::variants(); *v; ++v) names.push_back((*v)->name);
  return names;
}

template <class Bits>
bool all_finite(const Tensor& blocks, int64_t axis, const int64_t* slots, int64_t count, Bits exponent) {
  const Bits* data = static_cast<const Bits*>(blocks.const_data_ptr());
  const int64_t size = blocks.size(axis), channels = blocks.size(5 - axis);
  const int64_t along = blocks.stride(axis), across = blocks.stride(5 - axis);
  Bits bad = 0;
  for (int64_t i = 0; i < count; ++i) {
    const Bits* slot = data + slots[i] / size * blocks.stride(0) + slots[i] % size * along;
    for (int64_t h = 0; h < blocks.size(1); ++h)
      for (int64_t d = 0; d < channels; ++d)
        bad |= (slot[h * blocks.stride(1) + d * across] & exponent) == exponent;
  }
  return !bad;
}

// Whether what is stored at these slots is: of keys (axis 3) or of values (axis 2).
bool stored_finite(const Tensor& blocks, int64_t axis, const Tensor& slots) {
  TORCH_CHECK(blocks.dim() == 4 && (axis == 2 || axis == 3), "keypast: blocks have 4 axes, slots are on 2 or 3");
  const int64_t count = slots.numel(), *at = vector_of<int64_t>(slots, "slots", count);
  for (int64_t i = 0; i < count; ++i)
    TORCH_CHECK(at[i] >= 0 && at[i] < blocks.size(0) * blocks.size(axis), "keypast: slot ", at[i], " is in no block");
  switch (type_of(blocks, "blocks")) {
    case keypast::DType::f16: return all_finite<uint16_t>(blocks, axis, at, count, 0x7c00);
    case keypast::DType::bf16: return all_finite<uint16_t>(blocks, axis, at, count, 0x7f80);
    default: return all_finite<uint32_t>(blocks, axis, at, count, 0x7f800000);
  }
}

void force_isa(c10::string_view name) {
  TORCH_CHECK(keypast::choose(std::string(name).c_str()), "keypast: this machine has no ", name);
}

}  // namespace

TORCH_LIBRARY(keypast, m) {
  m.def(
      "attend(Tensor q, Tensor k, Tensor v, Tensor(a!) k_blocks, Tensor(b!) v_blocks, Tensor query_start, "
      "Tensor past_length, Tensor present_length, Tensor block_table, Tensor positions, Tensor slots, bool causal, "
      "Tensor? bias, Tensor? bias_start, Tensor? cos, Tensor? sin, float scale, Tensor? extra_k, Tensor? extra_v) "
      "-> Tensor");
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
  m.def("add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor normed, Tensor sum)");
  m.def("silu_gate(Tensor x) -> Tensor");
  m.def("linear(Tensor x, Tensor weight, Tensor bias, ScalarType? out_dtype=None) -> Tensor");
  m.def(
      "decoder_blocks(Tensor x, Tensor?[] weights, Tensor(a!) k_pool, Tensor(b!) v_pool, Tensor query_start, "
      "Tensor past_length, Tensor present_length, Tensor block_table, Tensor positions, Tensor slots, Tensor? cos, "
      "Tensor? sin, int heads, float scale, float eps) -> Tensor");
  m.def("finite(Tensor blocks, int axis, Tensor slots) -> bool");
  m.def("isa() -> str", isa);
  m.def("isas() -> str[]", isas);
  m.def("force_isa(str name) -> ()", force_isa);
}

TORCH_LIBRARY_IMPL(keypast, CPU, m) {
  m.impl("attend", attend);
  m.impl("rms_norm", rms_norm);
  m.impl("add_rms_norm", add_rms_norm);
  m.impl("silu_gate", silu_gate);
  m.impl("linear", linear);
  m.impl("finite", stored_finite);
  m.impl("decoder_blocks", decoder_blocks);
}
