/* See engine.h. */
#include "engine/engine.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "engine/product.h"

enum {
    CHUNK = 128, /* tokens of a prompt that go through the decoder together, at most */
    QUERIES = 4, /* tokens of an item of attention */
    MAX_STAGES = 64, /* of a matrix */
};

/* Keys and values of one attention. Keys are [kv_heads][blocks][head_dim][16 positions], so that 16 scores are computed at once,
 * values [kv_heads][capacity][head_dim rounded up to 16]. */
typedef struct {
    void *keys;
    void *values;
    float *key_scales; /* [kv_heads][capacity] of int8, else NULL */
    float *value_scales;
} layer_cache;

struct cc_cache {
    layer_cache *layers; /* by branch; those of other kinds are empty */
    int64_t num_branches, capacity, length;
    int type, width;
};

struct cc_engine {
    const cc_decoder *decoder;
    const cc_kernels *kernels;
    cc_team *team;
    int64_t chunk; /* tokens that the buffers hold */
    int64_t max_capacity;
    int64_t thread_bytes;
    uint8_t *scratch; /* [threads][thread_bytes] */
    float *scores;    /* [threads][QUERIES][max_capacity] */
    float *stream;    /* [chunk][hidden_size] */
    float *normed;    /* [chunk][hidden_size] */
    float *first;     /* [chunk][widest]: queries, gates */
    float *second;    /* [chunk][widest]: keys, up */
    float *third;     /* [chunk][widest]: values, mixed heads */
    float *output;    /* [chunk][hidden_size]: outputs of a part before its post norm, or of experts */
    float *turns;     /* [num_ropes][chunk][head_dim]: cosines, then sines */
    float *gathered;  /* [chunk][hidden_size]: normed tokens of an expert, with their blocks */
    cc_block *gathered_blocks;
    float *logits;    /* of routers [chunk][num_experts] */
    float *shares;    /* [chunk][top_k] */
    int32_t *chosen;  /* [chunk][top_k] */
    int32_t *members; /* [chunk]: tokens of an expert */
    cc_block *blocks; /* [chunk][widest / CC_BLOCK] */
    cc_block *inner;  /* the same, for the inputs of output projections */
    int64_t widest, inner_stride, outer_stride, max_experts, max_top_k, head_dim, phases;
};

typedef struct {
    cc_engine *engine;
    cc_cache *cache;
    const int32_t *ids;
    int64_t tokens; /* of this chunk */
    int64_t branches;
    int wanted;
    float *logits;
} run;

static int64_t larger(int64_t a, int64_t b)
{
    return a > b ? a : b;
}

static int64_t rounded_up(int64_t value, int64_t multiple)
{
    return (value + multiple - 1) / multiple * multiple;
}

/* ---- Operations; each is a phase or several. ---- */

/* normed = norm(stream), and its blocks. */
static void norm_and_quantise(const run *job, cc_worker *worker, const cc_norm *norm, int64_t first, int64_t tokens)
{
    const cc_engine *engine = job->engine;
    const int64_t hidden = engine->decoder->hidden_size;
    for (int64_t t = cc_first(worker, tokens); t >= 0; t = cc_next(worker, tokens)) {
        float *out = engine->normed + t * hidden;
        engine->kernels->norm(engine->stream + (first + t) * hidden, norm->weight, norm->eps, hidden, out);
        engine->kernels->quantise(out, hidden, engine->blocks + t * engine->outer_stride);
    }
}

static cc_product outer_product(const cc_engine *engine, const cc_linear *linear, float *y)
{
    const cc_product product = {linear, engine->blocks, engine->normed, y, engine->outer_stride, linear->out_features, 0};
    return product;
}

/* The output projection of `x` [tokens, in_features], whose blocks are the inner ones: added to the stream, at once or after the
 * post norm. */
static void project(const run *job, cc_worker *worker, const cc_branch *branch, const cc_linear *linear, const float *x,
                    uint8_t *scratch)
{
    const cc_engine *engine = job->engine;
    const int64_t hidden = engine->decoder->hidden_size;
    const int direct = branch->post_norm.weight == NULL;
    const cc_product product = {linear, engine->inner, x, direct ? engine->stream : engine->output, engine->inner_stride, hidden, direct};
    cc_multiply(worker, engine->kernels, &product, 1, job->tokens, scratch);
}

