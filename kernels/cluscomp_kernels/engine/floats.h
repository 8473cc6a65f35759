/* The operations on float32, as plain C over vectors of 16, compiled once for each instruction set.
 *
 * The including file defines FN (attributes of every function) and
 *   static lanes half_lanes(const uint16_t *)              16 float16 as float32
 *   static void store_half_lanes(uint16_t *, lanes)        16 float32 rounded to float16
 * Sums are kept in 16 lanes and added in one fixed order, and no product is fused with a sum, so all instruction sets give the
 * same bits. */
#include <math.h>
#include <string.h>

#include "engine/engine.h"
#include "engine/kernels.h"

static inline FN lanes load_lanes(const float *from)
{
    lanes values;
    memcpy(&values, from, sizeof values);
    return values;
}

static inline FN void store_lanes(float *to, lanes values)
{
    memcpy(to, &values, sizeof values);
}

static inline FN lanes all_lanes(float value)
{
    return (lanes){0} + value;
}

static inline FN float sum_lanes(lanes values)
{
    float part[16];
    memcpy(part, &values, sizeof part);
    for (int width = 8; width; width /= 2)
        for (int i = 0; i < width; i++)
            part[i] += part[i + width];
    return part[0];
}

/* The first `count` of 16 values; the others are 0. */
static inline FN lanes load_some(const float *from, int64_t count)
{
    float values[16] = {0};
    memcpy(values, from, (size_t)count * sizeof *values);
    return load_lanes(values);
}

/* 16 values of a stored type, from element `at` on. */
static inline FN lanes load_stored(const void *from, int type, int64_t at)
{
    if (type == CC_FLOAT32)
        return load_lanes((const float *)from + at);
    if (type == CC_FLOAT16)
        return half_lanes((const uint16_t *)from + at);
    if (type == CC_BFLOAT16) {
        halves bits;
        memcpy(&bits, (const uint16_t *)from + at, sizeof bits);
        const words wide = __builtin_convertvector(bits, words) << 16;
        lanes values;
        memcpy(&values, &wide, sizeof values);
        return values;
    }
    bytes small;
    memcpy(&small, (const int8_t *)from + at, sizeof small);
    return __builtin_convertvector(small, lanes);
}

static inline FN lanes choose(integers mask, lanes yes, lanes no)
{
    integers a, b;
    memcpy(&a, &yes, sizeof a);
    memcpy(&b, &no, sizeof b);
    const integers chosen = (mask & a) | (~mask & b);
    lanes values;
    memcpy(&values, &chosen, sizeof values);
    return values;
}

/* e^x within two units of the last place: Cody and Waite's reduction, and the Taylor polynomial on [-ln(2)/2, ln(2)/2]. 0 below
 * -87, as if it were e^88 above 88. */
static inline FN lanes exponential(lanes x)
{
    const lanes low = all_lanes(-87), high = all_lanes(88);
    const integers tiny = x < low;
    x = choose(x > high, high, choose(tiny, low, x));
    const lanes magic = all_lanes(12582912.0f); /* 1.5 * 2^23: rounds to an integer */
    const lanes n = (x * 1.44269504f + magic) - magic;
    const lanes r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    lanes p = all_lanes(1.0f / 5040);
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    const integers power = (__builtin_convertvector(n, integers) + 127) << 23;
    lanes scale;
    memcpy(&scale, &power, sizeof scale);
    return choose(tiny, all_lanes(0), p * scale);
}

static FN void norm(const float *x, const float *weight, float eps, int64_t size, float *out)
{
    lanes squares = all_lanes(0);
    int64_t i = 0;
    for (; i + 16 <= size; i += 16)
        squares += load_lanes(x + i) * load_lanes(x + i);
    if (i < size)
        squares += load_some(x + i, size - i) * load_some(x + i, size - i);
    const float inverse = 1.0f / sqrtf(sum_lanes(squares) / (float)size + eps);
    for (i = 0; i + 16 <= size; i += 16)
        store_lanes(out + i, load_lanes(x + i) * inverse * load_lanes(weight + i));
    for (; i < size; i++)
        out[i] = x[i] * inverse * weight[i];
}

static inline FN lanes activated(lanes x, int activation)
{
    if (activation == CC_SILU)
        return x / (exponential(-x) + 1.0f);
    if (activation == CC_GELU_TANH) {
        /* x/2 (1 + tanh(u)) = x / (1 + e^-2u), u = sqrt(2/pi) (x + .044715 x^3) */
        const lanes u = (x + x * x * x * 0.044715f) * 0.797884561f;
        return x / (exponential(u * -2.0f) + 1.0f);
    }
    float values[16];
    store_lanes(values, x);
    for (int i = 0; i < 16; i++)
        values[i] *= 0.5f * (1.0f + erff(values[i] * 0.707106781f));
    return load_lanes(values);
}

