/* What stands between the matrix products of a Gemma layer, one pass each: layers.py says what.

   A row is one thread's, and its arithmetic does not know which row it is: no result depends on the batch. */
#include "kernels.h"
#include "layers.h"
#include "threads.h"

#define ROWS 8            /* of a unit of work */
#define SMALL (1 << 16)   /* elements that are done before a other thread has come */
#define MAX_HEAD_DIM 512

static int threads_for(int64_t elements, int num_threads) { return elements < SMALL ? 1 : num_threads; }

INLINE void norm_row(void *to, const void *x, const float *weight, int n, float eps, const int is_fp32) {
  vfloat scale = splat(rms_scale(x, n, eps, is_fp32));
  for (int i = 0; i < n; i += LANES)
    store(to, i, load(x, i, is_fp32) * scale * load_fp32(weight + i), is_fp32);
}

#define FOR_ROWS(unit, T)                                                       \
  for (int row = (unit) * ROWS, end = row + ROWS < (T) ? row + ROWS : (T); row < end; row++)

#define BY_DTYPE(name)                                                          \
  static void name(void *arguments, int unit) {                                 \
    if (((struct name *)arguments)->is_fp32)                                    \
      name##_of((struct name *)arguments, unit, 1);                             \
    else                                                                        \
      name##_of((struct name *)arguments, unit, 0);                             \
  }

struct rms_norm {
  const void *x;
  const float *weight;
  void *out;
  float eps;
  int T, E, is_fp32;
};

INLINE void rms_norm_of(struct rms_norm *a, int unit, const int is_fp32) {
  FOR_ROWS(unit, a->T) {
    int64_t start = (int64_t)row * a->E;
    norm_row((void *)at(a->out, start, is_fp32), at(a->x, start, is_fp32), a->weight, a->E, a->eps, is_fp32);
  }
}
BY_DTYPE(rms_norm)

EXPORT void cabochon_rms_norm(const void *x, const float *weight, void *out, float eps, int T, int E,
                              int is_fp32, int num_threads) {
  struct rms_norm a = {x, weight, out, eps, T, E, is_fp32};
  for_each(rms_norm, &a, (T + ROWS - 1) / ROWS, threads_for((int64_t)T * E, num_threads));
}

struct embed_norm {
  const int64_t *token_ids;
  const void *embedding;
  float scale;
  const float *weight;
  void *residual, *x;
  float eps;
  int T, E, is_fp32;
};

INLINE void embed_norm_of(struct embed_norm *a, int unit, const int is_fp32) {
  FOR_ROWS(unit, a->T) {
    const void *from = at(a->embedding, a->token_ids[row] * a->E, is_fp32);
    void *residual = (void *)at(a->residual, (int64_t)row * a->E, is_fp32);
    for (int i = 0; i < a->E; i += LANES)
      store(residual, i, load(from, i, is_fp32) * splat(a->scale), is_fp32);
    norm_row((void *)at(a->x, (int64_t)row * a->E, is_fp32), residual, a->weight, a->E, a->eps, is_fp32);
  }
}
BY_DTYPE(embed_norm)

EXPORT void cabochon_embed_norm(const int64_t *token_ids, const void *embedding, float scale,
                                const float *weight, void *residual, void *x, float eps, int T, int E,
                                int is_fp32, int num_threads) {
  struct embed_norm a = {token_ids, embedding, scale, weight, residual, x, eps, T, E, is_fp32};
  for_each(embed_norm, &a, (T + ROWS - 1) / ROWS, threads_for((int64_t)T * E, num_threads));
}

struct sandwich {
  const void *branch;
  void *residual;
  const float *post, *pre; /* pre and x may be null */
  void *x;
  float eps;
  int T, E, is_fp32;
};

INLINE void sandwich_of(struct sandwich *a, int unit, const int is_fp32) {
  FOR_ROWS(unit, a->T) {
    int64_t start = (int64_t)row * a->E;
    const void *branch = at(a->branch, start, is_fp32);
    void *residual = (void *)at(a->residual, start, is_fp32);
    vfloat scale = splat(rms_scale(branch, a->E, a->eps, is_fp32));
    for (int i = 0; i < a->E; i += LANES) {
      vfloat y = rounded(load(branch, i, is_fp32) * scale * load_fp32(a->post + i), is_fp32);
      store(residual, i, load(residual, i, is_fp32) + y, is_fp32);
    }
    if (a->x) norm_row((void *)at(a->x, start, is_fp32), residual, a->pre, a->E, a->eps, is_fp32);
  }
}
BY_DTYPE(sandwich)

EXPORT void cabochon_sandwich_norm(const void *branch, void *residual, const float *post, const float *pre,
                                   void *x, float eps, int T, int E, int is_fp32, int num_threads) {
  struct sandwich a = {branch, residual, post, pre, x, eps, T, E, is_fp32};
  for_each(sandwich, &a, (T + ROWS - 1) / ROWS, threads_for((int64_t)T * E, num_threads));
}

