/* Kernels for AVX2. See matrix.h. */
#include "engine/kernels.h"

#if CC_X86

#include <immintrin.h>
#include <math.h>
#include <string.h>

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")

#define FN
#define INLINE static inline __attribute__((always_inline))
#define AHEAD 4096

/* How to unpack eight codes of 1 to 16 bits, which lie in `bits` bytes, to 32 bits each. */
typedef struct {
    __m256i spread, shift, mask;
} unpacking;

INLINE unpacking how_to_unpack(int bits)
{
    uint8_t spread[32];
    uint32_t shift[8];
    for (int i = 0; i < 8; i++) {
        for (int byte = 0; byte < 4; byte++) {
            const int at = i * bits / 8 + byte;
            spread[4 * i + byte] = (uint8_t)(at < 16 ? at : 0x80);
        }
        shift[i] = (uint32_t)(i * bits % 8);
    }
    const unpacking how = {_mm256_loadu_si256((const void *)spread), _mm256_loadu_si256((const void *)shift),
                           _mm256_set1_epi32((1 << bits) - 1)};
    return how;
}

/* The codes of a record. Nothing is read at or beyond `end`. */
INLINE void unpack(unpacking how, const uint8_t *record, const uint8_t *end, int64_t codes, int bits, uint32_t *unpacked)
{
    for (int64_t first = 0; first < codes; first += 8, record += bits) {
        __m128i stream;
        if (record + 16 <= end)
            stream = _mm_loadu_si128((const void *)record);
        else {
            uint8_t rest[16] = {0};
            memcpy(rest, record, (size_t)(end - record));
            stream = _mm_loadu_si128((const void *)rest);
        }
        const __m256i spread = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(stream), how.spread);
        _mm256_storeu_si256((void *)(unpacked + first), _mm256_and_si256(_mm256_srlv_epi32(spread, how.shift), how.mask));
    }
}

INLINE int row_of_4(const uint8_t *entries, uint32_t code)
{
    int row;
    memcpy(&row, entries + 4 * (size_t)code, sizeof row);
    return row;
}

static void decode(const cc_matrix *matrix, const uint8_t *record, int64_t quads, int64_t groups, uint8_t *decoded)
{
    const int64_t bytes = cc_record_bytes(matrix, groups), pitch = matrix->pitch;
    const uint8_t *end = cc_codes_end(matrix), *entries = matrix->entries;
    const unpacking how = how_to_unpack(matrix->bits);
    const __m128i order = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    for (int64_t quad = 0; quad < quads; quad++, record += bytes, decoded += pitch * CC_VECTOR) {
        uint32_t unpacked[CC_GROUPS * CC_QUAD];
        _mm_prefetch((const char *)record + AHEAD, _MM_HINT_T0);
        unpack(how, record, end, groups * CC_QUAD, matrix->bits, unpacked);
        __m128i *to = (__m128i *)decoded;
        for (const uint32_t *code = unpacked; code < unpacked + groups * CC_QUAD; code += CC_QUAD) {
            if (pitch == 4) {
                const __m128i rows = _mm_setr_epi32(row_of_4(entries, code[0]), row_of_4(entries, code[1]),
                                                    row_of_4(entries, code[2]), row_of_4(entries, code[3]));
                _mm_store_si128(to++, _mm_shuffle_epi8(rows, order));
            } else if (pitch == 8) {
                __m128i row[4];
                for (int c = 0; c < 4; c++)
                    row[c] = _mm_loadl_epi64((const void *)(entries + 8 * (size_t)code[c]));
                const __m128i first = _mm_unpacklo_epi8(row[0], row[1]), second = _mm_unpacklo_epi8(row[2], row[3]);
                _mm_store_si128(to++, _mm_unpacklo_epi16(first, second));
                _mm_store_si128(to++, _mm_unpackhi_epi16(first, second));
            } else
                for (int64_t part = 0; part < pitch; part += 16) {
                    __m128i row[4];
                    for (int c = 0; c < 4; c++)
                        row[c] = _mm_load_si128((const void *)(entries + (size_t)pitch * code[c] + part));
                    const __m128i low01 = _mm_unpacklo_epi8(row[0], row[1]), low23 = _mm_unpacklo_epi8(row[2], row[3]);
                    const __m128i high01 = _mm_unpackhi_epi8(row[0], row[1]), high23 = _mm_unpackhi_epi8(row[2], row[3]);
                    _mm_store_si128(to++, _mm_unpacklo_epi16(low01, low23));
                    _mm_store_si128(to++, _mm_unpackhi_epi16(low01, low23));
                    _mm_store_si128(to++, _mm_unpacklo_epi16(high01, high23));
                    _mm_store_si128(to++, _mm_unpackhi_epi16(high01, high23));
                }
        }
    }
}

/* The 16 outputs of a vector: sums[k] has pairs of partial sums of outputs 4k to 4k + 3. */
INLINE void add_products(__m256i sums[4], const uint8_t *entries, __m256i four)
{
    for (int k = 0; k < 4; k++) {
        const __m256i wide = _mm256_cvtepu8_epi16(_mm_load_si128((const void *)(entries + 16 * k)));
        sums[k] = _mm256_add_epi32(sums[k], _mm256_madd_epi16(wide, four));
    }
}

