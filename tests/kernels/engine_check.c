/* Runs the engine's kernels and a small decoder on every instruction set of this machine, with one thread and with four, for the
 * sanitizers to watch. Exits with the number of results that differ. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/engine.h"

enum { IN = 96, OUT = 200, TOKENS = 40 };
enum { HIDDEN = 48, WIDTH = 100, VOCABULARY = 70, HEAD = 12, EXPERTS = 3, IDS = 290 };

static int check_product(int variant, int dim, int clusters, int wide)
{
    cc_matrix matrix;
    memset(&matrix, 0, sizeof matrix);
    const int64_t entry_bytes = cc_entries_layout(&matrix, clusters, dim, wide, variant);
    uint8_t *entries = aligned_alloc(64, (size_t)entry_bytes);
    float *values = malloc(sizeof *values * (size_t)(clusters * dim));
    for (int i = 0; i < clusters * dim; i++)
        values[i] = (float)(rand() % 255 - 127);
    const float unit = cc_make_entries(&matrix, values, clusters, wide, entries);
    const int groups = (OUT + dim - 1) / dim, rest = groups % 16;
    /* Exactly as long as the codes are, so that any read beyond them is seen. */
    const int length = IN / 4 * (groups - rest + (rest + 1) / 2 * 2) * matrix.bits / 2;
    uint8_t *codes = malloc((size_t)length);
    for (int i = 0; i < length; i++)
        codes[i] = (uint8_t)rand();
    matrix.entries = entries;
    matrix.unit = &unit;
    matrix.codes = codes;
    matrix.in_features = IN;
    matrix.out_features = OUT;
    const cc_linear linear = {&matrix, NULL, NULL, IN, OUT, 1, 0};
    static float x[TOKENS * IN], alone[TOKENS * OUT], together[TOKENS * OUT], rows[3 * IN];
    for (int i = 0; i < TOKENS * IN; i++)
        x[i] = (float)(rand() % 100 - 50);
    cc_pool *one = cc_pool_new(variant, 1), *four = cc_pool_new(variant, 4);
    int different = 0;
    for (int repetition = 0; repetition < 5; repetition++)
        for (int tokens = 1; tokens <= TOKENS; tokens += 13) {
            cc_linear_apply(one, &linear, x, tokens, alone);
            cc_linear_apply(four, &linear, x, tokens, together);
            different += memcmp(alone, together, sizeof *alone * (size_t)(tokens * OUT)) != 0;
        }
    const int64_t ids[] = {0, OUT - 1, 17};
    cc_linear_rows(one, &linear, ids, 3, rows);
    cc_pool_read(four, x, sizeof x);
    cc_pool_free(one);
    cc_pool_free(four);
    free(entries);
    free(values);
    free(codes);
    return different;
}

static cc_linear dense(int out_features, int in_features)
{
    float *values = malloc(sizeof *values * (size_t)(out_features * in_features));
    for (int i = 0; i < out_features * in_features; i++)
        values[i] = (float)(rand() % 2001 - 1000) * 1e-4f;
    const cc_linear linear = {NULL, values, NULL, in_features, out_features, 0, CC_FLOAT32};
    return linear;
}

static int check_decoder(int variant, int cache_type)
{
    const cc_linear embedding = dense(VOCABULARY, HIDDEN), query = dense(4 * HEAD, HIDDEN), key = dense(2 * HEAD, HIDDEN);
    const cc_linear value = dense(2 * HEAD, HIDDEN), output = dense(HIDDEN, 4 * HEAD), router = dense(EXPERTS, HIDDEN);
    cc_linear gate[EXPERTS], up[EXPERTS], down[EXPERTS];
    for (int e = 0; e < EXPERTS; e++) {
        gate[e] = dense(WIDTH, HIDDEN);
        up[e] = dense(WIDTH, HIDDEN);
        down[e] = dense(HIDDEN, WIDTH);
    }
    float ones[WIDTH];
    double frequencies[HEAD / 2];
    for (int i = 0; i < WIDTH; i++)
        ones[i] = 1;
    for (int i = 0; i < HEAD / 2; i++)
        frequencies[i] = 1.0 / (i + 1);
    const double *ropes[] = {frequencies};
    const cc_norm norm = {ones, 1e-5f, 0};
    const cc_branch branches[] = {
        {.kind = CC_ATTENTION, .heads = 4, .kv_heads = 2, .head_dim = HEAD, .window = 5, .scale = .3f, .norm = norm,
         .post_norm = norm, .query_norm = norm, .key_norm = norm, .query = &query, .key = &key, .value = &value, .output = &output},
        {.kind = CC_EXPERTS, .activation = CC_SILU, .num_experts = EXPERTS, .top_k = 2, .normalised = 1, .norm = norm,
         .gate = gate, .up = up, .down = down, .router = &router},
        {.kind = CC_FEED_FORWARD, .activation = CC_GELU_TANH, .norm = norm, .gate = gate, .up = up, .down = down},
    };
    const cc_decoder decoder = {branches, &embedding, &embedding, ropes, norm, 3, HIDDEN, VOCABULARY, 1, 1};
    cc_engine *one = cc_engine_new(&decoder, variant, 1), *four = cc_engine_new(&decoder, variant, 4);
    cc_cache *whole = cc_cache_new(one, IDS, cache_type), *pieces = cc_cache_new(four, IDS, cache_type);
    static float expected[IDS * VOCABULARY], found[IDS * VOCABULARY];
    int32_t ids[IDS];
    for (int i = 0; i < IDS; i++)
        ids[i] = rand() % VOCABULARY;
    cc_engine_run(one, whole, ids, IDS, CC_ALL_LOGITS, expected);
    cc_engine_run(four, pieces, ids, 7, CC_ALL_LOGITS, found);
    for (int i = 7; i < 20; i++)
        cc_engine_run(four, pieces, ids + i, 1, CC_LAST_LOGITS, found + i * VOCABULARY);
    cc_engine_run(four, pieces, ids + 20, IDS - 20, CC_ALL_LOGITS, found + 20 * VOCABULARY);
    int different = memcmp(expected, found, sizeof expected) != 0;
    cc_cache_truncate(pieces, 10);
    cc_engine_run(four, pieces, ids + 10, 5, CC_ALL_LOGITS, found);
    different += memcmp(expected + 10 * VOCABULARY, found, sizeof *found * 5 * VOCABULARY) != 0;
    cc_cache_free(whole);
    cc_cache_free(pieces);
    cc_engine_free(one);
    cc_engine_free(four);
    const cc_linear *made[] = {&embedding, &query, &key, &value, &output, &router};
    for (int i = 0; i < 6; i++)
        free((void *)made[i]->values);
    for (int e = 0; e < EXPERTS; e++) {
        free((void *)gate[e].values);
        free((void *)up[e].values);
        free((void *)down[e].values);
    }
    return different;
}

int main(void)
{
    int different = 0;
    for (int variant = CC_PLAIN; variant <= CC_AMX; variant++) {
        if (!cc_engine_supported(variant))
            continue;
        for (int wide = 0; wide < 2; wide++)
            different += check_product(variant, 2, 256, wide) + check_product(variant, 3, 64, wide) +
                         check_product(variant, 4, 4096, wide) + check_product(variant, 9, 700, wide);
        different += check_decoder(variant, CC_FLOAT32) + check_decoder(variant, CC_FLOAT16) + check_decoder(variant, CC_INT8);
    }
    printf("%d results differ\n", different);
    return different;
}
