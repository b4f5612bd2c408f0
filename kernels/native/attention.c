/* Attention over paged K and V for decodes and prefills alike: attention.py says what.

   A unit of work is a block of neighbouring tokens of one sequence and one KV head: its queries share every key
   that is read. Scores of all visible keys are kept, so the maximum is exact and nothing is rescaled.

   Bits: a score is one chain of sums over the head dimension; a weight needs its own row's scores alone, in
   vectors that begin at the row's first visible key; an output adds p V key by key in the order of keys, and
   keys that only neighbours see add an exact zero, while their V is finite. So a token's result does not depend on how its prompt was
   cut, on whether it is a decode, or on who shares the step. */
#include <stdatomic.h>
#include <stdlib.h>

#include "kernels.h"
#include "layers.h"
#include "threads.h"

#define ROWS 16           /* queries × heads of a unit, unless one token alone has more heads */
#define KEYS 4            /* of a block of scores */
#define AHEAD 8           /* keys: what memory is asked for meanwhile */
#define TILE 32           /* keys whose V is widened at once: 32 KiB at D = 256 */
#define SMALL (1 << 21)   /* multiplications that are done before a other thread has come */

struct unit {
  int sequence, first, last; /* tokens first..last of the step */
};

struct attention {
  const void *q, *k, *v;
  const int32_t *table, *cu_seqlens, *seq_lens;
  void *out;
  const struct unit *units;
  float scale, softcap;
  int M, P, Hq, Hkv, D, window, is_fp32;
  atomic_int lacks_memory;
};

static __thread char *scratch;
static __thread size_t scratch_bytes;

/* Grows, is kept for the thread's next unit; null without memory. */
static char *scratch_of(size_t bytes) {
  if (bytes > scratch_bytes) {
    free(scratch);
    bytes += bytes / 2; /* a long sequence needs a little more at every step */
    scratch = aligned_alloc(64, (bytes + 63) & ~(size_t)63);
    scratch_bytes = scratch ? bytes : 0;
  }
  return scratch;
}

/* Scores of R queries, rows of q, with four keys. */
INLINE void scores_of(const float *q, const float *k, int D, float *to, int64_t stride, const int R) {
  vfloat sums[4][KEYS]; /* R <= 4: an array of variable length would not live in registers */
  for (int r = 0; r < R; r++)
    for (int j = 0; j < KEYS; j++) sums[r][j] = splat(0.0f);
  for (int i = 0; i < D; i += LANES) {
    vfloat keys[KEYS];
    for (int j = 0; j < KEYS; j++) keys[j] = load_fp32(k + j * D + i);
    for (int r = 0; r < R; r++) {
      vfloat query = load_fp32(q + r * D + i);
      for (int j = 0; j < KEYS; j++) sums[r][j] = sums[r][j] + query * keys[j];
    }
  }
  for (int r = 0; r < R; r++) sum_four(to + r * stride, sums[r][0], sums[r][1], sums[r][2], sums[r][3]);
}

/* acc += p V over n keys, for R rows and V columns of LANES. v: [n, D] */
INLINE void weigh(const float *p, int64_t stride, const float *v, int n, float *acc, int D, const int R,
                  const int V) {
  vfloat sums[4][4];
  for (int r = 0; r < R; r++)
    for (int c = 0; c < V; c++) sums[r][c] = load_fp32(acc + r * D + c * LANES);
  for (int key = 0; key < n; key++) {
    vfloat values[4];
    for (int c = 0; c < V; c++) values[c] = load_fp32(v + key * D + c * LANES);
    for (int r = 0; r < R; r++) {
      vfloat weight = splat(p[r * stride + key]);
      for (int c = 0; c < V; c++) sums[r][c] = sums[r][c] + weight * values[c];
    }
  }
  for (int r = 0; r < R; r++)
    for (int c = 0; c < V; c++) store_fp32(acc + r * D + c * LANES, sums[r][c]);
}

