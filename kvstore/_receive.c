/* SPDX-License-Identifier: Apache-2.0
 *
 * Values of one shape off a socket, many in one call: a length line, a header, a payload into its own buffer, an end.
 *
 * Small values cost more in Python than in the kernel, and each return from a receive waits for the interpreter lock.
 * Nothing is believed here: a value that does not begin with the length line expected ends the call, with all that was
 * received of it given back, and the caller's parser goes on from there; headers and checksums are the caller's.
 */
#include <errno.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/types.h>
#include <time.h>

enum { ARRIVED = 0, TIMED_OUT = -1, CLOSED = -2, NO_END = -3 }; /* or an errno */

struct receiving {
    int fd;
    double deadline_s; /* CLOCK_MONOTONIC */
    double armed_s;    /* SO_RCVTIMEO as it is set */
};

/* One receive under the deadline: the number of bytes, 0 never; or an outcome that is not ARRIVED in `why`. */
static size_t receive_some(struct receiving *from, uint8_t *into, size_t num_bytes, int flags, int *why)
{
    for (;;) {
        struct timespec now;
        clock_gettime(CLOCK_MONOTONIC, &now);
        const double left_s = from->deadline_s - ((double)now.tv_sec + 1e-9 * (double)now.tv_nsec);
        if (left_s <= 0) {
            *why = TIMED_OUT;
            return 0;
        }
        /* The kernel's timers fire late by up to an eighth: one that fires early gets another try. */
        if (!(0.8 * left_s <= from->armed_s && from->armed_s <= 0.88 * left_s)) {
            const double arm_s = 0.88 * left_s;
            struct timeval limit = {(time_t)arm_s, (suseconds_t)((arm_s - (double)(time_t)arm_s) * 1e6)};
            if (!limit.tv_sec && !limit.tv_usec)
                limit.tv_usec = 1; /* zero would mean for ever */
            if (setsockopt(from->fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit)) {
                *why = errno;
                return 0;
            }
            from->armed_s = arm_s;
        }
        const ssize_t count = recv(from->fd, into, num_bytes, flags);
        if (count > 0)
            return (size_t)count;
        if (!count)
            *why = CLOSED;
        else if (errno == EINTR || errno == EAGAIN || errno == EWOULDBLOCK)
            continue;
        else
            *why = errno;
        return 0;
    }
}

/* Receives up to `count` values that begin with `line` and a header of `head_bytes`, each payload of `payload_bytes`
 * into its buffer, each header into `heads`. `edge` has room for the line, a header and two bytes more; `*edge_bytes`
 * of the first value are in it already, and at the end what was received beyond the values counted: what lies ready is
 * taken with an end, and never waited for. */
int kvstore_receive(int fd, const uint8_t *line, size_t line_bytes, size_t head_bytes, size_t payload_bytes,
                    size_t count, uint8_t *const *buffers, uint8_t *heads, uint8_t *edge, size_t *edge_bytes,
                    double deadline_s, double *armed_s, size_t *num_done)
{
    struct receiving from = {fd, deadline_s, *armed_s};
    const size_t begin_bytes = line_bytes + head_bytes;
    size_t have = *edge_bytes;
    int why = ARRIVED;
    *num_done = 0;
    while (*num_done < count && !why) {
        while (!memcmp(edge, line, have < line_bytes ? have : line_bytes) && have < begin_bytes && !why)
            have += receive_some(&from, edge + have, begin_bytes - have, 0, &why);
        if (why || memcmp(edge, line, line_bytes))
            break;
        memcpy(heads + *num_done * head_bytes, edge + line_bytes, head_bytes);
        have = 0;
        for (size_t at = 0; at < payload_bytes && !why;)
            at += receive_some(&from, buffers[*num_done] + at, payload_bytes - at, MSG_WAITALL, &why);
        while (have < 2 && !why)
            have += receive_some(&from, edge + have, 2 + begin_bytes - have, 0, &why);
        if (why)
            break;
        if (edge[0] != '\r' || edge[1] != '\n')
            why = NO_END;
        have -= 2;
        memmove(edge, edge + 2, have);
        *num_done += !why;
    }
    *edge_bytes = have;
    *armed_s = from.armed_s;
    return why;
}
