/* Codes: tiling for the linear kernels, and bit-packed streams. */
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "native/threads.h"

#if defined(__GNUC__)
#define CC_INLINE inline __attribute__((always_inline))
#else
#define CC_INLINE inline
#endif

typedef struct {
    const uint16_t *codes;
    int64_t in_features, groups, groups_per_tile;
    int code_bytes;
    void *tiled;
    atomic_int largest;
} tile_job;

static void tile_one(void *arg, int64_t begin, int64_t end, int thread)
{
    tile_job *job = arg;
    int largest = 0;
    (void)thread;
    for (int64_t tile = begin; tile < end; tile++) {
        const int64_t first = tile * job->groups_per_tile, left = job->groups - first;
        const int64_t here = left < job->groups_per_tile ? left : job->groups_per_tile;
        for (int64_t i = 0; i < job->in_features; i++) {
            const uint16_t *from = job->codes + i * job->groups + first;
            const int64_t record = (tile * job->in_features + i) * job->groups_per_tile;
            for (int64_t g = 0; g < here; g++)
                largest = from[g] > largest ? from[g] : largest;
            if (job->code_bytes == 1) {
                uint8_t *to = (uint8_t *)job->tiled + record;
                for (int64_t g = 0; g < here; g++)
                    to[g] = (uint8_t)from[g];
                memset(to + here, 0, (size_t)(job->groups_per_tile - here));
            } else {
                uint16_t *to = (uint16_t *)job->tiled + record;
                memcpy(to, from, (size_t)here * sizeof *to);
                memset(to + here, 0, (size_t)(job->groups_per_tile - here) * sizeof *to);
            }
        }
    }
    int seen = atomic_load_explicit(&job->largest, memory_order_relaxed);
    while (seen < largest && !atomic_compare_exchange_weak_explicit(&job->largest, &seen, largest, memory_order_relaxed,
                                                                    memory_order_relaxed))
        ;
}

/* Lays codes [in_features, groups] out as [tiles][in_features][groups_per_tile] of code_bytes each, missing groups 0.
 * Returns the largest code; if it does not fit code_bytes, the tiled codes mean nothing. */
CC_EXPORT int cc_clus_tile(const uint16_t *codes, int64_t in_features, int64_t groups, int64_t groups_per_tile, int code_bytes,
                           void *tiled, int threads)
{
    tile_job job = {codes, in_features, groups, groups_per_tile, code_bytes, tiled, 0};
    cc_parallel_for((groups + groups_per_tile - 1) / groups_per_tile, 1, threads, tile_one, &job);
    return atomic_load_explicit(&job.largest, memory_order_relaxed);
}

/* Bit i of a stream is bit i % 8 of byte i / 8. Eight codes of b bits fill b bytes, so work splits at multiples of 8 codes. */
typedef struct {
    uint8_t *packed;
    uint16_t *codes;
    int64_t count, bytes;
    int bits;
} stream_job;

static CC_INLINE void unpack8(const uint8_t *packed, int bits, uint16_t *codes)
{
    for (int k = 0; k < 8; k++) {
        const uint8_t *at = packed + k * bits / 8;
        const int shift = k * bits % 8;
        uint32_t window = at[0];
        if (shift + bits > 8)
            window |= (uint32_t)at[1] << 8;
        if (shift + bits > 16)
            window |= (uint32_t)at[2] << 16;
        codes[k] = (uint16_t)(window >> shift & ((1u << bits) - 1));
    }
}

static CC_INLINE void pack8(const uint16_t *codes, int bits, uint8_t *packed)
{
    uint32_t window = 0;
    int held = 0;
    for (int k = 0; k < 8; k++) {
        window |= (codes[k] & ((1u << bits) - 1)) << held;
        for (held += bits; held >= 8; held -= 8, window >>= 8)
            *packed++ = (uint8_t)window;
    }
}

/* A constant width lets the compiler unroll the eight codes. */
#define WIDTHS(WIDTH)                                                                                                        \
    WIDTH(1) WIDTH(2) WIDTH(3) WIDTH(4) WIDTH(5) WIDTH(6) WIDTH(7) WIDTH(8)                                                   \
    WIDTH(9) WIDTH(10) WIDTH(11) WIDTH(12) WIDTH(13) WIDTH(14) WIDTH(15) WIDTH(16)

static void unpack_octets(void *arg, int64_t begin, int64_t end, int thread)
{
    const stream_job *job = arg;
    const int64_t whole = end * 8 <= job->count ? end : job->count / 8;
    (void)thread;
    switch (job->bits) {
#define WIDTH(b)                                                                                                             \
    case b:                                                                                                                  \
        for (int64_t octet = begin; octet < whole; octet++)                                                                  \
            unpack8(job->packed + octet * b, b, job->codes + octet * 8);                                                     \
        break;
        WIDTHS(WIDTH)
#undef WIDTH
    }
    if (whole < end) {
        uint8_t packed[16] = {0};
        uint16_t codes[8];
        memcpy(packed, job->packed + whole * job->bits, (size_t)(job->bytes - whole * job->bits));
        unpack8(packed, job->bits, codes);
        memcpy(job->codes + whole * 8, codes, (size_t)(job->count - whole * 8) * sizeof *codes);
    }
}

static void pack_octets(void *arg, int64_t begin, int64_t end, int thread)
{
    const stream_job *job = arg;
    const int64_t whole = end * 8 <= job->count ? end : job->count / 8;
    (void)thread;
    switch (job->bits) {
#define WIDTH(b)                                                                                                             \
    case b:                                                                                                                  \
        for (int64_t octet = begin; octet < whole; octet++)                                                                  \
            pack8(job->codes + octet * 8, b, job->packed + octet * b);                                                       \
        break;
        WIDTHS(WIDTH)
#undef WIDTH
    }
    if (whole < end) {
        uint8_t packed[16];
        uint16_t codes[8] = {0};
        memcpy(codes, job->codes + whole * 8, (size_t)(job->count - whole * 8) * sizeof *codes);
        pack8(codes, job->bits, packed);
        memcpy(job->packed + whole * job->bits, packed, (size_t)(job->bytes - whole * job->bits));
    }
}

#define OCTETS_PER_CHUNK 8192

static stream_job stream(uint8_t *packed, uint16_t *codes, int64_t count, int bits)
{
    const stream_job job = {packed, codes, count, (count * bits + 7) / 8, bits};
    return job;
}

/* codes[count] from packed[ceil(count * bits / 8)], 1 <= bits <= 16. */
CC_EXPORT void cc_unpack_codes(const uint8_t *packed, int64_t count, int bits, uint16_t *codes, int threads)
{
    stream_job job = stream((uint8_t *)packed, codes, count, bits);
    cc_parallel_for((count + 7) / 8, OCTETS_PER_CHUNK, threads, unpack_octets, &job);
}

/* packed[ceil(count * bits / 8)] from codes[count], of each the low `bits` bits; the last byte is filled up with zeros. */
CC_EXPORT void cc_pack_codes(const uint16_t *codes, int64_t count, int bits, uint8_t *packed, int threads)
{
    stream_job job = stream(packed, (uint16_t *)codes, count, bits);
    cc_parallel_for((count + 7) / 8, OCTETS_PER_CHUNK, threads, pack_octets, &job);
}