INLINE void weigh_rows(const float *p, int64_t stride, const float *v, int n, float *acc, int D, const int R) {
  int i = 0;
  for (; i + 4 * LANES <= D; i += 4 * LANES) weigh(p, stride, v + i, n, acc + i, D, R, 4);
  for (; i < D; i += LANES) weigh(p, stride, v + i, n, acc + i, D, R, 1);
}

/* Scores s[0..n) to weights, in place, n + LANES floats are ours. Returns their sum. */
INLINE float softmax(float *s, int n, float softcap) {
  vfloat highest = splat(-__builtin_inff()), sum = splat(0.0f);
  store_fp32(s + n, highest);
  for (int i = 0; i < n; i += LANES) {
    vfloat x = load_fp32(s + i);
    if (softcap > 0) store_fp32(s + i, x = splat(softcap) * vtanh(x / splat(softcap)));
    highest = vmax(highest, x);
  }
  highest = splat(max_lanes(highest));
  store_fp32(s + n, splat(-__builtin_inff())); /* again: the cap has made it -cap, which no score is below */
  for (int i = 0; i < n; i += LANES) {
    vfloat weights = vexp(load_fp32(s + i) - highest);
    store_fp32(s + i, weights);
    sum = sum + weights;
  }
  return sum_lanes(sum);
}

INLINE void widen(float *to, const void *from, int64_t start, int D, const int is_fp32) {
  for (int i = 0; i < D; i += LANES) store_fp32(to + i, load(from, start + i, is_fp32));
}

/* Ask memory for a row of D elements. */
INLINE void fetch(const void *base, int64_t start, int D, const int is_fp32) {
  for (int i = 0; i < D; i += is_fp32 ? 16 : 32) __builtin_prefetch(at(base, start + i, is_fp32));
}

/* Blocks of 4, 2 and 1 rows. */
#define IN_BLOCKS(rows, r, call4, call2, call1)                                 \
  for (int r = 0; r < (rows);) {                                                \
    if ((rows) - r >= 4) { call4; r += 4; }                                     \
    else if ((rows) - r >= 2) { call2; r += 2; }                                \
    else { call1; r += 1; }                                                     \
  }

