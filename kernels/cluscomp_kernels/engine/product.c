/* See product.h. */
#include "engine/product.h"

#include <string.h>

enum {
    DECODED_BYTES = 1 << 17, /* of a tile at a time for many tokens: stays in the L2 cache */
    FEW_DECODED_BYTES = 1 << 15, /* for few tokens: stays in the L1 cache */
    FEW_TOKENS = 4,
    TOKENS = 64, /* that share a decoded tile: their sums stay in the caches */
    DENSE_ROWS = 16, /* of an item */
    MAX_DIM = 64,
};

int64_t cc_product_scratch(const cc_linear *linear)
{
    int64_t pitch = 0;
    for (int32_t s = 0; s < linear->num_stages; s++)
        pitch = linear->stages[s].pitch > pitch ? linear->stages[s].pitch : pitch;
    return DECODED_BYTES + TOKENS * pitch * CC_VECTOR_LANES * (int64_t)sizeof(float);
}

static int64_t items_of(const cc_linear *linear, int32_t stage)
{
    if (linear->num_stages == 0)
        return stage == 0 ? (linear->out_features + DENSE_ROWS - 1) / DENSE_ROWS : 0;
    return stage < linear->num_stages ? cc_tiles(linear->stages + stage) : 0;
}

/* The values of a tile's outputs, [groups of the tile][dim], from its sums. */
static void collect(const cc_matrix *matrix, const float *sums, int64_t dim, float *values)
{
    const int64_t entry_step = matrix->in_registers ? CC_GROUPS : 1, group_step = matrix->in_registers ? 1 : matrix->pitch;
    for (int64_t k = 0; k < dim; k++)
        for (int64_t group = 0; group < CC_GROUPS; group++)
            values[group * dim + k] = sums[group * group_step + k * entry_step];
    if (matrix->planes == dim)
        return;
    const float *low = sums + dim * entry_step;
    for (int64_t k = 0; k < dim; k++)
        for (int64_t group = 0; group < CC_GROUPS; group++)
            values[group * dim + k] = values[group * dim + k] * 256 + low[group * group_step + k * entry_step];
}

/* Scales the sums of a tile for one token, and stores or adds them. `y` begins at the tile's first output. */
static void finish(const cc_matrix *matrix, int64_t tile, const float *sums, int32_t add, float *y)
{
    const int64_t dim = matrix->dim, first = tile * CC_GROUPS * dim, left = matrix->out_features - first;
    const int64_t outputs = left < CC_GROUPS * dim ? left : CC_GROUPS * dim;
    float values[CC_GROUPS * MAX_DIM];
    /* Compilers make good code of the usual ones. */
    if (dim == 1)
        collect(matrix, sums, 1, values);
    else if (dim == 2)
        collect(matrix, sums, 2, values);
    else if (dim == 3)
        collect(matrix, sums, 3, values);
    else if (dim == 4)
        collect(matrix, sums, 4, values);
    else
        collect(matrix, sums, dim, values);
    const float unit = *matrix->unit;
    if (matrix->row_scale)
        for (int64_t i = 0; i < outputs; i++)
            values[i] *= unit * matrix->row_scale[first + i];
    else
        for (int64_t i = 0; i < outputs; i++)
            values[i] *= unit;
    if (matrix->bias)
        for (int64_t i = 0; i < outputs; i++)
            values[i] += matrix->bias[first + i];
    if (add)
        for (int64_t i = 0; i < outputs; i++)
            y[i] += values[i];
    else
        memcpy(y, values, (size_t)outputs * sizeof *y);
}

static void multiply_tile(const cc_kernels *kernels, const cc_product *product, int32_t stage, int64_t tile, int64_t tokens,
                          uint8_t *scratch)
{
    const cc_matrix *matrix = product->linear->stages + stage;
    const int64_t quads = cc_quads(matrix), groups = cc_tile_groups(matrix, tile), pitch = matrix->pitch;
    const int64_t room = (tokens <= FEW_TOKENS ? FEW_DECODED_BYTES : DECODED_BYTES) / (CC_BLOCK_QUADS * pitch * CC_VECTOR);
    const int64_t step = (room < 1 ? 1 : room) * CC_BLOCK_QUADS, row = pitch * CC_VECTOR_LANES;
    const int32_t add = product->add || stage > 0;
    float *sums = (float *)(scratch + DECODED_BYTES);
    for (int64_t first = 0; first < tokens; first += TOKENS) {
        const int64_t here = tokens - first < TOKENS ? tokens - first : TOKENS;
        const cc_block *blocks = product->blocks + first * product->block_stride;
        memset(sums, 0, (size_t)(here * row) * sizeof *sums);
        for (int64_t quad = 0; quad < quads; quad += step) {
            const int64_t some = quads - quad < step ? quads - quad : step;
            kernels->decode(matrix, cc_record_at(matrix, tile, quad), some, groups, scratch);
            kernels->multiply(scratch, some, pitch, blocks + quad / CC_BLOCK_QUADS, product->block_stride, here, sums);
        }
        for (int64_t t = 0; t < here; t++)
            finish(matrix, tile, sums + t * row, add, product->y + (first + t) * product->y_stride + tile * CC_GROUPS * matrix->dim);
    }
}

