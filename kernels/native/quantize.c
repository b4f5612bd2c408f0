/* Weights in 8 bits, made once when a model is loaded: kernels/native/quantize.py says what. */
#include "layers.h"
#include "threads.h"

#define LARGEST 127
#define TINY 1e-37f /* a scale of zeros: its inverse is finite */
#define FOUR 4
#define OFFSET 128 /* of screen.c */

struct weight {
  const void *weight; /* [N, K] */
  int8_t *values;     /* [N, K'], zeros from K on */
  float *scales;      /* [N] */
  float *errors, *norms; /* [N] */
  uint8_t *packed;    /* [N' / LANES, K / FOUR, LANES, FOUR] */
  int N, K, padded_K, is_fp32;
};

INLINE void quantize_row(struct weight *a, int row, const int is_fp32) {
  const void *w = at(a->weight, (int64_t)row * a->K, is_fp32);
  int8_t *to = a->values + (int64_t)row * a->padded_K;
  vfloat largest = {0}, broken = {0};
  for (int i = 0; i < a->K; i += LANES) {
    vfloat v = load(w, i, is_fp32);
    largest = vmax((vfloat)((vint)v & 0x7FFFFFFF), largest);
    broken = broken + v * splat(0.0f); /* NaN, of infinity too */
  }
  const float none = sum_lanes(broken), high = max_lanes(largest) * (1.0f / LARGEST);
  const float scale = (high > TINY ? high : TINY) + none;
  a->scales[row] = scale;
  memset(to + a->K, 0, a->padded_K - a->K);
  for (int i = 0; i < a->K; i += LANES) {
    const vfloat magic = splat(12582912.0f); /* 1.5 * 2^23: adding it rounds to an integer */
    vfloat whole = none == 0 ? (load(w, i, is_fp32) / splat(scale) + magic) - magic : splat(0.0f);
    int8_t bytes __attribute__((vector_size(LANES))) =
        __builtin_convertvector(__builtin_convertvector(whole, vint), __typeof__(bytes));
    memcpy(to + i, &bytes, sizeof bytes);
  }
}

static void quantize_unit(void *arguments, int row) {
  struct weight *a = arguments;
  if (a->is_fp32) quantize_row(a, row, 1);
  else quantize_row(a, row, 0);
}

/* weight: [N, K], K a multiple of LANES. Writes values [N, K'], nearest multiples of scales [N]; a row that is not
   finite has a scale that is not. */
EXPORT void cabochon_quantize(const void *weight, int8_t *values, float *scales, int N, int K, int padded_K, int is_fp32,
                              int num_threads) {
  struct weight a = {weight, values, scales, 0, 0, 0, N, K, padded_K, is_fp32};
  for_each(quantize_unit, &a, N, num_threads);
}

INLINE void measure_row(struct weight *a, int row, const int is_fp32) {
  const void *w = at(a->weight, (int64_t)row * a->K, is_fp32);
  const int8_t *values = a->values + (int64_t)row * a->padded_K;
  vfloat error = {0}, norm = {0};
  for (int i = 0; i < a->K; i += LANES) {
    int8_t bytes __attribute__((vector_size(LANES)));
    memcpy(&bytes, values + i, sizeof bytes);
    vfloat restored = __builtin_convertvector(__builtin_convertvector(bytes, vint), vfloat) * splat(a->scales[row]);
    vfloat changed = load(w, i, is_fp32) - restored;
    error = error + changed * changed;
    norm = norm + restored * restored;
  }
  a->errors[row] = __builtin_sqrtf(sum_lanes(error));
  a->norms[row] = __builtin_sqrtf(sum_lanes(norm));
}

static void measure_unit(void *arguments, int row) {
  struct weight *a = arguments;
  if (a->is_fp32) measure_row(a, row, 1);
  else measure_row(a, row, 0);
}

/* Writes of each row [N] the norm of what values and scales have changed, and that of what they are. */
EXPORT void cabochon_quantize_errors(const void *weight, const int8_t *values, const float *scales, float *errors,
                                     float *norms, int N, int K, int padded_K, int is_fp32, int num_threads) {
  struct weight a = {weight, (int8_t *)values, (float *)scales, errors, norms, 0, N, K, padded_K, is_fp32};
  for_each(measure_unit, &a, N, num_threads);
}

static void pack_unit(void *arguments, int group) {
  struct weight *a = arguments;
  uint8_t *to = a->packed + (int64_t)group * a->K * LANES;
  for (int lane = 0; lane < LANES; lane++) {
    const int row = group * LANES + lane;
    const int8_t *values = a->values + (int64_t)row * a->padded_K;
    for (int i = 0; i < a->K; i += FOUR) {
      uint32_t bytes = 0;
      if (row < a->N) memcpy(&bytes, values + i, FOUR);
      bytes ^= 0x80808080u; /* adds OFFSET to each */
      memcpy(to + i * LANES + lane * FOUR, &bytes, FOUR);
    }
  }
}

/* values: [N, K']. Writes packed [N', K] in the order of screen.c, N' a multiple of LANES, zeros past N. */
EXPORT void cabochon_pack(const int8_t *values, uint8_t *packed, int N, int packed_N, int K, int padded_K,
                          int num_threads) {
  struct weight a = {0, (int8_t *)values, 0, 0, 0, packed, N, K, padded_K, 0};
  for_each(pack_unit, &a, packed_N / LANES, num_threads);
}
