/* Assigns every point to the nearest among its last centroid and that centroid's neighbours.
 *
 * The neighbours of centroid c are scanned nearest first. A centroid at distance s from c has at least the distance s - d(x, c)
 * from x, so the scan of x ends at the first neighbour with s > d(x, c) + d(x, best so far). If the list ends before that, the
 * point is *open*: a centroid outside the list may be nearer. An exact scan searches all tiles for open points. */
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
    int32_t length, dim, exact, stale;
    uint16_t *codes;
    float *distances;
    int64_t *open; /* [num_centroids] */
} scan_job;

/* Open points of one cluster that are searched over all tiles together: they share the bounding-box tests and the loads of
 * tiles. Padded to a whole number of batches with copies of the last point. */
#define BATCH 4
#define MAX_ROUND 64

typedef struct {
    int64_t count;
    int32_t point[MAX_ROUND], id[MAX_ROUND];
    float x[MAX_ROUND][CC_MAX_DIM], distance[MAX_ROUND], least_score[MAX_ROUND];
} search_round;

static CC_INLINE void improve(search_round *round, int64_t i, const cc_tiles *space, int64_t tile, int dim)
{
    float distances[CC_LANES];
    const int32_t *ids = space->ids + tile * CC_LANES;
    cc_tile_distances(round->x[i], space->tiles + tile * dim * CC_LANES, distances, dim);
    for (int lane = 0; lane < CC_LANES; lane++) {
        float distance = distances[lane];
        if (distance < round->distance[i] || (distance == round->distance[i] && ids[lane] < round->id[i])) {
            round->distance[i] = distance;
            round->id[i] = ids[lane];
        }
    }
    round->least_score[i] = cc_least_score(round->x[i], round->distance[i], space->largest, dim);
}

static CC_INLINE void search_tile(search_round *round, int64_t padded, const cc_tiles *space, int64_t tile, int dim, int fuses)
{
    const float *members = space->tiles + tile * dim * CC_LANES, *half_norms = space->half_norms + tile * CC_LANES;
    for (int64_t i = 0; i < padded; i += BATCH) {
        float scores[BATCH][CC_LANES];
        for (int j = 0; j < BATCH; j++)
            cc_tile_scores(round->x[i + j], members, half_norms, scores[j], dim, fuses);
        int any = 0;
        for (int j = 0; j < BATCH; j++) {
            CC_EACH_LANE(lane) any |= scores[j][lane] >= round->least_score[i + j];
        }
        if (any)
            for (int j = 0; j < BATCH; j++)
                improve(round, i + j, space, tile, dim);
    }
}

/* Finds the nearest of all centroids for the points of a round, starting from their near ones, and empties the round. */
static CC_INLINE void search_all(const scan_job *job, search_round *round, int dim, int fuses)
{
    const cc_tiles *space = &job->space;
    float low[CC_MAX_DIM], high[CC_MAX_DIM], widest = 0.0f;
    int64_t padded = (round->count + BATCH - 1) / BATCH * BATCH;
    for (int64_t i = round->count; i < padded; i++) {
        memcpy(round->x[i], round->x[i - 1], sizeof round->x[i]);
        round->distance[i] = round->distance[i - 1];
        round->id[i] = round->id[i - 1];
    }
    for (int d = 0; d < dim; d++)
        low[d] = high[d] = round->x[0][d];
    for (int64_t i = 0; i < padded; i++) {
        for (int d = 0; d < dim; d++) {
            low[d] = round->x[i][d] < low[d] ? round->x[i][d] : low[d];
            high[d] = round->x[i][d] > high[d] ? round->x[i][d] : high[d];
        }
        widest = round->distance[i] > widest ? round->distance[i] : widest;
        round->least_score[i] = cc_least_score(round->x[i], round->distance[i], space->largest, dim);
    }
    for (int64_t group = 0; group * CC_LANES < space->num_tiles; group++) {
        float bounds[CC_LANES];
        cc_box_distances(low, high, space->low + group * dim * CC_LANES, space->high + group * dim * CC_LANES, bounds, dim);
        for (int lane = 0; lane < CC_LANES; lane++)
            if (bounds[lane] <= widest && group * CC_LANES + lane < space->num_tiles)
                search_tile(round, padded, space, group * CC_LANES + lane, dim, fuses);
    }
    for (int64_t i = 0; i < round->count; i++) {
        job->distances[round->point[i]] = round->distance[i];
        job->codes[round->point[i]] = (uint16_t)round->id[i];
    }
    round->count = 0;
}

