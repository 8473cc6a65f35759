/* Chooses codes channel by channel, feeding the error of each channel back into the targets of the following ones.
 *
 * Vectors lie along the rows of `targets` [channels, width], so groups of columns are independent. Each thread takes some
 * groups through all channels; results do not depend on the number of threads. */
#include "kmeans/tiles.h"

/* Groups of columns processed together: enough to make the feedback loop efficient, and few enough that their part of all
 * channels stays in the cache. */
#define GROUPS 16

typedef struct {
    cc_tiles space;
    /* Corners of boxes around CC_LANES tiles' boxes each, [ceil(num_tiles / CC_LANES / CC_LANES), dim, CC_LANES]. */
    const float *outer_low, *outer_high;
    const float *centroids;
    const float *weights;
    /* Weight of the squared differences of each column [width]. */
    const float *importance;
    float *targets, *errors;
    uint16_t *codes;
    const float *factor;
    int64_t channels, groups, width, out_features;
    int dim;
} feedback_job;

/* cc_tile_distances with weights: rounding stays monotone. */
static CC_INLINE void weighted_tile_distances(const float *x, const float *importance, const float *tile, float *out, int dim)
{
    float sum[CC_LANES] = {0};
    for (int d = 0; d < dim; d++) {
        const float *row = tile + d * CC_LANES;
        float point = x[d], weight = importance[d];
        CC_EACH_LANE(lane)
        {
            float difference = point - row[lane];
            sum[lane] += difference * difference * weight;
        }
    }
    memcpy(out, sum, sizeof sum);
}

/* Distances are kept as their bits, as in cc_best: their integer minimum vectorises. */
typedef struct {
    int32_t distance, id;
} nearest_centroid;

static CC_INLINE void search_tile(const cc_tiles *space, const float *x, const float *importance, int64_t tile,
                                  nearest_centroid *best, int dim)
{
    float distances[CC_LANES];
    int32_t bits[CC_LANES];
    const int32_t *ids = space->ids + tile * CC_LANES;
    weighted_tile_distances(x, importance, space->tiles + tile * dim * CC_LANES, distances, dim);
    memcpy(bits, distances, sizeof bits);
    int32_t least = bits[0], least_id = CC_NO_ID;
    CC_EACH_LANE(lane) least = bits[lane] < least ? bits[lane] : least;
    if (least > best->distance)
        return;
    CC_EACH_LANE(lane)
    {
        int32_t id = bits[lane] == least ? ids[lane] : CC_NO_ID;
        least_id = id < least_id ? id : least_id;
    }
    if (least < best->distance || least_id < best->id) {
        best->distance = least;
        best->id = least_id;
    }
}

/* Lower bounds of the distances from x to CC_LANES boxes: cc_box_distances for a point, written so that it vectorises. */
static CC_INLINE void point_box_distances(const float *x, const float *importance, const float *lows, const float *highs,
                                          int64_t box, int32_t *out, int dim)
{
    float sum[CC_LANES] = {0};
    for (int d = 0; d < dim; d++) {
        const float *low = lows + (box * dim + d) * CC_LANES, *high = highs + (box * dim + d) * CC_LANES;
        float point = x[d], weight = importance[d];
        CC_EACH_LANE(lane)
        {
            /* u + |u| is exactly twice the greater of u and 0, and one of the two is 0. */
            float under = low[lane] - point, over = point - high[lane];
            float gap = 0.5f * ((under + fabsf(under)) + (over + fabsf(over)));
            sum[lane] += gap * gap * weight;
        }
    }
    memcpy(out, sum, sizeof sum);
}

/* Returns a lane whose bound is about the smallest: the lane's number replaces the low bits of each bound in the comparison. */
static CC_INLINE int least_lane(const int32_t *bounds)
{
    int32_t least = INT32_MAX;
    CC_EACH_LANE(lane)
    {
        int32_t key = (bounds[lane] & ~(CC_LANES - 1)) | lane;
        least = key < least ? key : least;
    }
    return least & (CC_LANES - 1);
}

/* One bit for each lane whose bound does not exceed the limit. */
static CC_INLINE uint32_t lanes_within(const int32_t *bounds, int32_t limit)
{
    uint32_t lanes = 0;
    CC_EACH_LANE(lane) lanes |= (uint32_t)(bounds[lane] <= limit) << lane;
    return lanes;
}

static CC_INLINE int first_lane(uint32_t lanes)
{
#if defined(__GNUC__)
    return __builtin_ctz(lanes);
#else
    int lane = 0;
    while (!(lanes >> lane & 1))
        lane++;
    return lane;
#endif
}

