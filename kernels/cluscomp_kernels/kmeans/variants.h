/* One C source, several instruction sets, the same bits.
 *
 * The inner loops run over CC_LANES floats at a time and are left to the compiler's vectoriser. CC_TASK_VARIANTS compiles a
 * task once for every instruction set and picks one at run time. Products and sums are never contracted into fused
 * multiply-adds by the compiler, and a sum over dimensions runs from the first to the last, so every variant, on every CPU,
 * gives the same bits as the plain C one and as the numpy reference. */
#ifndef CLUSCOMP_KMEANS_VARIANTS_H
#define CLUSCOMP_KMEANS_VARIANTS_H

#include "native/threads.h"

#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#elif defined(_MSC_VER)
#pragma fp_contract(off)
#endif

#define CC_LANES 16

/* A loop over the lanes. GCC must be kept from unrolling it before its vectoriser sees it. */
#if defined(__GNUC__) && !defined(__clang__)
#define CC_EACH_LANE(lane) _Pragma("GCC unroll 1") for (int lane = 0; lane < CC_LANES; lane++)
#else
#define CC_EACH_LANE(lane) for (int lane = 0; lane < CC_LANES; lane++)
#endif

#if defined(__GNUC__)
#define CC_INLINE inline __attribute__((always_inline))
#else
#define CC_INLINE inline
#endif

/* Plain C may use fused multiply-adds, where only a filter depends on them, if they are instructions here. */
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
#define CC_PLAIN_FUSES 1
#else
#define CC_PLAIN_FUSES 0
#endif

/* Defines the function `name(level)`, which picks a variant of the task. `body(arg, begin, end, thread, fuses)` is inlined in
 * each; `fuses` says whether the variant has fused multiply-adds, for filters whose results do not reach the caller. */
#if defined(__GNUC__) && defined(__x86_64__)
#define CC_TASK_VARIANTS(name, body)                                                                                   \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,prefer-vector-width=512"))) static void              \
    name##_avx512(void *arg, int64_t begin, int64_t end, int thread)                                                   \
    {                                                                                                                  \
        body(arg, begin, end, thread, 1);                                                                              \
    }                                                                                                                  \
    __attribute__((target("avx2,fma"))) static void name##_avx2(void *arg, int64_t begin, int64_t end, int thread)     \
    {                                                                                                                  \
        body(arg, begin, end, thread, 1);                                                                              \
    }                                                                                                                  \
    static void name##_plain(void *arg, int64_t begin, int64_t end, int thread)                                        \
    {                                                                                                                  \
        body(arg, begin, end, thread, CC_PLAIN_FUSES);                                                                 \
    }                                                                                                                  \
    static cc_task name(int level)                                                                                     \
    {                                                                                                                  \
        int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");                                    \
        if (level >= 2 && avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&           \
            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))                                  \
            return name##_avx512;                                                                                      \
        return level >= 1 && avx2 ? name##_avx2 : name##_plain;                                                        \
    }
#else
#define CC_TASK_VARIANTS(name, body)                                                                                   \
    static void name##_plain(void *arg, int64_t begin, int64_t end, int thread)                                        \
    {                                                                                                                  \
        body(arg, begin, end, thread, CC_PLAIN_FUSES);                                                                 \
    }                                                                                                                  \
    static cc_task name(int level)                                                                                     \
    {                                                                                                                  \
        (void)level;                                                                                                   \
        return name##_plain;                                                                                           \
    }
#endif

/* Calls `function(..., dim)` with the dim as a compile-time constant where that pays. */
#define CC_FOR_DIM(dim, function, ...)                                                                                 \
    switch (dim) {                                                                                                     \
    case 2:                                                                                                            \
        function(__VA_ARGS__, 2);                                                                                      \
        break;                                                                                                         \
    case 4:                                                                                                            \
        function(__VA_ARGS__, 4);                                                                                      \
        break;                                                                                                         \
    case 5:                                                                                                            \
        function(__VA_ARGS__, 5);                                                                                      \
        break;                                                                                                         \
    case 6:                                                                                                            \
        function(__VA_ARGS__, 6);                                                                                      \
        break;                                                                                                         \
    case 8:                                                                                                            \
        function(__VA_ARGS__, 8);                                                                                      \
        break;                                                                                                         \
    case 16:                                                                                                           \
        function(__VA_ARGS__, 16);                                                                                     \
        break;                                                                                                         \
    default:                                                                                                           \
        function(__VA_ARGS__, dim);                                                                                    \
        break;                                                                                                         \
    }

#endif
