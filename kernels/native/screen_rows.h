/* Rows of x for screen.c: in whole multiples of a scale, and how far products of them may be off. */
#ifndef CABOCHON_SCREEN_ROWS_H
#define CABOCHON_SCREEN_ROWS_H

#include "layers.h"

#define LARGEST 127
#define MOST_REPEATS 16   /* of a vector */
#define OFFSET 128        /* of the weight's bytes, which that instruction takes without a sign */
#define STANDING_OUT 4    /* elements of a row that may be larger than LARGEST */
#define APART 32          /* at most, of the largest elements whose errors are bounded one by one */
#define HALF 0.5001f      /* of a scale: the most that rounding has changed an element of the weight */
#define ROUNDINGS 40      /* of a sum, beside one for each vector: trees, conversions, scales, these bounds */
#define TINY 1e-10f       /* squares of less, and of what is left of it, are nothing in fp32 */

/* A product is off by at most rest * error + edges * scale + spread, of the weight's row. */
struct rounded {
  float scale;
  int32_t sum; /* of values, times OFFSET */
  float edges, rest, spread;
};

/* Enters |x| into those that are largest, descending. */
static void insert(float *top, float size) {
  int place = APART;
  for (; place > 0 && size > top[place - 1]; place--) top[place] = top[place - 1];
  top[place] = size;
}

/* |x (w - w')| <= sum of |x_i| HALF scale over some of the elements, + |rest of x| |rest of w - w'|: the largest of x
   are few and the same few hold half of its squares or more, while what rounding has changed is spread evenly. */
static void bound_row(struct rounded *row, int K, const float *top, float norm) {
  const double squares = (double)norm * norm, ratio = __builtin_sqrt(K / 12.0); /* of errors to scales, about */
  double sum = 0, rest = squares, least = __builtin_inf();
  row->edges = row->rest = 0;
  for (int m = 0; m <= APART && m <= K; m++) {
    const double root = rest > 0 ? __builtin_sqrt(rest) : 0, total = HALF * sum + ratio * root;
    if (total < least) {
      least = total;
      row->edges = (float)(HALF * sum * 1.000001);
      row->rest = (float)(root * 1.000001);
    }
    sum += top[m], rest -= (double)top[m] * top[m];
  }
}

/* Whole multiples of a scale, by which all but STANDING_OUT elements are at most LARGEST. weight_norm: the largest of
   the weight's rows. */
INLINE struct rounded round_row(const void *x, int K, float weight_norm, int32_t *to, const int is_fp32) {
  float top[APART + 1] = {0}; /* descending */
  vfloat squares = {0};
  for (int i = 0; i < K; i += LANES) {
    vfloat v = load(x, i, is_fp32);
    squares = squares + v * v;
    vfloat size = (vfloat)((vint)v & 0x7FFFFFFF);
    for (int lane = 0; lane < LANES; lane++)
      if (size[lane] > top[APART]) insert(top, size[lane]);
  }
  const float norm = __builtin_sqrtf(sum_lanes(squares)) * 1.0001f;
  const int is_told = norm < __builtin_inff() && (top[0] == 0 || top[0] > TINY); /* not NaN either */
  float limit = top[STANDING_OUT] > top[0] / MOST_REPEATS ? top[STANDING_OUT] : top[0] / MOST_REPEATS;
  limit = limit > 0 && is_told ? limit : 1;
  const float scale = limit / LARGEST, inverse = LARGEST / limit;
  vfloat rest = {0};
  vint sum = {0};
  for (int i = 0; i < K; i += LANES) {
    const vfloat magic = splat(12582912.0f); /* 1.5 * 2^23: adding it rounds to an integer */
    vfloat v = is_told ? load(x, i, is_fp32) : splat(0.0f);
    vfloat whole = (v * splat(inverse) + magic) - magic;
    vint values = __builtin_convertvector(whole, vint);
    memcpy(to + i, &values, sizeof values);
    sum += values;
    vfloat changed = v - whole * splat(scale);
    rest = rest + changed * changed;
  }
  int32_t total = 0;
  for (int lane = 0; lane < LANES; lane++) total += sum[lane];
  struct rounded row = {.scale = scale, .sum = total * OFFSET};
  bound_row(&row, K, top, norm);
  const float roundings = (K / LANES + ROUNDINGS) * 0x1p-24f; /* of the sums in fp32 that are compared */
  row.spread = (__builtin_sqrtf(sum_lanes(rest)) * 1.0001f + norm * roundings) * weight_norm;
  if (!is_told) row.spread = __builtin_nanf("");
  return row;
}

#endif
