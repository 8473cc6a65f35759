/* Codebooks as the kernels read them, and checks of codes. */
#include <math.h>
#include <string.h>

#include "engine/kernels.h"

#if CC_X86 && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#if CC_X86
static int has_avx512(void)
{
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni");
}

/* AMX needs the processor, and leave of the system to use its registers, which is asked for here. */
static int has_amx(void)
{
#if defined(__linux__) && defined(__x86_64__)
    enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 }; /* arch_prctl(2) */
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d >> 24 & 1) == 0 || (d >> 25 & 1) == 0)
        return 0;
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
#else
    return 0;
#endif
}
#endif

const cc_kernels *cc_kernels_of(int variant)
{
    if (variant == CC_PLAIN)
        return &cc_kernels_plain;
#if CC_X86
    if (variant == CC_AVX2 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
        return &cc_kernels_avx2;
    if (variant == CC_AVX512 && has_avx512())
        return &cc_kernels_avx512;
    if (variant == CC_AMX && has_avx512() && has_amx())
        return &cc_kernels_amx;
#endif
    return NULL;
}

int cc_engine_supported(int variant)
{
    return cc_kernels_of(variant) != NULL;
}

/* Bytes of the entries. There is room for every code of `bits` bits, so that no code leads out of them. */
static int64_t entries_bytes(const cc_matrix *layout)
{
    const int64_t rows = layout->in_registers ? CC_REGISTER_CLUSTERS : (int64_t)1 << layout->bits;
    return (rows * layout->pitch + 63) / 64 * 64;
}

int64_t cc_entries_layout(cc_matrix *matrix, int64_t num_clusters, int32_t dim, int32_t wide, int32_t variant)
{
    matrix->dim = dim;
    matrix->planes = wide ? 2 * dim : dim;
    matrix->bits = 1;
    while ((int64_t)1 << matrix->bits < num_clusters)
        matrix->bits++;
    matrix->in_registers = variant >= CC_AVX512 && num_clusters <= CC_REGISTER_CLUSTERS;
    if (matrix->in_registers)
        matrix->pitch = matrix->planes;
    else
        matrix->pitch = matrix->planes <= 4 ? 4 : matrix->planes <= 8 ? 8 : (matrix->planes + 15) / 16 * 16;
    return entries_bytes(matrix);
}

static void set_entry(const cc_matrix *matrix, uint8_t *entries, int64_t cluster, int64_t plane, int32_t value)
{
    const int64_t at = matrix->in_registers ? plane * CC_REGISTER_CLUSTERS + cluster : cluster * matrix->pitch + plane;
    entries[at] = (uint8_t)(value + 128);
}

float cc_make_entries(const cc_matrix *layout, const float *values, int64_t num_clusters, int32_t wide, uint8_t *entries)
{
    const int64_t dim = layout->dim;
    float most = 0;
    memset(entries, 128, (size_t)entries_bytes(layout));
    for (int64_t i = 0; wide && i < num_clusters * dim; i++)
        most = fabsf(values[i]) > most ? fabsf(values[i]) : most;
    /* 127 * 256: neither byte of the largest overflows. */
    const double inverse = most > 0 ? 32512 / (double)most : 0;
    for (int64_t cluster = 0; cluster < num_clusters; cluster++)
        for (int64_t k = 0; k < dim; k++) {
            const float value = values[cluster * dim + k];
            if (!wide) {
                set_entry(layout, entries, cluster, k, (int32_t)value);
                continue;
            }
            const int32_t integer = (int32_t)lrint(value * inverse), low = (int8_t)(integer & 255);
            set_entry(layout, entries, cluster, k, (integer - low) / 256);
            set_entry(layout, entries, cluster, dim + k, low);
        }
    return wide ? most / 32512 : 1;
}

uint32_t cc_largest_code(const uint8_t *stream, int64_t count, int32_t bits)
{
    uint32_t largest = 0;
    uint64_t window = 0;
    int held = 0;
    for (int64_t i = 0; i < count; i++) {
        while (held < bits) {
            window |= (uint64_t)*stream++ << held;
            held += 8;
        }
        const uint32_t code = (uint32_t)window & ((1u << bits) - 1);
        largest = code > largest ? code : largest;
        window >>= bits;
        held -= bits;
    }
    return largest;
}