INLINE void multiply_part(const uint8_t *decoded, int64_t quads, int64_t vectors, const cc_block *x, int64_t stride, float *sums,
                          int tokens)
{
    for (int64_t done = 0; done < quads; done += CC_BLOCK_QUADS, x++) {
        const int64_t here = quads - done < CC_BLOCK_QUADS ? quads - done : CC_BLOCK_QUADS;
        const uint8_t *from = decoded + done * vectors * CC_VECTOR;
        int16_t integers_of[2][CC_BLOCK];
        for (int t = 0; t < tokens; t++)
            for (int i = 0; i < CC_BLOCK; i += 16) {
                const __m256i high = _mm256_cvtepi8_epi16(_mm_loadu_si128((const void *)(x[t * stride].high + i)));
                const __m256i low = _mm256_cvtepi8_epi16(_mm_loadu_si128((const void *)(x[t * stride].low + i)));
                _mm256_storeu_si256((void *)(integers_of[t] + i), _mm256_add_epi16(_mm256_slli_epi16(high, 8), low));
            }
        __m256i products[2][4];
        for (int t = 0; t < tokens; t++)
            for (int k = 0; k < 4; k++)
                products[t][k] = _mm256_setzero_si256();
        for (int64_t quad = 0; quad < here; quad++, from += vectors * CC_VECTOR)
            for (int t = 0; t < tokens; t++) {
                int64_t four;
                memcpy(&four, integers_of[t] + CC_QUAD * quad, sizeof four);
                add_products(products[t], from, _mm256_set1_epi64x(four));
            }
        for (int t = 0; t < tokens; t++) {
            const __m256i offset = _mm256_set1_epi32(x[t * stride].offset);
            const __m256 scale = _mm256_set1_ps(x[t * stride].scale);
            for (int half = 0; half < 2; half++) {
                float *sum = sums + t * vectors * CC_VECTOR_LANES + 8 * half;
                /* hadd gives outputs 0 1 4 5 | 2 3 6 7. */
                const __m256i added = _mm256_hadd_epi32(products[t][2 * half], products[t][2 * half + 1]);
                const __m256i product = _mm256_sub_epi32(_mm256_permute4x64_epi64(added, 0xd8), offset);
                _mm256_storeu_ps(sum, _mm256_add_ps(_mm256_loadu_ps(sum), _mm256_mul_ps(_mm256_cvtepi32_ps(product), scale)));
            }
        }
    }
}

static void multiply(const uint8_t *decoded, int64_t quads, int64_t vectors, const cc_block *x, int64_t stride, int64_t tokens,
                     float *sums)
{
    const int64_t row = vectors * CC_VECTOR_LANES;
    for (int64_t v = 0; v < vectors; v++) {
        int64_t t = 0;
        for (; t + 2 <= tokens; t += 2)
            multiply_part(decoded + v * CC_VECTOR, quads, vectors, x + t * stride, stride, sums + t * row + v * CC_VECTOR_LANES, 2);
        for (; t < tokens; t++)
            multiply_part(decoded + v * CC_VECTOR, quads, vectors, x + t * stride, stride, sums + t * row + v * CC_VECTOR_LANES, 1);
    }
}

static void quantise(const float *x, int64_t channels, cc_block *blocks)
{
    for (int64_t first = 0; first < channels; first += CC_BLOCK, blocks++) {
        float values[CC_BLOCK] = {0};
        const int64_t here = channels - first < CC_BLOCK ? channels - first : CC_BLOCK;
        memcpy(values, x + first, (size_t)here * sizeof *values);
        const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
        __m256 largest = _mm256_setzero_ps(), unordered = _mm256_setzero_ps();
        for (int i = 0; i < CC_BLOCK; i += 8) {
            const __m256 v = _mm256_loadu_ps(values + i);
            largest = _mm256_max_ps(largest, _mm256_and_ps(v, magnitude));
            unordered = _mm256_or_ps(unordered, _mm256_cmp_ps(v, v, _CMP_UNORD_Q));
        }
        float each[8], most = 0;
        _mm256_storeu_ps(each, largest);
        for (int i = 0; i < 8; i++)
            most = each[i] > most ? each[i] : most;
        if (_mm256_movemask_ps(unordered))
            most = INFINITY;
        const int usable = most > CC_ACTIVATION_LEAST && most < INFINITY;
        const __m256 inverse = _mm256_set1_ps(usable ? CC_ACTIVATION_MAX / most : 0);
        blocks->scale = usable ? most / CC_ACTIVATION_MAX : most < INFINITY ? 0 : NAN;
        __m256i total = _mm256_setzero_si256();
        int32_t integer[8], sum[8];
        for (int i = 0; i < CC_BLOCK; i += 8) {
            const __m256i rounded = usable ? _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(values + i), inverse))
                                           : _mm256_setzero_si256();
            total = _mm256_add_epi32(total, rounded);
            _mm256_storeu_si256((void *)integer, rounded);
            for (int k = 0; k < 8; k++) {
                blocks->low[i + k] = (int8_t)(integer[k] & 255);
                blocks->high[i + k] = (int8_t)((integer[k] - blocks->low[i + k]) >> 8);
            }
        }
        _mm256_storeu_si256((void *)sum, total);
        blocks->offset = 0;
        for (int k = 0; k < 8; k++)
            blocks->offset += 128 * sum[k];
    }
}

INLINE lanes half_lanes(const uint16_t *from)
{
    lanes values;
    const __m256 first = _mm256_cvtph_ps(_mm_loadu_si128((const void *)from));
    const __m256 second = _mm256_cvtph_ps(_mm_loadu_si128((const void *)(from + 8)));
    memcpy(&values, &first, sizeof first);
    memcpy((char *)&values + sizeof first, &second, sizeof second);
    return values;
}

INLINE void store_half_lanes(uint16_t *to, lanes values)
{
    __m256 part[2];
    memcpy(part, &values, sizeof part);
    for (int k = 0; k < 2; k++)
        _mm_storeu_si128((void *)(to + 8 * k), _mm256_cvtps_ph(part[k], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

#include "engine/floats.h"

const cc_kernels cc_kernels_avx2 = {decode, multiply, quantise, norm, gate, dense, dense_row, store_values, attend};

#pragma GCC pop_options

#endif
