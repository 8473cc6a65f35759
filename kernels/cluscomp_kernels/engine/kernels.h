/* The table of operations that each instruction set has its own code for. */
#ifndef CLUSCOMP_KERNELS_H
#define CLUSCOMP_KERNELS_H

#include "engine/engine.h"

/* 16 values; compilers split them where registers are shorter. */
typedef float lanes __attribute__((vector_size(64)));
typedef int32_t integers __attribute__((vector_size(64)));
typedef uint32_t words __attribute__((vector_size(64)));
typedef uint16_t halves __attribute__((vector_size(32)));
typedef int8_t bytes __attribute__((vector_size(16)));

/* Attention of a head for `tokens` consecutive tokens, the first at `position`. Keys are [blocks][head_dim][16 positions], values
 * [positions][value_stride]; those of int8 have a scale for each position. */
typedef struct {
    const float *queries; /* [tokens][query_stride], scaled */
    float *out;           /* [tokens][out_stride] */
    float *scores;        /* [4][score_stride], room for a multiple of 16 positions each */
    const void *keys;
    const void *values;
    const float *key_scales;
    const float *value_scales;
    int64_t query_stride, out_stride, score_stride, value_stride;
    int64_t head_dim, position, window, tokens;
    int type;
} cc_attention;

typedef struct {
    /* Writes `quads` decoded records of `groups` groups, from `record` on, to `decoded`: `pitch` vectors each. */
    void (*decode)(const cc_matrix *matrix, const uint8_t *record, int64_t quads, int64_t groups, uint8_t *decoded);
    /* sums[token][16 * vectors] += decoded [quads][vectors][64] times the tokens' blocks, in order. Tokens are `stride` blocks
     * apart. */
    void (*multiply)(const uint8_t *decoded, int64_t quads, int64_t vectors, const cc_block *x, int64_t stride, int64_t tokens,
                     float *sums);
    /* x [channels] as blocks. */
    void (*quantise)(const float *x, int64_t channels, cc_block *blocks);
    /* out [size] = x / sqrt(mean(x^2) + eps) * weight; out may be x. */
    void (*norm)(const float *x, const float *weight, float eps, int64_t size, float *out);
    /* out [size] = activation(gates) * up; out may be gates. */
    void (*gate)(const float *gates, const float *up, int64_t size, int activation, float *out);
    /* results[token] = row `row` of a dense matrix times x [tokens, in_features]; without bias. */
    void (*dense)(const cc_linear *linear, int64_t row, const float *x, int64_t tokens, float *results);
    /* A row of a dense matrix as float32. */
    void (*dense_row)(const cc_linear *linear, int64_t row, float *out);
    /* x [size] as `type`, with `step` elements from one to the next; returns the scale, 1 unless the type is int8. */
    float (*store)(const float *x, int64_t size, int type, void *to, int64_t step);
    void (*attend)(const cc_attention *job);
} cc_kernels;

/* The kernels of a variant; NULL if this machine lacks the instructions. */
const cc_kernels *cc_kernels_of(int variant);

#if (defined(__x86_64__) || defined(__i386__)) && defined(__GNUC__)
#define CC_X86 1
extern const cc_kernels cc_kernels_avx2, cc_kernels_avx512, cc_kernels_amx;
#endif
extern const cc_kernels cc_kernels_plain;

#endif
