/* Clustered matrices as the engine reads them, and the kernels that multiply by them.
 *
 * Tiled codes. Input channels are taken in quads (4 consecutive channels), groups of `dim` outputs in tiles of CC_GROUPS. The
 * last tile has the groups that are left, rounded up to an even number. The order is: tile, quad, group of the tile, channel
 * of the quad; all codes form one stream of `bits` bits each, least significant bit first. The codes of a tile and a quad are a
 * record. Every record begins at a whole byte. Codes that stand for no group or channel are 0.
 *
 * Numbers. An activation is an integer of 16 bits; CC_BLOCK channels share a scale. An entry of a codebook is an integer of 8
 * bits; an entry of 16 bits is stored as two of 8. A product of a block is therefore exact in 32 bits, in whatever order it is
 * summed. Blocks are scaled and added in float32, in order, each operation rounded, so every kernel gives the same bits.
 *
 * Decoded records. A decoder writes the entries of a record as vectors of 64 bytes, each with 16 outputs of the tile times the
 * 4 channels of the quad, ready for instructions that add the products of four bytes to each of 16 sums. Lane `l` of a tile (the
 * vectors one after another) is entry `l % pitch` of group `l / pitch`, or entry `l / CC_GROUPS` of group `l % CC_GROUPS` if
 * the codebook is held in registers. Bytes of entries are stored plus 128, since one factor of these instructions is unsigned. */
#ifndef CLUSCOMP_MATRIX_H
#define CLUSCOMP_MATRIX_H

#include <stdint.h>

enum {
    CC_GROUPS = 16,          /* groups of a full tile */
    CC_QUAD = 4,             /* channels of a quad */
    CC_BLOCK = 64,           /* channels that share the scale of their activations */
    CC_BLOCK_QUADS = 16,     /* quads of a block */
    CC_VECTOR = 64,          /* bytes of a decoded vector */
    CC_VECTOR_LANES = 16,    /* outputs of a decoded vector */
    CC_REGISTER_CLUSTERS = 256, /* clusters of the largest codebook that vector registers hold */
    CC_MAX_PITCH = 128,      /* entries of a row, at most: cluster_dim 64 in two bytes each */
};

/* The largest integer of an activation. */
#define CC_ACTIVATION_MAX 32512.0f
/* Blocks without larger activations count as 0, since the inverse of their scale would overflow. */
#define CC_ACTIVATION_LEAST 1e-30f

/* Activations of CC_BLOCK channels: integers times `scale`. Missing channels are 0. */
typedef struct {
    int8_t high[CC_BLOCK]; /* integer = 256 * high + low */
    int8_t low[CC_BLOCK];
    int32_t offset; /* 128 times the sum of the integers: what adding 128 to the entries added to each product */
    float scale;
} cc_block;

/* A clustered matrix. Mirrored field by field in structures.py. */
typedef struct {
    const uint8_t *codes;   /* tiled codes */
    const uint8_t *entries; /* see cc_make_entries */
    const float *row_scale; /* [out_features], or NULL */
    const float *bias;      /* [out_features], or NULL */
    const float *unit;      /* the value of an entry of 1 */
    int64_t in_features;
    int64_t out_features;
    int32_t dim;    /* outputs of a group */
    int32_t planes; /* entries of a row: dim, or 2 * dim if entries have 16 bits (all high bytes, then all low bytes) */
    int32_t pitch;  /* vectors of a decoded record: planes in registers, else planes rounded up to 4, 8 or a multiple of 16 */
    int32_t bits;   /* of a code */
    int32_t in_registers; /* 1: entries are [planes][CC_REGISTER_CLUSTERS], else [2^bits][pitch] */
    int32_t reserved;
} cc_matrix;

enum { CC_PLAIN, CC_AVX2, CC_AVX512, CC_AMX };

static inline int64_t cc_tiles(const cc_matrix *matrix)
{
    const int64_t outputs = (int64_t)CC_GROUPS * matrix->dim;
    return (matrix->out_features + outputs - 1) / outputs;
}

static inline int64_t cc_quads(const cc_matrix *matrix)
{
    return (matrix->in_features + CC_QUAD - 1) / CC_QUAD;
}

static inline int64_t cc_blocks(int64_t channels)
{
    return (channels + CC_BLOCK - 1) / CC_BLOCK;
}

/* Groups of a tile that are stored. */
static inline int64_t cc_tile_groups(const cc_matrix *matrix, int64_t tile)
{
    const int64_t groups = (matrix->out_features + matrix->dim - 1) / matrix->dim - tile * CC_GROUPS;
    return groups < CC_GROUPS ? (groups + 1) / 2 * 2 : CC_GROUPS;
}

static inline int64_t cc_record_bytes(const cc_matrix *matrix, int64_t groups)
{
    return groups * matrix->bits / 2;
}

static inline const uint8_t *cc_record_at(const cc_matrix *matrix, int64_t tile, int64_t quad)
{
    const int64_t full = cc_record_bytes(matrix, CC_GROUPS);
    return matrix->codes + tile * cc_quads(matrix) * full + quad * cc_record_bytes(matrix, cc_tile_groups(matrix, tile));
}

static inline const uint8_t *cc_codes_end(const cc_matrix *matrix)
{
    const int64_t last = cc_tiles(matrix) - 1;
    return cc_record_at(matrix, last, cc_quads(matrix));
}

#endif
