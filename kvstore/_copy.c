/* SPDX-License-Identifier: Apache-2.0
 *
 * Strided copies with streaming stores.
 *
 * A KV block is written once and not read soon. An ordinary store first reads the line it is about to
 * overwrite and evicts something useful to keep it: a copy of 8 MiB then moves three bytes for two, and ran at
 * half the rate of this one where it was measured. libc's memmove streams only from tens of MiB upward.
 *
 * Shares of one 512 MiB memmove, 32 KiB rows gathered from 4 KiB pages, on an AMD EPYC: 16-byte vectors 0.75–0.94,
 * 32-byte vectors four at a time 0.88–0.98, `rep movsb` 0.64; prefetching 1 or 2 KiB ahead instead of 512 bytes
 * loses a tenth; two or four pages interleaved as libc does falls to 0.25 where source and destination differ by a
 * few lines modulo a page.
 *
 * Engines on CPUs keep keys turned, [channel][token] where a block has [token][channel]. Such a copy, of single
 * elements that follow each other along one axis on one side and along another on the other, goes in tiles that read
 * whole lines of the source and write whole lines of the destination. Their lines lie far apart, which no processor
 * foresees: each tile asks for the one at its place in the next rectangle. 32 MiB of two-byte elements, one thread: into
 * pages 3.4 ms and out of them 3.6, where a memmove takes 3; without asking 6 and 6 (eight rows of a line at a time) or
 * 7.7 (whole lines); with ordinary stores twice that; element by element 20.
 *
 * Loaded with ctypes, which releases the GIL; not a CPython module and needs no Python header.
 */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef void copy_fn(char *to, const char *from, size_t num_bytes);

static void copy_plain(char *to, const char *from, size_t num_bytes) { memcpy(to, from, num_bytes); }

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

enum { AHEAD = 512, LINE = 64 };

/* Bytes before the destination's first whole line; all of them where the row is too short to stream: it would end in
 * parts of lines. Rows of one or two lines by ordinary stores took 4.2 ms for 32 MiB, by streaming ones 2.6. */
static size_t lead_of(const char *to, size_t num_bytes)
{
    size_t lead = (LINE - ((uintptr_t)to & (LINE - 1))) & (LINE - 1);
    int whole_lines = !(lead | (num_bytes & (LINE - 1)));
    return num_bytes < 256 + lead && !whole_lines ? num_bytes : lead;
}

static void copy_sse2(char *to, const char *from, size_t num_bytes)
{
    size_t lead = lead_of(to, num_bytes);
    memcpy(to, from, lead);
    to += lead, from += lead, num_bytes -= lead;
    for (; num_bytes >= LINE; num_bytes -= LINE, to += LINE, from += LINE) {
        _mm_prefetch(from + AHEAD, _MM_HINT_NTA);
        __m128i a = _mm_loadu_si128((const __m128i *)from);
        __m128i b = _mm_loadu_si128((const __m128i *)(from + 16));
        __m128i c = _mm_loadu_si128((const __m128i *)(from + 32));
        __m128i d = _mm_loadu_si128((const __m128i *)(from + 48));
        _mm_stream_si128((__m128i *)to, a);
        _mm_stream_si128((__m128i *)(to + 16), b);
        _mm_stream_si128((__m128i *)(to + 32), c);
        _mm_stream_si128((__m128i *)(to + 48), d);
    }
    memcpy(to, from, num_bytes);
}

__attribute__((target("avx2"))) static void copy_avx2(char *to, const char *from, size_t num_bytes)
{
    size_t lead = lead_of(to, num_bytes);
    memcpy(to, from, lead);
    to += lead, from += lead, num_bytes -= lead;
    for (; num_bytes >= 2 * LINE; num_bytes -= 2 * LINE, to += 2 * LINE, from += 2 * LINE) {
        _mm_prefetch(from + AHEAD, _MM_HINT_NTA);
        _mm_prefetch(from + AHEAD + LINE, _MM_HINT_NTA);
        __m256i a = _mm256_loadu_si256((const __m256i *)from);
        __m256i b = _mm256_loadu_si256((const __m256i *)(from + 32));
        __m256i c = _mm256_loadu_si256((const __m256i *)(from + 64));
        __m256i d = _mm256_loadu_si256((const __m256i *)(from + 96));
        _mm256_stream_si256((__m256i *)to, a);
        _mm256_stream_si256((__m256i *)(to + 32), b);
        _mm256_stream_si256((__m256i *)(to + 64), c);
        _mm256_stream_si256((__m256i *)(to + 96), d);
    }
    memcpy(to, from, num_bytes);
}

