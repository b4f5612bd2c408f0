/* Choosing tokens: the largest logit and its ties, and the few tokens that a draw can choose (kernels/sampling.py).

   A draw is the argmax of fl(s + g), s = fl(l / T), g = -log(-log1p(-v)) as torch rounds it, v = (h + 1/2) / 2^32.
   No logarithm is needed to tell who can win. Let f be fp32 of h + 1/2, and x its bits read as an integer, times
   2^-23, less 127: exponent plus fraction, a line through the powers of two. log2 is concave, and at most 0.0861
   above that line, so 0 <= log2(f) - x <= 0.0861. With v <= -log1p(-v), and <= 2 ln 2 v where v < 1/2:

     g <= upper = (32 - x) ln 2 + 0.001                 g <= 22.88, at h = 0
     g >= lower = upper - 0.39 where f < 2^31           0.39 > 0.0861 ln 2 + ln(2 ln 2) + 2 * 0.001 = 0.3884
     g >= lower = -2.82 elsewhere                       -2.8115 at v = 1 - 2^-24, the largest v that torch sees

   0.001 is for rounding, which takes less than 0.0001 of it: f is off by two parts in 2^24, x as fp32 by 2^-17, the
   products by 2^-17 each, torch's fp32 logarithms by an ulp or two of at most 22.88. f < 2^31 only if h < 2^31.
   Addition rounds monotonically. So with B any fl(s + lower), or the largest, and w the winner,

     fl(s_w + upper_w) >= fl(s_w + g_w) >= fl(s_t + g_t) >= fl(s_t + lower_t) = B

   for whichever token t had B: the winner, and all that tie with it, are among those with fl(s + upper) >= B. About
   1.5 tokens are. One pass with a B that grows finds a superset, a look at what was found leaves those of the last B.
   B starts at the lowest number, so that -inf is never a candidate. */
#include <float.h>

#include "threads.h"
#include "vectors.h"

#define CAPACITY 64 /* candidates of a row; also in sampling.py */
#define HIGHEST_NOISE 22.9f
#define LOWEST_NOISE -2.82f
#define UPPER_LESS_LOWER 0.39f
#define LN2 0.69314718f
#define GROUP 4 /* vectors of a row that are looked at together */

static inline int any(vint mask) {
  uint64_t parts[sizeof mask / 8], all = 0;
  memcpy(parts, &mask, sizeof parts);
  for (unsigned i = 0; i < sizeof parts / sizeof *parts; i++) all |= parts[i];
  return all != 0;
}

/* Lanes from row[start] on; those past the row's end are -inf. */
static inline vfloat load_or_inf(const char *row, int is_fp32, int start, int vocab_size) {
  int width = is_fp32 ? 4 : 2;
  const char *from = row + (int64_t)start * width;
  if (start + LANES <= vocab_size) return is_fp32 ? load_fp32(from) : load_bf16(from);
  float lanes[LANES];
  for (int i = 0; i < LANES; i++) {
    uint32_t bits = 0xFF800000u;
    if (start + i < vocab_size) {
      if (is_fp32) memcpy(&bits, from + 4 * i, 4);
      else memcpy((char *)&bits, from + 2 * i, 2), bits <<= 16;
    }
    memcpy(&lanes[i], &bits, 4);
  }
  return load_fp32(lanes);
}

typedef struct {
  const char *logits;
  int64_t row_bytes;
  int vocab_size, is_fp32;
  const float *slack; /* or NULL */
  float relative_slack;
  float *highest;
  int64_t *token_ids;
  int32_t *num_tied;
} Largest;

/* NaN is never larger and never smaller: the first pass goes past it, the second one stops at it. */
static inline void largest_row(const Largest *g, int row, int is_fp32) {
  const char *logits = g->logits + row * g->row_bytes;
  vfloat best = splat(-__builtin_inff());
  for (int i = 0; i < g->vocab_size; i += LANES) {
    vfloat x = load_or_inf(logits, is_fp32, i, g->vocab_size);
    best = choose(x > best, x, best);
  }
  float highest = max_lanes(best), floor = highest;
  if (g->slack) floor = highest - (g->slack[row] + g->relative_slack * __builtin_fabsf(highest));
  int64_t token_id = -1;
  int num_tied = 0, is_nan = 0;
  for (int group = 0; group < g->vocab_size; group += GROUP * LANES) {
    vint found = {0};
    for (int i = group; i < group + GROUP * LANES && i < g->vocab_size; i += LANES)
      found |= ~(load_or_inf(logits, is_fp32, i, g->vocab_size) < floor);
    if (!any(found)) continue;
    for (int i = group; i < group + GROUP * LANES && i < g->vocab_size; i += LANES) {
      vfloat x = load_or_inf(logits, is_fp32, i, g->vocab_size);
      for (int lane = 0; lane < LANES && i + lane < g->vocab_size && !is_nan; lane++) {
        if (x[lane] < floor) continue;
        is_nan = x[lane] != x[lane];
        if (is_nan || (token_id < 0 && x[lane] == highest)) token_id = i + lane;
        num_tied++;
      }
    }
    if (is_nan) break;
  }
  g->highest[row] = is_nan ? __builtin_nanf("") : highest;
  g->token_ids[row] = token_id;
  g->num_tied[row] = is_nan ? 1 : num_tied;
}

static void largest_unit(void *arguments, int row) {
  const Largest *g = arguments;
  if (g->is_fp32) largest_row(g, row, 1);
  else largest_row(g, row, 0);
}

