/* Codes chosen channel after channel, the error of each fed back into the targets of those that follow.
 *
 * Vectors lie along the rows of `targets` [channels, width], so groups of columns never touch each other: every thread takes
 * some groups through all channels, and results do not depend on how many threads there are. */
#include "kmeans/tiles.h"

/* Groups of columns are taken through the channels together: as many as make feedback worth its loop, and few enough that their
 * part of all channels stays in the cache. */
#define GROUPS 16

typedef struct {
    cc_tiles space;
    /* Corners of the boxes of CC_LANES boxes each [ceil(num_tiles / CC_LANES / CC_LANES), dim, CC_LANES]. */
    const float *outer_low, *outer_high;
    const float *centroids;
    const float *weights;
    float *targets, *errors;
    uint16_t *codes;
    const float *factor;
    int64_t channels, groups, width, out_features;
    int dim;
} feedback_job;

typedef struct {
    float distance;
    int32_t id;
} nearest_centroid;

static CC_INLINE void look_into_tile(const cc_tiles *space, const float *x, int64_t tile, nearest_centroid *best, int dim)
{
    float distances[CC_LANES];
    const int32_t *ids = space->ids + tile * CC_LANES;
    cc_tile_distances(x, space->tiles + tile * dim * CC_LANES, distances, dim);
    int any = 0;
    CC_EACH_LANE(lane) any |= distances[lane] <= best->distance;
    if (!any)
        return;
    for (int lane = 0; lane < CC_LANES; lane++) {
        float distance = distances[lane];
        if (distance < best->distance || (distance == best->distance && ids[lane] < best->id)) {
            best->distance = distance;
            best->id = ids[lane];
        }
    }
}

static CC_INLINE int least_lane(const float *bounds)
{
    int least = 0;
    for (int lane = 1; lane < CC_LANES; lane++)
        least = bounds[lane] < bounds[least] ? lane : least;
    return least;
}

static CC_INLINE void box_bounds(const float *x, const float *low, const float *high, int64_t box, float *out, int dim)
{
    cc_box_distances(x, x, low + box * dim * CC_LANES, high + box * dim * CC_LANES, out, dim);
}

/* Boxes within boxes within boxes: the nearest at every level give a first centroid, whatever may be nearer is looked into. */
static CC_INLINE int32_t find_nearest(const feedback_job *job, const float *x, int dim)
{
    const cc_tiles *space = &job->space;
    int64_t inner_boxes = (space->num_tiles + CC_LANES - 1) / CC_LANES, outer_boxes = (inner_boxes + CC_LANES - 1) / CC_LANES;
    float outer[CC_LANES * CC_LANES], inner[CC_LANES];
    int64_t nearest_inner = 0;
    nearest_centroid best = {INFINITY, CC_NO_ID};
    for (int64_t box = 0; box < outer_boxes; box++) {
        box_bounds(x, job->outer_low, job->outer_high, box, outer + box * CC_LANES, dim);
        int64_t lane = box * CC_LANES + least_lane(outer + box * CC_LANES);
        nearest_inner = outer[lane] < outer[nearest_inner] ? lane : nearest_inner;
    }
    box_bounds(x, space->low, space->high, nearest_inner, inner, dim);
    look_into_tile(space, x, nearest_inner * CC_LANES + least_lane(inner), &best, dim);
    for (int64_t box = 0; box < inner_boxes; box++) {
        if (!(outer[box] <= best.distance))
            continue;
        box_bounds(x, space->low, space->high, box, inner, dim);
        for (int lane = 0; lane < CC_LANES; lane++)
            if (inner[lane] <= best.distance && box * CC_LANES + lane < space->num_tiles)
                look_into_tile(space, x, box * CC_LANES + lane, &best, dim);
    }
    return best.id;
}

static CC_INLINE void choose_groups(const feedback_job *job, int64_t first, int64_t last, int dim)
{
    int64_t begin = first * dim, length = (last - first) * dim, width = job->width;
    float changes[GROUPS * CC_MAX_DIM];
    for (int64_t channel = 0; channel < job->channels; channel++) {
        const float *weights = job->weights + channel * width + begin;
        float *errors = job->errors + channel * width + begin;
        const float *targets = job->targets + channel * width + begin;
        for (int64_t group = 0; group < last - first; group++) {
            int32_t code = find_nearest(job, targets + group * dim, dim);
            const float *centroid = job->centroids + (int64_t)code * dim;
            job->codes[channel * job->groups + first + group] = (uint16_t)code;
            for (int d = 0; d < dim; d++) {
                int64_t i = group * dim + d;
                float error = begin + i < job->out_features ? weights[i] - centroid[d] : 0.0f;
                changes[i] = error - errors[i];
                errors[i] = error;
            }
        }
        for (int64_t later = channel + 1; later < job->channels; later++) {
            float share = job->factor[channel * job->channels + later];
            float *restrict row = job->targets + later * width + begin;
            for (int64_t i = 0; i < length; i++)
                row[i] += share * changes[i];
        }
    }
}

static CC_INLINE void choose_range(const feedback_job *job, int64_t begin, int64_t end, int dim)
{
    for (int64_t block = begin; block < end; block++) {
        int64_t last = (block + 1) * GROUPS;
        choose_groups(job, block * GROUPS, last < job->groups ? last : job->groups, dim);
    }
}

static CC_INLINE void choose_body(void *arg, int64_t begin, int64_t end, int thread, int fuses)
{
    (void)thread;
    (void)fuses;
    CC_FOR_DIM(((const feedback_job *)arg)->dim, choose_range, arg, begin, end)
}

CC_TASK_VARIANTS(choose_task, choose_body)

/* For each channel in turn: `codes` [channels, groups] become the nearest centroids of `targets` [channels, groups * dim],
 * `errors` (same shape) become `weights` minus those centroids, 0 past out_features, and what they changed by times `factor`
 * [channels, channels] above the diagonal is added to the targets of the channels that follow. */
CC_EXPORT void cc_kmeans_feedback(const float *tiles, const int32_t *ids, const float *low, const float *high,
                                  const float *half_norms, float largest, int64_t num_tiles, const float *outer_low,
                                  const float *outer_high, const float *centroids, int32_t dim, const float *weights,
                                  float *targets, float *errors, uint16_t *codes, const float *factor, int64_t channels,
                                  int64_t groups, int64_t out_features, int threads, int level)
{
    feedback_job job = {{tiles, low, high, half_norms, ids, num_tiles, largest},
                        outer_low,
                        outer_high,
                        centroids,
                        weights,
                        targets,
                        errors,
                        codes,
                        factor,
                        channels,
                        groups,
                        groups * dim,
                        out_features,
                        dim};
    cc_parallel_for((groups + GROUPS - 1) / GROUPS, 1, threads, choose_task(level), &job);
}
