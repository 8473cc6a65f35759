/* The three tile kernels over all value types, row lengths and code widths, for one instruction set.
 *
 * The including file defines
 *   CC_FN                      attributes of every function, among them the target
 *   vec, VEC_LANES             a vector of floats
 *   vec_zero, vec_set1, vec_load, vec_store, vec_fmadd
 *   tile_vec(codebook, value_type, row, record, code_bytes, v)
 *                              vector v of the CC_LANES values of a record; only codebook and record vary at run time
 *   MULTIPLY_VECS              vectors of a record that the multiplication keeps in registers
 *   FUSE_FOUR_TOKENS           1 if the registers can hold the sums of four tokens, else 0
 * It is included as text so that each instruction set compiles the same loops with its own target. */
#include "clus_linear/clus_linear.h"

#include <stddef.h>

#define TILE_VECS (CC_LANES / VEC_LANES)

static inline CC_FN uint32_t code_at(const void *record, int code_bytes, int group)
{
    return code_bytes == 1 ? ((const uint8_t *)record)[group] : ((const uint16_t *)record)[group];
}

static inline CC_FN void tile_dot(int value_type, int row, int code_bytes, int tokens, const void *codes, const void *codebook,
                                  const float *const *x, int64_t in_features, float *lanes)
{
    const char *record = codes;
    vec sum[4][TILE_VECS];
    for (int n = 0; n < tokens; n++)
        for (int v = 0; v < TILE_VECS; v++)
            sum[n][v] = vec_zero();
    for (int64_t i = 0; i < in_features; i++, record += code_bytes * (CC_LANES / row)) {
        CC_FETCH(record + CC_PREFETCH);
        for (int v = 0; v < TILE_VECS; v++) {
            const vec weight = tile_vec(codebook, value_type, row, record, code_bytes, v);
            for (int n = 0; n < tokens; n++)
                sum[n][v] = vec_fmadd(vec_set1(x[n][i]), weight, sum[n][v]);
        }
    }
    for (int n = 0; n < tokens; n++)
        for (int v = 0; v < TILE_VECS; v++)
            vec_store(lanes + n * CC_LANES + v * VEC_LANES, sum[n][v]);
}

static inline CC_FN void tile_decode(int value_type, int row, int code_bytes, const void *codes, const void *codebook,
                                     int64_t channels, float *block)
{
    const char *record = codes;
    for (int64_t i = 0; i < channels; i++, record += code_bytes * (CC_LANES / row), block += CC_LANES) {
        CC_FETCH(record + CC_PREFETCH);
        for (int v = 0; v < TILE_VECS; v++)
            vec_store(block + v * VEC_LANES, tile_vec(codebook, value_type, row, record, code_bytes, v));
    }
}

/* Sums in the order of the channels, like tile_dot, so a token's result does not depend on the other tokens. */
static inline CC_FN void multiply_tokens(int tokens, const float *block, int64_t channels, const float *x, int64_t x_stride,
                                         float *lanes)
{
    for (int first = 0; first < TILE_VECS; first += MULTIPLY_VECS) {
        vec sum[4][MULTIPLY_VECS];
        for (int n = 0; n < tokens; n++)
            for (int v = 0; v < MULTIPLY_VECS; v++)
                sum[n][v] = vec_load(lanes + n * CC_LANES + (first + v) * VEC_LANES);
        for (int64_t i = 0; i < channels; i++) {
            vec weight[MULTIPLY_VECS];
            for (int v = 0; v < MULTIPLY_VECS; v++)
                weight[v] = vec_load(block + i * CC_LANES + (first + v) * VEC_LANES);
            for (int n = 0; n < tokens; n++) {
                const vec factor = vec_set1(x[n * x_stride + i]);
                for (int v = 0; v < MULTIPLY_VECS; v++)
                    sum[n][v] = vec_fmadd(factor, weight[v], sum[n][v]);
            }
        }
        for (int n = 0; n < tokens; n++)
            for (int v = 0; v < MULTIPLY_VECS; v++)
                vec_store(lanes + n * CC_LANES + (first + v) * VEC_LANES, sum[n][v]);
    }
}

