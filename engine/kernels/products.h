// The two products of attention, queries with keys and weights with values, over vectors of sixteen keys or channels:
// in float32, or in pairs of bfloat16 whose products and sums are float32. Every row is summed by itself, channels and
// keys in order, whatever other rows there are.
//
// A step is what one product takes in: a channel or key, or a pair of them. Packed, keys are [vectors][steps][16 keys],
// values [steps][width], queries [steps][rows of a group].
#pragma once
#include "vec.h"

namespace keypast::KEYPAST_VARIANT {

constexpr float kMasked = -1.0f;

// How many vectors of accumulators a group of M rows keeps per row, as registers allow.
template <int M>
constexpr int kWide = kWidth == 16 ? 4 : M <= 1 ? 4 : M <= 3 ? 2 : 1;

struct Keys {  // [begin, end) of a chunk, none of them masked before `whole`
  int begin, whole, end;
};

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// Both give:
//   score   scores[m][16 n ..] = sum over channels d of q[d][m] * keys[n][d][0:16]
//   weigh   a row's weights, 2^(score - peak), in the scores' place, and their sums
//   mask    marks the weight of a key, or of all in the i-th vector but the first `keys`
//   value   sums[m][16 n ..] = sum over keys j of weights[m][j] * values[j][16 n ..]. Keys that begin behind the
//           chunk's start add to what is there. From `whole` on, masked keys are stepped over one by one: what lies in
//           their slots must not be touched. `values` begin with the keys.
// With kFetch, what stands `ahead` vectors further on is fetched.

struct InFloats {
  using Packed = float;
  static constexpr int step = 1;
  static constexpr int direct_rows = 8;  // tiles up to this size convert keys and values as they read them

  static void put_queries(const float* line, int64_t dim, float* to, int64_t stride) {
    for (int64_t d = 0; d < dim; ++d) to[d * stride] = line[d];
  }
  KEYPAST_INLINE void put_key(float* keys, float* values, int64_t j, int64_t d, int64_t dim, int64_t width, float k,
                              float v) {
    keys[(j / kLanes * dim + d) * kLanes + j % kLanes] = k;
    values[j * width + d] = v;
  }
  template <class T>
  KEYPAST_INLINE void put_channels(const T* from, int64_t, int, float* to) {
    store(to, load(from));
  }
  template <class T>
  KEYPAST_INLINE void put_values(const T* from, int64_t, int lanes, float* to) {
    store(to, load(from, lanes));
  }

  KEYPAST_INLINE Vec weigh(float* s, int vecs, const Vec& peak) {
    Vec total = set(0.0f);
    for (int i = 0; i < vecs; ++i) {
      const Vec weights = exp2(load(s + i * kLanes) - peak);
      total = total + weights;
      store(s + i * kLanes, weights);
    }
    return total;
  }
  KEYPAST_INLINE void mask(float* s, int key) { s[key] = kMasked; }
  KEYPAST_INLINE void mask_behind(float* s, int i, int keys) {
    store(s + i * kLanes, first(load(s + i * kLanes), keys, set(kMasked)));
  }

  // One channel of N vectors of keys against M queries, which are neighbours.
  template <int M, int N, class T>
  KEYPAST_INLINE void score_channel(const float* q, const T* const* keys, int64_t at, Vec (&sums)[M][N]) {
    Vec k[N];
    KEYPAST_UNROLL for (int n = 0; n < N; ++n) k[n] = load(keys[n] + at);
    KEYPAST_UNROLL for (int m = 0; m < M; ++m) {
      const Vec x = set(q[m]);
      KEYPAST_UNROLL for (int n = 0; n < N; ++n) sums[m][n] = fma(x, k[n], sums[m][n]);
    }
  }

