/* SPDX-License-Identifier: Apache-2.0
 *
 * Values of one shape off a socket, many in one call that needs no interpreter: each is a length line, a header, a
 * payload into its own buffer, an end. Asks for the next ones as it goes. By whoever waits for them, or beside on a
 * thread of its own, so that the caller can do something else first.
 *
 * A payload is hashed piece by piece, while it is in the core's cache, and where there is a choice when nothing waits
 * to be received: hashed afterwards, the sender's buffer ran full meanwhile and both stood still in turn. Nothing is
 * believed here: a value that does not begin with the length line expected ends it, with all that was received of it
 * given back, and the caller's parser goes on from there; headers and checksums are the caller's to compare.
 */
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/types.h>
#include <time.h>

void kvstore_xxh3_begin(uint64_t *sums);
size_t kvstore_xxh3_more(uint64_t *sums, const uint8_t *bytes, size_t at, size_t until);
uint64_t kvstore_xxh3_end(uint64_t *sums, const uint8_t *bytes, size_t at, size_t num_bytes);

enum { ARRIVED = 0, TIMED_OUT = -1, CLOSED = -2, NO_END = -3 }; /* or an errno */

enum { PIECE_BYTES = 256 << 10, HASH_BYTES = 64 << 10 };

/* What to receive, and what came of it: laid out as `_Receiving` in native.py. */
struct receiving {
    int32_t fd;
    int32_t why;        /* how it ended */
    double deadline_s;  /* CLOCK_MONOTONIC */
    double armed_s;     /* SO_RCVTIMEO as it is set */
    const uint8_t *line;
    size_t line_bytes, head_bytes, payload_bytes, count;
    uint8_t *const *buffers;
    uint8_t *heads;
    uint64_t *sums;
    uint8_t *edge;      /* room for a line, a header and two bytes more */
    size_t edge_bytes;  /* of the first value, in `edge` already; at the end what was received beyond those counted */
    const uint8_t *requests;
    size_t request_bytes; /* of one */
    size_t num_asked;     /* values asked for */
    size_t num_ahead;     /* how many to have asked for beyond the one being received */
    size_t num_done;      /* values that arrived, to their ends */
    size_t num_received;  /* bytes of anything */
};

struct running {
    struct receiving *job;
    size_t have; /* of the next value, in `edge` */
    int ended;   /* no more will arrive */
    int beside;  /* on `thread`: what follows is for that alone */
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t moved;
    size_t wanted; /* whoever waits, waits for so many */
};

static double left_s(const struct receiving *job)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return job->deadline_s - ((double)now.tv_sec + 1e-9 * (double)now.tv_nsec);
}

/* What lies ready to be received, up to `num_bytes`; 0 where that is nothing. */
static size_t take_ready(struct receiving *job, uint8_t *into, size_t num_bytes)
{
    for (;;) {
        const ssize_t count = recv(job->fd, into, num_bytes, MSG_DONTWAIT);
        if (count > 0) {
            job->num_received += (size_t)count;
            return (size_t)count;
        }
        if (!count)
            job->why = CLOSED;
        else if (errno == EINTR)
            continue;
        else if (errno != EAGAIN && errno != EWOULDBLOCK)
            job->why = errno;
        return 0;
    }
}

