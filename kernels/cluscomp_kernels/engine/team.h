/* Threads that run one function together, phase by phase.
 *
 * Every thread runs the same function. Work is divided into phases of independent items, which threads claim one by one; a phase
 * ends when all its items are done, not when all threads have come to its end. So a thread that lost its core holds up the
 * others only with the item it was working on. Waiting threads spin for a moment, then sleep. */
#ifndef CLUSCOMP_TEAM_H
#define CLUSCOMP_TEAM_H

#include <stdint.h>

typedef struct cc_team cc_team;

/* A thread of a run. */
typedef struct {
    cc_team *team;
    int thread; /* 0 is the caller */
    int64_t phase;
} cc_worker;

typedef void (*cc_team_task)(void *arg, cc_worker *worker);

/* A team of `threads`, among them the caller of cc_team_run; runs have at most `phases` phases. NULL if there is no memory. */
cc_team *cc_team_new(int threads, int64_t phases);
void cc_team_free(cc_team *team);
int cc_team_threads(const cc_team *team);

/* One caller at a time has a team; others wait in cc_lock. */
void cc_lock(cc_team *team);
void cc_unlock(cc_team *team);

/* Runs the task on all threads that are there, and returns when it is done. The caller has the team. */
void cc_team_run(cc_team *team, cc_team_task task, void *arg);

/* The items of a phase: for (int64_t i = cc_first(worker, n); i >= 0; i = cc_next(worker, n)) {...}. At the end of the loop all
 * items are done, and what was written in them is visible. */
int64_t cc_first(cc_worker *worker, int64_t items);
int64_t cc_next(cc_worker *worker, int64_t items);

#endif
