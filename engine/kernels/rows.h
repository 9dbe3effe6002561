// Normalisation and gating: one row at a time, the same operations whatever other rows there are.
#pragma once
#include "vec.h"

namespace keypast::KEYPAST_VARIANT {

static inline int64_t start_of(const Rows& rows, int64_t i) {
  return i / rows.inner * rows.outer_stride + i % rows.inner * rows.inner_stride;
}

// The rounded sum is what is normalised: it is what the residual stream holds from here on.
template <class T>
static float add_row(const T* x, const T* residual, T* to, int64_t width) {
  Vec squares = set(0.0f);
  for (int64_t i = 0; i < width; i += kLanes) {
    const int n = width - i < kLanes ? (int)(width - i) : kLanes;
    Vec s = load(x + i, n);
    if (residual) {
      store(to + i, s + load(residual + i, n), n);
      s = load(to + i, n);
    }
    squares = fma(s, s, squares);
  }
  return sum(squares);
}

template <class T, class W>
static void scale_row(const T* s, const W* weight, float factor, T* to, int64_t width) {
  for (int64_t i = 0; i < width; i += kLanes) {
    const int n = width - i < kLanes ? (int)(width - i) : kLanes;
    store(to + i, load(s + i, n) * set(factor) * load(weight + i, n), n);
  }
}

static void rms_norm(const Norm& a, int64_t begin, int64_t end) {
  typed(a.dtype, a.x.data, [&](auto* x) {
    const auto residual = (decltype(x))a.residual.data, sums = (decltype(x))a.sum, out = (decltype(x))a.out;
    for (int64_t row = begin; row < end; ++row) {
      const auto from = x + start_of(a.x, row);
      const auto added = residual ? residual + start_of(a.residual, row) : nullptr;
      const auto s = residual ? sums + row * a.width : from;
      const float squares = add_row(from, added, s, a.width);
      const float factor = 1.0f / __builtin_sqrtf(squares / a.width + a.eps);
      const auto to = out + row * a.width;
      typed(a.weight_dtype, a.weight, [&](auto* weight) { scale_row(s, weight, factor, to, a.width); });
    }
  });
}

static void silu_gate(const Gate& a, int64_t begin, int64_t end) {
  typed(a.dtype, a.x.data, [&](auto* x) {
    const auto out = (decltype(x))a.out;
    for (int64_t row = begin; row < end; ++row) {
      const auto gate = x + start_of(a.x, row), up = gate + a.width;
      for (int64_t i = 0; i < a.width; i += kLanes) {
        const int n = a.width - i < kLanes ? (int)(a.width - i) : kLanes;
        const Vec g = load(gate + i, n);
        const Vec power = min(set(160.0f), g * set(-1.4426950408889634f));  // 2^160 is infinite already
        const Vec silu = g / (set(1.0f) + exp2(power));
        store(out + row * a.width + i, silu * load(up + i, n), n);
      }
    }
  });
}

}  // namespace keypast::KEYPAST_VARIANT