INLINE void attend(struct attention *a, int number, const int is_fp32) {
  const struct unit unit = a->units[number / a->Hkv];
  const int head = number % a->Hkv, G = a->Hq / a->Hkv, D = a->D, P = a->P;
  const int rows = (unit.last - unit.first + 1) * G;
  const int after = a->cu_seqlens[unit.sequence + 1]; /* a token's position follows from the sequence's end */
  const int last = a->seq_lens[unit.sequence] - after + unit.last, first = last - (unit.last - unit.first);
  const int low = a->window && first >= a->window ? first - a->window + 1 : 0, n = last - low + 1;
  const int64_t stride = (n + 2 * LANES + LANES - 1) / LANES * LANES;
  char *memory = scratch_of((rows * (stride + 2 * D) + TILE * D) * sizeof(float) + n * sizeof(int64_t));
  if (!memory) {
    atomic_store(&a->lacks_memory, 1);
    return;
  }
  float *s = (float *)memory, *q = s + rows * stride, *acc = q + rows * D, *wide = acc + rows * D;
  int64_t *places = (int64_t *)(wide + TILE * D);

  const int32_t *table = a->table + (int64_t)unit.sequence * a->M;
  for (int i = 0, page = low / P, offset = low % P; i < n; i++) {
    places[i] = (((int64_t)table[page] * P + offset) * a->Hkv + head) * D;
    if (++offset == P) offset = 0, page++;
  }
  for (int r = 0; r < rows; r++) {
    int64_t from = ((int64_t)(unit.first + r / G) * a->Hq + head * G + r % G) * D;
    for (int i = 0; i < D; i += LANES) {
      store_fp32(q + r * D + i, load(a->q, from + i, is_fp32) * splat(a->scale));
      store_fp32(acc + r * D + i, splat(0.0f));
    }
  }
  for (int i = 0; i < n; i += KEYS) {
    for (int j = 0; j < KEYS; j++) {
      if (i + j + AHEAD < n) fetch(a->k, places[i + j + AHEAD], D, is_fp32);
      widen(wide + j * D, a->k, places[i + j < n ? i + j : n - 1], D, is_fp32);
    }
    IN_BLOCKS(rows, r, scores_of(q + r * D, wide, D, s + r * stride + i, stride, 4),
              scores_of(q + r * D, wide, D, s + r * stride + i, stride, 2),
              scores_of(q + r * D, wide, D, s + r * stride + i, stride, 1))
  }
  float totals[rows];
  for (int r = 0; r < rows; r++) {
    const int position = first + r / G;
    const int from = (a->window && position >= a->window ? position - a->window + 1 : 0) - low;
    totals[r] = softmax(s + r * stride + from, position - low - from + 1, a->softcap);
    for (int i = 0; i < from; i++) s[r * stride + i] = 0;
    for (int i = position - low + 1; i < n; i++) s[r * stride + i] = 0;
  }
  for (int i = 0; i < n; i += TILE) {
    const int keys = n - i < TILE ? n - i : TILE;
    for (int j = 0; j < keys; j++) {
      if (i + j + AHEAD < n) fetch(a->v, places[i + j + AHEAD], D, is_fp32);
      widen(wide + j * D, a->v, places[i + j], D, is_fp32);
    }
    IN_BLOCKS(rows, r, weigh_rows(s + r * stride + i, stride, wide, keys, acc + r * D, D, 4),
              weigh_rows(s + r * stride + i, stride, wide, keys, acc + r * D, D, 2),
              weigh_rows(s + r * stride + i, stride, wide, keys, acc + r * D, D, 1))
  }
  for (int r = 0; r < rows; r++) {
    int64_t to = ((int64_t)(unit.first + r / G) * a->Hq + head * G + r % G) * D;
    for (int i = 0; i < D; i += LANES)
      store(a->out, to + i, load_fp32(acc + r * D + i) / splat(totals[r]), is_fp32);
  }
}

static void attend_bf16(void *arguments, int number) { attend(arguments, number, 0); }
static void attend_fp32(void *arguments, int number) { attend(arguments, number, 1); }

/* Returns 0, or -1 without memory. */
EXPORT int cabochon_paged_attention(const void *q, const void *k, const void *v, const int32_t *table,
                                    const int32_t *cu_seqlens, const int32_t *seq_lens, void *out, float scale,
                                    float softcap, int S, int M, int P, int Hq, int Hkv, int D, int window,
                                    int is_fp32, int num_threads) {
  const int G = Hq / Hkv, block = G < ROWS ? ROWS / G : 1;
  int num_units = 0;
  int64_t work = 0;
  for (int sequence = 0; sequence < S; sequence++) {
    const int tokens = cu_seqlens[sequence + 1] - cu_seqlens[sequence];
    const int keys = window && window < seq_lens[sequence] ? window : seq_lens[sequence];
    num_units += (tokens + block - 1) / block;
    work += (int64_t)tokens * keys * Hq * D * 2;
  }
  struct unit *units = malloc(sizeof(struct unit) * (num_units + 1));
  if (!units) return -1;
  for (int sequence = 0, number = 0; sequence < S; sequence++)
    for (int token = cu_seqlens[sequence]; token < cu_seqlens[sequence + 1]; token += block) {
      const int end = token + block < cu_seqlens[sequence + 1] ? token + block : cu_seqlens[sequence + 1];
      units[number++] = (struct unit){sequence, token, end - 1};
    }
  struct attention a = {q, k, v, table, cu_seqlens, seq_lens, out, units, scale, softcap,
                        M, P, Hq, Hkv, D, window, is_fp32, 0};
  for_each(is_fp32 ? attend_fp32 : attend_bf16, &a, num_units * Hkv, work < SMALL ? 1 : num_threads);
  free(units);
  return atomic_load(&a.lacks_memory) ? -1 : 0;
}
