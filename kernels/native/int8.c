/* Products of rows in 16 bits with weights in 8: kernels/native/int8.py says what.

   A sum of 2 K' / 32 products of 16 by 8 bits is an exact integer in each of 16 lanes; lanes become floats and are
   added by one tree, then scaled and rounded once. Nothing in that knows which rows or weights are computed
   together, or by which instructions: a result has the same bits in every batch, and in every library. */
#include <stdlib.h>

#include "kernels.h"
#include "layers.h"
#include "threads.h"

#define SEGMENT (256 * PAIRS) /* of a row: 512 products of 32,512 by 127 are below 2^31 */
#define WEIGHTS 4         /* rows of the weight together */
#define AHEAD 4096        /* bytes of the weight: what memory is asked for meanwhile */
#define BLOCK 64          /* rows of the weight in a unit of work: they stay in the cache for all x */
#define HEAD_BLOCK 512
#define LARGEST 32512.0f
#define TINY 1e-37f       /* a scale of zeros: its inverse is finite */
#define ROUNDING 0x1.04p-8f /* of a result to bf16, relative to it */

typedef int16_t vshort __attribute__((vector_size(2 * PAIRS)));
typedef int8_t vchar __attribute__((vector_size(PAIRS)));

/* sums + the products of neighbours, in pairs. */
INLINE vint add_pairs(vint sums, vshort a, vshort b) {
#if defined(__AVX512VNNI__)
  return (vint)_mm512_dpwssd_epi32((__m512i)sums, (__m512i)a, (__m512i)b);
#elif defined(__AVX512BW__)
  return sums + (vint)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  union { vshort all; __m256i half[2]; } x = {a}, y = {b};
  union { __m256i half[2]; vint all; } z = {{_mm256_madd_epi16(x.half[0], y.half[0]),
                                             _mm256_madd_epi16(x.half[1], y.half[1])}};
  return sums + z.all;
#else
  vint x = (vint)a, y = (vint)b;
  return sums + (x << 16 >> 16) * (y << 16 >> 16) + (x >> 16) * (y >> 16);
#endif
}

INLINE vshort load_short(const int16_t *from) {
  vshort x;
  memcpy(&x, from, sizeof x);
  return x;
}

INLINE vshort load_char(const int8_t *from) {
#if defined(__AVX512BW__) /* GCC 12 makes four instructions of the conversion below */
  return (vshort)_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)from));
#else
  vchar x;
  memcpy(&x, from, sizeof x);
  return __builtin_convertvector(x, vshort);
#endif
}

/* Sums of R rows of x with WEIGHTS rows of the weight, not scaled. to: [R][WEIGHTS] */
INLINE void multiply(const int16_t *x, const int8_t *w, int K, float (*to)[WEIGHTS], const int R) {
  vfloat totals[4][WEIGHTS] = {0};
  for (int start = 0; start < K; start += SEGMENT) {
    const int end = start + SEGMENT < K ? start + SEGMENT : K;
    vint sums[4][WEIGHTS];
    for (int r = 0; r < R; r++)
      for (int j = 0; j < WEIGHTS; j++) sums[r][j] = (vint){0};
    for (int i = start; i < end; i += PAIRS) {
      vshort weights[WEIGHTS];
      for (int j = 0; j < WEIGHTS; j++) {
        weights[j] = load_char(w + (int64_t)j * K + i);
        __builtin_prefetch(w + (int64_t)j * K + i + AHEAD);
      }
      for (int r = 0; r < R; r++) {
        vshort row = load_short(x + (int64_t)r * K + i);
        for (int j = 0; j < WEIGHTS; j++) sums[r][j] = add_pairs(sums[r][j], row, weights[j]);
      }
    }
    for (int r = 0; r < R; r++)
      for (int j = 0; j < WEIGHTS; j++)
        totals[r][j] = totals[r][j] + __builtin_convertvector(sums[r][j], vfloat);
  }
  for (int r = 0; r < R; r++) sum_four(to[r], totals[r][0], totals[r][1], totals[r][2], totals[r][3]);
}

struct rows {
  const void *x; /* [T, K] */
  int16_t *values; /* [T, K'], zeros from K on */
  float *scales; /* [T] */
  int T, K, padded_K, is_fp32;
};

/* Nearest multiples of a scale, max |x| / 32,512; a row that is not finite has a scale that is not. */
INLINE void quantize_of(struct rows *a, int row, const int is_fp32) {
  const void *x = at(a->x, (int64_t)row * a->K, is_fp32);
  int16_t *to = a->values + (int64_t)row * a->padded_K;
  vfloat largest = {0}, broken = {0};
  for (int i = 0; i < a->K; i += LANES) {
    vfloat v = load(x, i, is_fp32);
    vfloat size = (vfloat)((vint)v & 0x7FFFFFFF);
    largest = vmax(size, largest);
    broken = broken + v * splat(0.0f); /* NaN, of infinity too */
  }
  const float none = sum_lanes(broken), high = max_lanes(largest) / LARGEST;
  const float scale = (high > TINY ? high : TINY) + none;
  a->scales[row] = scale;
  memset(to + a->K, 0, (a->padded_K - a->K) * sizeof *to);
  for (int i = 0; i < a->K; i += LANES) {
    const vfloat magic = splat(12582912.0f); /* 1.5 * 2^23: adding it rounds to an integer */
    vfloat whole = none == 0 ? (load(x, i, is_fp32) / splat(scale) + magic) - magic : splat(0.0f);
    int16_t parts __attribute__((vector_size(2 * LANES))) =
        __builtin_convertvector(__builtin_convertvector(whole, vint), __typeof__(parts));
    memcpy(to + i, &parts, sizeof parts);
  }
}

