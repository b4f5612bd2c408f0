/* Which token has the largest logit, or wins a draw: kernels/native/screen.py says what and why that is exact.

   Sixteen tokens of the vocabulary lie side by side, four elements of each together: a vector of 64 bytes, which
   one VNNI instruction multiplies by four elements of x and adds to sixteen sums. A row's elements may be larger than
   a byte: their vector is then multiplied again by what is left of them, as often as any row of the block needs. */
#include <float.h>
#include <stdlib.h>

#include "layers.h"
#include "noise.h"
#include "screen_rows.h"
#include "threads.h"

#define AHEAD 4096        /* bytes of the weight: what memory is asked for meanwhile */
#define FOUR 4            /* elements that a vector has of each token */
#define ROWS 16           /* of x in a block: as many sums stay in registers */
#define GROUPS 16         /* of LANES tokens in a unit of work: they stay in the cache for all blocks */
#define CAPACITY 32768    /* candidates of a row; also in screen.py */
#define PIECE 256         /* of them in a unit of work */
#define DRAWN 64          /* of a draw, once their logits are known; also in screen.py */

struct block {            /* rows of x, whose vectors are multiplied in order */
  int num_rows, num_entries;
  int32_t *parts;         /* [num_entries, ROWS], four bytes each */
  int16_t *of;            /* [num_entries], which vector */
};

struct screen {
  const void *x;          /* [T, K] */
  const uint8_t *weight;  /* [N' / LANES, K / FOUR, LANES, FOUR] */
  const float *scales;    /* [N'] */
  const float *errors;    /* [N'], of the rounded weight's rows; NaN past N */
  const void *embedding;  /* [N, K] */
  float largest;          /* of the weight's norms */
  const float *temperatures; /* [T], 0: the largest logit is wanted */
  const uint64_t *keys;   /* [T] */
  float cap;              /* of logits that are drawn from; 0: none */
  int T, N, K, num_groups, is_fp32;
  struct block *blocks;
  int32_t *values;        /* [T, K]: x in whole multiples of its scale */
  struct rounded *rows;   /* [T] */
  uint32_t *bounds;       /* [T] floats: the largest lower bound so far */
  int *counts;            /* [T], of candidates, those beyond CAPACITY too */
  int32_t *token_ids;     /* [T, CAPACITY], -1: cannot win after all */
  float *highest;         /* [T, CAPACITY]: upper bounds, then the logits */
  int num_pieces;         /* of a row */
  int32_t *chosen;        /* [T, DRAWN] */
  float *logits;          /* [T, DRAWN] */
  int32_t *num_chosen;    /* [T] */
};

static void round_unit(void *arguments, int row) {
  const struct screen *s = arguments;
  const void *x = at(s->x, (int64_t)row * s->K, s->is_fp32);
  int32_t *to = s->values + (int64_t)row * s->K;
  s->rows[row] = s->is_fp32 ? round_row(x, s->K, s->largest, to, 1) : round_row(x, s->K, s->largest, to, 0);
}

static int repeats_of(int32_t value) {
  const int size = value < 0 ? -value : value;
  return size <= LARGEST ? 1 : (size + LARGEST - 1) / LARGEST;
}

/* What is left of a value after some repeats, as far as a byte holds it. */
static int32_t part_of(int32_t value, int repeat) {
  const int32_t left = value < 0 ? value + repeat * LARGEST : value - repeat * LARGEST;
  if (value < 0) return left > 0 ? 0 : left < -LARGEST ? -LARGEST : left;
  return left < 0 ? 0 : left > LARGEST ? LARGEST : left;
}

/* The order of products of the rows from block * ROWS on. */
static void order_unit(void *arguments, int index) {
  struct screen *s = arguments;
  struct block *b = s->blocks + index;
  const int first = index * ROWS;
  b->num_rows = s->T - first < ROWS ? s->T - first : ROWS;
  b->num_entries = 0;
  for (int vector = 0; vector < s->K / FOUR; vector++) {
    int repeats = 1;
    for (int r = 0; r < b->num_rows; r++)
      for (int i = 0; i < FOUR; i++) {
        const int own = repeats_of(s->values[(int64_t)(first + r) * s->K + vector * FOUR + i]);
        repeats = own > repeats ? own : repeats;
      }
    for (int repeat = 0; repeat < repeats; repeat++, b->num_entries++) {
      b->of[b->num_entries] = vector;
      for (int r = 0; r < ROWS; r++) {
        uint32_t four = 0;
        for (int i = 0; i < FOUR && r < b->num_rows; i++)
          four |= (uint32_t)(uint8_t)part_of(s->values[(int64_t)(first + r) * s->K + vector * FOUR + i], repeat) << 8 * i;
        b->parts[b->num_entries * ROWS + r] = (int32_t)four;
      }
    }
  }
}

