/* Products of bf16 rows with a bf16 weight: kernels/native/linear.py says what and why.

   Sixteen rows of the weight lie side by side, two elements of each together: a vector of 64 bytes, which one
   instruction (vdpbf16ps) multiplies by two elements of x and adds to sixteen sums. Rows of x are read in blocks of
   sixteen, whose pairs lie side by side, too. */
#include <stdlib.h>

#include "kernels.h"
#include "layers.h"
#include "threads.h"

#define ROWS 16          /* of x in a block: as many sums stay in registers */
#define UNIT (1 << 18)   /* bytes of the weight in a unit of work, at most: they stay in the cache for all blocks */
#define AHEAD 4096       /* bytes: what memory is asked for meanwhile */
#define SPLIT 4          /* units for each thread, at least: they do not end together */

#if defined(__AVX512VNNI__) && (defined(__GNUC__) || defined(__clang__)) /* of the libraries that are built, the one */
#define HAS_BF16 1
#define BF16 __attribute__((target("avx512bf16")))
#else
#define HAS_BF16 0
#endif

/* Whether this library and this CPU have the instruction. */
EXPORT int cabochon_can_multiply(void) {
#if HAS_BF16
  return __builtin_cpu_supports("avx512bf16") != 0;
#else
  return 0;
#endif
}

struct linear {
  const uint16_t *x;  /* [T, K] */
  int32_t *pairs;     /* [T / ROWS, K / 2, ROWS], zeros past T */
  const int32_t *weight; /* [N / LANES, K / 2, LANES] */
  uint16_t *out;      /* [T, N] */
  int T, N, K, groups; /* of LANES rows of the weight, in a unit */
};

