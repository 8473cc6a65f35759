/* Tile kernels for AVX-512 (F, BW, DQ, VL). */
#include "clus_linear/clus_linear.h"

#if CC_X86

#include <immintrin.h>

#define CC_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))
#define CC_FN __attribute__((always_inline)) CC_TARGET
#define VEC_LANES 16
#define MULTIPLY_VECS 4
#define FUSE_FOUR_TOKENS 1

typedef __m512 vec;
#define vec_zero _mm512_setzero_ps
#define vec_set1 _mm512_set1_ps
#define vec_load _mm512_loadu_ps
#define vec_store _mm512_storeu_ps
#define vec_fmadd _mm512_fmadd_ps

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

static inline CC_FN __m512i codes16(const void *record, int code_bytes, int first)
{
    return code_bytes == 1 ? _mm512_cvtepu8_epi32(_mm_loadu_si128((const void *)((const uint8_t *)record + first)))
                           : _mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)((const uint16_t *)record + first)));
}

static inline CC_FN __m128i row_of_4(const uint16_t *base, const void *record, int code_bytes, int group)
{
    return _mm_loadl_epi64((const void *)(base + (size_t)code_at(record, code_bytes, group) * 4));
}

/* Masked broadcasts from memory, unlike inserts, do not use the shuffle unit, which the conversion keeps busy. */
static inline CC_FN __m256i four_of_4(const uint16_t *base, const void *record, int code_bytes, int first)
{
    __m256i rows = _mm256_castsi128_si256(row_of_4(base, record, code_bytes, first));
    rows = _mm256_mask_broadcastq_epi64(rows, 2, row_of_4(base, record, code_bytes, first + 1));
    rows = _mm256_mask_broadcastq_epi64(rows, 4, row_of_4(base, record, code_bytes, first + 2));
    return _mm256_mask_broadcastq_epi64(rows, 8, row_of_4(base, record, code_bytes, first + 3));
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

/* 16 elements of 2 bytes each. */
static inline CC_FN __m256i halves(const void *codebook, int row, const void *record, int code_bytes, int v)
{
    const uint16_t *base = codebook;
    if (row >= 16) {
        const int lane = v * VEC_LANES;
        return _mm256_loadu_si256((const void *)(base + (size_t)code_at(record, code_bytes, lane / row) * row + lane % row));
    }
    const int first = v * (VEC_LANES / row);
    if (row == 8) {
        const __m128i low = _mm_loadu_si128((const void *)(base + (size_t)code_at(record, code_bytes, first) * 8));
        return _mm256_inserti128_si256(_mm256_castsi128_si256(low),
                                       _mm_loadu_si128((const void *)(base + (size_t)code_at(record, code_bytes, first + 1) * 8)),
                                       1);
    }
    if (row == 4)
        return four_of_4(base, record, code_bytes, first);
    if (row == 2)
        return _mm256_i32gather_epi32((const void *)base, codes8(record, code_bytes, first), 4);
    return _mm256_inserti128_si256(_mm256_castsi128_si256(eight_of_1(base, record, code_bytes, first)),
                                   eight_of_1(base, record, code_bytes, first + 8), 1);
}

static inline CC_FN __m512 singles(const void *codebook, int row, const void *record, int code_bytes, int v)
{
    const float *base = codebook;
    if (row >= 16) {
        const int lane = v * VEC_LANES;
        return _mm512_loadu_ps(base + (size_t)code_at(record, code_bytes, lane / row) * row + lane % row);
    }
    const int first = v * (VEC_LANES / row);
    if (row == 8)
        return _mm512_insertf32x8(_mm512_castps256_ps512(_mm256_loadu_ps(base + (size_t)code_at(record, code_bytes, first) * 8)),
                                  _mm256_loadu_ps(base + (size_t)code_at(record, code_bytes, first + 1) * 8), 1);
    if (row == 4) {
        __m512 wide = _mm512_castps128_ps512(_mm_loadu_ps(base + (size_t)code_at(record, code_bytes, first) * 4));
        wide = _mm512_insertf32x4(wide, _mm_loadu_ps(base + (size_t)code_at(record, code_bytes, first + 1) * 4), 1);
        wide = _mm512_insertf32x4(wide, _mm_loadu_ps(base + (size_t)code_at(record, code_bytes, first + 2) * 4), 2);
        return _mm512_insertf32x4(wide, _mm_loadu_ps(base + (size_t)code_at(record, code_bytes, first + 3) * 4), 3);
    }
    if (row == 2)
        return _mm512_castsi512_ps(_mm512_i32gather_epi64(codes8(record, code_bytes, first), base, 8));
    return _mm512_i32gather_ps(codes16(record, code_bytes, first), base, 4);
}

static inline CC_FN __m512 tile_vec(const void *codebook, int value_type, int row, const void *record, int code_bytes, int v)
{
    if (value_type == CC_FLOAT32)
        return singles(codebook, row, record, code_bytes, v);
    const __m256i bits = halves(codebook, row, record, code_bytes, v);
    if (value_type == CC_FLOAT16)
        return _mm512_cvtph_ps(bits);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

#include "clus_linear/tile_kernels.h"

/* At most 256 rows of one 16-bit element: registers hold the whole codebook, as two planes of bytes. */
#define VBMI_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx2,fma,f16c")))
#define VBMI_FN __attribute__((always_inline)) VBMI_TARGET

typedef struct {
    __m512i low[4], high[4];
} byte_planes;

static inline VBMI_FN byte_planes split_bytes(const uint16_t *codebook)
{
    byte_planes planes;
    for (int k = 0; k < 4; k++) {
        const __m512i first = _mm512_loadu_si512(codebook + 64 * k), second = _mm512_loadu_si512(codebook + 64 * k + 32);
        planes.low[k] = _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi16_epi8(first)), _mm512_cvtepi16_epi8(second), 1);
        planes.high[k] = _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi16_epi8(_mm512_srli_epi16(first, 8))),
                                            _mm512_cvtepi16_epi8(_mm512_srli_epi16(second, 8)), 1);
    }
    return planes;
}