static FN void gate(const float *gates, const float *up, int64_t size, int activation, float *out)
{
    int64_t i = 0;
    for (; i + 16 <= size; i += 16)
        store_lanes(out + i, activated(load_lanes(gates + i), activation) * load_lanes(up + i));
    if (i < size) {
        float rest[16];
        store_lanes(rest, activated(load_some(gates + i, size - i), activation) * load_some(up + i, size - i));
        memcpy(out + i, rest, (size_t)(size - i) * sizeof *out);
    }
}

static inline FN void dense_rows(const cc_linear *linear, int64_t row, const float *x, int tokens, int type, float *results)
{
    const int64_t size = linear->in_features, width = type == CC_FLOAT32 ? 4 : 2;
    const char *weights = (const char *)linear->values + row * size * width;
    lanes sums[4];
    for (int t = 0; t < tokens; t++)
        sums[t] = all_lanes(0);
    int64_t i = 0;
    for (; i + 16 <= size; i += 16) {
        const lanes w = load_stored(weights, type, i);
        for (int t = 0; t < tokens; t++)
            sums[t] += w * load_lanes(x + t * size + i);
    }
    if (i < size) {
        char rest[64] = {0};
        memcpy(rest, weights + i * width, (size_t)((size - i) * width));
        const lanes w = load_stored(rest, type, 0);
        for (int t = 0; t < tokens; t++)
            sums[t] += w * load_some(x + t * size + i, size - i);
    }
    for (int t = 0; t < tokens; t++)
        results[t] = sum_lanes(sums[t]);
}

static inline FN void dense_typed(const cc_linear *linear, int64_t row, const float *x, int64_t tokens, int type, float *results)
{
    int64_t t = 0;
    for (; t + 4 <= tokens; t += 4)
        dense_rows(linear, row, x + t * linear->in_features, 4, type, results + t);
    for (; t < tokens; t++)
        dense_rows(linear, row, x + t * linear->in_features, 1, type, results + t);
}

static FN void dense(const cc_linear *linear, int64_t row, const float *x, int64_t tokens, float *results)
{
    if (linear->value_type == CC_FLOAT32)
        dense_typed(linear, row, x, tokens, CC_FLOAT32, results);
    else if (linear->value_type == CC_FLOAT16)
        dense_typed(linear, row, x, tokens, CC_FLOAT16, results);
    else
        dense_typed(linear, row, x, tokens, CC_BFLOAT16, results);
}

static FN void dense_row(const cc_linear *linear, int64_t row, float *out)
{
    const int64_t size = linear->in_features, width = linear->value_type == CC_FLOAT32 ? 4 : 2;
    const char *weights = (const char *)linear->values + row * size * width;
    int64_t i = 0;
    for (; i + 16 <= size; i += 16)
        store_lanes(out + i, load_stored(weights, linear->value_type, i));
    if (i < size) {
        char rest[64] = {0};
        float values[16];
        memcpy(rest, weights + i * width, (size_t)((size - i) * width));
        store_lanes(values, load_stored(rest, linear->value_type, 0));
        memcpy(out + i, values, (size_t)(size - i) * sizeof *out);
    }
}

/* Largest magnitude of `size` values, and their copy as `type` with `step` elements between them. int8 is divided by the scale that is
 * returned. */
static FN float store_values(const float *x, int64_t size, int type, void *to, int64_t step)
{
    float scale = 1, inverse = 1;
    if (type == CC_INT8) {
        float most = 0;
        for (int64_t i = 0; i < size; i++)
            most = fabsf(x[i]) > most ? fabsf(x[i]) : most;
        scale = most / 127;
        inverse = most > 0 ? 127 / most : 0;
    }
    for (int64_t first = 0; first < size; first += 16) {
        const int64_t here = size - first < 16 ? size - first : 16;
        if (type == CC_FLOAT32)
            for (int64_t i = first; i < first + here; i++)
                ((float *)to)[i * step] = x[i];
        else if (type == CC_INT8)
            for (int64_t i = first; i < first + here; i++)
                ((int8_t *)to)[i * step] = (int8_t)lrintf(x[i] * inverse);
        else {
            uint16_t rounded[16];
            store_half_lanes(rounded, load_some(x + first, here));
            for (int64_t i = 0; i < here; i++)
                ((uint16_t *)to)[(first + i) * step] = rounded[i];
        }
    }
    return scale;
}