static copy_fn *row_copy(void) { return __builtin_cpu_supports("avx2") ? copy_avx2 : copy_sse2; }
static void copies_done(void) { _mm_sfence(); }

/* Eight rows of eight elements of four bytes, turned: half a line of each of eight destination rows. */
__attribute__((target("avx2"))) static inline void turn_8x8_of_4(char (*to)[LINE], int at, const char *from, int64_t step)
{
    __m256 row[8], pair[8], quad[8];
    for (int i = 0; i < 8; i++)
        row[i] = _mm256_loadu_ps((const float *)(from + i * step));
    for (int i = 0; i < 8; i += 2) {
        pair[i] = _mm256_unpacklo_ps(row[i], row[i + 1]);
        pair[i + 1] = _mm256_unpackhi_ps(row[i], row[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        quad[i] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0x44);
        quad[i + 1] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0xEE);
        quad[i + 2] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0x44);
        quad[i + 3] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0xEE);
    }
    for (int i = 0; i < 4; i++) {
        _mm256_store_ps((float *)(to[i] + at), _mm256_permute2f128_ps(quad[i], quad[i + 4], 0x20));
        _mm256_store_ps((float *)(to[i + 4] + at), _mm256_permute2f128_ps(quad[i], quad[i + 4], 0x31));
    }
}

