/* Sixteen floats at once, by GCC's and clang's vector types: AVX-512, two AVX2 or four NEON registers.

   No -ffast-math anywhere: an element's result must not depend on its place in a row or a batch, NaN must stay
   NaN, and infinity must be itself. a * b + c is one rounding on every path of a build, or on none. */
#ifndef CABOCHON_VECTORS_H
#define CABOCHON_VECTORS_H

#include <stdint.h>
#include <string.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define LANES 16

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "bf16 is read as the upper half of a float");

#define EXPORT __attribute__((visibility("default")))

typedef float vfloat __attribute__((vector_size(4 * LANES)));
typedef int32_t vint __attribute__((vector_size(4 * LANES)));
typedef uint32_t vuint __attribute__((vector_size(4 * LANES)));
typedef uint16_t vhalf __attribute__((vector_size(2 * LANES)));

static inline vfloat splat(float x) { return x - (vfloat){0}; }

static inline vfloat choose(vint mask, vfloat a, vfloat b) {
  return (vfloat)(((vint)a & mask) | ((vint)b & ~mask));
}

static inline vfloat vmax(vfloat a, vfloat b) { return choose(a > b, a, b); }

static inline vfloat load_fp32(const void *from) {
  vfloat x;
  memcpy(&x, from, sizeof x);
  return x;
}

static inline void store_fp32(void *to, vfloat x) { memcpy(to, &x, sizeof x); }

static inline vfloat load_bf16(const void *from) {
#if defined(__AVX512F__) /* GCC 12 makes four instructions of the conversion below */
  return (vfloat)((vuint)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from)) << 16);
#else
  vhalf x;
  memcpy(&x, from, sizeof x);
  return (vfloat)(__builtin_convertvector(x, vuint) << 16);
#endif
}

/* To nearest, ties to even. NaN stays NaN: the carry could make it infinity. */
static inline vfloat round_bf16(vfloat x) {
  vuint bits = (vuint)x;
  vuint rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000u;
  return choose(x == x, (vfloat)rounded, (vfloat)((vuint)x | 0x400000u));
}

static inline void store_bf16(void *to, vfloat x) {
  vhalf bits = __builtin_convertvector((vuint)round_bf16(x) >> 16, vhalf);
  memcpy(to, &bits, sizeof bits);
}

/* Lanes i and i + 8, of those i and i + 4, ... : one tree, whatever it is used for. */
static inline float sum_lanes(vfloat x) {
  float a[LANES];
  memcpy(a, &x, sizeof a);
  for (int width = LANES / 2; width; width /= 2)
    for (int i = 0; i < width; i++) a[i] += a[i + width];
  return a[0];
}

static inline float max_lanes(vfloat x) {
  float a[LANES];
  memcpy(a, &x, sizeof a);
  for (int width = LANES / 2; width; width /= 2)
    for (int i = 0; i < width; i++) a[i] = a[i] > a[i + width] ? a[i] : a[i + width];
  return a[0];
}

/* exp with an error of 2 ulp: x = n ln 2 + r, |r| <= ln 2 / 2, a polynomial for exp(r) (Cephes, expf). Below
   -87.3 it is 0, above 88.7 infinity, of NaN it is NaN. */
static inline vfloat vexp(vfloat x) {
  const vfloat magic = splat(12582912.0f); /* 1.5 * 2^23: adding it rounds to an integer */
  vfloat inside = choose(x < splat(-87.3f), splat(-87.3f), choose(x > splat(88.7f), splat(88.7f), x));
  vfloat n = (inside * splat(1.44269504088896341f) + magic) - magic;
  vfloat r = inside - n * splat(0.693359375f);
  r = r - n * splat(-2.12194440e-4f);
  vfloat y = splat(1.9875691500e-4f);
  y = y * r + splat(1.3981999507e-3f);
  y = y * r + splat(8.3334519073e-3f);
  y = y * r + splat(4.1665795894e-2f);
  y = y * r + splat(1.6666665459e-1f);
  y = y * r + splat(5.0000001201e-1f);
  y = y * (r * r) + r + splat(1.0f);
  vint half = __builtin_convertvector(n, vint) >> 1; /* two factors: 2^128 is no float */
  vint rest = __builtin_convertvector(n, vint) - half;
  y = y * (vfloat)((half + 127) << 23) * (vfloat)((rest + 127) << 23);
  y = choose(x < splat(-87.3f), splat(0.0f), y);
  y = choose(x > splat(88.7f), splat(__builtin_inff()), y);
  return choose(x == x, y, x);
}

/* tanh with an error of 2 ulp: a polynomial near 0 (Cephes, tanhf), else 1 - 2 / (exp(2 x) + 1). */
static inline vfloat vtanh(vfloat x) {
  vfloat z = x * x;
  vfloat y = splat(-5.70498872745e-3f);
  y = y * z + splat(2.06390887954e-2f);
  y = y * z + splat(-5.37397155531e-2f);
  y = y * z + splat(1.33314422036e-1f);
  y = y * z + splat(-3.33332819422e-1f);
  y = y * z * x + x;
  vfloat far = splat(1.0f) - splat(2.0f) / (vexp(x + x) + splat(1.0f));
  return choose(z < splat(0.390625f), y, far);
}

#endif