static CC_INLINE float reach(float own, float best)
{
    return (sqrtf(own) + sqrtf(best)) * CC_SLACK + CC_TINY;
}

/* Collects the neighbours within `radius` of the centroid, nearest first, in tiles, and returns their number. `spacing`
 * receives the distance (not squared) of the first neighbour of each tile, `complete` the distance below which no centroid is
 * missing. */
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
    *complete = job->length == job->num_centroids - 1 ? INFINITY : job->stale ? 0.0f : sqrtf(last);
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

static CC_INLINE void scan_cluster(const scan_job *job, int32_t own, float *tiles, int dim, int fuses)
{
    search_round round;
    int32_t ids[MAX_LIST];
    float spacing[MAX_LIST / CC_LANES], complete;
    const float *centroid = job->centroids + (int64_t)own * dim;
    int64_t begin = job->start[own], end = job->start[own + 1], open = 0;
    float widest = 0.0f;
    round.count = 0;
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
        int32_t distance = cc_best_distance(&best);
        job->distances[point] = cc_float(distance);
        job->codes[point] = (uint16_t)cc_best_id(&best, distance);
        if (complete > limit)
            continue;
        open++;
        if (job->exact) {
            memcpy(round.x[round.count], x, (size_t)dim * sizeof *x);
            round.distance[round.count] = job->distances[point];
            round.id[round.count] = job->codes[point];
            round.point[round.count++] = (int32_t)point;
            if (round.count == MAX_ROUND)
                search_all(job, &round, dim, fuses);
        }
    }
    if (round.count > 0)
        search_all(job, &round, dim, fuses);
    job->open[own] = open;
}

typedef struct {
    scan_job job;
    int64_t first;
} scan_slice;

static CC_INLINE void scan_range(const scan_slice *slice, int64_t begin, int64_t end, int fuses, int dim)
{
    float tiles[MAX_LIST * CC_MAX_DIM];
    for (int64_t own = begin; own < end; own++)
        scan_cluster(&slice->job, (int32_t)(slice->first + own), tiles, dim, fuses);
}

static CC_INLINE void scan_body(void *arg, int64_t begin, int64_t end, int thread, int fuses)
{
    (void)thread;
    CC_FOR_DIM(((const scan_slice *)arg)->job.dim, scan_range, arg, begin, end, fuses)
}

CC_TASK_VARIANTS(scan_task, scan_body)

/* Scans the points of clusters [first, last). Writes their codes, squared distances and, per cluster, the number of open
 * points. `lists` [num_centroids, length], length <= 1024, holds the nearest other centroids of each centroid; they need not be
 * sorted. If the centroids have moved since, the lists are stale: they exclude no centroid, and every point is open. */
CC_EXPORT void cc_kmeans_scan(const float *tiles, const int32_t *ids, const float *low, const float *high,
                              const float *half_norms, float largest, int64_t num_tiles, const float *points, const int32_t *order, const int32_t *start, const float *centroids,
                              int32_t num_centroids, int32_t dim, const int32_t *lists, int32_t length, int exact, int stale,
                              uint16_t *codes, float *distances, int64_t *open, int64_t first, int64_t last, int threads,
                              int level)
{
    scan_slice slice = {{{tiles, low, high, half_norms, ids, num_tiles, largest},
                         points,
                         order,
                         start,
                         centroids,
                         num_centroids,
                         lists,
                         length,
                         dim,
                         exact,
                         stale,
                         codes,
                         distances,
                         open},
                        first};
    cc_parallel_for(last - first, 16, threads, scan_task(level), &slice);
}
