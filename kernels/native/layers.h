/* Elements of the working dtype, bf16 or fp32, as floats. `is_fp32` is a constant wherever these are inlined. */
#ifndef CABOCHON_LAYERS_H
#define CABOCHON_LAYERS_H

#include "vectors.h"

#define INLINE static inline __attribute__((always_inline))

/* Sums of four vectors, each by the tree of sum_lanes. */
INLINE void sum_four(float *to, vfloat a, vfloat b, vfloat c, vfloat d) {
  vfloat ab = __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
              __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  vfloat cd = __builtin_shufflevector(c, d, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
              __builtin_shufflevector(c, d, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  vfloat x = __builtin_shufflevector(ab, cd, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
             __builtin_shufflevector(ab, cd, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
  x = x + __builtin_shufflevector(x, x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
  x = x + __builtin_shufflevector(x, x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
  float __attribute__((vector_size(16))) sums = __builtin_shufflevector(x, x, 0, 4, 8, 12);
  memcpy(to, &sums, sizeof sums);
}

INLINE const void *at(const void *base, int64_t index, const int is_fp32) {
  return (const char *)base + index * (is_fp32 ? 4 : 2);
}

INLINE vfloat load(const void *base, int64_t index, const int is_fp32) {
  return is_fp32 ? load_fp32(at(base, index, 1)) : load_bf16(at(base, index, 0));
}

INLINE void store(void *base, int64_t index, vfloat x, const int is_fp32) {
  if (is_fp32)
    store_fp32((void *)at(base, index, 1), x);
  else
    store_bf16((void *)at(base, index, 0), x);
}

/* n a multiple of LANES. */
INLINE float dot(const void *x, const void *w, int n, const int is_fp32) {
  vfloat sum = {0};
  for (int i = 0; i < n; i += LANES) sum = sum + load(x, i, is_fp32) * load(w, i, is_fp32);
  return sum_lanes(sum);
}

INLINE vfloat rounded(vfloat x, const int is_fp32) { return is_fp32 ? x : round_bf16(x); }

/* (mean(x^2) + eps)^-1/2 of n elements, n a multiple of LANES. */
INLINE float rms_scale(const void *x, int n, float eps, const int is_fp32) {
  vfloat sum = {0};
  for (int i = 0; i < n; i += LANES) {
    vfloat a = load(x, i, is_fp32);
    sum = sum + a * a;
  }
  return 1.0f / __builtin_sqrtf(sum_lanes(sum) / (float)n + eps);
}

#endif
