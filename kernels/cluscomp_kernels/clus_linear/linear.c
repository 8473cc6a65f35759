/* y = x @ W^T on prepared weights, decoding and row gathering; see clus_linear.h for the layout. */
#include "clus_linear/clus_linear.h"

#include <stddef.h>
#include <string.h>

#include "native/threads.h"

/* Mirrored field by field in native_kernel.py. */
typedef struct {
    const void *codes;
    const void *codebook;
    const float *row_scale; /* [out_features] or NULL */
    const float *bias;      /* [out_features] or NULL */
    int64_t in_features;
    int64_t out_features;
    int32_t cluster_dim;
    int32_t row_log2;
    int32_t value_type;
    int32_t code_bytes;
    int32_t variant;
    int32_t threads;
} cc_weight;

enum { CC_PLAIN, CC_AVX2, CC_AVX512 };

/* Returns 1 if this machine supports a variant: 0 plain C, 1 AVX2 + FMA + F16C, 2 AVX-512. */
CC_EXPORT int cc_clus_supported(int variant)
{
    if (variant == CC_PLAIN)
        return 1;
#if CC_X86
    if (variant == CC_AVX2)
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (variant == CC_AVX512)
        return cc_clus_supported(CC_AVX2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
    return 0;
}

static cc_kernels kernels_of(const cc_weight *weight)
{
#if CC_X86
    if (weight->variant == CC_AVX512)
        return cc_clus_avx512(weight->value_type, weight->row_log2, weight->code_bytes);
    if (weight->variant == CC_AVX2)
        return cc_clus_avx2(weight->value_type, weight->row_log2, weight->code_bytes);
#endif
    return cc_clus_plain(weight->value_type, weight->row_log2, weight->code_bytes);
}

static int64_t groups_per_tile(const cc_weight *weight)
{
    return CC_LANES >> weight->row_log2;
}

static int64_t outputs_per_tile(const cc_weight *weight)
{
    return groups_per_tile(weight) * weight->cluster_dim;
}

static int64_t tiles_of(const cc_weight *weight)
{
    return (weight->out_features + outputs_per_tile(weight) - 1) / outputs_per_tile(weight);
}

static const char *record_at(const cc_weight *weight, int64_t tile, int64_t channel)
{
    return (const char *)weight->codes + (tile * weight->in_features + channel) * groups_per_tile(weight) * weight->code_bytes;
}

/* Copies the lanes of a tile to `out`, which begins at the tile's first output, without padding and outputs past the end. */
static void compact_lanes(const cc_weight *weight, int64_t tile, const float *lanes, float *out)
{
    const int64_t row = (int64_t)1 << weight->row_log2, dim = weight->cluster_dim;
    int64_t left = weight->out_features - tile * outputs_per_tile(weight);
    if (left > outputs_per_tile(weight))
        left = outputs_per_tile(weight);
    if (dim == row) {
        memcpy(out, lanes, (size_t)left * sizeof *out);
        return;
    }
    for (; left > 0; left -= dim, lanes += row, out += dim)
        for (int64_t lane = 0; lane < dim && lane < left; lane++)
            out[lane] = lanes[lane];
}

static void finish_tile(const cc_weight *weight, int64_t tile, const float *lanes, float *y)
{
    const int64_t begin = tile * outputs_per_tile(weight);
    int64_t end = begin + outputs_per_tile(weight);
    if (end > weight->out_features)
        end = weight->out_features;
    compact_lanes(weight, tile, lanes, y + begin);
    if (weight->row_scale)
        for (int64_t out = begin; out < end; out++)
            y[out] *= weight->row_scale[out];
    if (weight->bias)
        for (int64_t out = begin; out < end; out++)
            y[out] += weight->bias[out];
}

typedef struct {
    const cc_weight *weight;
    cc_kernels kernels;
    const float *x;
    float *y;
    int64_t tokens;
} linear_job;

static void decoded_tile(const linear_job *job, int64_t tile, const float *x, int64_t tokens, float *lanes)
{
    const cc_weight *weight = job->weight;
    float block[CC_BLOCK * CC_LANES];
    memset(lanes, 0, (size_t)tokens * CC_LANES * sizeof *lanes);
    for (int64_t channel = 0; channel < weight->in_features; channel += CC_BLOCK) {
        const int64_t left = weight->in_features - channel, channels = left < CC_BLOCK ? left : CC_BLOCK;
        job->kernels.decode(record_at(weight, tile, channel), weight->codebook, channels, block);
        job->kernels.multiply(block, channels, x + channel, weight->in_features, tokens, lanes);
    }
}

static void linear_tiles(void *arg, int64_t begin, int64_t end, int thread)
{
    const linear_job *job = arg;
    const cc_weight *weight = job->weight;
    (void)thread;
    for (int64_t first = 0; first < job->tokens; first += CC_TOKENS) {
        const int64_t tokens = job->tokens - first < CC_TOKENS ? job->tokens - first : CC_TOKENS;
        const float *x = job->x + first * weight->in_features;
        /* Two or three tokens are filled up to four with copies of the last: free, since gathering is the bottleneck. */
        const float *rows[4];
        for (int64_t n = 0; n < 4; n++)
            rows[n] = x + (n < tokens ? n : tokens - 1) * weight->in_features;
        for (int64_t tile = begin; tile < end; tile++) {
            float lanes[CC_TOKENS * CC_LANES];
            if (tokens == 1)
                job->kernels.dot(record_at(weight, tile, 0), weight->codebook, rows, weight->in_features, lanes);
            else if (tokens <= 4 && job->kernels.dot4)
                job->kernels.dot4(record_at(weight, tile, 0), weight->codebook, rows, weight->in_features, lanes);
            else
                decoded_tile(job, tile, x, tokens, lanes);
            for (int64_t token = 0; token < tokens; token++)
                finish_tile(weight, tile, lanes + token * CC_LANES, job->y + (first + token) * weight->out_features);
        }
    }
}

/* y[tokens, out_features] = (x[tokens, in_features] @ W^T) * row_scale + bias, all contiguous float32. */
CC_EXPORT void cc_clus_linear(const cc_weight *weight, const float *x, int64_t tokens, float *y)
{
    linear_job job = {weight, kernels_of(weight), x, y, tokens};
    cc_parallel_for(tokens > 0 ? tiles_of(weight) : 0, 1, weight->threads, linear_tiles, &job);
}

typedef struct {
    const cc_weight *weight;
    cc_kernels kernels;
    float *dense;
    int64_t first_tile, end_tile, stride;
} decode_job;

static void decode_channels(void *arg, int64_t begin, int64_t end, int thread)
{
    const decode_job *job = arg;
    const cc_weight *weight = job->weight;
    float block[CC_BLOCK * CC_LANES];
    (void)thread;
    for (int64_t first = begin; first < end; first += CC_BLOCK) {
        const int64_t channels = end - first < CC_BLOCK ? end - first : CC_BLOCK;
        for (int64_t tile = job->first_tile; tile < job->end_tile; tile++) {
            float *out = job->dense + first * job->stride + (tile - job->first_tile) * outputs_per_tile(weight);
            job->kernels.decode(record_at(weight, tile, first), weight->codebook, channels, block);
            for (int64_t i = 0; i < channels; i++)
                compact_lanes(weight, tile, block + i * CC_LANES, out + i * job->stride);
        }
    }
}

/* Decodes the columns of tiles [first_tile, end_tile) of W^T to float32 dense[in_features, stride], without row scale. */
CC_EXPORT void cc_clus_decode(const cc_weight *weight, int64_t first_tile, int64_t end_tile, float *dense, int64_t stride)
{
    decode_job job = {weight, kernels_of(weight), dense, first_tile, end_tile, stride};
    cc_parallel_for(weight->in_features, 16, weight->threads, decode_channels, &job);
}

typedef struct {
    const cc_weight *weight;
    cc_kernels kernels;
    const int64_t *ids;
    float *rows;
} rows_job;

/* Decodes a whole record to use one of its lanes. Token lookups read few rows per call, so a faster path would not pay. */
static void gather_rows(void *arg, int64_t begin, int64_t end, int thread)
{
    const rows_job *job = arg;
    const cc_weight *weight = job->weight;
    const int64_t dim = weight->cluster_dim;
    (void)thread;
    for (int64_t n = begin; n < end; n++) {
        const int64_t out = job->ids[n], tile = out / outputs_per_tile(weight), local = out % outputs_per_tile(weight);
        const int64_t lane = ((local / dim) << weight->row_log2) + local % dim;
        float block[CC_BLOCK * CC_LANES], *row = job->rows + n * weight->in_features;
        for (int64_t first = 0; first < weight->in_features; first += CC_BLOCK) {
            const int64_t left = weight->in_features - first, channels = left < CC_BLOCK ? left : CC_BLOCK;
            job->kernels.decode(record_at(weight, tile, first), weight->codebook, channels, block);
            for (int64_t i = 0; i < channels; i++)
                row[first + i] = block[i * CC_LANES + lane];
        }
        if (weight->row_scale)
            for (int64_t i = 0; i < weight->in_features; i++)
                row[i] *= weight->row_scale[out];
    }
}

/* rows[count, in_features] = W[ids] times the row scale. The caller checks 0 <= ids < out_features. */
CC_EXPORT void cc_clus_rows(const cc_weight *weight, const int64_t *ids, int64_t count, float *rows)
{
    rows_job job = {weight, kernels_of(weight), ids, rows};
    cc_parallel_for(count, 1, weight->threads, gather_rows, &job);
}