#if HAS_BF16
INLINE void transpose(__m512i *v) {
  __m512i t[LANES];
  for (int i = 0; i < LANES; i += 2) {
    t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  }
  for (int i = 0; i < LANES; i += 4) {
    v[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    v[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    v[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    v[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; i++) {
    const __m512i a = _mm512_shuffle_i32x4(v[i], v[i + 4], 0x88), b = _mm512_shuffle_i32x4(v[i], v[i + 4], 0xdd);
    const __m512i c = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0x88);
    const __m512i d = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0xdd);
    t[i] = _mm512_shuffle_i32x4(a, c, 0x88);
    t[i + 8] = _mm512_shuffle_i32x4(a, c, 0xdd);
    t[i + 4] = _mm512_shuffle_i32x4(b, d, 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(b, d, 0xdd);
  }
  memcpy(v, t, sizeof t);
}

static void order_unit(void *arguments, int block) {
  const struct linear *a = arguments;
  const int pairs = a->K / 2, first = block * ROWS, rows = a->T - first < ROWS ? a->T - first : ROWS;
  int32_t *to = a->pairs + (int64_t)first * pairs;
  for (int pair = 0; pair < pairs; pair += LANES) {
    const int some = pairs - pair < LANES ? pairs - pair : LANES;
    const __mmask16 there = (__mmask16)((1u << some) - 1);
    __m512i v[ROWS];
    for (int r = 0; r < ROWS; r++)
      v[r] = _mm512_maskz_loadu_epi32(r < rows ? there : 0, a->x + (int64_t)(first + (r < rows ? r : 0)) * a->K + pair * 2);
    transpose(v);
    for (int i = 0; i < some; i++) _mm512_storeu_si512(to + (pair + i) * ROWS, v[i]);
  }
}

/* R rows from first on, of which T - first exist, with C groups of the weight. */
BF16 INLINE void multiply(const struct linear *a, int first, int group, const int R, const int C) {
  const int pairs = a->K / 2;
  const int32_t *x = a->pairs + (int64_t)first * pairs, *w = a->weight + (int64_t)group * pairs * LANES;
  __m512 sums[ROWS][4];
  for (int r = 0; r < R; r++)
    for (int c = 0; c < C; c++) sums[r][c] = _mm512_setzero_ps();
  for (int pair = 0; pair < pairs; pair++) {
    __m512i weights[4];
    for (int c = 0; c < C; c++) {
      const int32_t *from = w + ((int64_t)c * pairs + pair) * LANES;
      weights[c] = _mm512_loadu_si512(from);
      _mm_prefetch((const char *)from + AHEAD, _MM_HINT_T0);
    }
    for (int r = 0; r < R; r++) {
      const __m512i two = _mm512_set1_epi32(x[pair * ROWS + r]);
      for (int c = 0; c < C; c++) sums[r][c] = _mm512_dpbf16_ps(sums[r][c], (__m512bh)weights[c], (__m512bh)two);
    }
  }
  for (int r = 0; r < R && first + r < a->T; r++)
    for (int c = 0; c < C; c++) {
      const __m256i rounded = (__m256i)_mm512_cvtneps_pbh(sums[r][c]);
      _mm256_storeu_si256((__m256i *)(a->out + (int64_t)(first + r) * a->N + (group + c) * LANES), rounded);
    }
}

/* Groups from begin to end, C at a time, those that are left one by one. */
#define GROUPS_OF(R, C)                                                          \
  {                                                                              \
    int group = begin;                                                           \
    for (; group + C <= end; group += C) multiply(a, first, group, R, C);        \
    for (; group < end; group++) multiply(a, first, group, R, 1);                \
  }

BF16 static void multiply_unit(void *arguments, int unit) {
  const struct linear *a = arguments;
  const int begin = unit * a->groups, all = a->N / LANES, end = begin + a->groups < all ? begin + a->groups : all;
  for (int first = 0; first < a->T; first += ROWS) {
    const int rows = a->T - first;
    if (rows > 12) GROUPS_OF(16, 1)
    else if (rows > 8) GROUPS_OF(12, 1)
    else if (rows > 4) GROUPS_OF(8, 1)
    else if (rows > 2) GROUPS_OF(4, 2)
    else if (rows > 1) GROUPS_OF(2, 4)
    else GROUPS_OF(1, 4)
  }
}
#endif

/* x: [T, K], K a multiple of LANES. weight: of cabochon_pack_pairs, N a multiple of LANES. Writes out [T, N].
   Only if cabochon_can_multiply. Returns 0, or -1 without memory. */
EXPORT int cabochon_linear(const void *x, const void *weight, void *out, int T, int N, int K, int num_threads) {
#if HAS_BF16
  const int blocks = (T + ROWS - 1) / ROWS, all = N / LANES;
  int32_t *pairs = aligned_alloc(64, (size_t)blocks * ROWS * K * 2 + 64);
  if (!pairs) return -1;
  int groups = UNIT / (K * 2 * LANES);
  const int most = all / (SPLIT * num_threads);
  groups = groups < most ? groups : most;
  groups = groups > 4 ? groups / 4 * 4 : groups > 1 ? groups : 1;
  struct linear a = {x, pairs, weight, out, T, N, K, groups};
  for_each(order_unit, &a, blocks, num_threads);
  for_each(multiply_unit, &a, (all + groups - 1) / groups, num_threads);
  free(pairs);
#endif
  return 0;
}

struct packing {
  const int32_t *weight; /* [N, K / 2] */
  int32_t *packed;       /* [N / LANES, K / 2, LANES] */
  int pairs;
};

static void pack_unit(void *arguments, int group) {
  const struct packing *a = arguments;
  const int64_t first = (int64_t)group * LANES * a->pairs;
  for (int lane = 0; lane < LANES; lane++)
    for (int pair = 0; pair < a->pairs; pair++)
      a->packed[first + pair * LANES + lane] = a->weight[first + (int64_t)lane * a->pairs + pair];
}

/* weight: [N, K] of two bytes, K even, N a multiple of LANES. Writes packed [N / LANES, K / 2, LANES, 2]. */
EXPORT void cabochon_pack_pairs(const void *weight, void *packed, int N, int K, int num_threads) {
  struct packing a = {weight, packed, K / 2};
  for_each(pack_unit, &a, N / LANES, num_threads);
}