static void quantize(void *arguments, int row) {
  struct rows *a = arguments;
  if (a->is_fp32) quantize_of(a, row, 1);
  else quantize_of(a, row, 0);
}

struct product {
  const int16_t *x; /* [T, K'] */
  const float *x_scales;
  const int8_t *weight; /* [N, K'] */
  const float *scales; /* [N] */
  void *out; /* [T, N] */
  int T, N, K, is_fp32;
  /* Of a head alone */
  const float *norms; /* [T], of x: 0 where nothing is settled */
  const float *errors; /* [N] */
  float *lowest, *highest; /* [units, T]: largest lower bound of an entry, largest upper bound */
};

INLINE float as_float(const void *from, int64_t index, const int is_fp32) {
  float x;
  uint32_t bits = 0;
  if (is_fp32) return memcpy(&x, (const float *)from + index, 4), x;
  memcpy((char *)&bits, (const uint16_t *)from + index, 2);
  bits <<= 16;
  return memcpy(&x, &bits, 4), x;
}

INLINE void set(void *to, int64_t index, float value, const int is_fp32) {
  if (is_fp32) {
    memcpy((float *)to + index, &value, 4);
    return;
  }
  uint32_t bits;
  memcpy(&bits, &value, 4);
  uint16_t high = value == value ? (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 : (bits | 0x400000u) >> 16;
  memcpy((uint16_t *)to + index, &high, 2);
}

typedef float vfour __attribute__((vector_size(16)));
typedef uint32_t vufour __attribute__((vector_size(16)));
typedef uint16_t vhalffour __attribute__((vector_size(8)));

/* `set` of four neighbours in bf16. */
INLINE void set_four(void *to, int64_t index, vfour x) {
  const vufour bits = (vufour)x, is_nan = (vufour)(x != x);
  const vufour whole = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16, nan = (bits | 0x400000u) >> 16;
  const vhalffour high = __builtin_convertvector((whole & ~is_nan) | (nan & is_nan), vhalffour);
  memcpy((uint16_t *)to + index, &high, sizeof high);
}

/* Rows first..first + R of x with rows n..n + WEIGHTS of the weight, where they exist. */
INLINE void some(struct product *a, int first, int n, float *lowest, float *highest, const int R, const int is_fp32,
                 const int is_head) {
  float sums[4][WEIGHTS];
  const int start = n + WEIGHTS <= a->N ? n : a->N - WEIGHTS; /* the last ones again rather than beyond */
  multiply(a->x + (int64_t)first * a->K, a->weight + (int64_t)start * a->K, a->K, sums, R);
  for (int r = 0; r < R; r++) {
    const int row = first + r;
    if (!is_head && !is_fp32 && n == start) { /* as below, four at once */
      vfour scales, values;
      memcpy(&scales, a->scales + n, sizeof scales);
      memcpy(&values, sums[r], sizeof values);
      set_four(a->out, (int64_t)row * a->N + n, values * (a->x_scales[row] * scales));
      continue;
    }
    for (int j = n - start; j < WEIGHTS; j++) {
      const float value = sums[r][j] * (a->x_scales[row] * a->scales[start + j]);
      set(a->out, (int64_t)row * a->N + start + j, value, is_fp32);
      if (!is_head) continue;
      const float margin = a->norms[row] * a->errors[start + j];
      if (value - margin > lowest[row]) lowest[row] = value - margin;
      if (value + margin > highest[row]) highest[row] = value + margin;
    }
  }
}

INLINE void multiply_unit(struct product *a, int unit, int block, const int is_fp32, const int is_head) {
  const int first = unit * block, last = first + block < a->N ? first + block : a->N;
  float *lowest = is_head ? a->lowest + (int64_t)unit * a->T : 0, *highest = is_head ? a->highest + (int64_t)unit * a->T : 0;
  for (int row = 0; is_head && row < a->T; row++) lowest[row] = highest[row] = -__builtin_inff();
  for (int row = 0; row < a->T;) {
    const int R = a->T - row < 4 ? a->T - row : 4;
    for (int n = first; n < last; n += WEIGHTS) {
      if (R == 4) some(a, row, n, lowest, highest, 4, is_fp32, is_head);
      else if (R == 3) some(a, row, n, lowest, highest, 3, is_fp32, is_head);
      else if (R == 2) some(a, row, n, lowest, highest, 2, is_fp32, is_head);
      else some(a, row, n, lowest, highest, 1, is_fp32, is_head);
    }
    row += R;
  }
}

static void multiply_bf16(void *a, int unit) { multiply_unit(a, unit, BLOCK, 0, 0); }
static void multiply_fp32(void *a, int unit) { multiply_unit(a, unit, BLOCK, 1, 0); }
static void head_bf16(void *a, int unit) { multiply_unit(a, unit, HEAD_BLOCK, 0, 1); }
static void head_fp32(void *a, int unit) { multiply_unit(a, unit, HEAD_BLOCK, 1, 1); }

/* x: [T, K], K a multiple of LANES. weight: [N, K'], N at least WEIGHTS, scales: [N]. values: [T, K'] and x_scales: [T]
   are memory for x in 16 bits. out: [T, N]. */
EXPORT void cabochon_int8_linear(const void *x, int16_t *values, float *x_scales, const int8_t *weight,
                                 const float *scales, void *out, int T, int N, int K, int padded_K, int is_fp32,
                                 int num_threads) {
  struct rows rows = {x, values, x_scales, T, K, padded_K, is_fp32};
  struct product product = {values, x_scales, weight, scales, out, T, N, padded_K, is_fp32};
  for_each(quantize, &rows, T, T < 16 ? 1 : num_threads);
  for_each(is_fp32 ? multiply_fp32 : multiply_bf16, &product, (N + BLOCK - 1) / BLOCK, num_threads);
}

struct settle {
  const void *x, *embedding;
  const struct product *product;
  const float *lowest; /* [T]: what may be the largest has an upper bound that is not below; NaN: nothing is settled */
  int K;
};

/* Compute again, from the embedding, what could be the largest of its row. */
INLINE void settle_unit(const struct settle *a, int unit, const int is_fp32) {
  const struct product *p = a->product;
  const int K = a->K;
  const int first = unit * HEAD_BLOCK, last = first + HEAD_BLOCK < p->N ? first + HEAD_BLOCK : p->N;
  for (int row = 0; row < p->T; row++) {
    if (!(p->highest[(int64_t)unit * p->T + row] >= a->lowest[row])) continue;
    const void *x = at(a->x, (int64_t)row * K, is_fp32);
    for (int n = first; n < last; n++) {
      const float value = as_float(p->out, (int64_t)row * p->N + n, is_fp32);
      const float slack = is_fp32 ? 0 : __builtin_fabsf(value) * ROUNDING;
      if (value + slack + p->norms[row] * p->errors[n] >= a->lowest[row])
        set(p->out, (int64_t)row * p->N + n, dot(x, at(a->embedding, (int64_t)n * K, is_fp32), K, is_fp32), is_fp32);
    }
  }
}

static void settle_bf16(void *a, int unit) { settle_unit(a, unit, 0); }
static void settle_fp32(void *a, int unit) { settle_unit(a, unit, 1); }

/* As cabochon_int8_linear, then every entry that may be the largest of its row is computed from the embedding
   [N, K] instead. errors: [N], so that an entry is within ||x|| errors + x_scales x_error of the exact product.
   Returns 0, or -1 without memory. */
EXPORT int cabochon_int8_head(const void *x, int16_t *values, float *x_scales, const int8_t *weight,
                              const float *scales, const void *embedding, const float *errors, float x_error, void *out,
                              int T, int N, int K, int padded_K, int is_fp32, int num_threads) {
  const int units = (N + HEAD_BLOCK - 1) / HEAD_BLOCK;
  float *memory = malloc((size_t)T * (2 * units + 2) * sizeof(float));
  if (!memory) return -1;
  float *norms = memory, *lowest = norms + T, *bounds = lowest + T;
  struct rows rows = {x, values, x_scales, T, K, padded_K, is_fp32};
  struct product product = {values, x_scales, weight, scales, out, T, N, padded_K, is_fp32,
                            norms, errors, bounds, bounds + (int64_t)T * units};
  for_each(quantize, &rows, T, 1);
  for (int row = 0; row < T; row++) {
    const void *from = at(x, (int64_t)row * K, is_fp32);
    norms[row] = __builtin_sqrtf(is_fp32 ? dot(from, from, K, 1) : dot(from, from, K, 0)) * 1.0001f;
  }
  for_each(is_fp32 ? head_fp32 : head_bf16, &product, units, num_threads);
  for (int row = 0; row < T; row++) {
    float low = -__builtin_inff();
    for (int unit = 0; unit < units; unit++) {
      const float bound = product.lowest[(int64_t)unit * T + row];
      if (bound > low) low = bound;
    }
    lowest[row] = norms[row] > 0 && norms[row] < __builtin_inff() ? low - 2 * x_scales[row] * x_error : __builtin_nanf("");
  }
  struct settle settle = {x, embedding, &product, lowest, K};
  for_each(is_fp32 ? settle_fp32 : settle_bf16, &settle, units, num_threads);
  free(memory);
  return 0;
}
