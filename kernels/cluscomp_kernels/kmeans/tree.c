/* A tree over points: every split divides a node at the mean of its widest dimension.
 *
 * A node is a contiguous range of the points, which are reordered by each split; leaves that are near each other in space end
 * up near each other in memory. Python decides which nodes to split (see tree.py); nodes are independent of each other. */
#include "kmeans/tiles.h"

/* Arrays of one entry per node. `mean` is [nodes, dim]. */
typedef struct {
    float *points;
    float *weights; /* or NULL: all 1 */
    int32_t *order;
    int32_t dim;
    int64_t *begin, *end;
    int32_t *axis, *child;
    float *threshold, *mean;
    double *error;
    const int32_t *chosen; /* the nodes to work on */
} tree_job;

static CC_INLINE void describe(const tree_job *job, int32_t node, int dim)
{
    int64_t begin = job->begin[node], end = job->end[node];
    double shift[CC_MAX_DIM], first[CC_MAX_DIM] = {0}, second[CC_MAX_DIM] = {0}, total = 0.0;
    for (int d = 0; d < dim; d++)
        shift[d] = job->points[begin * dim + d];
    for (int64_t i = begin; i < end; i++) {
        const float *x = job->points + i * dim;
        double weight = job->weights ? (double)job->weights[i] : 1.0;
        total += weight;
        for (int d = 0; d < dim; d++) {
            double offset = (double)x[d] - shift[d];
            first[d] += weight * offset;
            second[d] += weight * (offset * offset);
        }
    }
    int weightless = total <= 0.0;
    if (weightless) {
        for (int64_t i = begin; i < end; i++)
            for (int d = 0; d < dim; d++)
                first[d] += (double)job->points[i * dim + d] - shift[d];
        total = (double)(end - begin);
    }
    double error = 0.0, widest = 0.0;
    int axis = 0;
    for (int d = 0; d < dim; d++) {
        double mean = first[d] / total;
        double spread = second[d] - first[d] * mean;
        job->mean[(int64_t)node * dim + d] = (float)(shift[d] + mean);
        spread = spread > 0.0 ? spread : 0.0;
        error += spread;
        if (spread > widest) {
            widest = spread;
            axis = d;
        }
    }
    job->axis[node] = axis;
    job->error[node] = weightless ? 0.0 : error;
}

static CC_INLINE void swap_rows(const tree_job *job, int64_t a, int64_t b, int dim)
{
    float *x = job->points + a * dim, *y = job->points + b * dim;
    for (int d = 0; d < dim; d++) {
        float value = x[d];
        x[d] = y[d];
        y[d] = value;
    }
    int32_t index = job->order[a];
    job->order[a] = job->order[b];
    job->order[b] = index;
    if (job->weights) {
        float weight = job->weights[a];
        job->weights[a] = job->weights[b];
        job->weights[b] = weight;
    }
}

/* Moves the points at or below the threshold to the front of the node. Returns the index at which the others begin. */
static CC_INLINE int64_t partition(const tree_job *job, int32_t node, float threshold, int dim)
{
    const float *column = job->points + job->axis[node];
    int64_t left = job->begin[node], right = job->end[node];
    for (;;) {
        while (left < right && column[left * dim] <= threshold)
            left++;
        while (left < right && column[(right - 1) * dim] > threshold)
            right--;
        if (left == right)
            return left;
        swap_rows(job, left++, --right, dim);
    }
}

static CC_INLINE void split(const tree_job *job, int32_t node, int dim)
{
    int64_t begin = job->begin[node], end = job->end[node];
    int32_t axis = job->axis[node], left = job->child[node];
    float threshold = job->mean[(int64_t)node * dim + axis];
    int64_t middle = partition(job, node, threshold, dim);
    if (middle == begin || middle == end) {
        /* Rounding put the mean outside the range of the points: split off those with the smallest coordinate instead. */
        threshold = job->points[begin * dim + axis];
        for (int64_t i = begin; i < end; i++)
            if (job->points[i * dim + axis] < threshold)
                threshold = job->points[i * dim + axis];
        middle = partition(job, node, threshold, dim);
    }
    job->threshold[node] = threshold;
    job->begin[left] = begin;
    job->end[left] = job->begin[left + 1] = middle;
    job->end[left + 1] = end;
    for (int32_t child = left; child < left + 2; child++) {
        job->error[child] = 0.0;
        if (job->begin[child] < job->end[child])
            describe(job, child, dim);
        /* Limited to the parent's error, as in exact arithmetic: the greedy order depends on it. */
        if (job->error[child] > job->error[node])
            job->error[child] = job->error[node];
    }
}

static CC_INLINE void split_range(const tree_job *job, int64_t begin, int64_t end, int dim)
{
    for (int64_t i = begin; i < end; i++)
        split(job, job->chosen[i], dim);
}

static CC_INLINE void split_body(void *arg, int64_t begin, int64_t end, int thread, int fuses)
{
    (void)thread;
    (void)fuses;
    CC_FOR_DIM(((const tree_job *)arg)->dim, split_range, arg, begin, end)
}

CC_TASK_VARIANTS(split_task, split_body)

static CC_INLINE void describe_body(void *arg, int64_t begin, int64_t end, int thread, int fuses)
{
    (void)fuses;
    (void)begin;
    (void)end;
    (void)thread;
    CC_FOR_DIM(((const tree_job *)arg)->dim, describe, arg, 0)
}

CC_TASK_VARIANTS(describe_task, describe_body)

/* Computes the fields of node 0, whose range is set. */
CC_EXPORT void cc_kmeans_tree_root(float *points, float *weights, int32_t *order, int32_t dim, int64_t *begin, int64_t *end,
                                   int32_t *axis, int32_t *child, float *threshold, float *mean, double *error, int level)
{
    tree_job job = {points, weights, order, dim, begin, end, axis, child, threshold, mean, error, NULL};
    describe_task(level)(&job, 0, 1, 0);
}

/* Splits the `count` nodes of `chosen`; child[node] is the index for the first of its two children. */
CC_EXPORT void cc_kmeans_tree_split(float *points, float *weights, int32_t *order, int32_t dim, int64_t *begin, int64_t *end,
                                    int32_t *axis, int32_t *child, float *threshold, float *mean, double *error,
                                    const int32_t *chosen, int64_t count, int threads, int level)
{
    tree_job job = {points, weights, order, dim, begin, end, axis, child, threshold, mean, error, chosen};
    cc_parallel_for(count, count / (8 * (int64_t)threads) + 1, threads, split_task(level), &job);
}

typedef struct {
    const float *points, *threshold;
    const int32_t *axis, *child, *leaf;
    uint16_t *codes;
    int32_t dim;
} descend_job;

static void descend_task(void *arg, int64_t begin, int64_t end, int thread)
{
    const descend_job *job = arg;
    (void)thread;
    for (int64_t i = begin; i < end; i++) {
        const float *x = job->points + i * job->dim;
        int32_t node = 0;
        while (job->child[node] >= 0)
            node = job->child[node] + (x[job->axis[node]] > job->threshold[node]);
        job->codes[i] = (uint16_t)job->leaf[node];
    }
}

/* Follows the splits from the root: codes[i] = leaf[node of point i]. A leaf has child -1. */
CC_EXPORT void cc_kmeans_tree_descend(const float *points, int64_t num_points, int32_t dim, const int32_t *axis,
                                      const float *threshold, const int32_t *child, const int32_t *leaf, uint16_t *codes,
                                      int threads)
{
    descend_job job = {points, threshold, axis, child, leaf, codes, dim};
    cc_parallel_for(num_points, 4096, threads, descend_task, &job);
}