/* logits: [R, V] bf16 or fp32, rows row_bytes apart, V > 0. Writes of each row [R] the largest logit, its lowest id
   and how many share it, or are less by at most slack + relative_slack * |largest|; slack: [R], or NULL for none. NaN
   is the largest, and then shares with none. */
EXPORT void cabochon_find_largest(const void *logits, int64_t row_bytes, int vocab_size, int is_fp32, int num_rows,
                                  const float *slack, float relative_slack, float *highest, int64_t *token_ids,
                                  int32_t *num_tied, int num_threads) {
  Largest g = {logits, row_bytes, vocab_size, is_fp32, slack, relative_slack, highest, token_ids, num_tied};
  for_each(largest_unit, &g, num_rows, num_threads);
}

typedef struct {
  const char *logits;
  int64_t row_bytes;
  int vocab_size, is_fp32;
  const int64_t *rows;
  const float *temperatures;
  const uint64_t *keys;
  int32_t *token_ids, *counts;
} Draws;

static inline vuint mix32(vuint x) {
  x = (x ^ (x >> 16)) * 0x85EBCA6Bu;
  x = (x ^ (x >> 13)) * 0xC2B2AE35u;
  return x ^ (x >> 16);
}

typedef struct {
  float bound; /* B */
  int count;
  int32_t token_ids[CAPACITY];
  float highest[CAPACITY]; /* fl(s + upper) */
} Found;

static void forget_losers(Found *found) {
  int kept = 0;
  for (int i = 0; i < found->count; i++)
    if (found->highest[i] >= found->bound) {
      found->token_ids[kept] = found->token_ids[i];
      found->highest[kept++] = found->highest[i];
    }
  found->count = kept;
}

/* Rare. Returns whether there was room. */
static int enter(Found *found, int start, vfloat s, vfloat f, vfloat upper) {
  vfloat lower = choose(f < splat(0x1p31f), upper - splat(UPPER_LESS_LOWER), splat(LOWEST_NOISE));
  float bound = max_lanes(s + lower);
  if (bound > found->bound) found->bound = bound;
  vfloat highest = s + upper;
  for (int lane = 0; lane < LANES; lane++) {
    if (!(highest[lane] >= found->bound)) continue;
    if (found->count == CAPACITY) forget_losers(found);
    if (found->count == CAPACITY) return 0;
    found->token_ids[found->count] = start + lane;
    found->highest[found->count++] = highest[lane];
  }
  return 1;
}

static inline int find_candidates(const Draws *d, int draw, int is_fp32, Found *found) {
  const char *logits = d->logits + d->rows[draw] * d->row_bytes;
  uint32_t key_low = (uint32_t)d->keys[draw], key_high = (uint32_t)(d->keys[draw] >> 32);
  vfloat temperature = splat(d->temperatures[draw]), s[GROUP], f[GROUP], upper[GROUP];
  for (int start = 0; start < d->vocab_size; start += GROUP * LANES) {
    vint may_win = {0};
    for (int i = 0; i < GROUP; i++) {
      s[i] = load_or_inf(logits, is_fp32, start + i * LANES, d->vocab_size) / temperature;
      may_win |= s[i] + splat(HIGHEST_NOISE) >= splat(found->bound);
    }
    if (!any(may_win)) continue;
    may_win = (vint){0};
    for (int i = 0; i < GROUP; i++) {
      const vuint lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
      vuint h = mix32(mix32((lanes + start + i * LANES) * 0x9E3779B1u + key_low) ^ key_high);
      f[i] = __builtin_convertvector(h, vfloat) + splat(0.5f);
      vfloat x = __builtin_convertvector((vint)f[i], vfloat) * splat(0x1p-23f) - splat(127);
      upper[i] = (splat(32) - x) * splat(LN2) + splat(0.001f);
      may_win |= s[i] + upper[i] >= splat(found->bound);
    }
    if (!any(may_win)) continue;
    for (int i = 0; i < GROUP; i++)
      if (!enter(found, start + i * LANES, s[i], f[i], upper[i])) return 0;
  }
  return 1;
}

static void draw_unit(void *arguments, int draw) {
  const Draws *d = arguments;
  Found found = {.bound = -FLT_MAX};
  int has_room = d->is_fp32 ? find_candidates(d, draw, 1, &found) : find_candidates(d, draw, 0, &found);
  forget_losers(&found);
  d->counts[draw] = has_room ? found.count : -1;
  memcpy(d->token_ids + (int64_t)draw * CAPACITY, found.token_ids, sizeof found.token_ids);
}

/* logits: [.., V] bf16 or fp32, rows row_bytes apart, without NaN. Each draw [D] is of rows[draw], divided by its
   temperature, with the noise of its 64-bit key. Writes token_ids [D, CAPACITY], ascending, and how many: 0 where
   every logit is -inf, -1 where there was no room. */
EXPORT void cabochon_find_candidates(const void *logits, int64_t row_bytes, int vocab_size, int is_fp32, int num_draws,
                                     const int64_t *rows, const float *temperatures, const uint64_t *keys,
                                     int32_t *token_ids, int32_t *counts, int num_threads) {
  Draws d = {logits, row_bytes, vocab_size, is_fp32, rows, temperatures, keys, token_ids, counts};
  for_each(draw_unit, &d, num_draws, num_threads);
}
