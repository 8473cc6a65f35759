/* Kernels for AVX-512 with VBMI and VNNI, and with AMX. See matrix.h. */
#include "engine/kernels.h"

#if CC_X86

#include <immintrin.h>
#include <math.h>

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni,avx2,fma,f16c,prefer-vector-width=512")

#define FN
#define INLINE static inline __attribute__((always_inline))
/* Bytes of codes to prefetch: the hardware prefetcher stops at every page. Measured in docs/lab-notes.md. */
#define AHEAD 4096

/* `count` bytes of a record, at most 64; those beyond are 0 and not read. */
INLINE __m512i load_bytes(const uint8_t *from, int64_t count)
{
    return _mm512_maskz_loadu_epi8(count >= 64 ? ~UINT64_C(0) : (UINT64_C(1) << count) - 1, from);
}

typedef struct {
    __m512i spread, shift, mask;
} unpacking;

/* How to unpack codes of up to 8 bits: every eight codes lie in `bits` bytes, which go to a word of 8 bytes each. */
INLINE unpacking byte_unpacking(int bits)
{
    /* Bytes i / 8 and i % 8; products with `bits` stay below 256, so those of pairs of bytes do not meet. */
    const __m512i eight = _mm512_setr_epi64(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303, 0x0404040404040404,
                                            0x0505050505050505, 0x0606060606060606, 0x0707070707070707);
    const __m512i place = _mm512_set1_epi64(0x0706050403020100), width = _mm512_set1_epi16((short)bits);
    const unpacking how = {_mm512_add_epi8(_mm512_mullo_epi16(eight, width), place), _mm512_mullo_epi16(place, width),
                           _mm512_set1_epi8((char)((1 << bits) - 1))};
    return how;
}

INLINE __m512i unpack_bytes(unpacking how, __m512i stream)
{
    return _mm512_and_si512(_mm512_multishift_epi64_epi8(how.shift, _mm512_permutexvar_epi8(how.spread, stream)), how.mask);
}

/* How to unpack 16 codes of 9 to 16 bits to 32 bits each. */
INLINE unpacking word_unpacking(int bits)
{
    const __m512i number = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i bit = _mm512_mullo_epi32(number, _mm512_set1_epi32(bits));
    const __m512i byte = _mm512_mullo_epi32(_mm512_srli_epi32(bit, 3), _mm512_set1_epi32(0x01010101));
    const unpacking how = {_mm512_add_epi32(byte, _mm512_set1_epi32(0x03020100)), _mm512_and_si512(bit, _mm512_set1_epi32(7)),
                           _mm512_set1_epi32((1 << bits) - 1)};
    return how;
}

INLINE __m512i unpack_words(unpacking how, __m512i stream)
{
    return _mm512_and_si512(_mm512_srlv_epi32(_mm512_permutexvar_epi8(how.spread, stream), how.shift), how.mask);
}

/* The codebook as bytes of each plane: 64 codes are looked up at once. */
INLINE void decode_in_registers(const cc_matrix *matrix, const uint8_t *record, int64_t quads, int64_t groups, uint8_t *decoded,
                                int table)
{
    const int64_t bytes = cc_record_bytes(matrix, groups), planes = matrix->planes;
    const __mmask64 stored = bytes >= 64 ? ~UINT64_C(0) : (UINT64_C(1) << bytes) - 1;
    const unpacking how = byte_unpacking(matrix->bits);
    const int whole = matrix->bits == 8;
    for (int64_t quad = 0; quad < quads; quad++, record += bytes) {
        __m512i codes = _mm512_maskz_loadu_epi8(stored, record);
        _mm_prefetch((const char *)record + AHEAD, _MM_HINT_T0);
        if (!whole)
            codes = unpack_bytes(how, codes);
        const __mmask64 upper = _mm512_movepi8_mask(codes);
        const uint8_t *entries = matrix->entries;
        for (int64_t plane = 0; plane < planes; plane++, entries += CC_REGISTER_CLUSTERS, decoded += CC_VECTOR) {
            __m512i found;
            if (table == 64)
                found = _mm512_permutexvar_epi8(codes, _mm512_loadu_si512(entries));
            else
                found = _mm512_permutex2var_epi8(_mm512_loadu_si512(entries), codes, _mm512_loadu_si512(entries + 64));
            if (table == 256)
                found = _mm512_mask_mov_epi8(found, upper,
                                             _mm512_permutex2var_epi8(_mm512_loadu_si512(entries + 128), codes,
                                                                      _mm512_loadu_si512(entries + 192)));
            _mm512_store_si512(decoded, found);
        }
    }
}

