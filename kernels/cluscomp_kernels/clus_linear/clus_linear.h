/* The compressed linear operator on a CPU: declarations shared by the dispatcher and the instruction-set variants.
 *
 * Layout of a prepared weight: rows of the codebook are padded with zeros to `row` elements, a power of two up to CC_LANES.
 * A tile of CC_LANES / row groups therefore has CC_LANES values per input channel for every cluster_dim. Codes are tiled
 * [tiles][in_features][CC_LANES / row], one or two bytes each; a tile is read from front to back. A "record" is the codes of
 * one input channel in a tile. If rows have one element and codes one byte, the codebook has 256 rows. */
#ifndef CLUSCOMP_CLUS_LINEAR_H
#define CLUSCOMP_CLUS_LINEAR_H

#include <stdint.h>

#define CC_LANES 64
/* Input channels decoded at a time for several tokens: CC_BLOCK * CC_LANES floats stay in the L1 cache. */
#define CC_BLOCK 32
/* Bytes of codes to prefetch. Each thread reads one sequential stream of codes, and the hardware prefetcher stops at every
 * page. Measured in docs/lab-notes.md. */
#define CC_PREFETCH 4096
#if defined(__GNUC__)
#define CC_FETCH(address) __builtin_prefetch(address)
#else
#define CC_FETCH(address) ((void)(address))
#endif
/* Tokens that share one decoded block. */
#define CC_TOKENS 16

enum { CC_FLOAT32, CC_FLOAT16, CC_BFLOAT16, CC_VALUE_TYPES };

/* One tile times the kernel's number of tokens: lanes[n][CC_LANES] = sum over i of x[n][i] * decoded(i). */
typedef void (*cc_tile_dot)(const void *codes, const void *codebook, const float *const *x, int64_t in_features, float *lanes);
/* `channels` records of a tile as float32: block[channels][CC_LANES]. */
typedef void (*cc_tile_decode)(const void *codes, const void *codebook, int64_t channels, float *block);
/* lanes[tokens][CC_LANES] += x[tokens][channels] @ block[channels][CC_LANES]; rows of x are x_stride floats apart. */
typedef void (*cc_block_multiply)(const float *block, int64_t channels, const float *x, int64_t x_stride, int64_t tokens,
                                  float *lanes);

typedef struct {
    cc_tile_dot dot;  /* 1 token */
    cc_tile_dot dot4; /* 4 tokens, or NULL if decoding a block first is as fast */
    cc_tile_decode decode;
    cc_block_multiply multiply;
} cc_kernels;

/* Kernels for rows of `1 << row_log2` elements of a value type and codes of code_bytes (1 or 2) bytes. */
cc_kernels cc_clus_plain(int value_type, int row_log2, int code_bytes);
#if (defined(__x86_64__) || defined(__i386__)) && defined(__GNUC__)
#define CC_X86 1
cc_kernels cc_clus_avx2(int value_type, int row_log2, int code_bytes);
cc_kernels cc_clus_avx512(int value_type, int row_log2, int code_bytes);
#endif

#endif
