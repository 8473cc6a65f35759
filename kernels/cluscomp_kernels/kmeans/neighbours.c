/* Exact lists of the nearest other centroids of every centroid; the tiles' bounding boxes prune the search. */
#include "kmeans/select.h"
#include "kmeans/tiles.h"

typedef struct {
    cc_tiles space;
    const float *centroids;
    int32_t *lists;   /* [num_centroids, length] */
    int has_previous; /* `lists` holds members of earlier lists */
    int32_t length, dim;
    uint64_t *scratch; /* [threads, CC_LANES * capacity + bounds] */
    int64_t scratch_stride, capacity;
    float *bounds; /* [threads, padded num_tiles] */
    int64_t bounds_stride;
} neighbours_job;

typedef struct {
    uint64_t *keys;
    int64_t count;
} candidates;

/* Upper bound of the distance of the last member of the new list: the distance of the farthest member of the old one. */
static CC_INLINE float previous_radius(const neighbours_job *job, int32_t id, int dim)
{
    const int32_t *list = job->lists + (int64_t)id * job->length;
    const float *x = job->centroids + (int64_t)id * dim;
    float radius = 0.0f;
    for (int32_t j = 0; j < job->length; j++) {
        float distance = cc_distance(x, job->centroids + (int64_t)list[j] * dim, dim);
        radius = distance > radius ? distance : radius;
    }
    return nextafterf(radius, INFINITY);
}

/* Adds the members of a tile that are nearer than the limit to the candidates of one centroid. Returns the new limit. */
static CC_INLINE float gather_tile(const neighbours_job *job, candidates *found, const float *x, int32_t own, int64_t tile,
                                   float limit, float *least_score, int dim, int fuses)
{
    const float *members = job->space.tiles + tile * dim * CC_LANES;
    float scores[CC_LANES], distances[CC_LANES];
    cc_tile_scores(x, members, job->space.half_norms + tile * CC_LANES, scores, dim, fuses);
    int any = 0;
    CC_EACH_LANE(lane) any |= scores[lane] >= *least_score;
    if (!any)
        return limit;
    cc_tile_distances(x, members, distances, dim);
    const int32_t *ids = job->space.ids + tile * CC_LANES;
    CC_EACH_LANE(lane) {
        if (!(distances[lane] < limit) || ids[lane] == own || ids[lane] == CC_NO_ID)
            continue;
        found->keys[found->count++] = cc_key(distances[lane], ids[lane]);
        if (found->count == job->capacity) {
            cc_select(found->keys, found->count, job->length);
            found->count = job->length;
            limit = cc_key_distance(found->keys[job->length - 1]);
            *least_score = cc_least_score(x, limit, job->space.largest, dim);
        }
    }
    return limit;
}