/* From [code of channel][4 entries] to [entry][channel], in each part of 16 bytes. */
INLINE __m512i transposed_4x4(__m512i rows)
{
    const __m128i order = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return _mm512_shuffle_epi8(rows, _mm512_broadcast_i32x4(order));
}

/* The orders that bring [part][4 channels][8 or 16 entries] to [part][entry][channel]. */
#define FOUR(first, step) first, (first) + (step), (first) + 2 * (step), (first) + 3 * (step)
static const uint8_t TRANSPOSED_8[64] = {
    FOUR(0, 8),  FOUR(1, 8),  FOUR(2, 8),  FOUR(3, 8),  FOUR(4, 8),  FOUR(5, 8),  FOUR(6, 8),  FOUR(7, 8),
    FOUR(32, 8), FOUR(33, 8), FOUR(34, 8), FOUR(35, 8), FOUR(36, 8), FOUR(37, 8), FOUR(38, 8), FOUR(39, 8),
};
static const uint8_t TRANSPOSED_16[64] = {
    FOUR(0, 16), FOUR(1, 16), FOUR(2, 16),  FOUR(3, 16),  FOUR(4, 16),  FOUR(5, 16),  FOUR(6, 16),  FOUR(7, 16),
    FOUR(8, 16), FOUR(9, 16), FOUR(10, 16), FOUR(11, 16), FOUR(12, 16), FOUR(13, 16), FOUR(14, 16), FOUR(15, 16),
};
#undef FOUR

INLINE void decode_rows_of_4(const cc_matrix *matrix, const uint8_t *record, int64_t quads, int64_t groups, uint8_t *decoded)
{
    const int64_t bytes = cc_record_bytes(matrix, groups);
    const unpacking how = word_unpacking(matrix->bits);
    const int64_t step = 2 * matrix->bits;
    for (int64_t quad = 0; quad < quads; quad++, record += bytes, decoded += 4 * CC_VECTOR) {
        _mm_prefetch((const char *)record + AHEAD, _MM_HINT_T0);
        _mm_prefetch((const char *)record + AHEAD + 64, _MM_HINT_T0);
        for (int part = 0; 4 * part < groups; part++) {
            const int64_t left = bytes - part * step;
            const __m512i codes = unpack_words(how, load_bytes(record + part * step, left < step ? left : step));
            const __m512i rows = _mm512_i32gather_epi32(codes, matrix->entries, 4);
            _mm512_store_si512(decoded + part * CC_VECTOR, transposed_4x4(rows));
        }
    }
}

INLINE void decode_rows_of_8(const cc_matrix *matrix, const uint8_t *record, int64_t quads, int64_t groups, uint8_t *decoded)
{
    const int64_t bytes = cc_record_bytes(matrix, groups);
    const unpacking how = word_unpacking(matrix->bits);
    const int64_t step = 2 * matrix->bits;
    const __m512i order = _mm512_loadu_si512(TRANSPOSED_8);
    for (int64_t quad = 0; quad < quads; quad++, record += bytes, decoded += 8 * CC_VECTOR) {
        _mm_prefetch((const char *)record + AHEAD, _MM_HINT_T0);
        _mm_prefetch((const char *)record + AHEAD + 64, _MM_HINT_T0);
        for (int part = 0; 4 * part < groups; part++) {
            const int64_t left = bytes - part * step;
            const __m512i codes = unpack_words(how, load_bytes(record + part * step, left < step ? left : step));
            const __m512i first = _mm512_i32gather_epi64(_mm512_castsi512_si256(codes), matrix->entries, 8);
            const __m512i second = _mm512_i32gather_epi64(_mm512_extracti64x4_epi64(codes, 1), matrix->entries, 8);
            _mm512_store_si512(decoded + 2 * part * CC_VECTOR, _mm512_permutexvar_epi8(order, first));
            _mm512_store_si512(decoded + (2 * part + 1) * CC_VECTOR, _mm512_permutexvar_epi8(order, second));
        }
    }
}

