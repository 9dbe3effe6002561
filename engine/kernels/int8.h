// Linears whose weights are 8-bit integers. Activations become 16-bit integers, whose rounding is far below bfloat16's;
// sums of products over a group are then integers, exact in any order. Across groups sums run in order, every operation
// rounded by itself. So a row's bits depend on no other row, no sharing out of work and no instruction set.
#pragma once
#include "rows.h"
#include "vec.h"

namespace keypast::KEYPAST_VARIANT {

constexpr float kLargest = 32767.0f;           // of an activation: sums over a group stay below 2^28
constexpr float kTiniest = 1e-30f;             // activations below count as zeros, so that 1 / x is finite
constexpr int kHalf = kGroup * kLanes;         // bytes of 16 outputs' weights of a group
constexpr int kHalves = kWidth == 16 ? 2 : 1;  // in a tile: with 6 rows all its sums stay in registers
constexpr int kFetch = 4 * kGroupBytes;        // between fetching a weight and reading it

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

static void quantize(const Int8& a, int64_t begin, int64_t end) {
  const int64_t groups = a.weight.groups();
  typed(a.dtype, a.x.data, [&](auto* x) {
    for (int64_t row = begin; row < end; ++row)
      quantize_row(x + start_of(a.x, row), a.weight.in, a.values + row * groups * kGroup, a.scales + row * groups);
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
    __builtin_prefetch(weight + kFetch + pair * N * 2 * kLanes);
    Pairs w[N];
    KEYPAST_UNROLL for (int n = 0; n < N; ++n) w[n] = widen_pairs(weight + n * kHalf + pair * 2 * kLanes);
    KEYPAST_UNROLL for (int m = 0; m < M; ++m) {
      const PairLane x = both(values + m * stride + 2 * pair);
      KEYPAST_UNROLL for (int n = 0; n < N; ++n) sums[m][n] = dot<kVnni>(sums[m][n], w[n], x);
    }
  }
}

// The outputs of M rows in N halves of a block.
template <int M, int N, bool kVnni>
static void multiply_tile(const Int8& a, int64_t block, int64_t half, int64_t row) {
  const Int8Weight& w = a.weight;
  const int64_t groups = w.groups(), stride = groups * kGroup;
  const int8_t* weight = w.data + block * groups * kGroupBytes;
  Vec total[M][N];
  KEYPAST_UNROLL for (int m = 0; m < M; ++m)
    KEYPAST_UNROLL for (int n = 0; n < N; ++n) total[m][n] = set(0.0f);
  for (int64_t group = 0; group < groups; ++group, weight += kGroupBytes) {
    Sums sums[M][N];
    sum_group<M, N, kVnni>(weight + kOutputs * sizeof(BFloat) + half * kHalf, a.values + row * stride + group * kGroup,
                           stride, sums);
    KEYPAST_UNROLL for (int n = 0; n < N; ++n) {
      const Vec scale = load((const BFloat*)weight + (half + n) * kLanes);
      KEYPAST_UNROLL for (int m = 0; m < M; ++m)
        total[m][n] = total[m][n] + to_floats(sums[m][n]) * scale * set(a.scales[(row + m) * groups + group]);
    }
  }
  float outputs[M][N * kLanes];  // a lambda that took hold of `total` would keep it out of registers
  KEYPAST_UNROLL for (int m = 0; m < M; ++m)
    KEYPAST_UNROLL for (int n = 0; n < N; ++n) store(outputs[m] + n * kLanes, total[m][n]);
  typed(a.dtype, a.out, [&](auto* out) {
    for (int n = 0; n < N; ++n) {
      const int64_t at = block * kOutputs + (half + n) * kLanes, left = w.out - at;
      if (left <= 0) break;
      const int lanes = left < kLanes ? (int)left : kLanes;
      const Vec bias = load(w.bias + at, lanes);
      for (int m = 0; m < M; ++m)
        store(out + (row + m) * w.out + at, load(outputs[m] + n * kLanes) + bias, lanes);
    }
  });
}

// Outputs of blocks [begin, end) for rows [first, last), in panels of rows equal to within one.
template <bool kVnni>
static void multiply(const Int8& a, int64_t begin, int64_t end, int64_t first, int64_t last) {
  const int64_t rows = last - first, panels = (rows + kMostRows - 1) / kMostRows;
  for (int64_t block = begin; block < end; ++block)
    for (int64_t panel = 0; panel < panels; ++panel) {
      const int64_t row = first + rows * panel / panels, next = first + rows * (panel + 1) / panels;
      sized((int)(next - row), [&](auto m) {
        for (int half = 0; half < kOutputs / kLanes; half += kHalves)
          multiply_tile<m.value, kHalves, kVnni>(a, block, half, row);
      });
    }
}

}  // namespace keypast::KEYPAST_VARIANT