static void add_output(const run *job, cc_worker *worker, const cc_branch *branch)
{
    const cc_engine *engine = job->engine;
    const int64_t hidden = engine->decoder->hidden_size;
    for (int64_t t = cc_first(worker, job->tokens); t >= 0; t = cc_next(worker, job->tokens)) {
        float *output = engine->output + t * hidden, *stream = engine->stream + t * hidden;
        if (branch->post_norm.weight)
            engine->kernels->norm(output, branch->post_norm.weight, branch->post_norm.eps, hidden, output);
        for (int64_t i = 0; i < hidden; i++)
            stream[i] += output[i];
    }
}

/* Pairs are (i, i + head_dim / 2), as in Hugging Face checkpoints. */
static void rotate(float *head, const float *cosines, const float *sines, int64_t size)
{
    const int64_t half = size / 2;
    for (int64_t i = 0; i < half; i++) {
        const float a = head[i], b = head[half + i];
        head[i] = a * cosines[i] - b * sines[i];
        head[half + i] = b * cosines[i] + a * sines[i];
    }
}

static void *element(void *base, int64_t index, int width)
{
    return (char *)base + index * width;
}

/* Norms and rotates queries and keys, and puts keys and values into the cache. An item is a token. */
static void place_heads(const run *job, cc_worker *worker, const cc_branch *branch, layer_cache *layer)
{
    const cc_engine *engine = job->engine;
    const cc_kernels *kernels = engine->kernels;
    const cc_cache *cache = job->cache;
    const int64_t size = branch->head_dim, padded = rounded_up(size, 16), capacity = cache->capacity;
    for (int64_t t = cc_first(worker, job->tokens); t >= 0; t = cc_next(worker, job->tokens)) {
        const int64_t position = cache->length + t;
        const float *cosines = engine->turns + (branch->rope * engine->chunk + t) * size, *sines = cosines + size / 2;
        float *queries = engine->first + t * branch->heads * size;
        for (int64_t h = 0; h < branch->heads; h++) {
            float *head = queries + h * size;
            if (branch->query_norm.weight)
                kernels->norm(head, branch->query_norm.weight, branch->query_norm.eps, size, head);
            rotate(head, cosines, sines, size);
            for (int64_t i = 0; i < size; i++)
                head[i] *= branch->scale;
        }
        for (int64_t h = 0; h < branch->kv_heads; h++) {
            float *key = engine->second + (t * branch->kv_heads + h) * size;
            const float *value = engine->third + (t * branch->kv_heads + h) * size;
            if (branch->key_norm.weight)
                kernels->norm(key, branch->key_norm.weight, branch->key_norm.eps, size, key);
            rotate(key, cosines, sines, size);
            const int64_t key_at = (h * (capacity / 16) + position / 16) * size * 16 + position % 16;
            const float key_scale = kernels->store(key, size, cache->type, element(layer->keys, key_at, cache->width), 16);
            const int64_t value_at = (h * capacity + position) * padded;
            const float value_scale = kernels->store(value, size, cache->type, element(layer->values, value_at, cache->width), 1);
            if (layer->key_scales) {
                layer->key_scales[h * capacity + position] = key_scale;
                layer->value_scales[h * capacity + position] = value_scale;
            }
        }
    }
}