static inline VBMI_FN __m512i look_up(const __m512i table[4], __m512i codes, __mmask64 upper)
{
    return _mm512_mask_mov_epi8(_mm512_permutex2var_epi8(table[0], codes, table[1]), upper,
                                _mm512_permutex2var_epi8(table[2], codes, table[3]));
}

static inline VBMI_FN void look_up_64(const byte_planes *planes, const uint8_t *record, int value_type, __m512 values[4])
{
    /* The unpack instructions below work within 128-bit parts; this order of the codes makes their results consecutive. */
    const __m512i codes = _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7), _mm512_loadu_si512(record));
    const __mmask64 upper = _mm512_movepi8_mask(codes);
    const __m512i low = look_up(planes->low, codes, upper), high = look_up(planes->high, codes, upper);
    const __m512i halves[2] = {_mm512_unpacklo_epi8(low, high), _mm512_unpackhi_epi8(low, high)};
    for (int k = 0; k < 4; k++) {
        const __m256i bits = k % 2 ? _mm512_extracti64x4_epi64(halves[k / 2], 1) : _mm512_castsi512_si256(halves[k / 2]);
        values[k] = value_type == CC_FLOAT16 ? _mm512_cvtph_ps(bits)
                                             : _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
    }
}

static inline VBMI_FN void register_dot(int value_type, const void *codes, const void *codebook, const float *const *x,
                                        int64_t in_features, float *lanes)
{
    const byte_planes planes = split_bytes(codebook);
    __m512 sum[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
    for (int64_t i = 0; i < in_features; i++) {
        __m512 values[4];
        CC_FETCH((const char *)codes + i * CC_LANES + CC_PREFETCH);
        look_up_64(&planes, (const uint8_t *)codes + i * CC_LANES, value_type, values);
        for (int k = 0; k < 4; k++)
            sum[k] = _mm512_fmadd_ps(_mm512_set1_ps(x[0][i]), values[k], sum[k]);
    }
    for (int k = 0; k < 4; k++)
        _mm512_storeu_ps(lanes + 16 * k, sum[k]);
}

static inline VBMI_FN void register_decode(int value_type, const void *codes, const void *codebook, int64_t channels, float *block)
{
    const byte_planes planes = split_bytes(codebook);
    for (int64_t i = 0; i < channels; i++) {
        __m512 values[4];
        look_up_64(&planes, (const uint8_t *)codes + i * CC_LANES, value_type, values);
        for (int k = 0; k < 4; k++)
            _mm512_storeu_ps(block + i * CC_LANES + 16 * k, values[k]);
    }
}

static VBMI_TARGET void register_dot_float16(const void *codes, const void *codebook, const float *const *x, int64_t in_features,
                                             float *lanes)
{
    register_dot(CC_FLOAT16, codes, codebook, x, in_features, lanes);
}

static VBMI_TARGET void register_dot_bfloat16(const void *codes, const void *codebook, const float *const *x, int64_t in_features,
                                              float *lanes)
{
    register_dot(CC_BFLOAT16, codes, codebook, x, in_features, lanes);
}

static VBMI_TARGET void register_decode_float16(const void *codes, const void *codebook, int64_t channels, float *block)
{
    register_decode(CC_FLOAT16, codes, codebook, channels, block);
}

static VBMI_TARGET void register_decode_bfloat16(const void *codes, const void *codebook, int64_t channels, float *block)
{
    register_decode(CC_BFLOAT16, codes, codebook, channels, block);
}

cc_kernels cc_clus_avx512(int value_type, int row_log2, int code_bytes)
{
    if (row_log2 == 0 && code_bytes == 1 && value_type != CC_FLOAT32 && __builtin_cpu_supports("avx512vbmi")) {
        const cc_kernels float16 = {register_dot_float16, NULL, register_decode_float16, block_multiply};
        const cc_kernels bfloat16 = {register_dot_bfloat16, NULL, register_decode_bfloat16, block_multiply};
        return value_type == CC_FLOAT16 ? float16 : bfloat16;
    }
    return table_kernels(value_type, row_log2, code_bytes);
}

#endif
