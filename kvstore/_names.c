/* SPDX-License-Identifier: Apache-2.0
 *
 * Names and scores of many parts at once, as words of RESP: what `kvstore/tiers/redis_names.py` does with numpy where
 * this was not built, row for row. A row is as long as every other of its kind.
 */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum { DIGEST = 32, MEMBER = 2 * DIGEST + 6, DIGITS = 18 };

static const char SCORE_HEAD[] = "$21\r\n", SCORE_TAIL[] = "e-6\r\n", MEMBER_HEAD[] = "$68\r\n";
enum { ROW = 5 + DIGITS + 5 + 5 + MEMBER };

/* "<block in hex>:<part, three digits>\r\n" */
static void put_member(char *into, const uint8_t *block, unsigned part)
{
    static const char digits[] = "0123456789abcdef";
    for (int i = 0; i < DIGEST; i++) {
        *into++ = digits[block[i] >> 4];
        *into++ = digits[block[i] & 15];
    }
    const char tail[] = {':', '0' + part / 100, '0' + part / 10 % 10, '0' + part % 10, '\r', '\n'};
    memcpy(into, tail, sizeof tail);
}

/* Rows [count, head_bytes + MEMBER]: the head of a part's root and bucket, then its member.
 *
 * `roots` says which root is each one's; NULL where all have the first. Heads lie by root, then by bucket. */
void kvstore_name_rows(size_t count, const uint8_t *blocks, const uint8_t *parts, const uint32_t *roots,
                       size_t num_buckets, const char *heads, size_t head_bytes, char *rows)
{
    for (size_t i = 0; i < count; i++, blocks += DIGEST) {
        const size_t head = (roots ? roots[i] : 0) * num_buckets + blocks[0] % num_buckets;
        memcpy(rows, heads + head * head_bytes, head_bytes);
        put_member(rows + head_bytes, blocks, parts[i]);
        rows += head_bytes + MEMBER;
    }
}

/* Rows [those not skipped, ROW]: score and member, by bucket, in order within each; how many each bucket has.
 *
 * A score is `micros`, plus `later[i]` unless that is NULL, less the depth: `depth` for the first part, one more at each
 * block that is another than the one before. Returns the depth of the last. `skip`: NULL, or a byte each. */
int64_t kvstore_touch_rows(size_t count, const uint8_t *blocks, const uint8_t *parts, const uint8_t *skip,
                           int64_t micros, int64_t depth, const int64_t *later, size_t num_buckets, size_t *counts,
                           char *rows)
{
    char *ends[256]; /* MAX_BUCKETS */
    memset(counts, 0, num_buckets * sizeof *counts);
    for (size_t i = 0; i < count; i++)
        if (!skip || !skip[i])
            counts[blocks[i * DIGEST] % num_buckets]++;
    for (size_t bucket = 0; bucket < num_buckets; bucket++) {
        ends[bucket] = rows;
        rows += counts[bucket] * ROW;
    }
    for (size_t i = 0; i < count; i++, blocks += DIGEST) {
        depth += i && memcmp(blocks, blocks - DIGEST, DIGEST);
        if (skip && skip[i])
            continue;
        char **end = &ends[blocks[0] % num_buckets], *at = *end;
        *end += ROW;
        memcpy(at, SCORE_HEAD, 5);
        uint64_t score = micros - depth + (later ? later[i] : 0);
        for (char *digit = at + 5 + DIGITS; digit-- > at + 5; score /= 10)
            *digit = '0' + score % 10;
        memcpy(at + 5 + DIGITS, SCORE_TAIL, 5);
        memcpy(at + 10 + DIGITS, MEMBER_HEAD, 5);
        put_member(at + 15 + DIGITS, blocks, parts[i]);
    }
    return depth;
}
