/* See threads.h. These are our own threads rather than OpenMP's: torch ships its own copy of the OpenMP runtime, and two OpenMP
 * pools compete by spinning on small machines. */
#include "native/threads.h"

#if defined(_WIN32)

void cc_parallel_for(int64_t items, int64_t grain, int threads, cc_task task, void *arg)
{
    (void)grain;
    (void)threads;
    if (items > 0)
        task(arg, 0, items, 0);
}

#else

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stddef.h>

#if defined(__x86_64__) || defined(__i386__)
#define CPU_RELAX() __builtin_ia32_pause()
#else
#define CPU_RELAX() atomic_signal_fence(memory_order_seq_cst)
#endif

/* Polls of a worker for the next job before it sleeps, about a millisecond. Decoding starts jobs at intervals of up to a few
 * hundred microseconds, and waking a sleeping thread takes longer than most jobs. */
#define WORKER_SPINS 20000
/* Polls of the caller for the last worker before it yields its core. */
#define CALLER_SPINS 2000

/* `state` holds the number of the current job, whether it is closed to further workers, and the count of workers in it. It is
 * one word, so that a worker that wakes late cannot join a job whose caller has already returned. */
#define WORKERS_MASK UINT64_C(0xffff)
#define CLOSED UINT64_C(0x10000)
#define JOB_SHIFT 17

static struct {
    pthread_mutex_t busy; /* held by the caller whose job runs */
    pthread_mutex_t lock; /* guards the condition variable */
    pthread_cond_t wake;
    _Atomic uint64_t state;
    _Atomic int64_t next; /* first item that no thread has claimed */
    int64_t items, grain;
    int started; /* workers, not counting the caller */
    int wanted;  /* workers that may join the current job */
    cc_task task;
    void *arg;
} pool = {.busy = PTHREAD_MUTEX_INITIALIZER,
          .lock = PTHREAD_MUTEX_INITIALIZER,
          .wake = PTHREAD_COND_INITIALIZER,
          .state = CLOSED};

static pthread_once_t once = PTHREAD_ONCE_INIT;

static void run_chunks(int thread)
{
    for (;;) {
        int64_t begin = atomic_fetch_add_explicit(&pool.next, pool.grain, memory_order_relaxed);
        if (begin >= pool.items)
            return;
        int64_t end = begin + pool.grain < pool.items ? begin + pool.grain : pool.items;
        pool.task(pool.arg, begin, end, thread);
    }
}

/* Joins the job in `state` unless it is closed; returns the job's number. */
static uint64_t join(int thread)
{
    uint64_t state = atomic_load_explicit(&pool.state, memory_order_acquire);
    while (!(state & CLOSED)) {
        if (!atomic_compare_exchange_weak_explicit(&pool.state, &state, state + 1, memory_order_acquire,
                                                   memory_order_acquire))
            continue;
        if (thread <= pool.wanted)
            run_chunks(thread);
        atomic_fetch_sub_explicit(&pool.state, 1, memory_order_release);
        break;
    }
    return state >> JOB_SHIFT;
}

static uint64_t current_job(void)
{
    return atomic_load_explicit(&pool.state, memory_order_acquire) >> JOB_SHIFT;
}

static void *worker(void *argument)
{
    int thread = (int)(intptr_t)argument;
    uint64_t done = 0;
    for (;;) {
        for (int spin = 0; spin < WORKER_SPINS && current_job() == done; spin++)
            CPU_RELAX();
        if (current_job() == done) {
            pthread_mutex_lock(&pool.lock);
            while (current_job() == done)
                pthread_cond_wait(&pool.wake, &pool.lock);
            pthread_mutex_unlock(&pool.lock);
        }
        done = join(thread);
    }
    return NULL;
}

/* A forked child inherits none of its parent's threads, so it starts with an empty pool. */
static void reset_in_child(void)
{
    pthread_mutex_init(&pool.busy, NULL);
    pthread_mutex_init(&pool.lock, NULL);
    pthread_cond_init(&pool.wake, NULL);
    pool.started = 0;
    atomic_store(&pool.state, CLOSED);
}

static void register_fork_handler(void)
{
    pthread_atfork(NULL, NULL, reset_in_child);
}

/* If the system refuses a thread, the existing ones share the work. */
static void start_workers(int wanted)
{
    pthread_t handle;
    while (pool.started < wanted &&
           pthread_create(&handle, NULL, worker, (void *)(intptr_t)(pool.started + 1)) == 0) {
        pthread_detach(handle);
        pool.started++;
    }
}

void cc_parallel_for(int64_t items, int64_t grain, int threads, cc_task task, void *arg)
{
    if (items <= 0)
        return;
    if (grain < 1)
        grain = 1;
    int64_t chunks = (items + grain - 1) / grain;
    if (threads > CC_MAX_THREADS)
        threads = CC_MAX_THREADS;
    if (threads > chunks)
        threads = (int)chunks;
    if (threads <= 1 || pthread_mutex_trylock(&pool.busy) != 0) {
        task(arg, 0, items, 0);
        return;
    }
    pthread_once(&once, register_fork_handler);
    start_workers(threads - 1);

    pool.task = task;
    pool.arg = arg;
    pool.items = items;
    pool.grain = grain;
    pool.wanted = threads - 1;
    atomic_store_explicit(&pool.next, 0, memory_order_relaxed);
    pthread_mutex_lock(&pool.lock);
    atomic_store_explicit(&pool.state, (current_job() + 1) << JOB_SHIFT, memory_order_release);
    pthread_cond_broadcast(&pool.wake);
    pthread_mutex_unlock(&pool.lock);

    run_chunks(0);
    atomic_fetch_or_explicit(&pool.state, CLOSED, memory_order_acq_rel);
    /* On a busy machine a worker may lose its core in the middle of a chunk; yielding lets it continue on the caller's. */
    for (int spin = 0; atomic_load_explicit(&pool.state, memory_order_acquire) & WORKERS_MASK; spin++) {
        if (spin < CALLER_SPINS)
            CPU_RELAX();
        else
            sched_yield();
    }
    pthread_mutex_unlock(&pool.busy);
}

#endif
