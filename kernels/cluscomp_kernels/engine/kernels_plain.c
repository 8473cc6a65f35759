/* Kernels in plain C: for machines without AVX2, and what the others are compared with. */
#include "engine/kernels.h"

#include <math.h>
#include <string.h>

#define FN

static inline float half_to_float(uint16_t half)
{
    const uint32_t sign = (uint32_t)(half & 0x8000) << 16, exponent = half >> 10 & 31, fraction = half & 1023;
    uint32_t bits = sign | (exponent + 112) << 23 | fraction << 13;
    float value;
    if (exponent == 0)
        value = (float)fraction * 0x1p-24f;
    else {
        if (exponent == 31)
            bits = sign | 0x7f800000 | fraction << 13;
        memcpy(&value, &bits, sizeof value);
        return value;
    }
    return sign ? -value : value;
}

/* To nearest, ties to even; what is too large becomes infinite. */
static inline uint16_t float_to_half(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    const uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000)
        return (uint16_t)(sign | 0x7e00);
    if (magnitude >= 0x47800000)
        return (uint16_t)(sign | 0x7c00);
    if (magnitude < 0x38800000) /* below 2^-14: a multiple of 2^-24 */
        return (uint16_t)(sign | (uint32_t)lrintf(fabsf(value) * 0x1p24f));
    const uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
    return (uint16_t)(sign | ((rounded - 0x38000000) >> 13));
}

static inline lanes half_lanes(const uint16_t *from)
{
    lanes values;
    for (int i = 0; i < 16; i++)
        values[i] = half_to_float(from[i]);
    return values;
}

static inline void store_half_lanes(uint16_t *to, lanes values)
{
    for (int i = 0; i < 16; i++)
        to[i] = float_to_half(values[i]);
}

#include "engine/floats.h"

static void decode(const cc_matrix *matrix, const uint8_t *record, int64_t quads, int64_t groups, uint8_t *decoded)
{
    const int64_t pitch = matrix->pitch, bits = matrix->bits, codes = groups * CC_QUAD;
    const uint32_t mask = (1u << bits) - 1;
    for (int64_t quad = 0; quad < quads; quad++, record += codes * bits / 8, decoded += pitch * CC_VECTOR) {
        for (int64_t code = 0; code < codes; code++) {
            const int64_t bit = code * bits, end = (bit + bits + 7) / 8;
            uint32_t word = 0;
            for (int64_t byte = end - 1; byte >= bit / 8; byte--)
                word = word << 8 | record[byte];
            const uint8_t *row = matrix->entries + (word >> bit % 8 & mask) * (size_t)pitch;
            uint8_t *to = decoded + code / CC_QUAD * pitch * CC_QUAD + code % CC_QUAD;
            for (int64_t entry = 0; entry < pitch; entry++)
                to[entry * CC_QUAD] = row[entry];
        }
    }
}

static void multiply(const uint8_t *decoded, int64_t quads, int64_t vectors, const cc_block *x, int64_t stride, int64_t tokens,
                     float *sums)
{
    const int64_t lanes_of_all = vectors * CC_VECTOR_LANES;
    for (int64_t done = 0; done < quads; done += CC_BLOCK_QUADS, x++) {
        const int64_t here = quads - done < CC_BLOCK_QUADS ? quads - done : CC_BLOCK_QUADS;
        const uint8_t *from = decoded + done * vectors * CC_VECTOR;
        for (int64_t t = 0; t < tokens; t++) {
            const cc_block *block = x + t * stride;
            for (int64_t first = 0; first < lanes_of_all; first += CC_VECTOR_LANES) {
                int32_t products[CC_VECTOR_LANES] = {0};
                for (int64_t quad = 0; quad < here; quad++) {
                    const uint8_t *entries = from + (quad * lanes_of_all + first) * CC_QUAD;
                    int32_t integer[CC_QUAD];
                    for (int c = 0; c < CC_QUAD; c++)
                        integer[c] = 256 * block->high[CC_QUAD * quad + c] + block->low[CC_QUAD * quad + c];
                    for (int lane = 0; lane < CC_VECTOR_LANES; lane++)
                        for (int c = 0; c < CC_QUAD; c++)
                            products[lane] += entries[CC_QUAD * lane + c] * integer[c];
                }
                float *sum = sums + t * lanes_of_all + first;
                for (int lane = 0; lane < CC_VECTOR_LANES; lane++)
                    sum[lane] += (float)(products[lane] - block->offset) * block->scale;
            }
        }
    }
}

static void quantise(const float *x, int64_t channels, cc_block *blocks)
{
    for (int64_t first = 0; first < channels; first += CC_BLOCK, blocks++) {
        const int64_t here = channels - first < CC_BLOCK ? channels - first : CC_BLOCK;
        float most = 0;
        int32_t total = 0;
        for (int64_t i = 0; i < here; i++)
            most = isnan(x[first + i]) ? INFINITY : fabsf(x[first + i]) > most ? fabsf(x[first + i]) : most;
        const int usable = most > CC_ACTIVATION_LEAST && most < INFINITY;
        const float inverse = usable ? CC_ACTIVATION_MAX / most : 0;
        memset(blocks, 0, sizeof *blocks);
        blocks->scale = usable ? most / CC_ACTIVATION_MAX : most < INFINITY ? 0 : NAN;
        for (int64_t i = 0; i < here && usable; i++) {
            const int32_t integer = (int32_t)lrintf(x[first + i] * inverse);
            blocks->low[i] = (int8_t)(integer & 255);
            blocks->high[i] = (int8_t)((integer - blocks->low[i]) / 256);
            total += integer;
        }
        blocks->offset = 128 * total;
    }
}

const cc_kernels cc_kernels_plain = {decode, multiply, quantise, norm, gate, dense, dense_row, store_values, attend};