/* Waits under the deadline for some of `num_bytes`; 0 where there will be none, and `why` says so. */
static size_t take(struct receiving *job, uint8_t *into, size_t num_bytes, int flags)
{
    for (;;) {
        const double remaining_s = left_s(job);
        if (remaining_s <= 0) {
            job->why = TIMED_OUT;
            return 0;
        }
        /* The kernel's timers fire late by up to an eighth: one that fires early gets another try. */
        if (!(0.8 * remaining_s <= job->armed_s && job->armed_s <= 0.88 * remaining_s)) {
            const double arm_s = 0.88 * remaining_s;
            struct timeval limit = {(time_t)arm_s, (suseconds_t)((arm_s - (double)(time_t)arm_s) * 1e6)};
            if (!limit.tv_sec && !limit.tv_usec)
                limit.tv_usec = 1; /* zero would mean for ever */
            if (setsockopt(job->fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit)) {
                job->why = errno;
                return 0;
            }
            job->armed_s = arm_s;
        }
        const ssize_t count = recv(job->fd, into, num_bytes, flags);
        if (count > 0) {
            job->num_received += (size_t)count;
            return (size_t)count;
        }
        if (!count)
            job->why = CLOSED;
        else if (errno == EINTR || errno == EAGAIN || errno == EWOULDBLOCK)
            continue;
        else
            job->why = errno;
        return 0;
    }
}