  template <int M, int N, bool kFetch, class T>
  KEYPAST_INLINE void score(const float* q, int64_t q_stride, const T* const* keys, int ahead, int64_t stride,
                            int64_t dim, float* scores) {
    // A line of the cache holds kStep channels of these 16 keys, or one channel of theirs and their neighbours':
    // fetching every kStep-th channel, from n % kStep on, reaches every line either way.
    constexpr int kStep = 4 / sizeof(T);
    Vec sums[M][N];
    KEYPAST_UNROLL for (int m = 0; m < M; ++m)
      KEYPAST_UNROLL for (int n = 0; n < N; ++n) sums[m][n] = set(0.0f);
    int64_t d = 0;
    for (; d + kStep <= dim; d += kStep) {
      if (kFetch)
        KEYPAST_UNROLL for (int n = 0; n < N; ++n) __builtin_prefetch(keys[n + ahead] + (d + n % kStep) * stride);
      KEYPAST_UNROLL for (int i = 0; i < kStep; ++i)
        score_channel(q + (d + i) * q_stride, keys, (d + i) * stride, sums);
    }
    for (; d < dim; ++d) score_channel(q + d * q_stride, keys, d * stride, sums);
    KEYPAST_UNROLL for (int m = 0; m < M; ++m)
      KEYPAST_UNROLL for (int n = 0; n < N; ++n) store(scores + m * kChunk + n * kLanes, sums[m][n]);
  }

