/* A small persistent thread pool for loops over independent items. */
#ifndef CLUSCOMP_THREADS_H
#define CLUSCOMP_THREADS_H

#include <stdint.h>

#if defined(_WIN32)
#define CC_EXPORT __declspec(dllexport)
#else
#define CC_EXPORT __attribute__((visibility("default")))
#endif

/* Works on items [begin, end) as worker `thread`, 0 <= thread < threads. */
typedef void (*cc_task)(void *arg, int64_t begin, int64_t end, int thread);

#define CC_MAX_THREADS 256

/* Calls `task` over [0, items) in chunks of `grain` on up to `threads` threads, including the calling one, and returns when
 * all chunks are done. The assignment of chunks to threads varies between runs, so a task must write only the results of its
 * own items. A nested call, or one made while another thread uses the pool, runs serially as thread 0. */
void cc_parallel_for(int64_t items, int64_t grain, int threads, cc_task task, void *arg);

#endif
