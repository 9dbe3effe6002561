// Linears. A row's bits depend on no other row and on no sharing out of work: every output is summed over its inputs in
// order. Against 8-bit weights activations become 16-bit integers, whose rounding is far below bfloat16's, and sums over
// a group are integers, so there they depend on no instruction set either.
#pragma once
#include "rows.h"
#include "vec.h"

namespace keypast::KEYPAST_VARIANT {

constexpr float kLargest = 32767.0f;           // of an integer activation: sums over a group stay below 2^28
constexpr float kTiniest = 1e-30f;             // activations below count as zeros, so that 1 / x is finite
constexpr int kHalf = kGroup * kLanes;         // bytes of 16 outputs' 8-bit weights of a group
constexpr int kHalves = kWidth == 16 ? 2 : 1;  // in a tile: all its sums stay in registers
constexpr int kFetch = 4096;                   // bytes between fetching a weight and reading it
constexpr int kPairRows = 14;                  // of a panel where pairs of bfloat16 are multiplied as they are

typedef int16_t PairLane __attribute__((vector_size(kWidth * 4)));

struct Pairs {  // of two inputs each, for 16 outputs
  PairLane part[kParts];
};
struct Sums {
  IntLane part[kParts];
};

// ---- activations ----

KEYPAST_INLINE void store_rounded(int16_t* to, const Vec& x) {  // to the nearest integer; |x| < 2^22
  KEYPAST_UNROLL KEYPAST_EACH {
    const Lane biased = x.part[i] + 12582912.0f;  // 1.5 * 2^23: the sum's last bit is worth one
    narrow((uint16_t*)to + i * kWidth, (UIntLane)((IntLane)biased - 0x4B400000));
  }
}

template <class T>
static void quantize_row(const T* x, int64_t width, int16_t* values, float* scales) {
  constexpr int kVecs = kGroup / kLanes;
  Vec faults = set(0.0f);  // NaN once a value is not finite; so are then all outputs
  for (int64_t start = 0; start < width; start += kGroup) {
    Vec part[kVecs], top = set(0.0f);
    KEYPAST_UNROLL for (int i = 0; i < kVecs; ++i) {
      const int64_t left = width - start - i * kLanes;
      part[i] = left <= 0 ? set(0.0f) : load(x + start + i * kLanes, left < kLanes ? (int)left : kLanes);
      top = max(max(part[i], set(0.0f) - part[i]), top);
      faults = faults + part[i] * set(0.0f);
    }
    const float largest = peak(top);
    const Vec factor = set(largest > kTiniest ? kLargest / largest : 0.0f);
    KEYPAST_UNROLL for (int i = 0; i < kVecs; ++i) store_rounded(values + start + i * kLanes, part[i] * factor);
    scales[start / kGroup] = largest * (1.0f / kLargest);
  }
  scales[0] += sum(faults);
}

// As floats, or as bfloat16 where products are of pairs of them; zeros behind. Groups come to lie `step` values apart.
template <class T, class To>
static void widen_row(const T* x, int64_t in, int64_t width, To* to, int64_t step) {
  for (int64_t i = 0; i < width; i += kLanes) {
    const int64_t left = in - i;
    store(to + i / kGroup * step + i % kGroup, left <= 0 ? set(0.0f) : load(x + i, left < kLanes ? (int)left : kLanes));
  }
}

// In which rows are multiplied, equal to within one.
struct Panels {
  int64_t rows, count;
  Panels(int64_t rows, int64_t most) : rows(rows), count((rows + most - 1) / most) {}
  int64_t first(int64_t panel) const { return rows * panel / count; }
  int64_t of(int64_t row) const { return ((row + 1) * count - 1) / rows; }
};

// A panel's rows, group by group, so that one register reaches them all: [groups][rows][kGroup].
template <class T>
static void widen_into_panel(const Linear& a, const T* x, int64_t row) {
  const Panels panels(a.rows, kPairRows);
  const int64_t panel = panels.of(row), first = panels.first(panel), rows = panels.first(panel + 1) - first;
  BFloat* to = (BFloat*)a.scratch + first * a.width() + (row - first) * kGroup;
  widen_row(x, a.weight.in, a.width(), to, rows * kGroup);
}

KEYPAST_INLINE float* scales_of(const Linear& a) { return a.scratch + a.rows * a.width(); }

template <bool kBf16>
static void prepare(const Linear& a, int64_t begin, int64_t end) {
  const int64_t width = a.width(), groups = a.weight.groups(), in = a.weight.in;
  typed(a.dtype, a.x.data, [&](auto* x) {
    for (int64_t row = begin; row < end; ++row) {
      const auto from = x + start_of(a.x, row);
      if (a.weight.type == WeightType::int8)
        quantize_row(from, in, (int16_t*)a.scratch + row * width, scales_of(a) + row * groups);
      else if (kBf16 && a.weight.type == WeightType::bf16)
        widen_into_panel(a, from, row);
      else
        widen_row(from, in, width, a.scratch + row * width, kGroup);
    }
  });
}

// ---- products ----

KEYPAST_INLINE PairLane lane_widen(const int8_t* from) {
#if defined(__AVX512F__)
  return (PairLane)_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)from));