/* sums + the products of four neighbours: bytes without a sign by bytes with one. */
INLINE vint add_fours(vint sums, vint weights, int32_t four) {
#if defined(__AVX512VNNI__)
  return (vint)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)weights, _mm512_set1_epi32(four));
#else
  const vuint bytes = (vuint)weights;
  for (int i = 0; i < FOUR; i++)
    sums += (vint)((bytes >> 8 * i) & 255u) * (int32_t)(int8_t)(uint8_t)((uint32_t)four >> 8 * i);
  return sums;
#endif
}

INLINE float as_float(uint32_t bits) {
  float x;
  return memcpy(&x, &bits, 4), x;
}

static void raise_bound(uint32_t *bound, float to) {
  uint32_t old = __atomic_load_n(bound, __ATOMIC_RELAXED), bits;
  memcpy(&bits, &to, 4);
  while (to > as_float(old))
    if (__atomic_compare_exchange_n(bound, &old, bits, 1, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) break;
}

/* Rare. Which tokens may still win, and whether the bound rises by them. */
static void enter(struct screen *s, int row, int token, vfloat low, vfloat high) {
  float bound = as_float(__atomic_load_n(s->bounds + row, __ATOMIC_RELAXED));
  const int lanes = s->N - token < LANES ? s->N - token : LANES; /* not past the last token */
  for (int lane = 0; lane < lanes; lane++) bound = low[lane] > bound ? low[lane] : bound;
  raise_bound(s->bounds + row, bound);
  for (int lane = 0; lane < lanes; lane++) {
    if (!(high[lane] >= bound)) continue; /* NaN too */
    const int place = __atomic_fetch_add(s->counts + row, 1, __ATOMIC_RELAXED);
    if (place >= CAPACITY) return;
    s->token_ids[(int64_t)row * CAPACITY + place] = token + lane;
    s->highest[(int64_t)row * CAPACITY + place] = high[lane];
  }
}

/* R rows from first on, of which num_rows exist, with C groups of tokens. */
INLINE void multiply(struct screen *s, const struct block *b, int first, int group, const int R, const int C) {
  const int vectors = s->K / FOUR;
  const uint8_t *weight = s->weight + (int64_t)group * vectors * 64;
  vint sums[ROWS][4];
  for (int r = 0; r < R; r++)
    for (int c = 0; c < C; c++) sums[r][c] = (vint){0};
  for (int entry = 0; entry < b->num_entries; entry++) {
    const int32_t *parts = b->parts + entry * ROWS;
    vint weights[4];
    for (int c = 0; c < C; c++) {
      const uint8_t *from = weight + ((int64_t)c * vectors + b->of[entry]) * 64;
      memcpy(&weights[c], from, 64);
      if (R > FOUR) __builtin_prefetch(from + AHEAD); /* with few rows the hardware keeps up */
    }
    for (int r = 0; r < R; r++)
      for (int c = 0; c < C; c++) sums[r][c] = add_fours(sums[r][c], weights[c], parts[r]);
  }
  for (int r = 0; r < R && r < b->num_rows; r++) {
    const int row = first + r;
    const struct rounded x = s->rows[row];
    for (int c = 0; c < C; c++) {
      const int token = (group + c) * LANES;
      const vfloat scale = load_fp32(s->scales + token), error = load_fp32(s->errors + token);
      const vfloat margin = error * splat(x.rest) + scale * splat(x.edges) + splat(x.spread);
      const vfloat value = __builtin_convertvector(sums[r][c] - x.sum, vfloat) * (scale * splat(x.scale));
      const vfloat bound = splat(as_float(__atomic_load_n(s->bounds + row, __ATOMIC_RELAXED)));
      vfloat high = value + margin;
      if (s->temperatures[row] == 0) {
        if (any(high >= bound)) enter(s, row, token, value - margin, high);
        continue;
      }
      high = capped(high, s->cap, CAP_ERROR) / splat(s->temperatures[row]);
      if (!any(high + splat(HIGHEST_NOISE) >= bound)) continue;
      const Noise noise = noise_of(sixteen_from(token), s->keys[row]);
      if (!any(high + noise.upper >= bound)) continue;
      const vfloat low = capped(value - margin, s->cap, -CAP_ERROR) / splat(s->temperatures[row]);
      enter(s, row, token, low + noise.lower, high + noise.upper);
    }
  }
}

static void multiply_unit(void *arguments, int unit) {
  struct screen *s = arguments;
  const int begin = unit * GROUPS, end = begin + GROUPS < s->num_groups ? begin + GROUPS : s->num_groups;
  for (int index = 0; index * ROWS < s->T; index++) {
    const struct block *b = s->blocks + index;
    const int first = index * ROWS, rows = b->num_rows;
    for (int group = begin; group < end; group += 4) { /* num_groups is a multiple of 4 */
      if (rows == 1) multiply(s, b, first, group, 1, 4);
      else if (rows == 2) multiply(s, b, first, group, 2, 4);
      else if (rows <= 4) multiply(s, b, first, group, 4, 4);
      else if (rows <= 8)
        for (int c = 0; c < 4; c += 2) multiply(s, b, first, group + c, 8, 2);
      else
        for (int c = 0; c < 4; c++) multiply(s, b, first, group + c, ROWS, 1);
    }
  }
}

/* Of the candidates of a draw, whose logits are now known, those that may win: `count` tokens, not in order. */
static void settle_draw(struct screen *s, int row, const int32_t *token_ids, const float *logits, int count) {
  float bound = -FLT_MAX, low[LANES], high[LANES];
  for (int pass = 0; pass < 2; pass++)
    for (int i = 0; i < count; i += LANES) {
      uint32_t ids[LANES] = {0};
      float some[LANES] = {0};
      const int n = count - i < LANES ? count - i : LANES;
      memcpy(ids, token_ids + i, n * 4);
      memcpy(some, logits + i, n * 4);
      vuint tokens;
      memcpy(&tokens, ids, sizeof tokens);
      const Noise noise = noise_of(tokens, s->keys[row]);
      const vfloat l = load_fp32(some), temperature = splat(s->temperatures[row]);
      store_fp32(low, capped(l, s->cap, -CAP_ERROR) / temperature + noise.lower);
      store_fp32(high, capped(l, s->cap, CAP_ERROR) / temperature + noise.upper);
      for (int lane = 0; lane < n; lane++) {
        if (pass == 0) bound = low[lane] > bound ? low[lane] : bound;
        else if (high[lane] >= bound) {
          if (s->num_chosen[row] == DRAWN) {
            s->num_chosen[row] = -1;
            return;
          }
          const int64_t place = (int64_t)row * DRAWN + s->num_chosen[row]++;
          s->chosen[place] = token_ids[i + lane];
          s->logits[place] = logits[i + lane];
        }
      }
    }
}

/* The products of the embedding for some of a row's candidates, of those that still can win. */
INLINE void weigh(struct screen *s, int row, int first, const int is_fp32) {
  const void *x = at(s->x, (int64_t)row * s->K, is_fp32);
  const int last = first + PIECE < s->counts[row] ? first + PIECE : s->counts[row];
  int32_t *token_ids = s->token_ids + (int64_t)row * CAPACITY;
  float *highest = s->highest + (int64_t)row * CAPACITY;
  for (int i = first; i < last && s->counts[row] <= CAPACITY; i++) {
    if (highest[i] < as_float(s->bounds[row])) token_ids[i] = -1;
    else highest[i] = dot(x, at(s->embedding, (int64_t)token_ids[i] * s->K, is_fp32), s->K, is_fp32);
  }
}

static void weigh_unit(void *arguments, int unit) {
  struct screen *s = arguments;
  if (s->is_fp32) weigh(s, unit / s->num_pieces, unit % s->num_pieces * PIECE, 1);
  else weigh(s, unit / s->num_pieces, unit % s->num_pieces * PIECE, 0);
}

/* The largest product among the candidates, the lowest token of those that share it; or of a draw all that may win. */
static void settle_unit(void *arguments, int row) {
  struct screen *s = arguments;
  int32_t *token_ids = s->token_ids + (int64_t)row * CAPACITY;
  float *highest = s->highest + (int64_t)row * CAPACITY;
  const int count = s->counts[row];
  s->num_chosen[row] = count && count <= CAPACITY ? 0 : -1;
  int kept = 0, best = 0;
  float broken = 0;
  for (int i = 0; i < count && count <= CAPACITY; i++) {
    if (token_ids[i] < 0) continue;
    token_ids[kept] = token_ids[i];
    highest[kept] = highest[i];
    broken += highest[kept] * 0; /* NaN, of infinity too */
    const int is_lower = highest[kept] == highest[best] && token_ids[kept] < token_ids[best];
    if (highest[kept] > highest[best] || is_lower) best = kept;
    kept++;
  }
  if (broken != 0) s->num_chosen[row] = -1;
  if (s->num_chosen[row] < 0) return;
  if (s->temperatures[row] != 0) {
    settle_draw(s, row, token_ids, highest, kept);
    return;
  }
  s->chosen[(int64_t)row * DRAWN] = token_ids[best];
  s->logits[(int64_t)row * DRAWN] = highest[best];
  s->num_chosen[row] = 1;
}

/* Whether this library has the instruction that makes it worth while. */
EXPORT int cabochon_can_screen(void) {
#if defined(__AVX512VNNI__)
  return 1;
#else
  return 0;
#endif
}

/* x: [T, K], K a multiple of LANES, at most 2^15. weight: the bytes of quantize.pack, N' tokens, N up to a multiple of
   64; scales, errors: [N']. embedding: [N, K]. Of each row [T] the largest logit is wanted where its
   temperature is 0; else a draw from logits, capped where cap is not 0, over the temperature, by the noise of its key.
   Writes chosen, logits: [T, DRAWN], and num_chosen: [T], how many: 1, or of a draw all that may win. -1 where too many
   were left to be told apart here, or the row or a logit is not finite. Returns 0, or -1 without memory. */
EXPORT int cabochon_screen(const void *x, const uint8_t *weight, const float *scales, const float *errors, float largest,
                           const void *embedding, const float *temperatures, const uint64_t *keys, float cap,
                           int32_t *chosen, float *logits, int32_t *num_chosen, int T, int N, int K, int is_fp32,
                           int num_threads) {
  const int num_blocks = (T + ROWS - 1) / ROWS, most = K / FOUR * MOST_REPEATS;
  const size_t rows = T, entries = (size_t)num_blocks * most;
  char *memory = malloc(64 + rows * ((size_t)K * 4 + sizeof(struct rounded) + 2 * 4 + CAPACITY * 8) + entries * (ROWS * 4 + 2) +
                        num_blocks * sizeof(struct block));
  if (!memory) return -1;
  struct screen s = {.x = x, .weight = weight, .scales = scales, .errors = errors, .embedding = embedding,
                     .largest = largest, .temperatures = temperatures, .keys = keys, .cap = cap, .T = T, .N = N, .K = K,
                     .num_groups = (N + 63) / 64 * (64 / LANES), .is_fp32 = is_fp32, .chosen = chosen, .logits = logits,
                     .num_chosen = num_chosen};
  char *next = memory;
  s.blocks = (struct block *)next, next += num_blocks * sizeof(struct block);
  s.values = (int32_t *)next, next += rows * K * 4;
  s.rows = (struct rounded *)next, next += rows * sizeof(struct rounded);
  s.bounds = (uint32_t *)next, next += rows * 4;
  s.counts = (int *)next, next += rows * 4;
  s.token_ids = (int32_t *)next, next += rows * CAPACITY * 4;
  s.highest = (float *)next, next += rows * CAPACITY * 4;
  int32_t *parts = (int32_t *)next;
  int16_t *of = (int16_t *)(next + entries * ROWS * 4);
  for (int i = 0; i < num_blocks; i++) {
    s.blocks[i].parts = parts + (int64_t)i * most * ROWS;
    s.blocks[i].of = of + (int64_t)i * most;
  }
  const float lowest = -FLT_MAX;
  for (int row = 0; row < T; row++) {
    memcpy(s.bounds + row, &lowest, 4);
    s.counts[row] = 0;
  }
  for_each(round_unit, &s, T, T < 8 ? 1 : num_threads);
  for_each(order_unit, &s, num_blocks, num_threads);
  for_each(multiply_unit, &s, (s.num_groups + GROUPS - 1) / GROUPS, num_threads);
  s.num_pieces = 1;
  for (int row = 0; row < T; row++) {
    const int pieces = ((s.counts[row] < CAPACITY ? s.counts[row] : CAPACITY) + PIECE - 1) / PIECE;
    s.num_pieces = pieces > s.num_pieces ? pieces : s.num_pieces;
  }
  for_each(weigh_unit, &s, T * s.num_pieces, num_threads);
  for_each(settle_unit, &s, T, num_threads);
  free(memory);
  return 0;
}

struct entries {
  const void *x, *weight;
  float *out;
  int K, is_fp32;
};

static void entry_unit(void *arguments, int i) {
  const struct entries *e = arguments;
  const int64_t from = (int64_t)i * e->K;
  e->out[i] = e->is_fp32 ? dot(at(e->x, from, 1), at(e->weight, from, 1), e->K, 1)
                         : dot(at(e->x, from, 0), at(e->weight, from, 0), e->K, 0);
}

/* Single entries of a product, by the sums of cabochon_screen. x, weight: [C, K]. out: [C]. */
EXPORT void cabochon_entries(const void *x, const void *weight, float *out, int C, int K, int is_fp32, int num_threads) {
  struct entries e = {x, weight, out, K, is_fp32};
  for_each(entry_unit, &e, C, C < 64 ? 1 : num_threads);
}