/* Mixed heads of the queries; an item is a head and a few tokens. */
static void attend(const run *job, cc_worker *worker, const cc_branch *branch, const layer_cache *layer)
{
    const cc_engine *engine = job->engine;
    const cc_cache *cache = job->cache;
    const int64_t size = branch->head_dim, padded = rounded_up(size, 16), row = branch->heads * size, capacity = cache->capacity;
    const int64_t parts = (job->tokens + QUERIES - 1) / QUERIES, items = parts * branch->heads;
    for (int64_t item = cc_first(worker, items); item >= 0; item = cc_next(worker, items)) {
        /* Long ones first, so that no thread is left with one at the end. */
        const int64_t part = parts - 1 - item / branch->heads, head = item % branch->heads, t = part * QUERIES;
        const int64_t kv_head = head / (branch->heads / branch->kv_heads);
        const cc_attention attention = {
            .queries = engine->first + t * row + head * size,
            .out = engine->third + t * row + head * size,
            .scores = engine->scores + worker->thread * QUERIES * engine->max_capacity,
            .keys = element(layer->keys, kv_head * capacity * size, cache->width),
            .values = element(layer->values, kv_head * capacity * padded, cache->width),
            .key_scales = layer->key_scales ? layer->key_scales + kv_head * capacity : NULL,
            .value_scales = layer->value_scales ? layer->value_scales + kv_head * capacity : NULL,
            .query_stride = row,
            .out_stride = row,
            .score_stride = engine->max_capacity,
            .value_stride = padded,
            .head_dim = size,
            .position = cache->length + t,
            .window = branch->window,
            .tokens = job->tokens - t < QUERIES ? job->tokens - t : QUERIES,
            .type = cache->type,
        };
        engine->kernels->attend(&attention);
    }
}

static void quantise_inner(const run *job, cc_worker *worker, const float *x, int64_t size, int64_t tokens)
{
    const cc_engine *engine = job->engine;
    for (int64_t t = cc_first(worker, tokens); t >= 0; t = cc_next(worker, tokens))
        engine->kernels->quantise(x + t * size, size, engine->inner + t * engine->inner_stride);
}

static void run_attention(const run *job, cc_worker *worker, const cc_branch *branch, layer_cache *layer, uint8_t *scratch)
{
    const cc_engine *engine = job->engine;
    const cc_product products[] = {
        outer_product(engine, branch->query, engine->first),
        outer_product(engine, branch->key, engine->second),
        outer_product(engine, branch->value, engine->third),
    };
    cc_multiply(worker, engine->kernels, products, 3, job->tokens, scratch);
    place_heads(job, worker, branch, layer);
    attend(job, worker, branch, layer);
    quantise_inner(job, worker, engine->third, (int64_t)branch->heads * branch->head_dim, job->tokens);
    project(job, worker, branch, branch->output, engine->third, scratch);
}

/* first = activation(first) * second, [tokens, width], and its blocks. */
static void gate(const run *job, cc_worker *worker, const cc_branch *branch, int64_t width, int64_t tokens)
{
    const cc_engine *engine = job->engine;
    for (int64_t t = cc_first(worker, tokens); t >= 0; t = cc_next(worker, tokens)) {
        float *gates = engine->first + t * width;
        engine->kernels->gate(gates, engine->second + t * width, width, branch->activation, gates);
        engine->kernels->quantise(gates, width, engine->inner + t * engine->inner_stride);
    }
}

static void run_feed_forward(const run *job, cc_worker *worker, const cc_branch *branch, uint8_t *scratch)
{
    const cc_engine *engine = job->engine;
    const cc_product products[] = {
        outer_product(engine, branch->gate, engine->first),
        outer_product(engine, branch->up, engine->second),
    };
    cc_multiply(worker, engine->kernels, products, 2, job->tokens, scratch);
    gate(job, worker, branch, branch->gate->out_features, job->tokens);
    project(job, worker, branch, branch->down, engine->first, scratch);
}

/* Experts of a token with the largest logits, and their shares: softmax over all, of those taken. */
static void choose_experts(const cc_engine *engine, const cc_branch *branch, int64_t t)
{
    const int32_t count = branch->num_experts, taken = branch->top_k;
    float *logits = engine->logits + t * count, *shares = engine->shares + t * taken, most = logits[0], total = 0, kept = 0;
    int32_t *chosen = engine->chosen + t * taken;
    for (int32_t e = 1; e < count; e++)
        most = logits[e] > most ? logits[e] : most;
    for (int32_t e = 0; e < count; e++)
        total += logits[e] = expf(logits[e] - most);
    for (int32_t k = 0; k < taken; k++) {
        int32_t best = -1;
        for (int32_t e = 0; e < count; e++)
            if (logits[e] >= 0 && (best < 0 || logits[e] > logits[best]))
                best = e;
        /* All logits are NaN: any expert gives NaN. */
        best = best < 0 ? k : best;
        chosen[k] = best;
        shares[k] = logits[best] / total;
        logits[best] = -1;
        kept += shares[k];
    }
    for (int32_t k = 0; branch->normalised && k < taken; k++)
        shares[k] /= kept;
}

