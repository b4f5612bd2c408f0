/* The noise of draws (kernels/sampling.py) without logarithms: bounds of it that are enough to tell who can win.

   A draw is the argmax of fl(s + g), g = -log(-log1p(-v)) as torch rounds it, v = (h + 1/2) / 2^32. Let f be fp32 of
   h + 1/2, and x its bits read as an integer, times 2^-23, less 127: exponent plus fraction, a line through the powers
   of two. log2 is concave, and at most 0.0861 above that line, so 0 <= log2(f) - x <= 0.0861. With v <= -log1p(-v), and
   <= 2 ln 2 v where v < 1/2:

     g <= upper = (32 - x) ln 2 + 0.001                 g <= 22.88, at h = 0
     g >= lower = upper - 0.39 where f < 2^31           0.39 > 0.0861 ln 2 + ln(2 ln 2) + 2 * 0.001 = 0.3884
     g >= lower = -2.82 elsewhere                       -2.8115 at v = 1 - 2^-24, the largest v that torch sees

   0.001 is for rounding, which takes less than 0.0001 of it: f is off by two parts in 2^24, x as fp32 by 2^-17, the
   products by 2^-17 each, torch's fp32 logarithms by an ulp or two of at most 22.88. f < 2^31 only if h < 2^31. */
#ifndef CABOCHON_NOISE_H
#define CABOCHON_NOISE_H

#include "vectors.h"

#define HIGHEST_NOISE 22.9f
#define LOWEST_NOISE -2.82f
#define UPPER_LESS_LOWER 0.39f
#define LN2 0.69314718f
#define CAP_ERROR 0x1p-20f /* of capped, relative to the cap */

typedef struct {
  vfloat upper, lower;
} Noise;

static inline vuint mix32(vuint x) {
  x = (x ^ (x >> 16)) * 0x85EBCA6Bu;
  x = (x ^ (x >> 13)) * 0xC2B2AE35u;
  return x ^ (x >> 16);
}

/* Of sixteen tokens, by the 64-bit key of a draw. */
static inline Noise noise_of(vuint tokens, uint64_t key) {
  vuint h = mix32(mix32(tokens * 0x9E3779B1u + (uint32_t)key) ^ (uint32_t)(key >> 32));
  vfloat f = __builtin_convertvector(h, vfloat) + splat(0.5f);
  vfloat x = __builtin_convertvector((vint)f, vfloat) * splat(0x1p-23f) - splat(127);
  vfloat upper = (splat(32) - x) * splat(LN2) + splat(0.001f);
  return (Noise){upper, choose(f < splat(0x1p31f), upper - splat(UPPER_LESS_LOWER), splat(LOWEST_NOISE))};
}

static inline vuint sixteen_from(int token) {
  const vuint lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return lanes + (uint32_t)token;
}

/* cap tanh(x / cap); x as it is where cap is 0. error: CAP_ERROR, with a sign, for a bound of what torch makes of it. */
static inline vfloat capped(vfloat x, float cap, float error) {
  return cap == 0 ? x : splat(cap) * vtanh(x / splat(cap)) + splat(error * cap);
}

static inline int any(vint mask) {
  uint64_t parts[sizeof mask / 8], all = 0;
  memcpy(parts, &mask, sizeof parts);
  for (unsigned i = 0; i < sizeof parts / sizeof *parts; i++) all |= parts[i];
  return all != 0;
}

#endif