#elif defined(__AVX2__)
  return (PairLane)_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)from));
#else
  typedef int8_t ByteLane __attribute__((vector_size(kWidth * 2)));
  ByteLane bytes;
  memcpy(&bytes, from, sizeof bytes);
  return __builtin_convertvector(bytes, PairLane);
#endif
}

template <bool kVnni>
KEYPAST_INLINE IntLane lane_dot(IntLane sum, PairLane a, PairLane b) {
#if defined(__AVX512F__)
  if (!kVnni) return sum + (IntLane)_mm512_madd_epi16((__m512i)a, (__m512i)b);
  asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));  // the compiler's own form of it copies registers about
  return sum;
#elif defined(__AVX2__)
  return sum + (IntLane)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
  return sum + ((IntLane)a << 16 >> 16) * ((IntLane)b << 16 >> 16) + ((IntLane)a >> 16) * ((IntLane)b >> 16);
#endif
}

KEYPAST_INLINE Pairs widen_pairs(const int8_t* from) {
  Pairs r;
  KEYPAST_UNROLL KEYPAST_EACH r.part[i] = lane_widen(from + i * 2 * kWidth);
  return r;
}

// sum + both products of each pair of `a` with the one pair that `b` repeats.
template <bool kVnni>
KEYPAST_INLINE Sums dot(const Sums& sum, const Pairs& a, PairLane b) {
  Sums r;
  KEYPAST_UNROLL KEYPAST_EACH r.part[i] = lane_dot<kVnni>(sum.part[i], a.part[i], b);
  return r;
}

KEYPAST_INLINE PairLane both(const int16_t* from) {
  int32_t pair;
  memcpy(&pair, from, sizeof pair);
  return (PairLane)(IntLane{} + pair);
}

KEYPAST_INLINE Vec to_floats(const Sums& x) {
  Vec r;
  KEYPAST_UNROLL KEYPAST_EACH r.part[i] = __builtin_convertvector(x.part[i], Lane);
  return r;
}

// sums[m][n]: of M rows and N times 16 outputs of one group.
template <int M, int N, bool kVnni>
KEYPAST_INLINE void sum_group(const int8_t* weight, const int16_t* values, int64_t stride, Sums (&sums)[M][N]) {
  KEYPAST_UNROLL for (int m = 0; m < M; ++m)
    KEYPAST_UNROLL for (int n = 0; n < N; ++n) sums[m][n] = Sums{};
  for (int pair = 0; pair < kGroup / 2; ++pair) {
    __builtin_prefetch(weight + kFetch + pair * N * 2 * kLanes, 0, 0);
    Pairs w[N];
    KEYPAST_UNROLL for (int n = 0; n < N; ++n) w[n] = widen_pairs(weight + n * kHalf + pair * 2 * kLanes);
    KEYPAST_UNROLL for (int m = 0; m < M; ++m) {
      const PairLane x = both(values + m * stride + 2 * pair);
      KEYPAST_UNROLL for (int n = 0; n < N; ++n) sums[m][n] = dot<kVnni>(sums[m][n], w[n], x);
    }
  }
}

