/* A pool of threads that help, if they are there.
 *
 * OpenMP waits at the end of every loop for all of its threads, also for one that the system has taken off its core before
 * it took any work: on a busy machine each of the hundreds of loops of a step then takes a time slice. Here pieces are
 * taken one by one, and only those that somebody has begun are waited for. A helper that finds nothing to do looks for a
 * while, then sleeps, so that between two steps its core is free for those who schedule and tell.
 */
#include "pool.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stddef.h>

#define MOST_THREADS 256
#define NO_PIECE 0xffffffffu
#define LOOKS 4000        /* of a helper for the next work, some 100 us, before it sleeps */
#define LOOKS_TO_YIELD 2000 /* of the caller for the end of what others have begun, between two yields */

/* The work's number and the next piece of it, in one word: whoever takes a piece knows that the work is still this. */
static _Atomic uint64_t ticket;
static _Atomic(Piece) work;
static void *_Atomic work_context;
static _Atomic int64_t work_pieces;
static _Atomic int64_t done;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t news = PTHREAD_COND_INITIALIZER;
static _Atomic int32_t sleeping, wanted = 1;
static int32_t started = 1;

static inline void look_away(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

/* Take pieces of the work that is there until none is left. What is read of it holds if the ticket has not changed. */
static void help(void) {
    uint64_t seen = atomic_load(&ticket);
    for (;;) {
        const Piece piece = atomic_load(&work);
        void *context = atomic_load(&work_context);
        const int64_t next = (int64_t)(seen & NO_PIECE);
        if (next >= atomic_load(&work_pieces)) {
            const uint64_t now = atomic_load(&ticket);
            if (now == seen) return;
            seen = now;
        } else if (atomic_compare_exchange_strong(&ticket, &seen, seen + 1)) {
            piece(context, next);
            atomic_fetch_add(&done, 1);
            seen = atomic_load(&ticket);
        }
    }
}

static void sleep_until_news(uint64_t number, int32_t index) {
    pthread_mutex_lock(&lock);
    atomic_fetch_add(&sleeping, 1);
    while (atomic_load(&ticket) >> 32 == number || index >= atomic_load(&wanted)) {
        pthread_cond_wait(&news, &lock);
        if (index >= atomic_load(&wanted)) number = atomic_load(&ticket) >> 32;
    }
    atomic_fetch_sub(&sleeping, 1);
    pthread_mutex_unlock(&lock);
}

static void *helper(void *argument) {
    const int32_t index = (int32_t)(intptr_t)argument;
    for (;;) {
        const uint64_t number = atomic_load(&ticket) >> 32;
        if (index < atomic_load(&wanted)) help();
        int looks = 0;
        while (atomic_load(&ticket) >> 32 == number && looks++ < LOOKS) look_away();
        if (atomic_load(&ticket) >> 32 == number || index >= atomic_load(&wanted)) sleep_until_news(number, index);
    }
    return NULL;
}

void flexpiped_set_threads(int32_t threads) {
    if (threads > MOST_THREADS) threads = MOST_THREADS;
    pthread_mutex_lock(&lock);
    while (started < threads) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, helper, (void *)(intptr_t)started) != 0) break;
        pthread_detach(thread);
        started++;
    }
    atomic_store(&wanted, threads < started ? threads : started);
    pthread_mutex_unlock(&lock);
}

void flexpiped_share(Piece piece, void *context, int64_t pieces) {
    if (pieces < 2 || atomic_load(&wanted) < 2) {
        for (int64_t number = 0; number < pieces; number++) piece(context, number);
        return;
    }
    const uint64_t number = (atomic_load(&ticket) >> 32) + 1;
    /* All pieces of the work before are done. Until the next is described, nobody can take one. */
    atomic_store(&ticket, number << 32 | NO_PIECE);
    atomic_store(&work, piece);
    atomic_store(&work_context, context);
    atomic_store(&work_pieces, pieces);
    atomic_store(&done, 0);
    atomic_store(&ticket, (number + 1) << 32);
    if (atomic_load(&sleeping) > 0) {
        pthread_mutex_lock(&lock);
        pthread_cond_broadcast(&news);
        pthread_mutex_unlock(&lock);
    }
    help();
    for (int looks = 0; atomic_load(&done) < pieces; looks++) {
        if (looks % LOOKS_TO_YIELD == LOOKS_TO_YIELD - 1)
            sched_yield();
        else
            look_away();
    }
}
