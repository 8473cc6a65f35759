/* Centroids in tiles of CC_LANES, and the squared distances that define all results.
 *
 * The distance of x and c is ((x[0]-c[0])^2 + (x[1]-c[1])^2) + ... in float32, with each operation rounded. Rounding is
 * monotone, so the distance to a bounding box, computed in the same order, never exceeds the distance to a point in the box:
 * pruning by boxes needs no safety margin. Pruning by the triangle inequality does; see CC_SLACK. */
#ifndef CLUSCOMP_KMEANS_TILES_H
#define CLUSCOMP_KMEANS_TILES_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "kmeans/variants.h"

#define CC_MAX_DIM 64
#define CC_NO_ID INT32_MAX

/* A float32 distance over at most CC_MAX_DIM dimensions has a relative error of at most 3e-6, or an absolute error of at most
 * 1e-18 if squares underflow. A bound from the triangle inequality holds for computed distances if it is widened by these. */
#define CC_SLACK 1.00001f
#define CC_TINY 1e-18f

/* `tiles` [num_tiles, dim, CC_LANES] and `ids` [num_tiles, CC_LANES] hold the centroids, ordered so that near ones are close to
 * each other; the last tile is padded with far points of id CC_NO_ID. `low` and `high` [ceil(num_tiles / CC_LANES), dim,
 * CC_LANES] are the corners of the tiles' bounding boxes, in tiles too. `half_norms` [num_tiles, CC_LANES] is half the squared
 * norm of each centroid, `largest` the largest squared norm. */
typedef struct {
    const float *tiles, *low, *high, *half_norms;
    const int32_t *ids;
    int64_t num_tiles;
    float largest;
} cc_tiles;

static CC_INLINE float cc_distance(const float *a, const float *b, int dim)
{
    float sum = 0.0f;
    for (int d = 0; d < dim; d++) {
        float difference = a[d] - b[d];
        sum += difference * difference;
    }
    return sum;
}

static CC_INLINE void cc_tile_distances(const float *x, const float *tile, float *out, int dim)
{
    float sum[CC_LANES] = {0};
    for (int d = 0; d < dim; d++) {
        const float *row = tile + d * CC_LANES;
        CC_EACH_LANE(lane) {
            float difference = x[d] - row[lane];
            sum[lane] += difference * difference;
        }
    }
    memcpy(out, sum, sizeof sum);
}

/* The score of c for x is x . c - |c|^2 / 2, which equals |x|^2 / 2 - distance / 2 up to rounding. It is cheaper than a
 * distance and sufficient to skip tiles without a near centroid. */
static CC_INLINE void cc_tile_scores(const float *x, const float *tile, const float *half_norms, float *out, int dim,
                                     int fuses)
{
    float sum[CC_LANES];
    CC_EACH_LANE(lane) sum[lane] = -half_norms[lane];
    for (int d = 0; d < dim; d++) {
        const float *row = tile + d * CC_LANES;
        if (fuses) {
            CC_EACH_LANE(lane) sum[lane] = fmaf(x[d], row[lane], sum[lane]);
        } else {
            CC_EACH_LANE(lane) sum[lane] += x[d] * row[lane];
        }
    }
    memcpy(out, sum, sizeof sum);
}

/* Returns a lower bound of the scores of centroids within `distance` of x. A score and half a distance each have an error of at
 * most (dim + 2) 2^-24 (|x|^2 + |c|^2); the margin is four times the sum of both. */
static CC_INLINE float cc_least_score(const float *x, float distance, float largest, int dim)
{
    float norm = 0.0f;
    for (int d = 0; d < dim; d++)
        norm += x[d] * x[d];
    return 0.5f * norm - 0.5f * distance - (float)(dim + 4) * 0x1p-21f * (norm + largest) - CC_TINY * CC_TINY;
}

/* Lower bounds of the distances from a box to CC_LANES boxes; a point is a box with low = high. */
static CC_INLINE void cc_box_distances(const float *low, const float *high, const float *lows, const float *highs,
                                       float *out, int dim)
{
    float sum[CC_LANES] = {0};
    for (int d = 0; d < dim; d++) {
        const float *row_low = lows + d * CC_LANES, *row_high = highs + d * CC_LANES;
        CC_EACH_LANE(lane) {
            float under = row_low[lane] - high[d];
            float over = low[d] - row_high[lane];
            float gap = under > over ? under : over;
            gap = gap > 0.0f ? gap : 0.0f;
            sum[lane] += gap * gap;
        }
    }
    memcpy(out, sum, sizeof sum);
}

static CC_INLINE int32_t cc_bits(float value)
{
    int32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static CC_INLINE float cc_float(int32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* The nearest centroid found so far in each lane. Distances are stored as their bits, because an integer minimum vectorises;
 * the bits of numbers that are not negative have the order of the numbers. */
typedef struct {
    int32_t distance[CC_LANES], id[CC_LANES];
} cc_best;

static CC_INLINE void cc_best_start(cc_best *best, float distance, int32_t id)
{
    CC_EACH_LANE(lane) {
        best->distance[lane] = cc_bits(distance);
        best->id[lane] = id;
    }
}

static CC_INLINE void cc_best_update(cc_best *best, const float *distances, const int32_t *ids)
{
    int32_t bits[CC_LANES];
    memcpy(bits, distances, sizeof bits);
    CC_EACH_LANE(lane) {
        int32_t old = best->distance[lane], old_id = best->id[lane], id = ids[lane];
        int nearer = (bits[lane] < old) | ((bits[lane] == old) & (id < old_id));
        best->distance[lane] = nearer ? bits[lane] : old;
        best->id[lane] = nearer ? id : old_id;
    }
}

static CC_INLINE int32_t cc_best_distance(const cc_best *best)
{
    int32_t least = best->distance[0];
    CC_EACH_LANE(lane)
        least = best->distance[lane] < least ? best->distance[lane] : least;
    return least;
}

static CC_INLINE int32_t cc_best_id(const cc_best *best, int32_t distance)
{
    int32_t least = CC_NO_ID;
    CC_EACH_LANE(lane) {
        int32_t id = best->distance[lane] == distance ? best->id[lane] : CC_NO_ID;
        least = id < least ? id : least;
    }
    return least;
}

#endif