static CC_INLINE void list_tile(const neighbours_job *job, int64_t own, int thread, int fuses, int dim)
{
    const cc_tiles *space = &job->space;
    const float *queries = space->tiles + own * dim * CC_LANES;
    const int32_t *ids = space->ids + own * CC_LANES;
    float *bounds = job->bounds + thread * job->bounds_stride;
    float x[CC_LANES][CC_MAX_DIM], limits[CC_LANES], least_scores[CC_LANES], low[CC_MAX_DIM], high[CC_MAX_DIM];
    candidates found[CC_LANES];
    for (int d = 0; d < dim; d++) {
        low[d] = space->low[((own / CC_LANES) * dim + d) * CC_LANES + own % CC_LANES];
        high[d] = space->high[((own / CC_LANES) * dim + d) * CC_LANES + own % CC_LANES];
    }
    float widest = 0.0f;
    CC_EACH_LANE(lane) {
        found[lane].keys = job->scratch + thread * job->scratch_stride + lane * job->capacity;
        found[lane].count = 0;
        for (int d = 0; d < dim; d++)
            x[lane][d] = queries[d * CC_LANES + lane];
        limits[lane] = INFINITY;
        if (ids[lane] == CC_NO_ID)
            limits[lane] = 0.0f;
        else if (job->has_previous)
            limits[lane] = previous_radius(job, ids[lane], dim);
        least_scores[lane] = cc_least_score(x[lane], limits[lane], space->largest, dim);
        widest = limits[lane] > widest ? limits[lane] : widest;
    }
    for (int64_t group = 0; group * CC_LANES < space->num_tiles; group++)
        cc_box_distances(low, high, space->low + group * dim * CC_LANES, space->high + group * dim * CC_LANES,
                         bounds + group * CC_LANES, dim);
    /* Go outwards from the centroid's own tile: near tiles come early and tighten the limits. */
    for (int64_t step = 0; step < 2 * space->num_tiles; step++) {
        int64_t tile = step % 2 ? own + (step + 1) / 2 : own - step / 2;
        if (tile < 0 || tile >= space->num_tiles || !(bounds[tile] < widest))
            continue;
        float gaps[CC_LANES] = {0};
        const float *box_low = space->low + (tile / CC_LANES) * dim * CC_LANES + tile % CC_LANES;
        const float *box_high = space->high + (tile / CC_LANES) * dim * CC_LANES + tile % CC_LANES;
        for (int d = 0; d < dim; d++) {
            float bottom = box_low[d * CC_LANES], top = box_high[d * CC_LANES];
            const float *row = queries + d * CC_LANES;
            CC_EACH_LANE(lane) {
                float under = bottom - row[lane], over = row[lane] - top;
                float gap = under > over ? under : over;
                gap = gap > 0.0f ? gap : 0.0f;
                gaps[lane] += gap * gap;
            }
        }
        CC_EACH_LANE(lane)
            if (gaps[lane] < limits[lane])
                limits[lane] = gather_tile(job, &found[lane], x[lane], ids[lane], tile, limits[lane],
                                           &least_scores[lane], dim, fuses);
        widest = 0.0f;
        CC_EACH_LANE(lane)
            widest = limits[lane] > widest ? limits[lane] : widest;
    }
    CC_EACH_LANE(lane) {
        if (ids[lane] == CC_NO_ID)
            continue;
        if (found[lane].count > job->length)
            cc_select(found[lane].keys, found[lane].count, job->length);
        cc_sort(found[lane].keys, job->length);
        int32_t *list = job->lists + (int64_t)ids[lane] * job->length;
        for (int32_t j = 0; j < job->length; j++)
            list[j] = cc_key_id(found[lane].keys[j]);
    }
}

static CC_INLINE void list_range(const neighbours_job *job, int64_t begin, int64_t end, int thread, int64_t first, int fuses,
                                 int dim)
{
    for (int64_t tile = begin; tile < end; tile++)
        list_tile(job, first + tile, thread, fuses, dim);
}

typedef struct {
    neighbours_job job;
    int64_t first;
} neighbours_slice;

static CC_INLINE void neighbours_body(void *arg, int64_t begin, int64_t end, int thread, int fuses)
{
    const neighbours_slice *slice = arg;
    CC_FOR_DIM(slice->job.dim, list_range, &slice->job, begin, end, thread, slice->first, fuses)
}

CC_TASK_VARIANTS(neighbours_task, neighbours_body)

/* Fills lists[id, :] for the centroids of tiles [first, last) with the `length` < num_centroids nearest other centroids,
 * nearest first (by id if distances are equal). With has_previous, the lists already hold `length` distinct other centroids
 * each, whose distances bound the search. `capacity` > length is the number of candidates kept per centroid. */
CC_EXPORT void cc_kmeans_neighbours(const float *tiles, const int32_t *ids, const float *low, const float *high,
                                    const float *half_norms, float largest, int64_t num_tiles, const float *centroids, int32_t dim, int32_t *lists, int32_t length,
                                    int has_previous, uint64_t *scratch, int64_t capacity, float *bounds,
                                    int64_t bounds_stride, int64_t first, int64_t last, int threads, int level)
{
    neighbours_slice slice = {
        {{tiles, low, high, half_norms, ids, num_tiles, largest},
         centroids,
         lists,
         has_previous,
         length,
         dim,
         scratch,
         CC_LANES * capacity,
         capacity,
         bounds,
         bounds_stride},
        first};
    cc_parallel_for(last - first, 1, threads, neighbours_task(level), &slice);
}