struct Rounding {
  template <class T>
  KEYPAST_INLINE void put(T* to, const Vec& x, int lanes) {
    store(to, x, lanes);
  }
};

// Weights to fetch while others are multiplied: `step` bytes further on with each pair of inputs.
struct Ahead {
  const char* from;
  int64_t step;
};

// Each of these adds to total[m][n] the products of M rows with N times 16 outputs, from the `half`th of a block on, over
// all groups. `x` is the first row, as `prepare` left it.

template <bool kVnni>
struct Integers : Rounding {
  static constexpr WeightType type = WeightType::int8;
  static constexpr int most_rows = 6;  // with two sums for each
  template <int M, int N>
  KEYPAST_INLINE void add(const Linear& a, const char* weight, int half, int64_t row, Ahead, Vec (&total)[M][N]) {
    const int64_t groups = a.weight.groups(), stride = a.width();
    const int16_t* x = (const int16_t*)a.scratch + row * stride;
    const float* scales = scales_of(a) + row * groups;
    for (int64_t group = 0; group < groups; ++group, weight += group_bytes(type)) {
      Sums sums[M][N];
      sum_group<M, N, kVnni>((const int8_t*)weight + kOutputs * sizeof(BFloat) + half * kHalf, x + group * kGroup,
                             stride, sums);
      KEYPAST_UNROLL for (int n = 0; n < N; ++n) {
        const Vec scale = load((const BFloat*)weight + (half + n) * kLanes);
        KEYPAST_UNROLL for (int m = 0; m < M; ++m)
          total[m][n] = total[m][n] + to_floats(sums[m][n]) * scale * set(scales[m * groups + group]);
      }
    }
  }
};

template <class T>
struct Floats : Rounding {
  static constexpr WeightType type = sizeof(T) == 4 ? WeightType::f32 : WeightType::f16;
  static constexpr int most_rows = kWidth == 16 ? 12 : 6;
  template <int M, int N>
  KEYPAST_INLINE void add(const Linear& a, const char* weight, int half, int64_t row, Ahead, Vec (&total)[M][N]) {
    const int64_t width = a.width();
    const float* x = a.scratch + row * width;
    const T* w = (const T*)weight + half * kLanes;
    for (int64_t i = 0; i < width; ++i, w += kOutputs) {
      __builtin_prefetch((const char*)w + kFetch, 0, 0);
      Vec wide[N];
      KEYPAST_UNROLL for (int n = 0; n < N; ++n) wide[n] = load(w + n * kLanes);
      KEYPAST_UNROLL for (int m = 0; m < M; ++m) {
        const Vec one = set(x[m * width + i]);
        KEYPAST_UNROLL for (int n = 0; n < N; ++n) total[m][n] = fma(wide[n], one, total[m][n]);
      }
    }
  }
};

struct PairsOfFloats : Rounding {  // bfloat16 weights where nothing multiplies them as they are
  static constexpr WeightType type = WeightType::bf16;
  static constexpr int most_rows = kWidth == 16 ? 10 : 5;
  template <int M, int N>
  KEYPAST_INLINE void add(const Linear& a, const char* weight, int half, int64_t row, Ahead, Vec (&total)[M][N]) {
    const int64_t width = a.width();
    const float* x = a.scratch + row * width;
    const UIntLane* w = (const UIntLane*)weight + half * kParts;
    for (int64_t at = 0; at < width; at += 2, w += 2 * kParts) {
      __builtin_prefetch((const char*)w + kFetch, 0, 0);
      Vec even[N], odd[N];
      KEYPAST_UNROLL for (int n = 0; n < N; ++n)
        KEYPAST_UNROLL KEYPAST_EACH {
          UIntLane pair;
          memcpy(&pair, w + n * kParts + i, sizeof pair);
          even[n].part[i] = (Lane)(pair << 16), odd[n].part[i] = (Lane)(pair & 0xFFFF0000);
        }
      KEYPAST_UNROLL for (int m = 0; m < M; ++m) {
        const Vec first = set(x[m * width + at]), second = set(x[m * width + at + 1]);
        KEYPAST_UNROLL for (int n = 0; n < N; ++n) total[m][n] = fma(even[n], first, total[m][n]);
        KEYPAST_UNROLL for (int n = 0; n < N; ++n) total[m][n] = fma(odd[n], second, total[m][n]);
      }
    }
  }
};