/* The tokens that an expert is chosen for, side by side: their slots in `chosen`, activations and blocks. */
static void gather_members(const cc_engine *engine, const cc_branch *branch, int64_t tokens, int32_t expert)
{
    const int64_t hidden = engine->decoder->hidden_size, stride = engine->outer_stride;
    int64_t count = 0;
    for (int64_t slot = 0; slot < tokens * branch->top_k; slot++)
        if (engine->chosen[slot] == expert) {
            const int64_t t = slot / branch->top_k;
            memcpy(engine->gathered + count * hidden, engine->normed + t * hidden, (size_t)hidden * sizeof(float));
            memcpy(engine->gathered_blocks + count * stride, engine->blocks + t * stride, (size_t)stride * sizeof(cc_block));
            engine->members[count++] = (int32_t)slot;
        }
}

static int64_t count_members(const cc_engine *engine, const cc_branch *branch, int64_t tokens, int32_t expert)
{
    int64_t count = 0;
    for (int64_t slot = 0; slot < tokens * branch->top_k; slot++)
        count += engine->chosen[slot] == expert;
    return count;
}

static void run_expert(const run *job, cc_worker *worker, const cc_branch *branch, int32_t expert, int64_t count, uint8_t *scratch)
{
    const cc_engine *engine = job->engine;
    const int64_t hidden = engine->decoder->hidden_size, width = branch->gate[expert].out_features;
    for (int64_t i = cc_first(worker, 1); i >= 0; i = cc_next(worker, 1))
        gather_members(engine, branch, job->tokens, expert);
    const cc_product products[] = {
        {branch->gate + expert, engine->gathered_blocks, engine->gathered, engine->first, engine->outer_stride, width, 0},
        {branch->up + expert, engine->gathered_blocks, engine->gathered, engine->second, engine->outer_stride, width, 0},
    };
    cc_multiply(worker, engine->kernels, products, 2, count, scratch);
    gate(job, worker, branch, width, count);
    const cc_product down = {branch->down + expert, engine->inner, engine->first, engine->third, engine->inner_stride, hidden, 0};
    cc_multiply(worker, engine->kernels, &down, 1, count, scratch);
    for (int64_t n = cc_first(worker, count); n >= 0; n = cc_next(worker, count)) {
        const int32_t slot = engine->members[n];
        float *output = engine->output + slot / branch->top_k * hidden;
        for (int64_t i = 0; i < hidden; i++)
            output[i] += engine->shares[slot] * engine->third[n * hidden + i];
    }
}

static void run_experts(const run *job, cc_worker *worker, const cc_branch *branch, uint8_t *scratch)
{
    const cc_engine *engine = job->engine;
    const int64_t hidden = engine->decoder->hidden_size;
    const cc_product routing = outer_product(engine, branch->router, engine->logits);
    cc_multiply(worker, engine->kernels, &routing, 1, job->tokens, scratch);
    for (int64_t t = cc_first(worker, job->tokens); t >= 0; t = cc_next(worker, job->tokens)) {
        choose_experts(engine, branch, t);
        memset(engine->output + t * hidden, 0, (size_t)hidden * sizeof *engine->output);
    }
    for (int32_t expert = 0; expert < branch->num_experts; expert++) {
        const int64_t count = count_members(engine, branch, job->tokens, expert);
        if (count)
            run_expert(job, worker, branch, expert, count, scratch);
    }
    add_output(job, worker, branch);
}

/* ---- A run. ---- */

