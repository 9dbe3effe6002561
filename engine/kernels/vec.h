// Sixteen floats at a time: one 512-bit register, two 256-bit ones, or four of 128 bits. Everything here has internal
// linkage or lives in the variant's own namespace: a symbol shared between variants could be linked from the wrong one.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "kernels.h"

#define KEYPAST_INLINE static inline __attribute__((always_inline))
#define KEYPAST_UNROLL _Pragma("GCC unroll 16")

namespace keypast::KEYPAST_VARIANT {

struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif
constexpr int kParts = kLanes / kWidth;

typedef float Lane __attribute__((vector_size(kWidth * 4)));
typedef int32_t IntLane __attribute__((vector_size(kWidth * 4)));
typedef uint32_t UIntLane __attribute__((vector_size(kWidth * 4)));
typedef uint16_t ShortLane __attribute__((vector_size(kWidth * 2)));

struct Vec {
  Lane part[kParts];
};

template <int N>
struct Constant {
  static constexpr int value = N;
};

// ---- one register ----

KEYPAST_INLINE Lane lane_set(float x) { return x - Lane{}; }  // a plain broadcast, -0 too

KEYPAST_INLINE Lane lane_fma(Lane a, Lane b, Lane c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

// Of these two, b where either is NaN.
KEYPAST_INLINE Lane lane_max(Lane a, Lane b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

KEYPAST_INLINE Lane lane_min(Lane a, Lane b) {
#if defined(__AVX512F__)
  return _mm512_min_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_min_ps(a, b);
#else
  return a < b ? a : b;
#endif
}

// p * 2^n for integral n in [-160, 160], where `biased` is n + 1.5 * 2^23.
KEYPAST_INLINE Lane lane_scale(Lane p, Lane n, Lane biased) {
#if defined(__AVX512F__)
  (void)biased;
  return _mm512_scalef_ps(p, n);
#else
  (void)n;
  const IntLane whole = (IntLane)biased - 0x4B400000;
  const IntLane half = whole >> 1;  // two factors, so that neither leaves the exponent's range
  return p * (Lane)((half + 127) << 23) * (Lane)((whole - half + 127) << 23);
#endif
}

// 2^x, x at most 160, to about one unit in the last place; exactly 0 from -inf, exactly 1 from 0, NaN from NaN.
KEYPAST_INLINE Lane lane_exp2(Lane x) {
  x = lane_max(lane_set(-160.0f), x);
  const Lane biased = x + 12582912.0f;  // 1.5 * 2^23: the sum's last bit is worth one
  const Lane n = biased - 12582912.0f;
  const Lane r = x - n;
  Lane p = lane_fma(lane_set(0.00015353362f), r, lane_set(0.0013398875f));  // minimax on [-0.5, 0.5]
  p = lane_fma(p, r, lane_set(0.009618437f));
  p = lane_fma(p, r, lane_set(0.055503324f));
  p = lane_fma(p, r, lane_set(0.24022648f));
  p = lane_fma(p, r, lane_set(0.6931472f));
  p = lane_fma(p, r, lane_set(1.0f));
  return lane_scale(p, n, biased);
}

KEYPAST_INLINE Lane lane_load(const float* from) {
  Lane x;
  memcpy(&x, from, sizeof x);
  return x;
}

KEYPAST_INLINE UIntLane widen(const uint16_t* from) {
#if defined(__AVX512F__)  // the compiler widens each half by itself
  return (UIntLane)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from));
#else
  ShortLane bits;
  memcpy(&bits, from, sizeof bits);
  return __builtin_convertvector(bits, UIntLane);
#endif
}

KEYPAST_INLINE Lane lane_load(const BFloat* from) { return (Lane)(widen(&from->bits) << 16); }

KEYPAST_INLINE Lane lane_load(const Half* from) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from));
#elif defined(__AVX2__)
  return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from));
#else
  const UIntLane h = widen(&from->bits);
  const UIntLane magnitude = h & 0x7FFF;
  const UIntLane finite = (UIntLane)((Lane)(magnitude << 13) * 0x1p112f);  // exact, denormals too
  const UIntLane special = (magnitude << 13) | 0x7F800000;
  return (Lane)((magnitude >= 0x7C00 ? special : finite) | (h & 0x8000) << 16);
#endif
}

KEYPAST_INLINE void lane_store(float* to, Lane x) { memcpy(to, &x, sizeof x); }

KEYPAST_INLINE void narrow(uint16_t* to, UIntLane x) {
  const ShortLane bits = __builtin_convertvector(x, ShortLane);
  memcpy(to, &bits, sizeof bits);
}

KEYPAST_INLINE void lane_store(BFloat* to, Lane x) {  // round to nearest, ties to even
  const UIntLane bits = (UIntLane)x;
  const UIntLane rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
  narrow(&to->bits, (bits & 0x7FFFFFFF) > 0x7F800000 ? UIntLane{} + 0x7FC0 : rounded);
}

KEYPAST_INLINE void lane_store(Half* to, Lane x) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)to, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__AVX2__)
  _mm_storeu_si128((__m128i*)to, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  const UIntLane bits = (UIntLane)x, magnitude = bits & 0x7FFFFFFF;
  const UIntLane rebased = magnitude - 0x38000000;  // exponent bias 127 -> 15
  UIntLane h = (rebased + 0xFFF + (rebased >> 13 & 1)) >> 13;
  const Lane half = lane_set(0.5f);  // its last bit is worth 2^-24, half precision's smallest denormal
  h = magnitude < 0x38800000 ? (UIntLane)((Lane)magnitude + half) - (UIntLane)half : h;
  h = magnitude >= 0x47800000 ? UIntLane{} + 0x7C00 : h;
  h = magnitude > 0x7F800000 ? UIntLane{} + 0x7E00 : h;
  narrow(&to->bits, h | (bits >> 16 & 0x8000));
#endif
}

