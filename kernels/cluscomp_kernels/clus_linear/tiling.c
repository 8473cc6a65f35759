/* Tiling of codes for the linear kernels. */
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "native/threads.h"

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

/* Lays codes [in_features, groups] out as [tiles][in_features][groups_per_tile] of code_bytes each; missing groups are 0.
 * Returns the largest code; the tiled codes are valid only if it fits code_bytes. */
CC_EXPORT int cc_clus_tile(const uint16_t *codes, int64_t in_features, int64_t groups, int64_t groups_per_tile, int code_bytes,
                           void *tiled, int threads)
{
    tile_job job = {codes, in_features, groups, groups_per_tile, code_bytes, tiled, 0};
    cc_parallel_for((groups + groups_per_tile - 1) / groups_per_tile, 1, threads, tile_one, &job);
    return atomic_load_explicit(&job.largest, memory_order_relaxed);
}