/* The stream's beginning, and cosines and sines of the positions. */
static void embed(const run *job, cc_worker *worker)
{
    const cc_engine *engine = job->engine;
    const cc_decoder *decoder = engine->decoder;
    const int64_t hidden = decoder->hidden_size, half = engine->head_dim / 2;
    for (int64_t t = cc_first(worker, job->tokens); t >= 0; t = cc_next(worker, job->tokens)) {
        float *row = engine->stream + t * hidden;
        cc_linear_row(engine->kernels, decoder->embedding, job->ids[t], row);
        for (int64_t i = 0; decoder->embedding_scale != 1 && i < hidden; i++)
            row[i] *= decoder->embedding_scale;
        for (int32_t r = 0; r < decoder->num_ropes; r++) {
            float *cosines = engine->turns + (r * engine->chunk + t) * 2 * half;
            for (int64_t i = 0; i < half; i++) {
                const double angle = (double)(job->cache->length + t) * decoder->inverse_frequencies[r][i];
                cosines[i] = (float)cos(angle);
                cosines[half + i] = (float)sin(angle);
            }
        }
    }
}

static void run_chunk(void *arg, cc_worker *worker)
{
    const run *job = arg;
    const cc_engine *engine = job->engine;
    const cc_decoder *decoder = engine->decoder;
    uint8_t *scratch = engine->scratch + worker->thread * engine->thread_bytes;
    embed(job, worker);
    for (int64_t b = 0; b < job->branches; b++) {
        const cc_branch *branch = decoder->branches + b;
        norm_and_quantise(job, worker, &branch->norm, 0, job->tokens);
        if (branch->kind == CC_ATTENTION)
            run_attention(job, worker, branch, job->cache->layers + b, scratch);
        else if (branch->kind == CC_FEED_FORWARD)
            run_feed_forward(job, worker, branch, scratch);
        else
            run_experts(job, worker, branch, scratch);
        if (branch->kind != CC_EXPERTS && branch->post_norm.weight)
            add_output(job, worker, branch);
    }
    if (job->wanted == CC_NO_LOGITS)
        return;
    const int64_t tokens = job->wanted == CC_ALL_LOGITS ? job->tokens : 1;
    norm_and_quantise(job, worker, &decoder->norm, job->tokens - tokens, tokens);
    const cc_product head = outer_product(engine, decoder->head, job->logits);
    cc_multiply(worker, engine->kernels, &head, 1, tokens, scratch);
}

/* Buffers for `chunk` tokens. Returns whether there is memory for them. */
static int reserve(cc_engine *engine, int64_t chunk, int64_t capacity);

static int run_all(cc_engine *engine, cc_cache *cache, const int32_t *ids, int64_t tokens, int64_t branches, int wanted,
                   float *logits, float *stream)
{
    int failed = 0;
    cc_lock(engine->team);
    if (!reserve(engine, tokens < CHUNK ? tokens : CHUNK, cache->capacity))
        failed = -1;
    for (int64_t first = 0; first < tokens && !failed; first += CHUNK) {
        run job = {engine, cache, ids + first, tokens - first < CHUNK ? tokens - first : CHUNK, branches, wanted, logits};
        if (wanted == CC_LAST_LOGITS && first + job.tokens < tokens)
            job.wanted = CC_NO_LOGITS;
        cc_team_run(engine->team, run_chunk, &job);
        cache->length += job.tokens;
        if (wanted == CC_ALL_LOGITS)
            logits += job.tokens * engine->decoder->vocab_size;
        if (stream)
            memcpy(stream + first * engine->decoder->hidden_size, engine->stream,
                   (size_t)(job.tokens * engine->decoder->hidden_size) * sizeof *stream);
    }
    cc_unlock(engine->team);
    return failed;
}

int cc_engine_run(cc_engine *engine, cc_cache *cache, const int32_t *ids, int64_t tokens, int wanted, float *logits)
{
    return run_all(engine, cache, ids, tokens, engine->decoder->num_branches, wanted, logits, NULL);
}

int cc_engine_stream(cc_engine *engine, cc_cache *cache, const int32_t *ids, int64_t tokens, int64_t branches, float *stream)
{
    return run_all(engine, cache, ids, tokens, branches, CC_NO_LOGITS, NULL, stream);
}

/* ---- Memory. ---- */

static void *aligned(int64_t bytes)
{
    void *memory = NULL;
#if defined(_WIN32)
    memory = _aligned_malloc((size_t)rounded_up(bytes + 1, 64), 64);
#else
    if (posix_memalign(&memory, 64, (size_t)rounded_up(bytes + 1, 64)) != 0)
        memory = NULL;
#endif
    return memory;
}