/* Searches three levels of boxes: the nearest box at every level gives a first centroid, then all boxes that may hold a nearer
 * one are searched. Returns 0 if x is not finite, since no distance is then comparable. */
static CC_INLINE int32_t find_nearest(const feedback_job *job, const float *x, const float *importance, int dim)
{
    const cc_tiles *space = &job->space;
    int64_t inner_boxes = (space->num_tiles + CC_LANES - 1) / CC_LANES, outer_boxes = (inner_boxes + CC_LANES - 1) / CC_LANES;
    int32_t outer[CC_LANES * CC_LANES], inner[CC_LANES];
    int64_t nearest_inner = 0;
    nearest_centroid best = {INT32_MAX, CC_NO_ID};
    for (int64_t box = 0; box < outer_boxes; box++) {
        point_box_distances(x, importance, job->outer_low, job->outer_high, box, outer + box * CC_LANES, dim);
        int64_t lane = box * CC_LANES + least_lane(outer + box * CC_LANES);
        nearest_inner = outer[lane] < outer[nearest_inner] ? lane : nearest_inner;
    }
    point_box_distances(x, importance, space->low, space->high, nearest_inner, inner, dim);
    search_tile(space, x, importance, nearest_inner * CC_LANES + least_lane(inner), &best, dim);
    for (int64_t box = 0; box < outer_boxes; box++) {
        uint32_t within = lanes_within(outer + box * CC_LANES, best.distance);
        for (; within != 0; within &= within - 1) {
            int64_t candidate = box * CC_LANES + first_lane(within);
            if (outer[candidate] > best.distance || candidate >= inner_boxes)
                continue;
            point_box_distances(x, importance, space->low, space->high, candidate, inner, dim);
            for (uint32_t lanes = lanes_within(inner, best.distance); lanes != 0; lanes &= lanes - 1) {
                int lane = first_lane(lanes);
                if (inner[lane] <= best.distance && candidate * CC_LANES + lane < space->num_tiles)
                    search_tile(space, x, importance, candidate * CC_LANES + lane, &best, dim);
            }
        }
    }
    return best.id == CC_NO_ID ? 0 : best.id;
}

static CC_INLINE void choose_groups(const feedback_job *job, int64_t first, int64_t last, int dim)
{
    int64_t begin = first * dim, length = (last - first) * dim, width = job->width;
    for (int64_t channel = 0; channel < job->channels; channel++) {
        const float *weights = job->weights + channel * width + begin;
        float *restrict errors = job->errors + channel * width + begin;
        const float *targets = job->targets + channel * width + begin;
        for (int64_t group = 0; group < last - first; group++) {
            int32_t code = find_nearest(job, targets + group * dim, job->importance + begin + group * dim, dim);
            const float *centroid = job->centroids + (int64_t)code * dim;
            job->codes[channel * job->groups + first + group] = (uint16_t)code;
            for (int d = 0; d < dim; d++) {
                int64_t i = group * dim + d;
                errors[i] = begin + i < job->out_features ? weights[i] - centroid[d] : 0.0f;
            }
        }
        for (int64_t later = channel + 1; later < job->channels; later++) {
            float share = job->factor[channel * job->channels + later];
            float *restrict row = job->targets + later * width + begin;
            for (int64_t i = 0; i < length; i++)
                row[i] += share * errors[i];
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

/* For each channel in turn:
 * - sets `codes` [channels, groups] to the nearest centroids of `targets` [channels, groups * dim], with squared differences
 *   weighted by `importance` [groups * dim];
 * - sets `errors` [channels, groups * dim] to `weights` minus these centroids, and to 0 from column out_features on;
 * - adds the errors times `factor` [channels, channels] to the targets of the following channels. */
CC_EXPORT void cc_kmeans_feedback(const float *tiles, const int32_t *ids, const float *low, const float *high,
                                  const float *half_norms, float largest, int64_t num_tiles, const float *outer_low,
                                  const float *outer_high, const float *centroids, int32_t dim, const float *weights,
                                  const float *importance, float *targets, float *errors, uint16_t *codes, const float *factor,
                                  int64_t channels, int64_t groups, int64_t out_features, int threads, int level)
{
    feedback_job job = {{tiles, low, high, half_norms, ids, num_tiles, largest},
                        outer_low,
                        outer_high,
                        centroids,
                        weights,
                        importance,
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