/* Asks for values until `num_ahead` are on their way beyond value `at`: many at once, when half of them have come. */
static void ask(struct receiving *job, size_t at)
{
    if (job->num_asked == job->count || job->num_asked > at + (job->num_ahead + 1) / 2)
        return;
    size_t until = at + 1 + job->num_ahead;
    if (until > job->count)
        until = job->count;
    size_t sent = job->num_asked * job->request_bytes;
    const size_t end = until * job->request_bytes;
    while (sent < end && !job->why) {
        const ssize_t count = send(job->fd, job->requests + sent, end - sent, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (count >= 0) {
            sent += (size_t)count;
            continue;
        }
        if (errno == EINTR)
            continue;
        if (errno != EAGAIN && errno != EWOULDBLOCK) {
            job->why = errno;
            break;
        }
        struct pollfd ready = {job->fd, POLLOUT, 0};
        const double remaining_s = left_s(job);
        if (remaining_s <= 0)
            job->why = TIMED_OUT;
        else
            poll(&ready, 1, remaining_s < 1000 ? 1 + (int)(1e3 * remaining_s) : 1000000);
    }
    job->num_asked = until;
}

static uint64_t take_payload(struct receiving *job, uint8_t *into)
{
    const size_t num_bytes = job->payload_bytes;
    uint64_t sums[8];
    size_t at = 0, hashed = 0;
    kvstore_xxh3_begin(sums);
    while (at < num_bytes && !job->why) {
        const size_t step = num_bytes - at < PIECE_BYTES ? num_bytes - at : PIECE_BYTES;
        size_t count = take_ready(job, into + at, step);
        if (!count && !job->why) {
            const size_t until = at - hashed < HASH_BYTES ? at : hashed + HASH_BYTES;
            const size_t before = hashed;
            hashed = kvstore_xxh3_more(sums, into, hashed, until);
            if (hashed == before)
                count = take(job, into + at, step < HASH_BYTES ? step : HASH_BYTES, MSG_WAITALL);
        }
        at += count;
        if (at - hashed >= PIECE_BYTES)
            hashed = kvstore_xxh3_more(sums, into, hashed, at);
    }
    return job->why ? 0 : kvstore_xxh3_end(sums, into, hashed, num_bytes);
}

static void done(struct running *run, size_t num_done)
{
    __atomic_store_n(&run->job->num_done, num_done, __ATOMIC_SEQ_CST);
    if (!run->beside || num_done < __atomic_load_n(&run->wanted, __ATOMIC_SEQ_CST))
        return;
    pthread_mutex_lock(&run->lock);
    pthread_cond_broadcast(&run->moved);
    pthread_mutex_unlock(&run->lock);
}

/* Until `until` values have arrived, or no more will; whether that is so. */
static int receive_until(struct running *run, size_t until)
{
    struct receiving *const job = run->job;
    const size_t begin_bytes = job->line_bytes + job->head_bytes;
    size_t have = run->have, number = job->num_done;
    int odd = 0;
    while (number < until && !job->why) {
        ask(job, number);
        while (!memcmp(job->edge, job->line, have < job->line_bytes ? have : job->line_bytes) && have < begin_bytes &&
               !job->why)
            have += take(job, job->edge + have, begin_bytes - have, 0);
        if (job->why || memcmp(job->edge, job->line, job->line_bytes)) {
            odd = 1;
            break;
        }
        memcpy(job->heads + number * job->head_bytes, job->edge + job->line_bytes, job->head_bytes);
        have = 0;
        job->sums[number] = take_payload(job, job->buffers[number]);
        /* What lies ready of the next one is taken with an end, and never waited for. */
        while (have < 2 && !job->why)
            have += take(job, job->edge + have, 2 + begin_bytes - have, 0);
        if (job->why)
            break;
        if (job->edge[0] != '\r' || job->edge[1] != '\n')
            job->why = NO_END;
        have -= 2;
        memmove(job->edge, job->edge + 2, have);
        if (!job->why)
            done(run, ++number);
    }
    run->have = have;
    return odd || job->why || number == job->count;
}

static void *run_thread(void *given)
{
    struct running *const run = given;
    receive_until(run, run->job->count);
    pthread_mutex_lock(&run->lock);
    run->ended = 1;
    pthread_cond_broadcast(&run->moved);
    pthread_mutex_unlock(&run->lock);
    return NULL;
}

/* Begins to receive: what arrives does in `kvstore_receive_wait`, or `beside` it on a thread of its own. Everything
 * `job` names is this run's until `kvstore_receive_end`. NULL where there is no memory for it. */
void *kvstore_receive_begin(struct receiving *job, int beside)
{
    struct running *const run = calloc(1, sizeof *run);
    if (!run)
        return NULL;
    run->job = job;
    run->have = job->edge_bytes;
    if (!beside)
        return run;
    run->wanted = job->count;
    pthread_mutex_init(&run->lock, NULL);
    pthread_cond_init(&run->moved, NULL);
    run->beside = 1;
    sigset_t all, before; /* signals are for the interpreter's threads */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    const int refused = pthread_create(&run->thread, NULL, run_thread, run);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (refused) {
        pthread_cond_destroy(&run->moved);
        pthread_mutex_destroy(&run->lock);
        run->beside = 0;
    }
    return run;
}

/* Waits until `wanted` values have arrived, or no more will; how many have. */
size_t kvstore_receive_wait(struct running *run, size_t wanted)
{
    if (wanted > run->job->count)
        wanted = run->job->count;
    if (!run->beside) {
        if (!run->ended)
            run->ended = receive_until(run, wanted);
        return run->job->num_done;
    }
    pthread_mutex_lock(&run->lock);
    __atomic_store_n(&run->wanted, wanted, __ATOMIC_SEQ_CST);
    while (__atomic_load_n(&run->job->num_done, __ATOMIC_SEQ_CST) < wanted && !run->ended)
        pthread_cond_wait(&run->moved, &run->lock);
    pthread_mutex_unlock(&run->lock);
    return __atomic_load_n(&run->job->num_done, __ATOMIC_SEQ_CST);
}

/* Ends it, of no use to anybody else where more could arrive: from here on nothing writes to the buffers. */
void kvstore_receive_end(struct running *run)
{
    struct receiving *const job = run->job;
    if (run->beside)
        pthread_mutex_lock(&run->lock);
    /* A thread that has them all is about to say so. */
    const int cut = !run->ended && __atomic_load_n(&job->num_done, __ATOMIC_SEQ_CST) < job->count;
    if (run->beside) {
        if (cut)
            shutdown(job->fd, SHUT_RDWR);
        pthread_mutex_unlock(&run->lock);
        pthread_join(run->thread, NULL);
        pthread_cond_destroy(&run->moved);
        pthread_mutex_destroy(&run->lock);
    }
    if (cut && !job->why) /* the thread may have found all the rest in the socket */
        job->why = CLOSED;
    job->edge_bytes = run->have;
    free(run);
}
