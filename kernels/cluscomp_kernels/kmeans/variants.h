/* One C source for several instruction sets, with bit-identical results.
 *
 * The inner loops run over CC_LANES floats at a time, and the compiler vectorises them. CC_TASK_VARIANTS compiles a task once
 * per instruction set and chooses a variant at run time. The compiler must not contract products and sums into fused
 * multiply-adds, and a sum over dimensions runs from the first to the last, so every variant on every CPU gives the same bits
 * as plain C and the numpy reference. */
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

/* A loop over the lanes. GCC must not unroll it, or it would not vectorise it. */
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

/* 1 if the target has fused multiply-add instructions. Plain C may use them in filters, which do not affect results. */
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
#define CC_PLAIN_FUSES 1
#else
#define CC_PLAIN_FUSES 0
#endif

/* Defines the function `name(level)`, which returns a variant of the task. `body(arg, begin, end, thread, fuses)` is inlined in
 * each variant; `fuses` is 1 if the variant has fused multiply-adds, for filters, which do not affect results. */
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

/* Calls `function(..., dim)`, with dim a compile-time constant for common values. */
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