static void release(void *memory)
{
#if defined(_WIN32)
    _aligned_free(memory);
#else
    free(memory);
#endif
}

/* All buffers, for freeing and allocating them in one place. */
static int64_t buffers_of(cc_engine *engine, void ***places, int64_t *bytes)
{
    const int64_t hidden = engine->decoder->hidden_size, chunk = engine->chunk, real = sizeof(float);
    const int64_t threads = cc_team_threads(engine->team), ropes = engine->decoder->num_ropes;
    int64_t n = 0;
#define BUFFER(field, size) (places[n] = (void **)&engine->field, bytes[n++] = (size))
    BUFFER(scratch, threads * engine->thread_bytes);
    BUFFER(scores, threads * QUERIES * engine->max_capacity * real);
    BUFFER(stream, chunk * hidden * real);
    BUFFER(normed, chunk * hidden * real);
    BUFFER(first, chunk * engine->widest * real);
    BUFFER(second, chunk * engine->widest * real);
    BUFFER(third, chunk * engine->widest * real);
    BUFFER(output, chunk * hidden * real);
    BUFFER(turns, ropes * chunk * engine->head_dim * real);
    BUFFER(blocks, chunk * engine->outer_stride * (int64_t)sizeof(cc_block));
    BUFFER(inner, chunk * engine->inner_stride * (int64_t)sizeof(cc_block));
    if (engine->max_experts) {
        BUFFER(gathered, chunk * hidden * real);
        BUFFER(gathered_blocks, chunk * engine->outer_stride * (int64_t)sizeof(cc_block));
        BUFFER(logits, chunk * engine->max_experts * real);
        BUFFER(shares, chunk * engine->max_top_k * real);
        BUFFER(chosen, chunk * engine->max_top_k * (int64_t)sizeof(int32_t));
        BUFFER(members, chunk * (int64_t)sizeof(int32_t));
    }
#undef BUFFER
    return n;
}

static void release_buffers(cc_engine *engine)
{
    void **places[32];
    int64_t bytes[32];
    for (int64_t i = buffers_of(engine, places, bytes) - 1; i >= 0; i--) {
        release(*places[i]);
        *places[i] = NULL;
    }
}

static int reserve(cc_engine *engine, int64_t chunk, int64_t capacity)
{
    void **places[32];
    int64_t bytes[32];
    if (chunk <= engine->chunk && capacity <= engine->max_capacity)
        return 1;
    release_buffers(engine);
    engine->chunk = larger(chunk, engine->chunk);
    engine->max_capacity = larger(capacity, engine->max_capacity);
    const int64_t count = buffers_of(engine, places, bytes);
    for (int64_t i = 0; i < count; i++)
        if ((*places[i] = aligned(bytes[i])) == NULL) {
            release_buffers(engine);
            engine->chunk = engine->max_capacity = 0;
            return 0;
        }
    return 1;
}

static void measure_linear(cc_engine *engine, const cc_linear *linear, int inner)
{
    const int64_t blocks = cc_blocks(linear->in_features);
    engine->thread_bytes = larger(engine->thread_bytes, cc_product_scratch(linear));
    if (inner)
        engine->inner_stride = larger(engine->inner_stride, blocks);
    else
        engine->outer_stride = larger(engine->outer_stride, blocks);
}