// ---- sixteen lanes ----

#define KEYPAST_EACH for (int i = 0; i < kParts; ++i)

KEYPAST_INLINE Vec set(float x) {
  Vec r;
  KEYPAST_UNROLL KEYPAST_EACH r.part[i] = lane_set(x);
  return r;
}

template <class T>
KEYPAST_INLINE Vec load(const T* from) {
  Vec r;
  KEYPAST_UNROLL KEYPAST_EACH r.part[i] = lane_load(from + i * kWidth);
  return r;
}

template <class T>
KEYPAST_INLINE void store(T* to, const Vec& x) {
  KEYPAST_UNROLL KEYPAST_EACH lane_store(to + i * kWidth, x.part[i]);
}

#define KEYPAST_BINARY(name, expression)                \
  KEYPAST_INLINE Vec name(const Vec& a, const Vec& b) { \
    Vec r;                                              \
    KEYPAST_UNROLL KEYPAST_EACH {                       \
      const Lane x = a.part[i], y = b.part[i];          \
      r.part[i] = expression;                           \
    }                                                   \
    return r;                                           \
  }
KEYPAST_BINARY(operator+, x + y)
KEYPAST_BINARY(operator-, x - y)
KEYPAST_BINARY(operator*, x* y)
KEYPAST_BINARY(operator/, x / y)
KEYPAST_BINARY(max, lane_max(x, y))
KEYPAST_BINARY(min, lane_min(x, y))
#undef KEYPAST_BINARY

KEYPAST_INLINE Vec fma(const Vec& a, const Vec& b, const Vec& c) {
  Vec r;
  KEYPAST_UNROLL KEYPAST_EACH r.part[i] = lane_fma(a.part[i], b.part[i], c.part[i]);
  return r;
}

KEYPAST_INLINE Vec exp2(const Vec& x) {
  Vec r;
  KEYPAST_UNROLL KEYPAST_EACH r.part[i] = lane_exp2(x.part[i]);
  return r;
}

// x in lanes below n, `other` in the rest.
KEYPAST_INLINE Vec first(const Vec& x, int n, const Vec& other) {
  static const int32_t index[kLanes] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  Vec r;
  KEYPAST_UNROLL KEYPAST_EACH {
    IntLane at;
    memcpy(&at, index + i * kWidth, sizeof at);
    r.part[i] = at < IntLane{} + n ? x.part[i] : other.part[i];
  }
  return r;
}

// x, but `other` where `mask` is -inf.
KEYPAST_INLINE Vec hide(const Vec& x, const Vec& mask, const Vec& other) {
  Vec r;
  KEYPAST_UNROLL KEYPAST_EACH r.part[i] = mask.part[i] == lane_set(-__builtin_inff()) ? other.part[i] : x.part[i];
  return r;
}

#if defined(__AVX512F__)
KEYPAST_INLINE float sum(const Vec& x) { return _mm512_reduce_add_ps(x.part[0]); }
KEYPAST_INLINE float peak(const Vec& x) { return _mm512_reduce_max_ps(x.part[0]); }
#else
KEYPAST_INLINE float sum(const Vec& x) {  // a fixed tree
  Lane folded = x.part[0];
  KEYPAST_UNROLL for (int i = 1; i < kParts; ++i) folded += x.part[i];
  KEYPAST_UNROLL for (int n = kWidth / 2; n; n /= 2)
    KEYPAST_UNROLL for (int i = 0; i < n; ++i) folded[i] += folded[i + n];
  return folded[0];
}
KEYPAST_INLINE float peak(const Vec& x) {
  Lane folded = x.part[0];
  KEYPAST_UNROLL for (int i = 1; i < kParts; ++i) folded = lane_max(folded, x.part[i]);
  KEYPAST_UNROLL for (int n = kWidth / 2; n; n /= 2)
    KEYPAST_UNROLL for (int i = 0; i < n; ++i) folded[i] = folded[i] > folded[i + n] ? folded[i] : folded[i + n];
  return folded[0];
}
#endif

KEYPAST_INLINE float any(const Vec& x) { return x.part[0][0]; }  // of a vector whose lanes are all alike

template <class T>
KEYPAST_INLINE Vec load(const T* from, int n) {  // n lanes, zeros behind
  if (n >= kLanes) return load(from);
  T a[kLanes] = {};
  memcpy(a, from, n * sizeof(T));
  return load(a);
}

template <class T>
KEYPAST_INLINE void store(T* to, const Vec& x, int n) {
  if (n >= kLanes) return store(to, x);
  T a[kLanes];
  store(a, x);
  memcpy(to, a, n * sizeof(T));
}

// Calls f with a number of rows, 1 to kMostRows, as a constant.
constexpr int kMostRows = 6;

template <class F>
KEYPAST_INLINE void sized(int rows, F f) {
  switch (rows) {
    case 1: return f(Constant<1>{});
    case 2: return f(Constant<2>{});
    case 3: return f(Constant<3>{});
    case 4: return f(Constant<4>{});
    case 5: return f(Constant<5>{});
    default: return f(Constant<6>{});
  }
}

// Calls f with `data` as a pointer to its elements.
template <class F>
KEYPAST_INLINE void typed(DType type, void* data, F f) {
  if (type == DType::f16) f((Half*)data);
  if (type == DType::bf16) f((BFloat*)data);
  if (type == DType::f32) f((float*)data);
}

}  // namespace keypast::KEYPAST_VARIANT
