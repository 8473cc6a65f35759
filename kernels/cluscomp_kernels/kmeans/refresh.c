/* Approximate neighbour lists from old ones, after the centroids have moved a little: a new neighbour is probably an old
 * neighbour, or an old neighbour of a near one. Faster than the exact search of neighbours.c, but misses some neighbours. */
#include "kmeans/select.h"
#include "kmeans/tiles.h"

typedef struct {
    const float *centroids;
    const int32_t *old;
    int32_t *lists;
    int32_t num_centroids, dim, length, near, width;
    int64_t capacity;
    uint64_t *keys;  /* [threads, capacity] */
    int32_t *stamps; /* [threads, num_centroids], zero at first */
} refresh_job;

static CC_INLINE void refresh_range(const refresh_job *job, int64_t begin, int64_t end, int thread, int64_t first, int dim)
{
    uint64_t *keys = job->keys + thread * job->capacity;
    int32_t *stamps = job->stamps + (int64_t)thread * job->num_centroids;
    for (int64_t own = first + begin; own < first + end; own++) {
        const float *x = job->centroids + own * dim;
        const int32_t *old = job->old + own * job->length;
        int32_t stamp = (int32_t)own + 1;
        float limit = 0.0f;
        int64_t count = 0;
        stamps[own] = stamp;
        for (int32_t j = 0; j < job->length; j++) {
            float distance = cc_distance(x, job->centroids + (int64_t)old[j] * dim, dim);
            stamps[old[j]] = stamp;
            keys[count++] = cc_key(distance, old[j]);
            limit = distance > limit ? distance : limit;
        }
        for (int32_t j = 0; j < job->near; j++) {
            const int32_t *other = job->old + (int64_t)old[j] * job->length;
            for (int32_t i = 0; i < job->width; i++) {
                int32_t id = other[i];
                if (stamps[id] == stamp)
                    continue;
                stamps[id] = stamp;
                float distance = cc_distance(x, job->centroids + (int64_t)id * dim, dim);
                if (distance >= limit)
                    continue;
                keys[count++] = cc_key(distance, id);
                if (count == job->capacity) {
                    cc_select(keys, count, job->length);
                    count = job->length;
                    limit = cc_key_distance(keys[count - 1]);
                }
            }
        }
        if (count > job->length)
            cc_select(keys, count, job->length);
        cc_sort(keys, job->length);
        for (int32_t j = 0; j < job->length; j++)
            job->lists[own * job->length + j] = cc_key_id(keys[j]);
    }
}

typedef struct {
    refresh_job job;
    int64_t first;
} refresh_slice;

static CC_INLINE void refresh_body(void *arg, int64_t begin, int64_t end, int thread, int fuses)
{
    const refresh_slice *slice = arg;
    (void)fuses;
    CC_FOR_DIM(slice->job.dim, refresh_range, &slice->job, begin, end, thread, slice->first)
}

CC_TASK_VARIANTS(refresh_task, refresh_body)

/* Writes `lists` [num_centroids, length] of centroids [first, last). Candidates are the members of the centroid's list in `old`
 * and the first `width` members of the old lists of its first `near` members. */
CC_EXPORT void cc_kmeans_refresh(const float *centroids, int32_t num_centroids, int32_t dim, const int32_t *old, int32_t *lists,
                                 int32_t length, int32_t near, int32_t width, uint64_t *keys, int64_t capacity,
                                 int32_t *stamps, int64_t first, int64_t last, int threads, int level)
{
    refresh_slice slice = {
        {centroids, old, lists, num_centroids, dim, length, near, width, capacity, keys, stamps}, first};
    cc_parallel_for(last - first, 64, threads, refresh_task(level), &slice);
}
