/* See team.h. */
#include "engine/team.h"

#include <stdlib.h>
#include <string.h>

#if defined(_WIN32)

struct cc_team {
    int64_t item;
};

cc_team *cc_team_new(int threads, int64_t phases)
{
    (void)threads;
    (void)phases;
    return calloc(1, sizeof(cc_team));
}

void cc_team_free(cc_team *team)
{
    free(team);
}

int cc_team_threads(const cc_team *team)
{
    (void)team;
    return 1;
}

/* One thread: Python holds no lock around a call, so calls of several threads must not share an engine here. */
void cc_lock(cc_team *team)
{
    (void)team;
}

void cc_unlock(cc_team *team)
{
    (void)team;
}

void cc_team_run(cc_team *team, cc_team_task task, void *arg)
{
    cc_worker worker = {team, 0, 0};
    task(arg, &worker);
}

int64_t cc_first(cc_worker *worker, int64_t items)
{
    worker->team->item = 0;
    return items > 0 ? 0 : -1;
}

int64_t cc_next(cc_worker *worker, int64_t items)
{
    return ++worker->team->item < items ? worker->team->item : -1;
}

#else

#include <pthread.h>
#include <stdatomic.h>
#include <unistd.h>

#if defined(__x86_64__) || defined(__i386__)
#define CPU_RELAX() __builtin_ia32_pause()
#elif defined(__aarch64__)
#define CPU_RELAX() __asm__ volatile("yield")
#else
#define CPU_RELAX() atomic_signal_fence(memory_order_seq_cst)
#endif

/* Polls before a thread sleeps: some tens of microseconds within a run, where a phase takes less; about a millisecond between
 * runs, since waking takes longer than the time between two tokens. */
#define PHASE_SPINS 1000
#define RUN_SPINS 20000

typedef struct {
    _Alignas(64) _Atomic int64_t next; /* first item that nobody has claimed */
    _Atomic int64_t done;
} phase_state;

/* `run` is the number of the current run, shifted, with CLOSED set if no further worker may join it. */
#define CLOSED UINT64_C(1)

struct cc_team {
    pthread_mutex_t busy; /* held by the caller that has the team */
    pthread_mutex_t lock; /* guards sleeping */
    pthread_cond_t wake;
    _Alignas(64) _Atomic uint64_t run;
    _Alignas(64) _Atomic int inside;   /* workers that may be in the current run */
    _Alignas(64) _Atomic int sleepers; /* threads that sleep until something changes */
    _Atomic int ending;
    cc_team_task task;
    void *arg;
    int64_t phases;
    int threads, started;
    pid_t process; /* a forked child has none of the threads */
    phase_state *states;
    pthread_t *handles;
};

typedef struct {
    cc_team *team;
    int thread;
} start_of_worker;

static void wake_sleepers(cc_team *team)
{
    atomic_thread_fence(memory_order_seq_cst);
    if (atomic_load_explicit(&team->sleepers, memory_order_relaxed) == 0)
        return;
    pthread_mutex_lock(&team->lock);
    pthread_cond_broadcast(&team->wake);
    pthread_mutex_unlock(&team->lock);
}

typedef int (*condition)(const cc_team *team, int64_t a, int64_t b);

/* Returns when the condition holds; whoever makes it true calls wake_sleepers. */
static void wait_until(cc_team *team, condition holds, int64_t a, int64_t b, int spins)
{
    for (int spin = 0; spin < spins; spin++) {
        if (holds(team, a, b))
            return;
        CPU_RELAX();
    }
    pthread_mutex_lock(&team->lock);
    atomic_fetch_add_explicit(&team->sleepers, 1, memory_order_relaxed);
    atomic_thread_fence(memory_order_seq_cst);
    while (!holds(team, a, b))
        pthread_cond_wait(&team->wake, &team->lock);
    atomic_fetch_sub_explicit(&team->sleepers, 1, memory_order_relaxed);
    pthread_mutex_unlock(&team->lock);
}

static int phase_is_done(const cc_team *team, int64_t phase, int64_t items)
{
    return atomic_load_explicit(&team->states[phase].done, memory_order_acquire) >= items;
}

static int run_has_changed(const cc_team *team, int64_t last, int64_t unused)
{
    (void)unused;
    return (int64_t)(atomic_load_explicit(&team->run, memory_order_acquire) >> 1) != last ||
           atomic_load_explicit(&team->ending, memory_order_acquire);
}

static int nobody_is_inside(const cc_team *team, int64_t unused, int64_t unused_too)
{
    (void)unused;
    (void)unused_too;
    return atomic_load_explicit(&team->inside, memory_order_seq_cst) == 0;
}