struct geglu {
  const void *gate_up;
  void *out;
  int T, F, is_fp32;
};

INLINE void geglu_of(struct geglu *a, int unit, const int is_fp32) {
  /* gelu(x) = x (1 + tanh(u)) / 2 = x / (1 + exp(-2 u)), u = sqrt(2 / pi) (x + 0.044715 x^3) */
  const vfloat linear = splat(-1.5957691216057308f), cubic = splat(-0.07135481282052762f);
  FOR_ROWS(unit, a->T) {
    const void *gate = at(a->gate_up, (int64_t)row * 2 * a->F, is_fp32), *up = at(gate, a->F, is_fp32);
    for (int i = 0; i < a->F; i += LANES) {
      vfloat g = load(gate, i, is_fp32);
      vfloat gelu = g / (splat(1.0f) + vexp(g * (linear + cubic * (g * g))));
      store(a->out, (int64_t)row * a->F + i, rounded(gelu, is_fp32) * load(up, i, is_fp32), is_fp32);
    }
  }
}
BY_DTYPE(geglu)

EXPORT void cabochon_geglu(const void *gate_up, void *out, int T, int F, int is_fp32, int num_threads) {
  struct geglu a = {gate_up, out, T, F, is_fp32};
  for_each(geglu, &a, (T + ROWS - 1) / ROWS, threads_for((int64_t)T * F * 4, num_threads));
}

struct qkv {
  const void *qkv;
  const int64_t *positions, *slots;
  const float *cos, *sin, *q_norm, *k_norm; /* the norms may be null */
  void *q, *k_pages, *v_pages;
  float eps;
  int T, Hq, Hkv, D, is_fp32;
};

/* One head, normalized if it has a weight, turned by its position's angle; float[D]. */
INLINE void turned(float *to, const void *head, const float *weight, const float *cos, const float *sin, int D,
                   float eps, const int is_fp32) {
  float x[MAX_HEAD_DIM];
  vfloat scale = splat(weight ? rms_scale(head, D, eps, is_fp32) : 1.0f);
  for (int i = 0; i < D; i += LANES) {
    vfloat a = load(head, i, is_fp32);
    store_fp32(x + i, weight ? rounded(a * scale * load_fp32(weight + i), is_fp32) : a);
  }
  for (int i = 0, half = D / 2; i < half; i++) {
    to[i] = x[i] * cos[i] - x[i + half] * sin[i];
    to[i + half] = x[i + half] * cos[i] + x[i] * sin[i];
  }
}

INLINE void qkv_of(struct qkv *a, int unit, const int is_fp32) {
  const int D = a->D, Hq = a->Hq, Hkv = a->Hkv;
  float x[MAX_HEAD_DIM];
  FOR_ROWS(unit, a->T) {
    const float *cos = a->cos + a->positions[row] * (D / 2), *sin = a->sin + a->positions[row] * (D / 2);
    const void *heads = at(a->qkv, (int64_t)row * (Hq + 2 * Hkv) * D, is_fp32);
    for (int head = 0; head < Hq; head++) {
      turned(x, at(heads, head * D, is_fp32), a->q_norm, cos, sin, D, a->eps, is_fp32);
      for (int i = 0; i < D; i += LANES) store(a->q, ((int64_t)row * Hq + head) * D + i, load_fp32(x + i), is_fp32);
    }
    if (a->slots[row] < 0) continue; /* padding */
    for (int head = 0; head < Hkv; head++) {
      int64_t to = (a->slots[row] * Hkv + head) * D;
      const void *value = at(heads, (Hq + Hkv + head) * D, is_fp32);
      turned(x, at(heads, (Hq + head) * D, is_fp32), a->k_norm, cos, sin, D, a->eps, is_fp32);
      for (int i = 0; i < D; i += LANES) {
        store(a->k_pages, to + i, load_fp32(x + i), is_fp32);
        store(a->v_pages, to + i, load(value, i, is_fp32), is_fp32);
      }
    }
  }
}
BY_DTYPE(qkv)

EXPORT void cabochon_qkv_rope_write(const void *qkv_rows, const int64_t *positions, const int64_t *slots,
                                    const float *cos, const float *sin, const float *q_norm,
                                    const float *k_norm, void *q, void *k_pages, void *v_pages, float eps,
                                    int T, int Hq, int Hkv, int D, int is_fp32, int num_threads) {
  struct qkv a = {qkv_rows, positions, slots, cos, sin, q_norm, k_norm, q, k_pages, v_pages, eps,
                  T, Hq, Hkv, D, is_fp32};
  for_each(qkv, &a, (T + ROWS - 1) / ROWS, threads_for((int64_t)T * (Hq + 2 * Hkv) * D, num_threads));
}