/* Adds up what a branch needs. */
static void measure_branch(cc_engine *engine, const cc_branch *branch)
{
    const int64_t hidden = engine->decoder->hidden_size;
    if (branch->kind == CC_ATTENTION) {
        const cc_linear *outer[] = {branch->query, branch->key, branch->value};
        engine->head_dim = larger(engine->head_dim, branch->head_dim);
        engine->widest = larger(engine->widest, (int64_t)branch->heads * branch->head_dim);
        for (int i = 0; i < 3; i++)
            measure_linear(engine, outer[i], 0);
        measure_linear(engine, branch->output, 1);
        engine->phases += 5 + cc_product_phases(branch->query) + cc_product_phases(branch->key) + cc_product_phases(branch->value) + cc_product_phases(branch->output);
        return;
    }
    const int32_t experts = branch->kind == CC_EXPERTS ? branch->num_experts : 1;
    for (int32_t e = 0; e < experts; e++) {
        engine->widest = larger(engine->widest, branch->gate[e].out_features);
        measure_linear(engine, branch->gate + e, 0);
        measure_linear(engine, branch->up + e, 0);
        measure_linear(engine, branch->down + e, 1);
        engine->phases += 3 + cc_product_phases(branch->gate + e) + cc_product_phases(branch->up + e) +
                          cc_product_phases(branch->down + e);
    }
    engine->phases += 3;
    if (branch->kind == CC_EXPERTS) {
        engine->widest = larger(engine->widest, hidden);
        measure_linear(engine, branch->router, 0);
        engine->phases += cc_product_phases(branch->router);
        engine->max_experts = larger(engine->max_experts, experts);
        engine->max_top_k = larger(engine->max_top_k, branch->top_k);
    }
}

cc_engine *cc_engine_new(const cc_decoder *decoder, int variant, int threads)
{
    cc_engine *engine = calloc(1, sizeof *engine);
    if (engine == NULL)
        return NULL;
    engine->decoder = decoder;
    engine->kernels = cc_kernels_of(variant);
    engine->phases = 8 + cc_product_phases(decoder->head);
    measure_linear(engine, decoder->head, 0);
    for (int64_t b = 0; b < decoder->num_branches; b++)
        measure_branch(engine, decoder->branches + b);
    engine->team = cc_team_new(threads, engine->phases);
    if (engine->team == NULL || engine->kernels == NULL) {
        cc_team_free(engine->team);
        free(engine);
        return NULL;
    }
    return engine;
}

void cc_engine_free(cc_engine *engine)
{
    if (engine == NULL)
        return;
    release_buffers(engine);
    cc_team_free(engine->team);
    free(engine);
}

cc_cache *cc_cache_new(const cc_engine *engine, int64_t capacity, int value_type)
{
    const cc_decoder *decoder = engine->decoder;
    cc_cache *cache = calloc(1, sizeof *cache);
    if (cache == NULL)
        return NULL;
    cache->layers = calloc((size_t)decoder->num_branches + 1, sizeof *cache->layers);
    cache->num_branches = decoder->num_branches;
    cache->capacity = rounded_up(capacity < 1 ? 1 : capacity, 16);
    cache->type = value_type;
    cache->width = value_type == CC_FLOAT32 ? 4 : value_type == CC_INT8 ? 1 : 2;
    int complete = cache->layers != NULL;
    for (int64_t b = 0; complete && b < decoder->num_branches; b++) {
        const cc_branch *branch = decoder->branches + b;
        if (branch->kind != CC_ATTENTION)
            continue;
        layer_cache *layer = cache->layers + b;
        const size_t positions = (size_t)(branch->kv_heads * cache->capacity);
        /* Zeros: a block of keys is read whole when its first position is filled. calloc takes them from the system as pages
         * are used. */
        layer->keys = calloc(positions * (size_t)branch->head_dim, (size_t)cache->width);
        layer->values = calloc(positions * (size_t)rounded_up(branch->head_dim, 16), (size_t)cache->width);
        complete = layer->keys != NULL && layer->values != NULL;
        if (value_type == CC_INT8) {
            layer->key_scales = calloc(positions, sizeof(float));
            layer->value_scales = calloc(positions, sizeof(float));
            complete = complete && layer->key_scales != NULL && layer->value_scales != NULL;
        }
    }
    if (!complete) {
        cc_cache_free(cache);
        return NULL;
    }
    return cache;
}

void cc_cache_free(cc_cache *cache)
{
    if (cache == NULL)
        return;
    for (int64_t b = 0; cache->layers != NULL && b < cache->num_branches; b++) {
        free(cache->layers[b].keys);
        free(cache->layers[b].values);
        free(cache->layers[b].key_scales);
        free(cache->layers[b].value_scales);
    }
    free(cache->layers);
    free(cache);
}

int64_t cc_cache_length(const cc_cache *cache)
{
    return cache->length;
}

void cc_cache_truncate(cc_cache *cache, int64_t length)
{
    if (length >= 0 && length < cache->length)
        cache->length = length;
}