/* Scores of `tokens` queries for the 16 positions of each of `some` blocks of keys. */
static inline FN void score(const cc_attention *job, int64_t block, int tokens, int some, int type)
{
    const int64_t size = job->head_dim;
    lanes sums[4][4];
    for (int t = 0; t < tokens; t++)
        for (int b = 0; b < some; b++)
            sums[t][b] = all_lanes(0);
    for (int64_t d = 0; d < size; d++)
        for (int b = 0; b < some; b++) {
            const lanes keys = load_stored(job->keys, type, ((block + b) * size + d) * 16);
            for (int t = 0; t < tokens; t++)
                sums[t][b] += keys * job->queries[t * job->query_stride + d];
        }
    for (int b = 0; b < some; b++) {
        const lanes scale = type == CC_INT8 ? load_lanes(job->key_scales + (block + b) * 16) : all_lanes(1);
        for (int t = 0; t < tokens; t++)
            store_lanes(job->scores + t * job->score_stride + (block + b) * 16, sums[t][b] * scale);
    }
}

/* Turns the scores of a query for positions [begin, end) to weights that add up to 1; other positions get 0. */
static inline FN void weigh(const cc_attention *job, int t, int64_t first, int64_t last, int64_t begin, int64_t end, int type)
{
    float *scores = job->scores + t * job->score_stride;
    float most = -INFINITY;
    for (int64_t i = begin; i < end; i++)
        most = scores[i] > most ? scores[i] : most;
    for (int64_t i = first; i < begin; i++)
        scores[i] = -INFINITY;
    for (int64_t i = end; i < last; i++)
        scores[i] = -INFINITY;
    lanes total = all_lanes(0);
    for (int64_t i = first; i < last; i += 16) {
        const lanes weights = exponential(load_lanes(scores + i) - most);
        total += weights;
        store_lanes(scores + i, weights);
    }
    const float inverse = 1 / sum_lanes(total);
    for (int64_t i = first; i < last; i += 16) {
        lanes weights = load_lanes(scores + i) * inverse;
        if (type == CC_INT8)
            weights *= load_lanes(job->value_scales + i);
        store_lanes(scores + i, weights);
    }
}

/* Weighted values of `parts` parts of 16 features. */
static inline FN void mix(const cc_attention *job, int64_t first, int64_t begin, int64_t end, int tokens, int parts, int type)
{
    lanes sums[4][4];
    for (int t = 0; t < tokens; t++)
        for (int part = 0; part < parts; part++)
            sums[t][part] = all_lanes(0);
    for (int64_t i = begin; i < end; i++)
        for (int part = 0; part < parts; part++) {
            const lanes values = load_stored(job->values, type, i * job->value_stride + first + 16 * part);
            for (int t = 0; t < tokens; t++)
                sums[t][part] += values * job->scores[t * job->score_stride + i];
        }
    for (int t = 0; t < tokens; t++)
        for (int part = 0; part < parts; part++) {
            const int64_t left = job->head_dim - first - 16 * part;
            float values[16];
            store_lanes(values, sums[t][part]);
            memcpy(job->out + t * job->out_stride + first + 16 * part, values, (size_t)(left < 16 ? left : 16) * sizeof *values);
        }
}

static inline FN void attend_typed(const cc_attention *job, int tokens, int type)
{
    const int64_t window = job->window, last_end = job->position + tokens;
    int64_t begins[4], least = INT64_MAX;
    for (int t = 0; t < tokens; t++) {
        const int64_t end = job->position + t + 1;
        begins[t] = window && end > window ? end - window : 0;
        least = begins[t] < least ? begins[t] : least;
    }
    const int64_t first = least / 16, last = (last_end + 15) / 16, most = tokens == 1 ? 4 : 1;
    int64_t block = first;
    for (; block + most <= last; block += most)
        score(job, block, tokens, (int)most, type);
    for (; block < last; block++)
        score(job, block, tokens, 1, type);
    for (int t = 0; t < tokens; t++)
        weigh(job, t, first * 16, last * 16, begins[t], job->position + t + 1, type);
    const int64_t parts = (job->head_dim + 15) / 16, wide = tokens == 1 ? 4 : 2;
    int64_t part = 0;
    for (; part + wide <= parts; part += wide)
        mix(job, part * 16, least, last_end, tokens, (int)wide, type);
    for (; part < parts; part++)
        mix(job, part * 16, least, last_end, tokens, 1, type);
}

static FN void attend(const cc_attention *job)
{
    if (job->tokens == 4) {
        if (job->type == CC_FLOAT32)
            attend_typed(job, 4, CC_FLOAT32);
        else if (job->type == CC_FLOAT16)
            attend_typed(job, 4, CC_FLOAT16);
        else
            attend_typed(job, 4, CC_INT8);
        return;
    }
    for (int64_t t = 0; t < job->tokens; t++) {
        cc_attention one = *job;
        one.queries += t * job->query_stride;
        one.out += t * job->out_stride;
        one.position += t;
        if (job->type == CC_FLOAT32)
            attend_typed(&one, 1, CC_FLOAT32);
        else if (job->type == CC_FLOAT16)
            attend_typed(&one, 1, CC_FLOAT16);
        else
            attend_typed(&one, 1, CC_INT8);
    }
}