static void multiply_rows(const cc_kernels *kernels, const cc_product *product, int64_t first, int64_t tokens)
{
    const cc_linear *linear = product->linear;
    const int64_t end = first + DENSE_ROWS < linear->out_features ? first + DENSE_ROWS : linear->out_features;
    for (int64_t row = first; row < end; row++)
        for (int64_t token = 0; token < tokens; token += TOKENS) {
            const int64_t here = tokens - token < TOKENS ? tokens - token : TOKENS;
            float results[TOKENS];
            kernels->dense(linear, row, product->x + token * linear->in_features, here, results);
            for (int64_t t = 0; t < here; t++) {
                float *y = product->y + (token + t) * product->y_stride + row;
                const float value = linear->bias ? results[t] + linear->bias[row] : results[t];
                *y = product->add ? *y + value : value;
            }
        }
}

void cc_multiply(cc_worker *worker, const cc_kernels *kernels, const cc_product *products, int count, int64_t tokens,
                 uint8_t *scratch)
{
    int64_t stages = 1;
    for (int p = 0; p < count; p++)
        stages = cc_product_phases(products[p].linear) > stages ? cc_product_phases(products[p].linear) : stages;
    for (int32_t stage = 0; stage < stages; stage++) {
        int64_t items = 0;
        for (int p = 0; p < count; p++)
            items += items_of(products[p].linear, stage);
        for (int64_t i = cc_first(worker, items); i >= 0; i = cc_next(worker, items)) {
            const cc_product *product = products;
            int64_t item = i;
            while (item >= items_of(product->linear, stage))
                item -= items_of(product++->linear, stage);
            if (product->linear->num_stages)
                multiply_tile(kernels, product, stage, item, tokens, scratch);
            else
                multiply_rows(kernels, product, item * DENSE_ROWS, tokens);
        }
    }
}

static uint32_t code_at(const uint8_t *stream, int64_t index, int32_t bits)
{
    const int64_t bit = index * bits, end = (bit + bits + 7) / 8;
    uint32_t word = 0;
    for (int64_t byte = end - 1; byte >= bit / 8; byte--)
        word = word << 8 | stream[byte];
    return word >> bit % 8 & ((1u << bits) - 1);
}

static void add_row(const cc_matrix *matrix, int64_t row, float *out)
{
    const int64_t dim = matrix->dim, group = row / dim, tile = group / CC_GROUPS;
    const int64_t entry_step = matrix->in_registers ? CC_REGISTER_CLUSTERS : 1, row_step = matrix->in_registers ? 1 : matrix->pitch;
    const uint8_t *entry = matrix->entries + row % dim * entry_step;
    const float scale = matrix->row_scale ? *matrix->unit * matrix->row_scale[row] : *matrix->unit;
    for (int64_t channel = 0; channel < matrix->in_features; channel++) {
        const uint8_t *record = cc_record_at(matrix, tile, channel / CC_QUAD);
        const uint32_t code = code_at(record, group % CC_GROUPS * CC_QUAD + channel % CC_QUAD, matrix->bits);
        const uint8_t *found = entry + (size_t)code * (size_t)row_step;
        float value = (float)(*found - 128);
        if (matrix->planes != dim)
            value = value * 256 + (float)(found[dim * entry_step] - 128);
        out[channel] += value * scale;
    }
}

void cc_linear_row(const cc_kernels *kernels, const cc_linear *linear, int64_t row, float *out)
{
    if (linear->num_stages == 0) {
        kernels->dense_row(linear, row, out);
        return;
    }
    memset(out, 0, (size_t)linear->in_features * sizeof *out);
    for (int32_t stage = 0; stage < linear->num_stages; stage++)
        add_row(linear->stages + stage, row, out);
}