/* Rows of 16 bytes or a multiple: 16 entries of the four channels are four loads. */
INLINE void decode_long_rows(const cc_matrix *matrix, const uint8_t *record, int64_t quads, int64_t groups, uint8_t *decoded)
{
    const int64_t bytes = cc_record_bytes(matrix, groups), pitch = matrix->pitch;
    const unpacking how = word_unpacking(matrix->bits);
    const int64_t step = 2 * matrix->bits;
    const __m512i order = _mm512_loadu_si512(TRANSPOSED_16);
    for (int64_t quad = 0; quad < quads; quad++, record += bytes, decoded += pitch * CC_VECTOR) {
        uint32_t codes[CC_GROUPS * CC_QUAD];
        _mm_prefetch((const char *)record + AHEAD, _MM_HINT_T0);
        _mm_prefetch((const char *)record + AHEAD + 64, _MM_HINT_T0);
        for (int part = 0; 4 * part < groups; part++) {
            const int64_t left = bytes - part * step;
            _mm512_storeu_si512(codes + 16 * part, unpack_words(how, load_bytes(record + part * step, left < step ? left : step)));
        }
        uint8_t *to = decoded;
        for (int64_t group = 0; group < groups; group++)
            for (int64_t first = 0; first < pitch; first += 16, to += CC_VECTOR) {
                const uint8_t *base = matrix->entries + first;
                const uint32_t *code = codes + 4 * group;
                __m512i rows = _mm512_castsi128_si512(_mm_load_si128((const void *)(base + code[0] * (size_t)pitch)));
                for (int channel = 1; channel < 4; channel++)
                    rows = _mm512_mask_broadcast_i32x4(rows, (__mmask16)(15 << 4 * channel),
                                                       _mm_load_si128((const void *)(base + code[channel] * (size_t)pitch)));
                _mm512_store_si512(to, _mm512_permutexvar_epi8(order, rows));
            }
    }
}

static void decode(const cc_matrix *matrix, const uint8_t *record, int64_t quads, int64_t groups, uint8_t *decoded)
{
    if (matrix->in_registers && matrix->bits <= 6)
        decode_in_registers(matrix, record, quads, groups, decoded, 64);
    else if (matrix->in_registers && matrix->bits == 7)
        decode_in_registers(matrix, record, quads, groups, decoded, 128);
    else if (matrix->in_registers)
        decode_in_registers(matrix, record, quads, groups, decoded, 256);
    else if (matrix->pitch == 4)
        decode_rows_of_4(matrix, record, quads, groups, decoded);
    else if (matrix->pitch == 8)
        decode_rows_of_8(matrix, record, quads, groups, decoded);
    else
        decode_long_rows(matrix, record, quads, groups, decoded);
}

/* The four channels of a quad, for every lane. */
INLINE __m512i quad_of(const int8_t *integers, int64_t quad)
{
    int32_t four;
    __builtin_memcpy(&four, integers + CC_QUAD * quad, sizeof four);
    return _mm512_set1_epi32(four);
}

/* The products of `some` vectors of a quad, added to those of each token. */
INLINE void add_quad(const uint8_t *from, const cc_block *x, int64_t stride, int64_t quad, int some, int tokens,
                     __m512i high[4][4], __m512i low[4][4])
{
    __m512i entries[4];
    for (int v = 0; v < some; v++)
        entries[v] = _mm512_load_si512(from + v * CC_VECTOR);
    for (int t = 0; t < tokens; t++) {
        const __m512i xh = quad_of(x[t * stride].high, quad), xl = quad_of(x[t * stride].low, quad);
        for (int v = 0; v < some; v++) {
            high[t][v] = _mm512_dpbusd_epi32(high[t][v], entries[v], xh);
            low[t][v] = _mm512_dpbusd_epi32(low[t][v], entries[v], xl);
        }
    }
}