  template <int M, int N, bool kFetch, class T>
  KEYPAST_INLINE void value(const float* weights, const T* const* values, int ahead, int64_t offset,
                            int64_t stride, const Keys& keys, float* sums, int64_t sums_stride) {
    Vec acc[M][N];
    KEYPAST_UNROLL for (int m = 0; m < M; ++m)
      KEYPAST_UNROLL for (int n = 0; n < N; ++n)
        acc[m][n] = keys.begin ? load(sums + m * sums_stride + n * kLanes) : set(0.0f);
    weights += keys.begin;
    const int whole = keys.whole - keys.begin, end_key = keys.end - keys.begin;
    int key = 0;
    while (key < whole) {
      const T* row = values[key / kLanes] + offset;
      const T* later = values[key / kLanes + (kFetch ? ahead : 0)] + offset;
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
    for (; key < end_key; ++key) {
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
};

#if defined(__AVX512F__)
// This unit is compiled for processors without these instructions, where nothing here is called.
struct InPairs {
  struct Packed {
    uint32_t bits;  // the first of the pair is the lower half
  };
  static constexpr int step = 2;
  static constexpr int direct_rows = 8;
  static constexpr uint16_t masked = 0xBF80;  // kMasked

  static void put_queries(const float* line, int64_t dim, Packed* to, int64_t stride) {
    for (int64_t d = 0; d < dim; d += kLanes) {
      BFloat few[kLanes];
      Packed pairs[kLanes / 2];
      store(few, load(line + d, (int)least(kLanes, dim - d)));
      memcpy(pairs, few, sizeof pairs);
      for (int64_t i = 0; i < kLanes / 2 && d + 2 * i < dim; ++i) to[(d / 2 + i) * stride] = pairs[i];
    }
  }
  KEYPAST_INLINE void put_key(Packed* keys, Packed* values, int64_t j, int64_t d, int64_t dim, int64_t width, float k,
                              float v) {
    Packed* key = keys + (j / kLanes * ((dim + 1) / 2) + d / 2) * kLanes + j % kLanes;
    if (d % 2 == 0) key->bits = 0;
    store((BFloat*)key + d % 2, set(k), 1);
    store((BFloat*)(values + j / 2 * width + d) + j % 2, set(v), 1);
  }
  template <class T>
  KEYPAST_INLINE void put_channels(const T* from, int64_t stride, int channels, Packed* to) {
    _mm512_storeu_si512(to, pair_up(load(from), channels > 1 ? load(from + stride) : set(0.0f)));
  }
  template <class T>
  KEYPAST_INLINE void put_values(const T* from, int64_t stride, int lanes, Packed* to) {
    _mm512_storeu_si512(to, pair_up(load(from, lanes), load(from + stride, lanes)));
  }

  // The weights that are multiplied are those that are added up, by twos.
  KEYPAST_INLINE Vec weigh(float* s, int vecs, const Vec& peak) {
    const __m512i ones = _mm512_set1_epi32(0x3F803F80);
    __m512 total = _mm512_setzero_ps();
    for (int i = 0; i < vecs; i += 2) {
      const Lane high = i + 1 < vecs ? exp2(load(s + (i + 1) * kLanes).part[0] - peak.part[0]) : Lane{};
      const __m512i weights = round_both(exp2(load(s + i * kLanes).part[0] - peak.part[0]), high);
      total = dot(total, weights, ones);
      _mm512_storeu_si512((__m256i*)s + i, weights);
    }
    Vec r;
    r.part[0] = total;
    return r;
  }
  KEYPAST_INLINE void mask(float* s, int key) { ((BFloat*)s)[key].bits = masked; }
  KEYPAST_INLINE void mask_behind(float* s, int i, int keys) {
    __m256i* at = (__m256i*)s + i;
    const __m256i marks = _mm256_set1_epi16((int16_t)masked);
    _mm256_storeu_si256(at, _mm256_mask_loadu_epi16(marks, (__mmask16)((1u << least(keys, kLanes)) - 1), at));
  }

  template <int M, int N, bool kFetch, class T>
  KEYPAST_INLINE void score(const Packed* q, int64_t q_stride, const T* const* keys, int ahead, int64_t stride,
                            int64_t dim, float* scores) {
    __m512 sums[M][N];
    KEYPAST_UNROLL for (int m = 0; m < M; ++m)
      KEYPAST_UNROLL for (int n = 0; n < N; ++n) sums[m][n] = _mm512_setzero_ps();
    for (int64_t d = 0; d < dim; d += 2, q += q_stride) {
      if (kFetch)  // as in floats, of 16-bit keys
        KEYPAST_UNROLL for (int n = 0; n < N; ++n) __builtin_prefetch(keys[n + ahead] + (d + n % 2) * stride, 0, 0);
      __m512i k[N];
      KEYPAST_UNROLL for (int n = 0; n < N; ++n) k[n] = pair_at(keys[n], d, stride);
      KEYPAST_UNROLL for (int m = 0; m < M; ++m) {
        const __m512i x = _mm512_set1_epi32((int)q[m].bits);
        KEYPAST_UNROLL for (int n = 0; n < N; ++n) sums[m][n] = dot(sums[m][n], k[n], x);
      }
    }
    KEYPAST_UNROLL for (int m = 0; m < M; ++m)
      KEYPAST_UNROLL for (int n = 0; n < N; ++n) _mm512_storeu_ps(scores + m * kChunk + n * kLanes, sums[m][n]);
  }

  template <int M, int N, bool kFetch, class T>
  KEYPAST_INLINE void value(const float* weights, const T* const* values, int ahead, int64_t offset,
                            int64_t stride, const Keys& keys, float* sums, int64_t sums_stride) {
    __m512 acc[M][N];
    KEYPAST_UNROLL for (int m = 0; m < M; ++m)
      KEYPAST_UNROLL for (int n = 0; n < N; ++n)
        acc[m][n] = keys.begin ? _mm512_loadu_ps(sums + m * sums_stride + n * kLanes) : _mm512_setzero_ps();
    const BFloat* w = (const BFloat*)weights + keys.begin;
    const int whole = (keys.whole - keys.begin) / 2 * 2, end_key = keys.end - keys.begin;
    int key = 0;
    while (key < whole) {
      const T *from = values[key / kLanes] + offset, *later = values[key / kLanes + (kFetch ? ahead : 0)] + offset;
      const int first = key, end = (int)least(key + kLanes, whole);
      for (; key < end; key += 2) {
        if (kFetch)
          KEYPAST_UNROLL for (int i = 0; i < 2 * N * kLanes; i += 32)
            __builtin_prefetch(later + (key - first + i / (N * kLanes)) * stride + i % (N * kLanes), 0, 0);
        __m512i v[N];
        KEYPAST_UNROLL for (int n = 0; n < N; ++n) v[n] = pair_at(from + n * kLanes, key - first, stride);
        KEYPAST_UNROLL for (int m = 0; m < M; ++m) {
          const __m512i x = _mm512_set1_epi32((int)pair_of(w + m * 2 * kChunk + key));
          KEYPAST_UNROLL for (int n = 0; n < N; ++n) acc[m][n] = dot(acc[m][n], v[n], x);
        }
      }
    }
    for (; key < end_key; key += 2) {
      const T* from = values[key / kLanes] + offset;
      KEYPAST_UNROLL for (int m = 0; m < M; ++m) {
        const uint32_t pair = pair_of(w + m * 2 * kChunk + key), keep = unmasked(pair);
        if (!keep) continue;
        const __m512i x = _mm512_set1_epi32((int)(pair & keep)), lanes = _mm512_set1_epi32((int)keep);
        KEYPAST_UNROLL for (int n = 0; n < N; ++n)
          acc[m][n] = dot(acc[m][n], pair_at(from + n * kLanes, key % kLanes, stride) & lanes, x);
      }
    }
    KEYPAST_UNROLL for (int m = 0; m < M; ++m)
      KEYPAST_UNROLL for (int n = 0; n < N; ++n) _mm512_storeu_ps(sums + m * sums_stride + n * kLanes, acc[m][n]);
  }

 private:
  KEYPAST_INLINE uint32_t pair_of(const BFloat* from) {
    uint32_t pair;
    memcpy(&pair, from, sizeof pair);
    return pair;
  }
  KEYPAST_INLINE uint32_t unmasked(uint32_t pair) {
    return ((pair & 0xFFFF) == masked ? 0 : 0xFFFF) | (pair >> 16 == masked ? 0 : 0xFFFF0000);
  }
  KEYPAST_INLINE __m512i pair_up(const Vec& first, const Vec& second) {
    static const uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                       8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return _mm512_permutexvar_epi16(_mm512_loadu_si512(order), round_both(first.part[0], second.part[0]));
  }
  KEYPAST_INLINE __m512i round_both(__m512 first, __m512 second) {  // one behind the other
    __m512i both;
    asm("vcvtne2ps2bf16 %1, %2, %0" : "=v"(both) : "v"(first), "v"(second));
    return both;
  }
  // As `lane_exp2`, but to 2^-18 only: rounding takes 2^-9 away.
  KEYPAST_INLINE Lane exp2(Lane x) {
    x = lane_max(lane_set(-160.0f), x);
    const Lane biased = x + 12582912.0f, n = biased - 12582912.0f, r = x - n;
    Lane p = lane_fma(lane_set(0.009582853f), r, lane_set(0.055906426f));
    p = lane_fma(p, r, lane_set(0.24024099f));
    p = lane_fma(p, r, lane_set(0.69312418f));
    p = lane_fma(p, r, lane_set(1.0f));
    return lane_scale(p, n, biased);
  }
  // Rows i and i + 1 of what lies `stride` apart, i even.
  template <class T>
  KEYPAST_INLINE __m512i pair_at(const T* from, int64_t i, int64_t stride) {
    return pair_up(load(from + i * stride), load(from + (i + 1) * stride));
  }
  KEYPAST_INLINE __m512i pair_at(const BFloat* from, int64_t i, int64_t stride) {
    const __m512i upper = _mm512_slli_epi32((__m512i)widen(&from[(i + 1) * stride].bits), 16);
    return (__m512i)widen(&from[i * stride].bits) | upper;
  }
  KEYPAST_INLINE __m512i pair_at(const Packed* from, int64_t i, int64_t stride) {
    return _mm512_loadu_si512(from + (i >> 1) * stride);
  }
  KEYPAST_INLINE __m512 dot(__m512 sum, __m512i pairs, __m512i x) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(pairs), "v"(x));
    return sum;
  }
};
#endif

template <class Products, int M, bool kFetch, class T>
static void score_group(const typename Products::Packed* q, int64_t q_stride, const T* const* keys, int ahead,
                        int64_t stride, int64_t dim, int vecs, float* s) {
  int n = 0;
  if constexpr (kWide<M> >= 4)
    for (; vecs - n >= 4; n += 4)
      Products::template score<M, 4, kFetch>(q, q_stride, keys + n, ahead, stride, dim, s + n * kLanes);
  if constexpr (kWide<M> >= 2)
    for (; vecs - n >= 2; n += 2)
      Products::template score<M, 2, kFetch>(q, q_stride, keys + n, ahead, stride, dim, s + n * kLanes);
  for (; n < vecs; ++n)
    Products::template score<M, 1, kFetch>(q, q_stride, keys + n, ahead, stride, dim, s + n * kLanes);
}

template <class Products, int M, bool kFetch, class T>
static void value_group(const float* weights, const T* const* values, int ahead, int64_t stride,
                        const Keys& keys, float* sums, int64_t width) {
  int64_t i = 0;
  if constexpr (kWide<M> >= 4)
    for (; width - i >= 4 * kLanes; i += 4 * kLanes)
      Products::template value<M, 4, kFetch>(weights, values, ahead, i, stride, keys, sums + i, width);
  if constexpr (kWide<M> >= 2)
    for (; width - i >= 2 * kLanes; i += 2 * kLanes)
      Products::template value<M, 2, kFetch>(weights, values, ahead, i, stride, keys, sums + i, width);
  for (; i < width; i += kLanes)
    Products::template value<M, 1, kFetch>(weights, values, ahead, i, stride, keys, sums + i, width);
}

}  // namespace keypast::KEYPAST_VARIANT
