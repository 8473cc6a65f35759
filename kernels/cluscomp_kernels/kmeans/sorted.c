/* One dimension: finds the nearest of sorted centroids by binary search. */
#include "kmeans/variants.h"

#include <stddef.h>

typedef struct {
    const float *points, *values;
    const int32_t *ids;
    int32_t count;
    uint16_t *codes;
} sorted_job;

static CC_INLINE float distance(float a, float b)
{
    float difference = a - b;
    return difference * difference;
}

static void sorted_task(void *arg, int64_t begin, int64_t end, int thread)
{
    const sorted_job *job = arg;
    (void)thread;
    for (int64_t i = begin; i < end; i++) {
        float x = job->points[i];
        int32_t low = 0, length = job->count; /* values[low + length] and all later values are >= x, values[low - 1] < x */
        while (length > 0) {
            int32_t half = length / 2;
            int below = job->values[low + half] < x;
            low = below ? low + half + 1 : low;
            length = below ? length - half - 1 : half;
        }
        int32_t nearest = low < job->count ? low : job->count - 1;
        if (nearest > 0 && distance(x, job->values[nearest - 1]) < distance(x, job->values[nearest]))
            nearest--;
        /* Rounding can give farther centroids the same distance; centroids with equal distances are adjacent in the sorted
         * order. */
        float least = distance(x, job->values[nearest]);
        int32_t id = job->ids[nearest];
        for (int32_t j = nearest - 1; j >= 0 && distance(x, job->values[j]) <= least; j--)
            id = job->ids[j] < id ? job->ids[j] : id;
        for (int32_t j = nearest + 1; j < job->count && distance(x, job->values[j]) <= least; j++)
            id = job->ids[j] < id ? job->ids[j] : id;
        job->codes[i] = (uint16_t)id;
    }
}

/* codes[i] = id of the nearest of `count` distinct ascending `values`; the lowest id among equally near ones. */
CC_EXPORT void cc_kmeans_sorted(const float *points, int64_t num_points, const float *values, const int32_t *ids, int32_t count,
                                uint16_t *codes, int threads)
{
    sorted_job job = {points, values, ids, count, codes};
    cc_parallel_for(num_points, 1 << 16, threads, sorted_task, &job);
}