/* `chains` sums for each product: an instruction waits for the one before it in its sum, and one sum would be waiting mostly. */
INLINE void multiply_part(const uint8_t *decoded, int64_t quads, int64_t vectors, const cc_block *x, int64_t stride, float *sums,
                          int some, int tokens, int chains)
{
    const int64_t row = vectors * CC_VECTOR;
    for (int64_t done = 0; done < quads; done += CC_BLOCK_QUADS, x++) {
        const int64_t here = quads - done < CC_BLOCK_QUADS ? quads - done : CC_BLOCK_QUADS;
        const uint8_t *from = decoded + done * row;
        __m512i high[4][4][4], low[4][4][4];
        for (int c = 0; c < chains; c++)
            for (int t = 0; t < tokens; t++)
                for (int v = 0; v < some; v++)
                    high[c][t][v] = low[c][t][v] = _mm512_setzero_si512();
        int64_t quad = 0;
        for (; quad + chains <= here; quad += chains)
            for (int c = 0; c < chains; c++)
                add_quad(from + (quad + c) * row, x, stride, quad + c, some, tokens, high[c], low[c]);
        for (; quad < here; quad++)
            add_quad(from + quad * row, x, stride, quad, some, tokens, high[0], low[0]);
        for (int t = 0; t < tokens; t++) {
            const __m512i offset = _mm512_set1_epi32(x[t * stride].offset);
            const __m512 scale = _mm512_set1_ps(x[t * stride].scale);
            for (int v = 0; v < some; v++) {
                float *sum = sums + t * vectors * CC_VECTOR_LANES + v * CC_VECTOR_LANES;
                __m512i all_high = high[0][t][v], all_low = low[0][t][v];
                for (int c = 1; c < chains; c++) {
                    all_high = _mm512_add_epi32(all_high, high[c][t][v]);
                    all_low = _mm512_add_epi32(all_low, low[c][t][v]);
                }
                const __m512i product = _mm512_sub_epi32(_mm512_add_epi32(_mm512_slli_epi32(all_high, 8), all_low), offset);
                _mm512_storeu_ps(sum, _mm512_add_ps(_mm512_loadu_ps(sum), _mm512_mul_ps(_mm512_cvtepi32_ps(product), scale)));
            }
        }
    }
}

#define PART(some, tokens, chains)                                                                                             \
    multiply_part(decoded + v * CC_VECTOR, quads, vectors, x, stride, sums + v * CC_VECTOR_LANES, some, tokens, chains)

static void multiply_one(const uint8_t *decoded, int64_t quads, int64_t vectors, const cc_block *x, float *sums)
{
    const int64_t stride = 0;
    int64_t v = 0;
    for (; v + 4 <= vectors; v += 4)
        PART(4, 1, 1);
    if (vectors - v == 3)
        PART(3, 1, 2);
    else if (vectors - v == 2)
        PART(2, 1, 2);
    else if (vectors - v == 1)
        PART(1, 1, 4);
}

static void multiply_two(const uint8_t *decoded, int64_t quads, int64_t vectors, const cc_block *x, int64_t stride, float *sums)
{
    int64_t v = 0;
    for (; v + 4 <= vectors; v += 4)
        PART(4, 2, 1);
    for (; v + 2 <= vectors; v += 2)
        PART(2, 2, 1);
    if (v < vectors)
        PART(1, 2, 2);
}

static void multiply_four(const uint8_t *decoded, int64_t quads, int64_t vectors, const cc_block *x, int64_t stride, float *sums)
{
    int64_t v = 0;
    for (; v + 2 <= vectors; v += 2)
        PART(2, 4, 1);
    if (v < vectors)
        PART(1, 4, 1);
}

