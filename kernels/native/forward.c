/* All layers of a step in one call: forward.py says why. The kernels of this folder, in the order in which
   engine/models/fused.py calls them, on the same bytes. */
#include <stdlib.h>

#include "kernels.h"
#include "layers.h"

#define ALIGNMENT 64

struct weight {
  const void *values;  /* [N, K'] int8; without scales bf16, packed for cabochon_linear */
  const float *scales; /* [N] */
};

struct layer {
  const float *input_norm, *post_attention_norm, *pre_mlp_norm, *post_mlp_norm; /* [E] */
  const float *q_norm, *k_norm;                                                 /* [D], or null */
  struct weight qkv, out, gate_up, down;
  const float *cos, *sin; /* [max_len, D / 2] */
  void *k_pages, *v_pages; /* [N + 1, P, Hkv, D] */
  int group, window;       /* window: 0 for none */
};

struct model {
  const struct layer *layers;
  const void *embedding; /* [V, E] */
  float embedding_scale, eps, attention_scale, softcap; /* softcap: 0 for none */
  int num_layers, E, F, Hq, Hkv, D, P, is_fp32;
};

struct step {
  const int64_t *token_ids, *positions; /* [T] */
  const int64_t *const *slots;          /* per group [T] */
  const int32_t *const *page_tables;    /* per group [S, M] */
  const int32_t *cu_seqlens, *seq_lens; /* [S + 1], [S] */
  void *residual;                       /* [T, E], the result */
  int T, S, M, num_threads;
};

struct buffers {
  char *x, *qkv, *q, *attended, *gate_up, *gated, *branch; /* [T, E], [T, (Hq + 2 Hkv) D], ... */
  int16_t *x_values; /* what int8 makes of x: [T, K'], but for the last product, which takes the place of gate_up */
  float *x_scales;   /* [T] */
};

static char *take(char *base, int64_t *used, int64_t bytes) {
  char *place = (char *)((uintptr_t)base + *used); /* base may be null: what is wanted is `used` */
  *used += (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
  return place;
}

static int64_t largest(int64_t a, int64_t b) { return a > b ? a : b; }

/* Places in base, and the bytes of all. */
static int64_t lay_out(const struct model *m, int64_t T, char *base, struct buffers *b) {
  const int64_t size = m->is_fp32 ? 4 : 2, heads = (int64_t)m->Hq * m->D;
  int64_t used = 0;
  b->x = take(base, &used, T * m->E * size);
  b->qkv = take(base, &used, T * (m->Hq + 2 * m->Hkv) * m->D * size);
  b->q = take(base, &used, T * heads * size);
  b->attended = take(base, &used, T * heads * size);
  b->gate_up = take(base, &used, T * 2 * m->F * size); /* x in 16 bits, too: K' is at most 2 F */
  b->gated = take(base, &used, T * m->F * size);
  b->branch = take(base, &used, T * m->E * size);
  b->x_values = (int16_t *)take(base, &used, T * (largest(m->E, heads) + PAIRS) * sizeof(int16_t));
  b->x_scales = (float *)take(base, &used, T * sizeof(float));
  return used;
}

/* x: [T, K]. out: [T, N]. x_values: memory for x in 16 bits. Returns 0, or -1 without memory. */
static int multiply(const struct model *m, const struct step *s, const struct buffers *b, const struct weight *w,
                    const void *x, int16_t *x_values, void *out, int N, int K) {
  if (!w->scales) return cabochon_linear(x, w->values, out, s->T, N, K, s->num_threads);
  cabochon_int8_linear(x, x_values, b->x_scales, w->values, w->scales, out, s->T, N, K,
                       (K + PAIRS - 1) / PAIRS * PAIRS, m->is_fp32, s->num_threads);
  return 0;
}

static int forward_layer(const struct model *m, const struct step *s, const struct buffers *b, const struct layer *l,
                         const float *next_norm) {
  const int E = m->E, F = m->F, Hq = m->Hq, Hkv = m->Hkv, D = m->D, fp32 = m->is_fp32, threads = s->num_threads;
  if (multiply(m, s, b, &l->qkv, b->x, b->x_values, b->qkv, (Hq + 2 * Hkv) * D, E)) return -1;
  cabochon_qkv_rope_write(b->qkv, s->positions, s->slots[l->group], l->cos, l->sin, l->q_norm, l->k_norm, b->q,
                          l->k_pages, l->v_pages, m->eps, s->T, Hq, Hkv, D, fp32, threads);
  if (cabochon_paged_attention(b->q, l->k_pages, l->v_pages, s->page_tables[l->group], s->cu_seqlens, s->seq_lens,
                               b->attended, m->attention_scale, m->softcap, s->S, s->M, m->P, Hq, Hkv, D, l->window,
                               fp32, threads))
    return -1;
  if (multiply(m, s, b, &l->out, b->attended, b->x_values, b->branch, E, Hq * D)) return -1;
  cabochon_sandwich_norm(b->branch, s->residual, l->post_attention_norm, l->pre_mlp_norm, b->x, m->eps, s->T, E, fp32,
                         threads);
  if (multiply(m, s, b, &l->gate_up, b->x, b->x_values, b->gate_up, 2 * F, E)) return -1;
  cabochon_geglu(b->gate_up, b->gated, s->T, F, fp32, threads);
  if (multiply(m, s, b, &l->down, b->gated, (int16_t *)b->gate_up, b->branch, E, F)) return -1;
  cabochon_sandwich_norm(b->branch, s->residual, l->post_mlp_norm, next_norm, next_norm ? b->x : 0, m->eps, s->T, E,
                         fp32, threads);
  return 0;
}

/* Hidden rows before the final norm, in s->residual. Returns 0, or -1 without memory. */
EXPORT int cabochon_forward(const struct model *m, const struct step *s) {
  struct buffers b;
  char *memory = aligned_alloc(ALIGNMENT, lay_out(m, s->T, 0, &b));
  if (!memory) return -1;
  lay_out(m, s->T, memory, &b);
  const int64_t row = (int64_t)m->Hq * m->D * (m->is_fp32 ? 4 : 2), used = s->cu_seqlens[s->S];
  memset(b.attended + used * row, 0, (s->T - used) * row); /* padding, which no layer writes */
  cabochon_embed_norm(s->token_ids, m->embedding, m->embedding_scale, m->layers[0].input_norm, s->residual, b.x,
                      m->eps, s->T, m->E, m->is_fp32, s->num_threads);
  int status = 0;
  for (int i = 0; i < m->num_layers && !status; i++) { /* the final norm is for chosen rows */
    const float *next_norm = i + 1 < m->num_layers ? m->layers[i + 1].input_norm : 0;
    status = forward_layer(m, s, &b, &m->layers[i], next_norm);
  }
  free(memory);
  return status;
}