static CC_TARGET void block_multiply(const float *block, int64_t channels, const float *x, int64_t x_stride, int64_t tokens,
                                     float *lanes)
{
    for (; tokens >= 4; tokens -= 4, x += 4 * x_stride, lanes += 4 * CC_LANES)
        multiply_tokens(4, block, channels, x, x_stride, lanes);
    switch (tokens) {
    case 1:
        multiply_tokens(1, block, channels, x, x_stride, lanes);
        break;
    case 2:
        multiply_tokens(2, block, channels, x, x_stride, lanes);
        break;
    case 3:
        multiply_tokens(3, block, channels, x, x_stride, lanes);
        break;
    default:
        break;
    }
}

#define DOT(type, row_log2, bytes, tokens)                                                                                   \
    static CC_TARGET void dot##tokens##_##type##_##row_log2##_##bytes(const void *codes, const void *codebook,               \
                                                                      const float *const *x, int64_t in_features,            \
                                                                      float *lanes)                                          \
    {                                                                                                                        \
        tile_dot(type, 1 << row_log2, bytes, tokens, codes, codebook, x, in_features, lanes);                                \
    }
#define DECODE(type, row_log2, bytes)                                                                                        \
    static CC_TARGET void decode_##type##_##row_log2##_##bytes(const void *codes, const void *codebook, int64_t channels,    \
                                                               float *block)                                                 \
    {                                                                                                                        \
        tile_decode(type, 1 << row_log2, bytes, codes, codebook, channels, block);                                           \
    }
#if FUSE_FOUR_TOKENS
#define KERNELS(type, row_log2, bytes)                                                                                       \
    DOT(type, row_log2, bytes, 1) DOT(type, row_log2, bytes, 4) DECODE(type, row_log2, bytes)
#define ENTRY(type, row_log2, bytes)                                                                                         \
    {                                                                                                                        \
        dot1_##type##_##row_log2##_##bytes, dot4_##type##_##row_log2##_##bytes, decode_##type##_##row_log2##_##bytes,        \
            block_multiply                                                                                                   \
    }
#else
#define KERNELS(type, row_log2, bytes) DOT(type, row_log2, bytes, 1) DECODE(type, row_log2, bytes)
#define ENTRY(type, row_log2, bytes)                                                                                         \
    {                                                                                                                        \
        dot1_##type##_##row_log2##_##bytes, NULL, decode_##type##_##row_log2##_##bytes, block_multiply                       \
    }
#endif
#define KERNELS_OF_ROW(row_log2)                                                                                             \
    KERNELS(CC_FLOAT32, row_log2, 1)                                                                                         \
    KERNELS(CC_FLOAT32, row_log2, 2)                                                                                         \
    KERNELS(CC_FLOAT16, row_log2, 1)                                                                                         \
    KERNELS(CC_FLOAT16, row_log2, 2)                                                                                         \
    KERNELS(CC_BFLOAT16, row_log2, 1)                                                                                        \
    KERNELS(CC_BFLOAT16, row_log2, 2)
KERNELS_OF_ROW(0)
KERNELS_OF_ROW(1)
KERNELS_OF_ROW(2)
KERNELS_OF_ROW(3)
KERNELS_OF_ROW(4)
KERNELS_OF_ROW(5)
KERNELS_OF_ROW(6)

#define ENTRIES_OF_ROW(row_log2)                                                                                             \
    {                                                                                                                        \
        {ENTRY(CC_FLOAT32, row_log2, 1), ENTRY(CC_FLOAT32, row_log2, 2)},                                                    \
            {ENTRY(CC_FLOAT16, row_log2, 1), ENTRY(CC_FLOAT16, row_log2, 2)},                                                \
            {ENTRY(CC_BFLOAT16, row_log2, 1), ENTRY(CC_BFLOAT16, row_log2, 2)},                                              \
    }

static cc_kernels table_kernels(int value_type, int row_log2, int code_bytes)
{
    static const cc_kernels table[][CC_VALUE_TYPES][2] = {
        ENTRIES_OF_ROW(0), ENTRIES_OF_ROW(1), ENTRIES_OF_ROW(2), ENTRIES_OF_ROW(3),
        ENTRIES_OF_ROW(4), ENTRIES_OF_ROW(5), ENTRIES_OF_ROW(6),
    };
    return table[row_log2][value_type][code_bytes - 1];
}
