/* Assignment: every point to the nearest of its last centroid and that centroid's neighbours.
 *
 * The neighbours of centroid c are scanned nearest first. A centroid at distance s from c is at least s - d(x, c) from x, so
 * the scan of x ends at the first neighbour with s > d(x, c) + d(x, best so far). Where the list ends before that, the point
 * is *open*: a centroid outside the list may be nearer. An exact scan settles open points by a search over all tiles. */
#include "kmeans/select.h"
#include "kmeans/tiles.h"

#define MAX_LIST 1024

typedef struct {
    cc_tiles space;
    const float *points;
    const int32_t *order, *start; /* points of cluster c: order[start[c]] to order[start[c + 1] - 1] */
    const float *centroids;
    int32_t num_centroids;
    const int32_t *lists;
    int32_t length, dim, exact;
    uint16_t *codes;
    float *distances;
    int64_t *open; /* [num_centroids] */
} scan_job;

/* The nearest of all centroids, given one to start from. */
static CC_INLINE void search_all(const cc_tiles *space, const float *x, cc_best *best, int dim)
{
    float limit = cc_float(cc_best_distance(best));
    for (int64_t group = 0; group * CC_LANES < space->num_tiles; group++) {
        float bounds[CC_LANES], distances[CC_LANES];
        cc_box_distances(x, x, space->low + group * dim * CC_LANES, space->high + group * dim * CC_LANES, bounds, dim);
        int any = 0;
        CC_EACH_LANE(lane)
            any |= bounds[lane] <= limit;
        if (!any)
            continue;
        CC_EACH_LANE(lane) {
            int64_t tile = group * CC_LANES + lane;
            if (!(bounds[lane] <= limit) || tile >= space->num_tiles)
                continue;
            cc_tile_distances(x, space->tiles + tile * dim * CC_LANES, distances, dim);
            cc_best_update(best, distances, space->ids + tile * CC_LANES);
            limit = cc_float(cc_best_distance(best));
        }
    }
}

static CC_INLINE float reach(float own, float best)
{
    return (sqrtf(own) + sqrtf(best)) * CC_SLACK + CC_TINY;
}

/* The neighbours within `radius` of the centroid, nearest first, in tiles. Returns how many; `spacing` receives the distance
 * (not squared) of the first of each tile, `complete` the distance below which no centroid is missing. */
static CC_INLINE int64_t near_tiles(const scan_job *job, int32_t own, float radius, float *tiles, int32_t *ids, float *spacing,
                                    float *complete, int dim)
{
    uint64_t keys[MAX_LIST];
    const int32_t *list = job->lists + (int64_t)own * job->length;
    const float *x = job->centroids + (int64_t)own * dim;
    float limit = radius * radius * CC_SLACK, last = 0.0f;
    int64_t count = 0;
    for (int32_t j = 0; j < job->length; j++) {
        float distance = cc_distance(x, job->centroids + (int64_t)list[j] * dim, dim);
        last = distance > last ? distance : last;
        if (distance <= limit)
            keys[count++] = cc_key(distance, list[j]);
    }
    cc_insertion_sort(keys, count);
    *complete = job->length == job->num_centroids - 1 ? INFINITY : sqrtf(last);
    for (int64_t j = 0; j < count; j++) {
        int64_t tile = j / CC_LANES, lane = j % CC_LANES;
        const float *neighbour = job->centroids + (int64_t)cc_key_id(keys[j]) * dim;
        if (lane == 0)
            spacing[tile] = sqrtf(cc_key_distance(keys[j]));
        ids[j] = cc_key_id(keys[j]);
        for (int d = 0; d < dim; d++)
            tiles[(tile * dim + d) * CC_LANES + lane] = neighbour[d];
    }
    int64_t padded = (count + CC_LANES - 1) / CC_LANES * CC_LANES;
    for (int64_t j = count; j < padded; j++) {
        ids[j] = CC_NO_ID;
        for (int d = 0; d < dim; d++)
            tiles[(j / CC_LANES * dim + d) * CC_LANES + j % CC_LANES] = 1e30f;
    }
    return padded / CC_LANES;
}

static CC_INLINE void scan_cluster(const scan_job *job, int32_t own, float *tiles, int dim)
{
    int32_t ids[MAX_LIST];
    float spacing[MAX_LIST / CC_LANES], complete;
    const float *centroid = job->centroids + (int64_t)own * dim;
    int64_t begin = job->start[own], end = job->start[own + 1], open = 0;
    float widest = 0.0f;
    if (begin == end) {
        job->open[own] = 0;
        return;
    }
    for (int64_t i = begin; i < end; i++) {
        int64_t point = job->order[i];
        float distance = cc_distance(job->points + point * dim, centroid, dim);
        job->distances[point] = distance;
        widest = distance > widest ? distance : widest;
    }
    int64_t num_tiles = near_tiles(job, own, reach(widest, widest), tiles, ids, spacing, &complete, dim);
    for (int64_t i = begin; i < end; i++) {
        int64_t point = job->order[i];
        const float *x = job->points + point * dim;
        float to_own = job->distances[point], limit = reach(to_own, to_own), distances[CC_LANES];
        cc_best best;
        cc_best_start(&best, to_own, own);
        for (int64_t tile = 0; tile < num_tiles && spacing[tile] <= limit; tile++) {
            cc_tile_distances(x, tiles + tile * dim * CC_LANES, distances, dim);
            cc_best_update(&best, distances, ids + tile * CC_LANES);
            limit = reach(to_own, cc_float(cc_best_distance(&best)));
        }
        if (complete <= limit) {
            open++;
            if (job->exact)
                search_all(&job->space, x, &best, dim);
        }
        int32_t distance = cc_best_distance(&best);
        job->distances[point] = cc_float(distance);
        job->codes[point] = (uint16_t)cc_best_id(&best, distance);
    }
    job->open[own] = open;
}

typedef struct {
    scan_job job;
    int64_t first;
} scan_slice;

static CC_INLINE void scan_range(const scan_slice *slice, int64_t begin, int64_t end, int dim)
{
    float tiles[MAX_LIST * CC_MAX_DIM];
    for (int64_t own = begin; own < end; own++)
        scan_cluster(&slice->job, (int32_t)(slice->first + own), tiles, dim);
}

static CC_INLINE void scan_body(void *arg, int64_t begin, int64_t end, int thread)
{
    (void)thread;
    CC_FOR_DIM(((const scan_slice *)arg)->job.dim, scan_range, arg, begin, end)
}

CC_TASK_VARIANTS(scan_task, scan_body)

/* Scans the points of clusters [first, last); writes their codes, squared distances and, per cluster, how many were open.
 * `lists` [num_centroids, length], length <= 1024, holds each centroid's nearest others; they need not be sorted, and for an
 * inexact scan the centroids may have moved since. */
CC_EXPORT void cc_kmeans_scan(const float *tiles, const int32_t *ids, const float *low, const float *high, int64_t num_tiles,
                              const float *points, const int32_t *order, const int32_t *start, const float *centroids,
                              int32_t num_centroids, int32_t dim, const int32_t *lists, int32_t length, int exact,
                              uint16_t *codes, float *distances, int64_t *open, int64_t first, int64_t last, int threads,
                              int level)
{
    scan_slice slice = {{{tiles, low, high, ids, num_tiles},
                         points,
                         order,
                         start,
                         centroids,
                         num_centroids,
                         lists,
                         length,
                         dim,
                         exact,
                         codes,
                         distances,
                         open},
                        first};
    cc_parallel_for(last - first, 16, threads, scan_task(level), &slice);
}