/* The same of two bytes: a quarter of each line. */
static inline void turn_8x8_of_2(char (*to)[LINE], int at, const char *from, int64_t step)
{
    __m128i row[8], pair[8], quad[8];
    for (int i = 0; i < 8; i++)
        row[i] = _mm_loadu_si128((const __m128i *)(from + i * step));
    for (int i = 0; i < 8; i += 2) {
        pair[i] = _mm_unpacklo_epi16(row[i], row[i + 1]);
        pair[i + 1] = _mm_unpackhi_epi16(row[i], row[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        quad[i] = _mm_unpacklo_epi32(pair[i], pair[i + 2]);
        quad[i + 1] = _mm_unpackhi_epi32(pair[i], pair[i + 2]);
        quad[i + 2] = _mm_unpacklo_epi32(pair[i + 1], pair[i + 3]);
        quad[i + 3] = _mm_unpackhi_epi32(pair[i + 1], pair[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        _mm_store_si128((__m128i *)(to[2 * i] + at), _mm_unpacklo_epi64(quad[i], quad[i + 4]));
        _mm_store_si128((__m128i *)(to[2 * i + 1] + at), _mm_unpackhi_epi64(quad[i], quad[i + 4]));
    }
}

static int turns_by_vector(size_t item_bytes, const char *to, int64_t to_step)
{
    int whole_lines = !(((uintptr_t)to | (uintptr_t)to_step) & (LINE - 1));
    return whole_lines && (item_bytes == 2 || item_bytes == 4) && __builtin_cpu_supports("avx2");
}

/* The part of `turn` that is whole lines of the destination, up to as many rows of it as make a line of the source. A
 * tile is put together in the cache and streamed out line by line: half lines streamed in turn ran at half the rate. */
__attribute__((target("avx2"))) static void turn_tiles(char *to, const char *from, int64_t lines, int64_t rows,
                                                       int64_t to_step, int64_t from_step, int64_t ahead, int item_bytes)
{
    char tile[LINE / 2][LINE] __attribute__((aligned(LINE)));
    int64_t line_items = LINE / item_bytes;
    for (int64_t line = 0; line < lines; line++)
        for (int64_t row = 0; row < rows; row += line_items) {
            int64_t num_rows = rows - row < line_items ? rows - row : line_items;
            const char *source = from + line * line_items * from_step + row * item_bytes;
            for (int at = 0; at < LINE; at += 8 * item_bytes, source += 8 * from_step) {
                for (int i = 0; i < 8; i++)
                    _mm_prefetch(source + i * from_step + ahead, _MM_HINT_T1);
                for (int64_t eight = 0; eight < num_rows; eight += 8) {
                    if (item_bytes == 4)
                        turn_8x8_of_4(tile + eight, at, source + eight * 4, from_step);
                    else
                        turn_8x8_of_2(tile + eight, at, source + eight * 2, from_step);
                }
            }
            char *into = to + row * to_step + line * LINE;
            for (int64_t i = 0; i < num_rows; i++, into += to_step) {
                _mm256_stream_si256((__m256i *)into, _mm256_load_si256((const __m256i *)tile[i]));
                _mm256_stream_si256((__m256i *)(into + 32), _mm256_load_si256((const __m256i *)(tile[i] + 32)));
            }
        }
}
#else
static copy_fn *row_copy(void) { return copy_plain; }
static void copies_done(void) {}
enum { LINE = 64 };
static int turns_by_vector(size_t item_bytes, const char *to, int64_t to_step) { return 0; }
static void turn_tiles(char *to, const char *from, int64_t lines, int64_t rows, int64_t to_step, int64_t from_step,
                       int64_t ahead, int item_bytes)
{
}
#endif

enum {
    SHORT_ROW = 256,
    AT_ONCE = 64 << 10 /* bytes that one of a team takes, or one place */
};

/* GOMP_parallel: run `work(shared)` on this thread and its team, of the usual size for 0, and wait for all. */
typedef void team_fn(void (*work)(void *), void *shared, unsigned num_threads, unsigned flags);

/* A rectangle of single elements: `across` of them follow each other at the destination, `down` at the source, where
 * the next rectangle begins `ahead` bytes on. */
typedef struct {
    int64_t across, down, to_step, from_step, ahead;
} rectangle;

#define TURN_PLAIN(item_bytes)                                                                         \
    for (int64_t left = 0; left < area.across; left += TILE)                                           \
        for (int64_t row = 0; row < area.down; row++)                                                  \
            for (int64_t at = left; at < area.across && at < left + TILE; at++)                        \
                memcpy(to + row * area.to_step + at * item_bytes, from + at * area.from_step + row * item_bytes, item_bytes)

static void turn_plain(char *to, const char *from, rectangle area, size_t item_bytes)
{
    enum { TILE = 16 };
    switch (item_bytes) { /* so that each element's copy is one instruction, not a call */
    case 1: TURN_PLAIN(1); break;
    case 2: TURN_PLAIN(2); break;
    case 4: TURN_PLAIN(4); break;
    default: TURN_PLAIN(8);
    }
}

static void turn(char *to, const char *from, rectangle area, size_t item_bytes)
{
    rectangle rest = area;
    if (turns_by_vector(item_bytes, to, area.to_step)) {
        int64_t lines = area.across * (int64_t)item_bytes / LINE, down = area.down / 8 * 8;
        int64_t across = lines * LINE / (int64_t)item_bytes;
        turn_tiles(to, from, lines, down, area.to_step, area.from_step, area.ahead, (int)item_bytes);
        rest.across = across, rest.down = area.down - down;
        turn_plain(to + down * area.to_step, from + down * (int64_t)item_bytes, rest, item_bytes);
        rest.across = area.across - across, rest.down = area.down;
        to += across * (int64_t)item_bytes, from += across * area.from_step;
    }
    turn_plain(to, from, rest, item_bytes);
}

typedef struct {
    copy_fn *copy;
    size_t row_bytes;
    int turned;
    rectangle area;
} leaf;

static void copy_axes(const leaf *each, char *to, const char *from, int num_axes, const int64_t *sizes,
                      const int64_t *to_steps, const int64_t *from_steps)
{
    if (num_axes == 0) {
        if (each->turned)
            turn(to, from, each->area, each->row_bytes);
        else
            each->copy(to, from, each->row_bytes);
        return;
    }
    for (int64_t at = 0; at < sizes[0]; at++)
        copy_axes(each, to + at * to_steps[0], from + at * from_steps[0], num_axes - 1, sizes + 1, to_steps + 1,
                  from_steps + 1);
}

/* The axis along which rows follow each other without gaps; -1 for none. */
static int dense_axis(int num_axes, const int64_t *steps, size_t row_bytes)
{
    for (int at = num_axes - 1; at >= 0; at--)
        if (steps[at] == (int64_t)row_bytes)
            return at;
    return -1;
}

typedef struct {
    leaf each;
    char *const *to;
    const char *const *from;
    int num_axes;
    int64_t sizes[8], to_steps[8], from_steps[8];
    size_t num_places, at_once;
    size_t next; /* the first place that nobody has taken */
} job;

/* What one copy of `num_places` does. */
static void begin(job *made, size_t num_places, char *const *to, const char *const *from, int num_axes,
                  const int64_t *sizes, const int64_t *to_steps, const int64_t *from_steps, size_t row_bytes)
{
    leaf each = {row_bytes < SHORT_ROW && row_bytes % LINE ? copy_plain : row_copy(), row_bytes, 0, {0, 0, 0, 0, 0}};
    int across = dense_axis(num_axes, to_steps, row_bytes), down = dense_axis(num_axes, from_steps, row_bytes);
    size_t place_bytes = row_bytes;
    int kept = 0;
    each.turned = across >= 0 && down >= 0 && across != down && (row_bytes == 1 || row_bytes == 2 || row_bytes == 4 || row_bytes == 8);
    for (int at = 0; at < num_axes; at++) {
        place_bytes *= (size_t)sizes[at];
        if (each.turned && (at == across || at == down))
            continue;
        made->sizes[kept] = sizes[at], made->to_steps[kept] = to_steps[at], made->from_steps[kept] = from_steps[at];
        kept++;
    }
    if (each.turned) {
        rectangle area = {sizes[across], sizes[down], to_steps[down], from_steps[across],
                          kept ? made->from_steps[kept - 1] : 0};
        each.area = area;
    }
    made->each = each;
    made->to = to, made->from = from;
    made->num_axes = kept;
    made->num_places = num_places;
    made->at_once = place_bytes && place_bytes < AT_ONCE ? AT_ONCE / place_bytes : 1;
    made->next = 0;
}

/* Copy places until none is left to take: what each of a team does. */
static void work(void *shared)
{
    job *all = shared;
    for (;;) {
        size_t at = __atomic_fetch_add(&all->next, all->at_once, __ATOMIC_RELAXED), stop = at + all->at_once;
        if (at >= all->num_places)
            break;
        for (stop = stop < all->num_places ? stop : all->num_places; at < stop; at++)
            copy_axes(&all->each, all->to[at], all->from[at], all->num_axes, all->sizes, all->to_steps, all->from_steps);
    }
    copies_done();
}

/* For each of num_places pairs of addresses, copy rows of row_bytes over num_axes axes, at most 8; steps are in
 * bytes. Sources and destinations must not overlap.
 *
 * `team`, where it is not NULL, is GOMP_parallel of the OpenMP runtime that computes on this thread, and the threads of
 * its team copy along. Between two operators they spin for some milliseconds, on every core, and a thread of our own
 * waits as long for one. Places are taken, not dealt: a thread that comes late finds the rest, or nothing. */
void kvstore_copy(size_t num_places, char *const *to, const char *const *from, int num_axes, const int64_t *sizes,
                  const int64_t *to_steps, const int64_t *from_steps, size_t row_bytes, team_fn *team)
{
    job made;
    begin(&made, num_places, to, from, num_axes, sizes, to_steps, from_steps, row_bytes);
    if (team && num_places > made.at_once)
        team(work, &made, 0, 0);
    else
        work(&made);
}

/* So that the build backend, which takes this for an extension module, finds the name it asks the linker for. */
void PyInit__native(void) {}
