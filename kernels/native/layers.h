/* Elements of the working dtype, bf16 or fp32, as floats. `is_fp32` is a constant wherever these are inlined. */
#ifndef CABOCHON_LAYERS_H
#define CABOCHON_LAYERS_H

#include "vectors.h"

#define INLINE static inline __attribute__((always_inline))

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
