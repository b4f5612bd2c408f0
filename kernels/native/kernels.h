/* What the kernels of this folder export and forward.c calls. */
#ifndef CABOCHON_KERNELS_H
#define CABOCHON_KERNELS_H

#include <stdint.h>

#define PAIRS 32 /* products of int8.c that a vector of sums takes at once, twice its LANES; K' is a multiple */

void cabochon_embed_norm(const int64_t *token_ids, const void *embedding, float scale, const float *weight,
                         void *residual, void *x, float eps, int T, int E, int is_fp32, int num_threads);
void cabochon_sandwich_norm(const void *branch, void *residual, const float *post, const float *pre, void *x,
                            float eps, int T, int E, int is_fp32, int num_threads);
void cabochon_geglu(const void *gate_up, void *out, int T, int F, int is_fp32, int num_threads);
void cabochon_qkv_rope_write(const void *qkv_rows, const int64_t *positions, const int64_t *slots, const float *cos,
                             const float *sin, const float *q_norm, const float *k_norm, void *q, void *k_pages,
                             void *v_pages, float eps, int T, int Hq, int Hkv, int D, int is_fp32, int num_threads);
int cabochon_paged_attention(const void *q, const void *k, const void *v, const int32_t *table,
                             const int32_t *cu_seqlens, const int32_t *seq_lens, void *out, float scale, float softcap,
                             int S, int M, int P, int Hq, int Hkv, int D, int window, int is_fp32, int num_threads);
int cabochon_linear(const void *x, const void *weight, void *out, int T, int N, int K, int num_threads);
void cabochon_int8_linear(const void *x, int16_t *values, float *x_scales, const int8_t *weight, const float *scales,
                          void *out, int T, int N, int K, int padded_K, int is_fp32, int num_threads);

#endif
