/* The engine: a whole decoding step, or a chunk of a prompt, of a decoder in one call.
 *
 * A decoder is a table of branches that add to the residual stream, one after another, as described in
 * cluscomp_formats.architectures: stream + post_norm(part(norm(stream))), where the part is attention, a gated feed-forward
 * network or experts. Structures are mirrored field by field in structures.py. All pointers stay the caller's, and must be valid
 * as long as the engine is; float arrays are float32. Nothing here allocates per token. */
#ifndef CLUSCOMP_ENGINE_H
#define CLUSCOMP_ENGINE_H

#include "engine/matrix.h"

#if defined(_WIN32)
#define CC_EXPORT __declspec(dllexport)
#else
#define CC_EXPORT __attribute__((visibility("default")))
#endif

enum { CC_FLOAT32, CC_FLOAT16, CC_BFLOAT16, CC_INT8 };
enum { CC_ATTENTION, CC_FEED_FORWARD, CC_EXPERTS };
enum { CC_SILU, CC_GELU, CC_GELU_TANH };
enum { CC_NO_LOGITS, CC_LAST_LOGITS, CC_ALL_LOGITS };

/* y = x W^T + bias. Clustered: W is the sum of `num_stages` matrices, of which only the first may have a bias. Dense: num_stages
 * is 0, and `values` are [out_features, in_features] of `value_type`. */
typedef struct {
    const cc_matrix *stages;
    const void *values;
    const float *bias;
    int64_t in_features;
    int64_t out_features;
    int32_t num_stages;
    int32_t value_type;
} cc_linear;

/* x / sqrt(mean(x^2) + eps) * weight; no norm if the weight is NULL. */
typedef struct {
    const float *weight;
    float eps;
    int32_t reserved;
} cc_norm;

/* A branch. Fields that its kind does not have are 0. */
typedef struct {
    int32_t kind;
    /* Attention: */
    int32_t heads;
    int32_t kv_heads;
    int32_t head_dim;
    int32_t rope;     /* index of the inverse frequencies */
    int32_t window;   /* positions that a token sees, itself included; 0 for all */
    /* Feed-forward and experts: */
    int32_t activation;
    int32_t num_experts;
    int32_t top_k;
    int32_t normalised; /* 1: the weights of the experts taken are divided by their sum */
    float scale;        /* of attention scores */
    int32_t reserved;
    cc_norm norm;
    cc_norm post_norm;
    cc_norm query_norm; /* per head */
    cc_norm key_norm;
    /* query, key, value and output of attention; gate, up and down, [num_experts] each, of the others; the router of experts. */
    const cc_linear *query;
    const cc_linear *key;
    const cc_linear *value;
    const cc_linear *output;
    const cc_linear *gate;
    const cc_linear *up;
    const cc_linear *down;
    const cc_linear *router;
} cc_branch;

typedef struct {
    const cc_branch *branches;
    const cc_linear *embedding;
    const cc_linear *head;
    const double *const *inverse_frequencies; /* [num_ropes], each [head_dim / 2]: radians per position */
    cc_norm norm;
    int64_t num_branches;
    int64_t hidden_size;
    int64_t vocab_size;
    float embedding_scale;
    int32_t num_ropes;
} cc_decoder;

typedef struct cc_engine cc_engine;
typedef struct cc_cache cc_cache;

/* Whether this machine has the instructions of a variant (CC_PLAIN, CC_AVX2, CC_AVX512, CC_AMX). */
CC_EXPORT int cc_engine_supported(int variant);

/* NULL if there is no memory. `threads` counts the caller. */
CC_EXPORT cc_engine *cc_engine_new(const cc_decoder *decoder, int variant, int threads);
CC_EXPORT void cc_engine_free(cc_engine *engine);

/* Keys and values of all attentions for `capacity` positions, stored as `value_type` (float32, float16 or int8). Memory is used
 * as positions are filled. NULL if there is none. */
CC_EXPORT cc_cache *cc_cache_new(const cc_engine *engine, int64_t capacity, int value_type);
CC_EXPORT void cc_cache_free(cc_cache *cache);
CC_EXPORT int64_t cc_cache_length(const cc_cache *cache);
/* Forgets the positions from `length` on. */
CC_EXPORT void cc_cache_truncate(cc_cache *cache, int64_t length);

/* Runs `tokens` ids (checked by the caller: 0 <= id < vocab_size; they fit the cache) after the positions in the cache, and adds
 * them to it. Logits are [vocab_size] of the last token, [tokens, vocab_size], or none, as `wanted` says. Returns 0, or -1 if
 * there is no memory. One call at a time runs; others wait. */
CC_EXPORT int cc_engine_run(cc_engine *engine, cc_cache *cache, const int32_t *ids, int64_t tokens, int wanted, float *logits);

/* The same for the residual stream [tokens, hidden_size] after the first `branches` branches; 0 gives the embedding. The cache must be
 * used for nothing else. For tests. */
CC_EXPORT int cc_engine_stream(cc_engine *engine, cc_cache *cache, const int32_t *ids, int64_t tokens, int64_t branches,
                               float *stream);

/* Threads and kernels for linears alone, of at most 64 stages. */
typedef struct cc_pool cc_pool;
CC_EXPORT cc_pool *cc_pool_new(int variant, int threads);
CC_EXPORT void cc_pool_free(cc_pool *pool);
/* y [tokens, out_features] for x [tokens, in_features]. Returns 0, or -1 if there is no memory. */
CC_EXPORT int cc_linear_apply(cc_pool *pool, const cc_linear *linear, const float *x, int64_t tokens, float *y);
/* Rows of the weight, which the caller has checked, as [count, in_features]. */
CC_EXPORT void cc_linear_rows(const cc_pool *pool, const cc_linear *linear, const int64_t *ids, int64_t count, float *rows);

/* Reads all of `data` with the pool's threads, to measure how fast that is; returns the exclusive or of its 64-bit words. */
CC_EXPORT uint64_t cc_pool_read(cc_pool *pool, const void *data, int64_t bytes);

/* The codebook [num_clusters, dim] as the kernels of a variant read it. cc_entries_layout fills in `dim`, `planes`, `pitch`, `bits`
 * and `in_registers` of a matrix, and returns the bytes of the entries, which begin at a multiple of 64. cc_make_entries writes
 * them and returns the value of an entry of 1. With `wide`, entries have 16 bits, to which values are rounded; otherwise values
 * are integers of int8. */
CC_EXPORT int64_t cc_entries_layout(cc_matrix *matrix, int64_t num_clusters, int32_t dim, int32_t wide, int32_t variant);
CC_EXPORT float cc_make_entries(const cc_matrix *layout, const float *values, int64_t num_clusters, int32_t wide,
                                uint8_t *entries);

/* The largest of `count` codes of `bits` bits in a stream. */
CC_EXPORT uint32_t cc_largest_code(const uint8_t *stream, int64_t count, int32_t bits);

#endif