#if defined(__AVX512F__)
KEYPAST_INLINE void store_bf16(BFloat* to, const Vec& x) {  // by the processor, where PairsOfBFloats runs
  __m256i narrow;
  asm("vcvtneps2bf16 %1, %0" : "=v"(narrow) : "v"(x.part[0]));
  _mm256_storeu_si256((__m256i*)to, narrow);
}

KEYPAST_INLINE __m512 dot_pairs(__m512 sum, __m512i weights, __m512i x) {
  // This unit is compiled for processors without it, where it is never called.
  asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(weights), "v"(x));
  return sum;
}

struct PairsOfBFloats : Rounding {
  using Rounding::put;
  KEYPAST_INLINE void put(BFloat* to, const Vec& x, int lanes) {
    lanes < kLanes ? store(to, x, lanes) : store_bf16(to, x);
  }
  static constexpr WeightType type = WeightType::bf16;
  static constexpr int most_rows = kPairRows;
  static constexpr int kUnrolled = 2;  // pairs of inputs; with 4, eight rows are 4 % slower
  template <int M, int N>
  KEYPAST_INLINE void add(const Linear& a, const char* weight, int half, int64_t row, Ahead ahead, Vec (&total)[M][N]) {
    constexpr int kRow = kGroup * sizeof(BFloat);
    const char* x = (const char*)a.scratch + row * a.width() * sizeof(BFloat);
    __m512 sums[M][N];  // not `total`, which the instruction would hold in memory
    KEYPAST_UNROLL for (int m = 0; m < M; ++m)
      KEYPAST_UNROLL for (int n = 0; n < N; ++n) sums[m][n] = _mm512_setzero_ps();
    weight += half * 64;
    for (int64_t group = 0; group < a.weight.groups(); ++group, x += (M - 1) * kRow)
      for (int pair = 0; pair < kGroup / 2; pair += kUnrolled, x += kUnrolled * 4, weight += kUnrolled * kOutputs * 4) {
        KEYPAST_UNROLL for (int i = 0; i < kUnrolled; ++i, ahead.from += ahead.step) {
          __m512i w[N];
          KEYPAST_UNROLL for (int n = 0; n < N; ++n) {
            __builtin_prefetch(ahead.from + n * 64, 0, 0);
            w[n] = _mm512_loadu_si512(weight + i * kOutputs * 4 + n * 64);
          }
          KEYPAST_UNROLL for (int m = 0; m < M; ++m) {
            const __m512i one = (__m512i)both((const int16_t*)(x + m * kRow + i * 4));  // loaded once for all n
            KEYPAST_UNROLL for (int n = 0; n < N; ++n) sums[m][n] = dot_pairs(sums[m][n], w[n], one);
          }
        }
      }
    KEYPAST_UNROLL for (int m = 0; m < M; ++m)
      KEYPAST_UNROLL for (int n = 0; n < N; ++n) total[m][n].part[0] = sums[m][n];
  }
};
#endif

template <class Products, class T, int M, int N>
KEYPAST_INLINE void finish(const Linear& a, T* out, int64_t at, const Vec (&total)[M][N]) {
  KEYPAST_UNROLL for (int n = 0; n < N; ++n) {
    const int64_t left = a.weight.out - at - n * kLanes;
    if (left <= 0) break;
    const int lanes = left < kLanes ? (int)left : kLanes;
    const Vec bias = load(a.weight.bias + at + n * kLanes, lanes);
    KEYPAST_UNROLL for (int m = 0; m < M; ++m)
      Products::put(out + m * a.weight.out + n * kLanes, total[m][n] + bias, lanes);
  }
}