#undef PART

static void multiply(const uint8_t *decoded, int64_t quads, int64_t vectors, const cc_block *x, int64_t stride,
                            int64_t tokens, float *sums)
{
    const int64_t row = vectors * CC_VECTOR_LANES;
    int64_t t = 0;
    for (; t + 4 <= tokens; t += 4)
        multiply_four(decoded, quads, vectors, x + t * stride, stride, sums + t * row);
    for (; t + 2 <= tokens; t += 2)
        multiply_two(decoded, quads, vectors, x + t * stride, stride, sums + t * row);
    for (; t < tokens; t++)
        multiply_one(decoded, quads, vectors, x + t * stride, sums + t * row);
}

static void quantise(const float *x, int64_t channels, cc_block *blocks)
{
    for (int64_t first = 0; first < channels; first += CC_BLOCK, blocks++) {
        __m512 values[4];
        __m512 largest = _mm512_setzero_ps();
        for (int k = 0; k < 4; k++) {
            const int64_t left = channels - first - 16 * k;
            const __mmask16 present = left >= 16 ? 0xffff : left > 0 ? (__mmask16)((1 << left) - 1) : 0;
            values[k] = _mm512_maskz_loadu_ps(present, x + first + 16 * k);
            /* The second operand is returned if one is NaN. */
            largest = _mm512_max_ps(largest, _mm512_abs_ps(values[k]));
            if (_mm512_cmp_ps_mask(values[k], values[k], _CMP_UNORD_Q))
                largest = _mm512_set1_ps(INFINITY);
        }
        const float most = _mm512_reduce_max_ps(largest);
        const int usable = most > CC_ACTIVATION_LEAST && most < INFINITY;
        const float inverse = usable ? CC_ACTIVATION_MAX / most : 0;
        blocks->scale = usable ? most / CC_ACTIVATION_MAX : most < INFINITY ? 0 : NAN;
        __m512i total = _mm512_setzero_si512();
        for (int k = 0; k < 4; k++) {
            const __m512i integer = usable ? _mm512_cvtps_epi32(_mm512_mul_ps(values[k], _mm512_set1_ps(inverse)))
                                           : _mm512_setzero_si512();
            const __m512i low = _mm512_srai_epi32(_mm512_slli_epi32(integer, 24), 24);
            total = _mm512_add_epi32(total, integer);
            _mm_storeu_si128((void *)(blocks->low + 16 * k), _mm512_cvtepi32_epi8(low));
            _mm_storeu_si128((void *)(blocks->high + 16 * k),
                             _mm512_cvtepi32_epi8(_mm512_srai_epi32(_mm512_sub_epi32(integer, low), 8)));
        }
        blocks->offset = 128 * _mm512_reduce_add_epi32(total);
    }
}

INLINE lanes half_lanes(const uint16_t *from)
{
    return (lanes)_mm512_cvtph_ps(_mm256_loadu_si256((const void *)from));
}

