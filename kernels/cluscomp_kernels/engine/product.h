/* Products of linears with tokens, divided into items for threads. */
#ifndef CLUSCOMP_PRODUCT_H
#define CLUSCOMP_PRODUCT_H

#include "engine/kernels.h"
#include "engine/team.h"

/* y [tokens][y_stride] = or += linear(x). Clustered matrices read `blocks` [tokens][block_stride], dense ones `x` [tokens, in_features]. */
typedef struct {
    const cc_linear *linear;
    const cc_block *blocks;
    const float *x;
    float *y;
    int64_t block_stride;
    int64_t y_stride;
    int32_t add;
} cc_product;

/* Bytes of memory that each thread needs for products with these linears; a multiple of 64. */
int64_t cc_product_scratch(const cc_linear *linear);

/* Computes `count` products for `tokens` tokens, together. Takes as many phases as the linear with the most stages has, at least 1.
 * `scratch` is the thread's own. */
void cc_multiply(cc_worker *worker, const cc_kernels *kernels, const cc_product *products, int count, int64_t tokens,
                 uint8_t *scratch);

/* Row `row` of the weight as float32 [in_features]. */
void cc_linear_row(const cc_kernels *kernels, const cc_linear *linear, int64_t row, float *out);

/* Phases that cc_multiply takes for a linear. */
static inline int64_t cc_product_phases(const cc_linear *linear)
{
    return linear->num_stages > 1 ? linear->num_stages : 1;
}

#endif
