/* LoRA adapters of a packed batch on top of a linear layer: kernels/native/lora.py says what.

   A unit of work is a tile of rows of one adapter and a part of the layer (q, k or v): A x of the part, rounded, and
   B of that. A row's sums are its own, in an order that nothing else decides. */
#include "layers.h"
#include "threads.h"

#define SMALL (1 << 17) /* products that are done before a other thread has come */
#define VECTORS 4       /* of columns together */

struct lora {
  const void *x;             /* [T', K] */
  void *out;                 /* [T', N] */
  const int32_t *tiles;      /* [num_tiles, 3]: slot, first row, end row */
  const void *const *a;      /* [slots], each [P, rank, K] */
  const void *const *b;      /* [slots], each [rank, N] */
  const int32_t *ranks, *part_ends;
  int P, K, N;
};

/* inner[r][j..j + 4] = A x of R rows; what is past the rank is of its last row again. */
INLINE void shrink(const void *x, const void *a, int K, int rank, int j, float *inner, int stride, const int R,
                   const int is_fp32) {
  vfloat sums[4][4];
  const void *rows[4];
  for (int i = 0; i < 4; i++) rows[i] = at(a, (int64_t)(j + i < rank ? j + i : rank - 1) * K, is_fp32);
  for (int r = 0; r < R; r++)
    for (int i = 0; i < 4; i++) sums[r][i] = splat(0.0f);
  for (int k = 0; k < K; k += LANES) {
    vfloat weights[4];
    for (int i = 0; i < 4; i++) weights[i] = load(rows[i], k, is_fp32);
    for (int r = 0; r < R; r++) {
      vfloat value = load(x, (int64_t)r * K + k, is_fp32);
      for (int i = 0; i < 4; i++) sums[r][i] = sums[r][i] + value * weights[i];
    }
  }
  for (int r = 0; r < R; r++) sum_four(inner + r * stride + j, sums[r][0], sums[r][1], sums[r][2], sums[r][3]);
}

/* out[r][n..n + V vectors] += B inner. */
INLINE void expand(void *out, const void *b, int N, int rank, int n, const float *inner, int stride, const int R,
                   const int V, const int is_fp32) {
  vfloat sums[4][VECTORS];
  for (int r = 0; r < R; r++)
    for (int c = 0; c < V; c++) sums[r][c] = splat(0.0f);
  for (int j = 0; j < rank; j++) {
    vfloat weights[VECTORS];
    for (int c = 0; c < V; c++) weights[c] = load(b, (int64_t)j * N + n + c * LANES, is_fp32);
    for (int r = 0; r < R; r++) {
      vfloat value = splat(inner[r * stride + j]);
      for (int c = 0; c < V; c++) sums[r][c] = sums[r][c] + value * weights[c];
    }
  }
  for (int r = 0; r < R; r++)
    for (int c = 0; c < V; c++) {
      const int64_t to = (int64_t)r * N + n + c * LANES;
      store(out, to, load(out, to, is_fp32) + sums[r][c], is_fp32);
    }
}

/* R neighbouring rows of one adapter. */
INLINE void add_rows(const struct lora *l, int slot, int part, int row, const int R, const int is_fp32) {
  const int rank = l->ranks[slot], stride = (rank + LANES - 1) / LANES * LANES;
  const int begin = part ? l->part_ends[part - 1] : 0, end = l->part_ends[part];
  const void *x = at(l->x, (int64_t)row * l->K, is_fp32), *a = at(l->a[slot], (int64_t)part * rank * l->K, is_fp32);
  void *out = (void *)at(l->out, (int64_t)row * l->N, is_fp32);
  float inner[4 * stride];
  for (int j = 0; j < rank; j += 4) shrink(x, a, l->K, rank, j, inner, stride, R, is_fp32);
  for (int r = 0; r < R; r++)
    for (int j = 0; j < rank; j += LANES) {
      float *some = inner + r * stride + j;
      store_fp32(some, rounded(load_fp32(some), is_fp32));
    }
  int n = begin;
  for (; n + VECTORS * LANES <= end; n += VECTORS * LANES)
    expand(out, l->b[slot], l->N, rank, n, inner, stride, R, VECTORS, is_fp32);
  for (; n < end; n += LANES) expand(out, l->b[slot], l->N, rank, n, inner, stride, R, 1, is_fp32);
}

INLINE void add_unit(const struct lora *l, int unit, const int is_fp32) {
  const int part = unit % l->P;
  const int32_t *tile = l->tiles + (int64_t)(unit / l->P) * 3;
  if (tile[0] < 0 || l->ranks[tile[0]] == 0) return;
  int row = tile[1];
  for (; row + 4 <= tile[2]; row += 4) add_rows(l, tile[0], part, row, 4, is_fp32);
  for (; row + 2 <= tile[2]; row += 2) add_rows(l, tile[0], part, row, 2, is_fp32);
  for (; row < tile[2]; row++) add_rows(l, tile[0], part, row, 1, is_fp32);
}

static void add_bf16(void *l, int unit) { add_unit(l, unit, 0); }
static void add_fp32(void *l, int unit) { add_unit(l, unit, 1); }

EXPORT void cabochon_add_lora(const void *x, void *out, const int32_t *tiles, const void *a, const void *b,
                              const int32_t *ranks, const int32_t *part_ends, int num_tiles, int P, int K, int N,
                              int is_fp32, int num_threads) {
  struct lora lora = {x, out, tiles, a, b, ranks, part_ends, P, K, N};
  int64_t work = 0;
  for (int i = 0; i < num_tiles; i++)
    if (tiles[3 * i] >= 0) work += (int64_t)(tiles[3 * i + 2] - tiles[3 * i + 1]) * ranks[tiles[3 * i]] * (P * K + N);
  for_each(is_fp32 ? add_fp32 : add_bf16, &lora, num_tiles * P, work < SMALL ? 1 : num_threads);
}