// The outputs of M rows in N halves of a block. A function of its own: where many are in one, the compiler copies sums
// from register to register all the time.
template <class Products, int M, int N>
static __attribute__((noinline)) void multiply_tile(const Linear& a, int64_t block, int half, int64_t row,
                                                    Ahead ahead) {
  const Weight& w = a.weight;
  Vec total[M][N];
  KEYPAST_UNROLL for (int m = 0; m < M; ++m)
    KEYPAST_UNROLL for (int n = 0; n < N; ++n) total[m][n] = set(0.0f);
  Products::add(a, w.block(block), half, row, ahead, total);
  const int64_t at = block * kOutputs + half * kLanes, first = row * w.out + at;
  // No lambda here: one that took hold of `total` would keep it out of registers.
  if (a.out_dtype == DType::bf16) finish<Products>(a, (BFloat*)a.out + first, at, total);
  if (a.out_dtype == DType::f16) finish<Products>(a, (Half*)a.out + first, at, total);
  if (a.out_dtype == DType::f32) finish<Products>(a, (float*)a.out + first, at, total);
}

// Calls f with `rows`, 1 to M, as a constant.
template <int M, class F>
KEYPAST_INLINE void up_to(int rows, F f) {
  if constexpr (M > 1)
    if (rows < M) return up_to<M - 1>(rows, f);
  f(Constant<M>{});
}

// What the `panel`th of `panels` fetches: its share of the block that follows, which so comes in evenly while all of
// them are multiplied. One that is alone fetches what it reads next.
KEYPAST_INLINE Ahead share_of(const Weight& w, int64_t block, int64_t follows, int64_t panel, int64_t panels) {
  constexpr int64_t kPair = kOutputs * 2 * sizeof(BFloat);
  if (panels == 1) return {w.block(block) + kFetch, kPair};
  if (follows >= w.blocks()) return {w.data, 0};
  return {w.block(follows) + w.block_bytes() * panel / panels, kPair / panels};
}

template <class Products>
static void multiply_blocks(const Linear& a, int64_t begin, int64_t end, int64_t next) {
  const Panels panels(a.rows, Products::most_rows);
  for (int64_t first = 0, last; first < panels.count; first = last) {
    last = first + kRowsAtOnce / Products::most_rows;
    if (last > panels.count) last = panels.count;
    for (int64_t block = begin; block < end; ++block)
      for (int64_t panel = first; panel < last; ++panel) {
        const int64_t row = panels.first(panel), rows = panels.first(panel + 1) - row;
        const Ahead ahead = share_of(a.weight, block, block + 1 < end ? block + 1 : next, panel - first, last - first);
        up_to<Products::most_rows>((int)rows, [&](auto m) {
          for (int half = 0; half < kOutputs / kLanes; half += kHalves)
            multiply_tile<Products, m.value, kHalves>(a, block, half, row, ahead);
        });
      }
  }
}

template <bool kVnni, bool kBf16>
static void multiply(const Linear& a, int64_t begin, int64_t end, int64_t next) {
  switch (a.weight.type) {
    case WeightType::int8: return multiply_blocks<Integers<kVnni>>(a, begin, end, next);
    case WeightType::f16: return multiply_blocks<Floats<Half>>(a, begin, end, next);
    case WeightType::f32: return multiply_blocks<Floats<float>>(a, begin, end, next);
    case WeightType::bf16:
#if defined(__AVX512F__)
      if (kBf16) return multiply_blocks<PairsOfBFloats>(a, begin, end, next);
#endif
      return multiply_blocks<PairsOfFloats>(a, begin, end, next);
  }
}

}  // namespace keypast::KEYPAST_VARIANT
