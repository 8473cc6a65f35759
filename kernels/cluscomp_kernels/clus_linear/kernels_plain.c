/* Tile kernels in portable C, for processors that have no variant of their own. */
#include "clus_linear/clus_linear.h"

#include <string.h>

#define CC_TARGET
#if defined(__GNUC__)
#define CC_FN __attribute__((always_inline))
#define VEC_LANES 4
typedef float vec __attribute__((vector_size(16)));
#else
#define CC_FN
#define VEC_LANES 1
typedef float vec;
#endif
#define MULTIPLY_VECS 4
#define FUSE_FOUR_TOKENS 0

static inline CC_FN uint32_t code_at(const void *record, int code_bytes, int group);

static inline CC_FN vec vec_load(const float *values)
{
    vec loaded;
    memcpy(&loaded, values, sizeof loaded);
    return loaded;
}

static inline CC_FN void vec_store(float *values, vec stored)
{
    memcpy(values, &stored, sizeof stored);
}

static inline CC_FN vec vec_set1(float value)
{
    float values[VEC_LANES];
    for (int lane = 0; lane < VEC_LANES; lane++)
        values[lane] = value;
    return vec_load(values);
}

static inline CC_FN vec vec_zero(void)
{
    return vec_set1(0.0f);
}

static inline CC_FN vec vec_fmadd(vec a, vec b, vec c)
{
    return a * b + c;
}

static inline CC_FN float float_of_bits(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* Rebias the exponent from half to single precision. Subnormals are normalised by a float subtraction of normal numbers, which
 * is exact even if the processor flushes subnormals to zero. */
static inline CC_FN float float_of_half(uint16_t half)
{
#if defined(__aarch64__)
    __fp16 value;
    memcpy(&value, &half, sizeof value);
    return value;
#else
    const uint32_t magnitude = (uint32_t)(half & 0x7fff) << 13;
    const uint32_t exponent = magnitude & (0x1fu << 23);
    const uint32_t sign = (uint32_t)(half & 0x8000) << 16;
    if (exponent == 0) {
        const float value = float_of_bits(magnitude + (113u << 23)) - float_of_bits(113u << 23);
        return sign ? -value : value;
    }
    return float_of_bits(sign | (magnitude + ((exponent == (0x1fu << 23) ? 224u : 112u) << 23)));
#endif
}

static inline CC_FN float element(const void *codebook, int value_type, size_t index)
{
    if (value_type == CC_FLOAT32)
        return ((const float *)codebook)[index];
    const uint16_t bits = ((const uint16_t *)codebook)[index];
    return value_type == CC_FLOAT16 ? float_of_half(bits) : float_of_bits((uint32_t)bits << 16);
}

static inline CC_FN vec tile_vec(const void *codebook, int value_type, int row, const void *record, int code_bytes, int v)
{
    float values[VEC_LANES];
    for (int lane = 0; lane < VEC_LANES; lane++) {
        const int position = v * VEC_LANES + lane;
        const size_t code = code_at(record, code_bytes, position / row);
        values[lane] = element(codebook, value_type, code * (size_t)row + (size_t)(position % row));
    }
    return vec_load(values);
}

#include "clus_linear/tile_kernels.h"

cc_kernels cc_clus_plain(int value_type, int row_log2, int code_bytes)
{
    return table_kernels(value_type, row_log2, code_bytes);
}
