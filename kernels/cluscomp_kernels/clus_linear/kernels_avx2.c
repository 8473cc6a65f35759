/* Tile kernels for AVX2 with FMA and F16C. */
#include "clus_linear/clus_linear.h"

#if CC_X86

#include <immintrin.h>

#define CC_TARGET __attribute__((target("avx2,fma,f16c")))
#define CC_FN __attribute__((always_inline)) CC_TARGET
#define VEC_LANES 8
#define MULTIPLY_VECS 2
#define FUSE_FOUR_TOKENS 0

typedef __m256 vec;
#define vec_zero _mm256_setzero_ps
#define vec_set1 _mm256_set1_ps
#define vec_load _mm256_loadu_ps
#define vec_store _mm256_storeu_ps
#define vec_fmadd _mm256_fmadd_ps

static inline CC_FN uint32_t code_at(const void *record, int code_bytes, int group);

/* Codes of the groups from `first` on, as 32-bit indices. */
static inline CC_FN __m128i codes4(const void *record, int code_bytes, int first)
{
    return code_bytes == 1 ? _mm_cvtepu8_epi32(_mm_loadu_si32((const uint8_t *)record + first))
                           : _mm_cvtepu16_epi32(_mm_loadl_epi64((const void *)((const uint16_t *)record + first)));
}

static inline CC_FN __m256i codes8(const void *record, int code_bytes, int first)
{
    return code_bytes == 1 ? _mm256_cvtepu8_epi32(_mm_loadl_epi64((const void *)((const uint8_t *)record + first)))
                           : _mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)((const uint16_t *)record + first)));
}

/* Two rows of four elements, eight rows of one. */
static inline CC_FN __m128i pair_of_4(const uint16_t *base, const void *record, int code_bytes, int first)
{
    const __m128i low = _mm_loadl_epi64((const void *)(base + (size_t)code_at(record, code_bytes, first) * 4));
    const void *high = base + (size_t)code_at(record, code_bytes, first + 1) * 4;
    return _mm_castps_si128(_mm_loadh_pi(_mm_castsi128_ps(low), high));
}

/* Inserts are twice as fast as a gather instruction here. */
static inline CC_FN __m128i eight_of_1(const uint16_t *base, const void *record, int code_bytes, int first)
{
    __m128i rows = _mm_cvtsi32_si128(base[code_at(record, code_bytes, first)]);
    rows = _mm_insert_epi16(rows, base[code_at(record, code_bytes, first + 1)], 1);
    rows = _mm_insert_epi16(rows, base[code_at(record, code_bytes, first + 2)], 2);
    rows = _mm_insert_epi16(rows, base[code_at(record, code_bytes, first + 3)], 3);
    rows = _mm_insert_epi16(rows, base[code_at(record, code_bytes, first + 4)], 4);
    rows = _mm_insert_epi16(rows, base[code_at(record, code_bytes, first + 5)], 5);
    rows = _mm_insert_epi16(rows, base[code_at(record, code_bytes, first + 6)], 6);
    return _mm_insert_epi16(rows, base[code_at(record, code_bytes, first + 7)], 7);
}

/* 8 elements of 2 bytes each. */
static inline CC_FN __m128i halves(const void *codebook, int row, const void *record, int code_bytes, int v)
{
    const uint16_t *base = codebook;
    if (row >= 8) {
        const int lane = v * VEC_LANES;
        return _mm_loadu_si128((const void *)(base + (size_t)code_at(record, code_bytes, lane / row) * row + lane % row));
    }
    const int first = v * (VEC_LANES / row);
    if (row == 4)
        return pair_of_4(base, record, code_bytes, first);
    if (row == 2)
        return _mm_i32gather_epi32((const void *)base, codes4(record, code_bytes, first), 4);
    return eight_of_1(base, record, code_bytes, first);
}

static inline CC_FN __m256 singles(const void *codebook, int row, const void *record, int code_bytes, int v)
{
    const float *base = codebook;
    if (row >= 8) {
        const int lane = v * VEC_LANES;
        return _mm256_loadu_ps(base + (size_t)code_at(record, code_bytes, lane / row) * row + lane % row);
    }
    const int first = v * (VEC_LANES / row);
    if (row == 4)
        return _mm256_insertf128_ps(
            _mm256_castps128_ps256(_mm_loadu_ps(base + (size_t)code_at(record, code_bytes, first) * 4)),
            _mm_loadu_ps(base + (size_t)code_at(record, code_bytes, first + 1) * 4), 1);
    if (row == 2)
        return _mm256_castsi256_ps(_mm256_i32gather_epi64((const void *)base, codes4(record, code_bytes, first), 8));
    return _mm256_i32gather_ps(base, codes8(record, code_bytes, first), 4);
}

static inline CC_FN __m256 tile_vec(const void *codebook, int value_type, int row, const void *record, int code_bytes, int v)
{
    if (value_type == CC_FLOAT32)
        return singles(codebook, row, record, code_bytes, v);
    const __m128i bits = halves(codebook, row, record, code_bytes, v);
    if (value_type == CC_FLOAT16)
        return _mm256_cvtph_ps(bits);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

#include "clus_linear/tile_kernels.h"

cc_kernels cc_clus_avx2(int value_type, int row_log2, int code_bytes)
{
    return table_kernels(value_type, row_log2, code_bytes);
}

#endif