int64_t cc_first(cc_worker *worker, int64_t items)
{
    cc_team *team = worker->team;
    phase_state *state = team->states + worker->phase;
    if (items > 0) {
        const int64_t item = atomic_fetch_add_explicit(&state->next, 1, memory_order_relaxed);
        if (item < items)
            return item;
        wait_until(team, phase_is_done, worker->phase, items, PHASE_SPINS);
    }
    worker->phase++;
    return -1;
}

int64_t cc_next(cc_worker *worker, int64_t items)
{
    cc_team *team = worker->team;
    phase_state *state = team->states + worker->phase;
    if (atomic_fetch_add_explicit(&state->done, 1, memory_order_acq_rel) + 1 == items)
        wake_sleepers(team);
    return cc_first(worker, items);
}

static void *work(void *argument)
{
    start_of_worker start = *(start_of_worker *)argument;
    cc_team *team = start.team;
    int64_t last = 0;
    free(argument);
    for (;;) {
        wait_until(team, run_has_changed, last, 0, RUN_SPINS);
        if (atomic_load_explicit(&team->ending, memory_order_acquire))
            return NULL;
        /* Counted first, so that the caller, who closes the run before it reads the count, waits for this thread if it joins. */
        atomic_fetch_add_explicit(&team->inside, 1, memory_order_seq_cst);
        const uint64_t run = atomic_load_explicit(&team->run, memory_order_seq_cst);
        last = (int64_t)(run >> 1);
        if (!(run & CLOSED)) {
            cc_worker worker = {team, start.thread, 0};
            team->task(team->arg, &worker);
        }
        if (atomic_fetch_sub_explicit(&team->inside, 1, memory_order_acq_rel) == 1)
            wake_sleepers(team);
    }
}

/* If the system refuses a thread, those that are there share the work. */
static void start_workers(cc_team *team)
{
    while (team->started < team->threads - 1) {
        start_of_worker *start = malloc(sizeof *start);
        if (start == NULL)
            return;
        *start = (start_of_worker){team, team->started + 1};
        if (pthread_create(&team->handles[team->started], NULL, work, start) != 0) {
            free(start);
            return;
        }
        team->started++;
    }
}

static void prepare(cc_team *team)
{
    pthread_mutex_init(&team->busy, NULL);
    pthread_mutex_init(&team->lock, NULL);
    pthread_cond_init(&team->wake, NULL);
    atomic_store(&team->run, CLOSED);
    atomic_store(&team->inside, 0);
    atomic_store(&team->sleepers, 0);
    atomic_store(&team->ending, 0);
    team->started = 0;
    team->process = getpid();
}

cc_team *cc_team_new(int threads, int64_t phases)
{
    cc_team *team = NULL;
    if (posix_memalign((void **)&team, 64, sizeof *team) != 0)
        return NULL;
    memset(team, 0, sizeof *team);
    team->threads = threads < 1 ? 1 : threads;
    team->phases = phases;
    team->handles = calloc((size_t)team->threads, sizeof *team->handles);
    if (team->handles == NULL || posix_memalign((void **)&team->states, 64, (size_t)(phases + 1) * sizeof *team->states) != 0) {
        free(team->handles);
        free(team);
        return NULL;
    }
    prepare(team);
    return team;
}

void cc_team_free(cc_team *team)
{
    if (team == NULL)
        return;
    if (team->process == getpid()) {
        atomic_store(&team->ending, 1);
        pthread_mutex_lock(&team->lock);
        pthread_cond_broadcast(&team->wake);
        pthread_mutex_unlock(&team->lock);
        for (int i = 0; i < team->started; i++)
            pthread_join(team->handles[i], NULL);
    }
    free(team->states);
    free(team->handles);
    free(team);
}

int cc_team_threads(const cc_team *team)
{
    return team->threads;
}

void cc_lock(cc_team *team)
{
    if (team->process != getpid())
        prepare(team);
    pthread_mutex_lock(&team->busy);
}

void cc_unlock(cc_team *team)
{
    pthread_mutex_unlock(&team->busy);
}

void cc_team_run(cc_team *team, cc_team_task task, void *arg)
{
    start_workers(team);
    memset(team->states, 0, (size_t)(team->phases + 1) * sizeof *team->states);
    team->task = task;
    team->arg = arg;
    const uint64_t number = (atomic_load(&team->run) >> 1) + 1;
    atomic_store_explicit(&team->run, number << 1, memory_order_seq_cst);
    wake_sleepers(team);
    cc_worker worker = {team, 0, 0};
    task(arg, &worker);
    atomic_fetch_or_explicit(&team->run, CLOSED, memory_order_seq_cst);
    wait_until(team, nobody_is_inside, 0, 0, PHASE_SPINS);
}

#endif
