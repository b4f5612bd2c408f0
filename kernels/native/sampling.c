/* Choosing tokens: the largest logit and its ties, and the few tokens that a draw can choose (kernels/sampling.py).

   A logit l stands for any number within its slack, whose cap over the temperature is then between s_low and s_high;
   without slack and cap both are l / T. Addition rounds monotonically. So with B any fl(s_low + lower), or the largest,
   lower and upper bounds of noise.h, and w the winner,

     fl(s_high_w + upper_w) >= fl(s_w + g_w) >= fl(s_t + g_t) >= fl(s_low_t + lower_t) = B

   for whichever token t had B: the winner, and all that tie with it, are among those with fl(s_high + upper) >= B.
   Without slack about 1.5 tokens are. One pass with a B that grows finds a superset, a look at what was found leaves
   those of the last B. B starts at the lowest number, so that -inf is never a candidate. */
#include <float.h>

#include "noise.h"
#include "threads.h"
#include "vectors.h"

#define CAPACITY 64 /* candidates of a row; also in sampling.py */
#define GROUP 4 /* vectors of a row that are looked at together */

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
  if (g->slack) floor = highest - 2 * (g->slack[row] + g->relative_slack * __builtin_fabsf(highest));
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
   and how many share it, or might if each is off by slack + relative_slack * |largest|; slack: [R], or NULL for none.
   NaN is the largest, and then shares with none. */
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
  const float *slack; /* of rows, or NULL */
  float relative_slack, cap;
  int32_t *token_ids, *counts;
} Draws;

typedef struct {
  float bound; /* B */
  int count;
  int32_t token_ids[CAPACITY];
  float highest[CAPACITY]; /* fl(s_high + upper) */
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

/* Rare. low, high: of sums with the noise. Returns whether there was room. */
static int enter(Found *found, int start, vfloat low, vfloat high) {
  float bound = max_lanes(low);
  if (bound > found->bound) found->bound = bound;
  for (int lane = 0; lane < LANES; lane++) {
    if (!(high[lane] >= found->bound)) continue;
    if (found->count == CAPACITY) forget_losers(found);
    if (found->count == CAPACITY) return 0;
    found->token_ids[found->count] = start + lane;
    found->highest[found->count++] = high[lane];
  }
  return 1;
}

static inline vfloat slack_of(const Draws *d, int draw, vfloat logits) {
  if (!d->slack) return splat(0);
  vfloat sizes = (vfloat)((vint)logits & 0x7FFFFFFF);
  return splat(d->slack[d->rows[draw]]) + sizes * splat(d->relative_slack);
}

/* Past the row's end there is no token, whatever a cap makes of -inf. */
static inline vfloat inside(const Draws *d, int start, vfloat x) {
  if (start + LANES <= d->vocab_size) return x;
  return choose((vint)sixteen_from(start) < d->vocab_size, x, splat(-__builtin_inff()));
}

static inline int find_candidates(const Draws *d, int draw, int is_fp32, Found *found) {
  const char *logits = d->logits + d->rows[draw] * d->row_bytes;
  const vfloat temperature = splat(d->temperatures[draw]);
  vfloat l[GROUP], high[GROUP];
  Noise noise[GROUP];
  for (int start = 0; start < d->vocab_size; start += GROUP * LANES) {
    vint may_win = {0};
    for (int i = 0; i < GROUP; i++) {
      l[i] = load_or_inf(logits, is_fp32, start + i * LANES, d->vocab_size);
      high[i] = capped(l[i] + slack_of(d, draw, l[i]), d->cap, CAP_ERROR) / temperature;
      high[i] = inside(d, start + i * LANES, high[i]);
      may_win |= high[i] + splat(HIGHEST_NOISE) >= splat(found->bound);
    }
    if (!any(may_win)) continue;
    may_win = (vint){0};
    for (int i = 0; i < GROUP; i++) {
      noise[i] = noise_of(sixteen_from(start + i * LANES), d->keys[draw]);
      may_win |= high[i] + noise[i].upper >= splat(found->bound);
    }
    if (!any(may_win)) continue;
    for (int i = 0; i < GROUP; i++) {
      vfloat low = capped(l[i] - slack_of(d, draw, l[i]), d->cap, -CAP_ERROR) / temperature;
      low = inside(d, start + i * LANES, low);
      if (!enter(found, start + i * LANES, low + noise[i].lower, high[i] + noise[i].upper)) return 0;
    }
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

/* logits: [.., V] bf16 or fp32, rows row_bytes apart, without NaN. Each draw [D] is of rows[draw], capped where cap is
   not 0, divided by its temperature, with the noise of its 64-bit key; a logit may be off by slack[row] + relative_slack
   * |logit|, slack NULL for not at all. Writes token_ids [D, CAPACITY], ascending, and how many: 0 where every logit is
   -inf, -1 where there was no room. */
EXPORT void cabochon_find_candidates(const void *logits, int64_t row_bytes, int vocab_size, int is_fp32, int num_draws,
                                     const int64_t *rows, const float *temperatures, const uint64_t *keys,
                                     const float *slack, float relative_slack, float cap, int32_t *token_ids,
                                     int32_t *counts, int num_threads) {
  Draws d = {logits, row_bytes, vocab_size, is_fp32, rows, temperatures, keys, slack, relative_slack, cap, token_ids,
             counts};
  for_each(draw_unit, &d, num_draws, num_threads);
}