/* ---- Linears alone. ---- */

typedef struct {
    const cc_linear *linear;
    const cc_kernels *kernels;
    const float *x;
    float *y;
    int64_t tokens;
    cc_block *blocks;
    uint8_t *scratch;
} linear_job;

struct cc_pool {
    cc_team *team;
    const cc_kernels *kernels;
};

static void apply_linear(void *arg, cc_worker *worker)
{
    const linear_job *job = arg;
    const cc_linear *linear = job->linear;
    const int64_t stride = cc_blocks(linear->in_features), scratch = cc_product_scratch(linear);
    for (int64_t t = cc_first(worker, job->tokens); t >= 0; t = cc_next(worker, job->tokens))
        job->kernels->quantise(job->x + t * linear->in_features, linear->in_features, job->blocks + t * stride);
    const cc_product product = {linear, job->blocks, job->x, job->y, stride, linear->out_features, 0};
    cc_multiply(worker, job->kernels, &product, 1, job->tokens, job->scratch + worker->thread * scratch);
}

int cc_linear_apply(cc_pool *pool, const cc_linear *linear, const float *x, int64_t tokens, float *y)
{
    const int64_t scratch = cc_product_scratch(linear);
    linear_job job = {linear, pool->kernels, x, y, tokens, NULL, NULL};
    cc_lock(pool->team);
    job.blocks = aligned(tokens * cc_blocks(linear->in_features) * (int64_t)sizeof(cc_block));
    job.scratch = aligned(cc_team_threads(pool->team) * scratch);
    const int complete = job.blocks != NULL && job.scratch != NULL;
    if (complete)
        cc_team_run(pool->team, apply_linear, &job);
    release(job.blocks);
    release(job.scratch);
    cc_unlock(pool->team);
    return complete ? 0 : -1;
}

void cc_linear_rows(const cc_pool *pool, const cc_linear *linear, const int64_t *ids, int64_t count, float *rows)
{
    for (int64_t i = 0; i < count; i++)
        cc_linear_row(pool->kernels, linear, ids[i], rows + i * linear->in_features);
}

typedef struct {
    const uint64_t *words;
    int64_t count;
    uint64_t *results; /* one of each thread, 64 bytes apart */
} read_job;

enum { READ_WORDS = 1 << 15 };

static void read_words(void *arg, cc_worker *worker)
{
    const read_job *job = arg;
    const int64_t items = (job->count + READ_WORDS - 1) / READ_WORDS;
    for (int64_t item = cc_first(worker, items); item >= 0; item = cc_next(worker, items)) {
        const int64_t first = item * READ_WORDS, left = job->count - first, here = left < READ_WORDS ? left : READ_WORDS;
        uint64_t mixed[8] = {0};
        for (int64_t i = 0; i + 8 <= here; i += 8)
            for (int k = 0; k < 8; k++)
                mixed[k] ^= job->words[first + i + k];
        for (int k = 0; k < 8; k++)
            job->results[8 * worker->thread] ^= mixed[k];
    }
}

uint64_t cc_pool_read(cc_pool *pool, const void *data, int64_t bytes)
{
    const int threads = cc_team_threads(pool->team);
    read_job job = {data, bytes / 8, calloc((size_t)threads, 64)};
    uint64_t mixed = 0;
    if (job.results == NULL)
        return 0;
    cc_lock(pool->team);
    cc_team_run(pool->team, read_words, &job);
    cc_unlock(pool->team);
    for (int t = 0; t < threads; t++)
        mixed ^= job.results[8 * t];
    free(job.results);
    return mixed;
}

cc_pool *cc_pool_new(int variant, int threads)
{
    cc_pool *pool = calloc(1, sizeof *pool);
    if (pool == NULL)
        return NULL;
    pool->kernels = cc_kernels_of(variant);
    pool->team = cc_team_new(threads, MAX_STAGES + 1);
    if (pool->kernels == NULL || pool->team == NULL) {
        cc_pool_free(pool);
        return NULL;
    }
    return pool;
}

void cc_pool_free(cc_pool *pool)
{
    if (pool == NULL)
        return;
    cc_team_free(pool->team);
    free(pool);
}
