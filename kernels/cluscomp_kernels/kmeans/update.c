/* The update half of a Lloyd iteration: groups points by cluster and computes the means of the groups. */
#include "kmeans/variants.h"

#include <stddef.h>
#include <string.h>

#define MAX_DIM 64

/* Counting sort: the points of cluster c are order[start[c]] to order[start[c + 1] - 1], in ascending order. `start` has
 * num_clusters + 1 entries. */
CC_EXPORT void cc_kmeans_group(const uint16_t *codes, int64_t num_points, int32_t num_clusters, int32_t *start, int32_t *order)
{
    memset(start, 0, ((size_t)num_clusters + 1) * sizeof *start);
    for (int64_t i = 0; i < num_points; i++)
        start[codes[i] + 1]++;
    for (int32_t c = 0; c < num_clusters; c++)
        start[c + 1] += start[c];
    for (int64_t i = 0; i < num_points; i++)
        order[start[codes[i]]++] = (int32_t)i;
    for (int32_t c = num_clusters; c > 0; c--)
        start[c] = start[c - 1];
    start[0] = 0;
}

typedef struct {
    const float *points, *weights, *distances;
    const int32_t *order, *start;
    int32_t dim;
    float *centroids;
    double *mass, *error;
    int32_t *farthest;
} update_job;

/* One thread sums a cluster, in the order of its points, so the result does not depend on the number of threads. */
static CC_INLINE void update_range(const update_job *job, int64_t begin, int64_t end, int dim)
{
    for (int64_t c = begin; c < end; c++) {
        double sums[MAX_DIM] = {0}, mass = 0.0, error = 0.0, worst = 0.0;
        int32_t farthest = -1;
        for (int64_t i = job->start[c]; i < job->start[c + 1]; i++) {
            int32_t point = job->order[i];
            const float *x = job->points + (int64_t)point * dim;
            double weight = job->weights ? (double)job->weights[point] : 1.0;
            double share = weight * (double)job->distances[point];
            mass += weight;
            error += share;
            if (share > worst) {
                worst = share;
                farthest = point;
            }
            for (int d = 0; d < dim; d++)
                sums[d] += weight * (double)x[d];
        }
        job->mass[c] = mass;
        job->error[c] = error;
        job->farthest[c] = farthest;
        if (mass > 0.0)
            for (int d = 0; d < dim; d++)
                job->centroids[c * dim + d] = (float)(sums[d] / mass);
    }
}

static CC_INLINE void update_body(void *arg, int64_t begin, int64_t end, int thread, int fuses)
{
    (void)thread;
    (void)fuses;
    CC_FOR_DIM(((const update_job *)arg)->dim, update_range, arg, begin, end)
}

CC_TASK_VARIANTS(update_task, update_body)

/* Moves every centroid of positive weight to the weighted mean of its points. Writes per cluster: `mass`, the sum of weights;
 * `error`, the weighted sum of the given squared distances; `farthest`, the point with the largest share of it, or -1. */
CC_EXPORT void cc_kmeans_update(const float *points, const float *weights, const float *distances, const int32_t *order,
                                const int32_t *start, int32_t num_clusters, int32_t dim, float *centroids, double *mass,
                                double *error, int32_t *farthest, int threads, int level)
{
    update_job job = {points, weights, distances, order, start, dim, centroids, mass, error, farthest};
    cc_parallel_for(num_clusters, 64, threads, update_task(level), &job);
}