INLINE void store_half_lanes(uint16_t *to, lanes values)
{
    _mm256_storeu_si256((void *)to, _mm512_cvtps_ph((__m512)values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

#include "engine/floats.h"

const cc_kernels cc_kernels_avx512 = {decode, multiply, quantise, norm, gate, dense, dense_row, store_values, attend};

/* ---- AMX: blocks of 16 tokens times vectors of 16 outputs, for prompts. ---- */

#pragma GCC push_options
#pragma GCC target("amx-tile,amx-int8")

enum { AMX_TOKENS = 16 };

/* As _tile_loadconfig reads it. */
typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} tile_shapes;

/* sums += the products of a block for 16 tokens and a vector, from its parts [16 tokens][16 outputs]. */
INLINE void add_block(const int32_t *high, const int32_t *low, const cc_block *x, int64_t stride, float *sums, int64_t row)
{
    for (int t = 0; t < AMX_TOKENS; t++) {
        const __m512i part = _mm512_slli_epi32(_mm512_load_si512(high + 16 * t), 8);
        const __m512i product = _mm512_sub_epi32(_mm512_add_epi32(part, _mm512_load_si512(low + 16 * t)),
                                                 _mm512_set1_epi32(x[t * stride].offset));
        const __m512 scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(product), _mm512_set1_ps(x[t * stride].scale));
        _mm512_storeu_ps(sums + t * row, _mm512_add_ps(_mm512_loadu_ps(sums + t * row), scaled));
    }
}

static void multiply_amx(const uint8_t *decoded, int64_t quads, int64_t vectors, const cc_block *x, int64_t stride,
                         int64_t tokens, float *sums)
{
    const int64_t row = vectors * CC_VECTOR_LANES, blocks = quads / CC_BLOCK_QUADS, whole = tokens / AMX_TOKENS * AMX_TOKENS;
    _Alignas(64) int32_t products[4][AMX_TOKENS * CC_VECTOR_LANES];
    if (whole && blocks) {
        tile_shapes shapes = {.palette = 1};
        for (int tile = 0; tile < 8; tile++) {
            shapes.rows[tile] = 16;
            shapes.row_bytes[tile] = 64;
        }
        /* GCC 12 does not know that the next instruction reads this. */
        __asm__ volatile("" : "+m"(shapes));
        _tile_loadconfig(&shapes);
        for (int64_t t = 0; t < whole; t += AMX_TOKENS)
            for (int64_t b = 0; b < blocks; b++) {
                const cc_block *block = x + t * stride + b;
                const uint8_t *from = decoded + b * CC_BLOCK_QUADS * vectors * CC_VECTOR;
                float *sum = sums + t * row;
                _tile_loadd(0, block->high, stride * (int64_t)sizeof *x);
                _tile_loadd(1, block->low, stride * (int64_t)sizeof *x);
                int64_t v = 0;
                for (; v + 2 <= vectors; v += 2) {
                    _tile_zero(2);
                    _tile_zero(3);
                    _tile_zero(4);
                    _tile_zero(5);
                    _tile_loadd(6, from + v * CC_VECTOR, vectors * CC_VECTOR);
                    _tile_loadd(7, from + (v + 1) * CC_VECTOR, vectors * CC_VECTOR);
                    _tile_dpbsud(2, 0, 6);
                    _tile_dpbsud(3, 1, 6);
                    _tile_dpbsud(4, 0, 7);
                    _tile_dpbsud(5, 1, 7);
                    _tile_stored(2, products[0], 64);
                    _tile_stored(3, products[1], 64);
                    _tile_stored(4, products[2], 64);
                    _tile_stored(5, products[3], 64);
                    add_block(products[0], products[1], block, stride, sum + v * CC_VECTOR_LANES, row);
                    add_block(products[2], products[3], block, stride, sum + (v + 1) * CC_VECTOR_LANES, row);
                }
                if (v < vectors) {
                    _tile_zero(2);
                    _tile_zero(3);
                    _tile_loadd(6, from + v * CC_VECTOR, vectors * CC_VECTOR);
                    _tile_dpbsud(2, 0, 6);
                    _tile_dpbsud(3, 1, 6);
                    _tile_stored(2, products[0], 64);
                    _tile_stored(3, products[1], 64);
                    add_block(products[0], products[1], block, stride, sum + v * CC_VECTOR_LANES, row);
                }
            }
        _tile_release();
    }
    /* The channels of a last block that is not whole, and the tokens that are left. */
    const int64_t done = blocks * CC_BLOCK_QUADS;
    if (whole && done < quads)
        multiply(decoded + done * vectors * CC_VECTOR, quads - done, vectors, x + blocks, stride, whole, sums);
    if (whole < tokens)
        multiply(decoded, quads, vectors, x + whole * stride, stride, tokens - whole, sums + whole * row);
}

#pragma GCC pop_options

const cc_kernels cc_kernels_amx = {decode, multiply_amx, quantise, norm, gate, dense, dense_row, store_values, attend};

#pragma GCC pop_options

#endif
