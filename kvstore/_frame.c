/* SPDX-License-Identifier: Apache-2.0
 *
 * Which of many values that were received are certainly the parts asked for: every check of `kvstore/wire/frame.py`
 * in one call, for the shape that nearly all of them have (not sealed, raw, a header of the length expected).
 *
 * It never says why: what is not sound here, for whatever reason, goes through frame.py, whose word counts. So this may
 * doubt too much, and must not believe anything that frame.py refuses; tests hold the two against each other.
 */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

int kvstore_hash_chain(const uint8_t *parent, const uint8_t *head, size_t head_bytes, const uint8_t *tokens,
                       size_t block_bytes, size_t num_blocks, uint8_t *digests);
uint64_t kvstore_xxh3(const uint8_t *bytes, size_t num_bytes);

enum { DIGEST = 32, FIXED = 144, CHECKSUM = 8, MAX_TOKENS = 256, MAX_EXTRA = 64 << 10 };

static uint64_t number(const uint8_t *from, int num_bytes)
{
    uint64_t value = 0;
    for (int i = num_bytes; i--;)
        value = value << 8 | from[i];
    return value;
}

static int is_sound(const uint8_t *head, size_t head_bytes, size_t payload_bytes, uint64_t payload_xxh3, uint8_t raw_id,
                    const uint8_t *root, const uint8_t *block, uint32_t part)
{
    const uint64_t num_tokens = number(head + 16, 4), extra_bytes = number(head + 20, 4);
    if (memcmp(head, "KVSF\1\0", 6) || head[6] != raw_id)
        return 0;
    if (num_tokens > MAX_TOKENS || extra_bytes > MAX_EXTRA ||
        FIXED + 4 * num_tokens + extra_bytes + CHECKSUM != head_bytes)
        return 0;
    if (number(head + head_bytes - CHECKSUM, 8) != kvstore_xxh3(head, head_bytes - CHECKSUM))
        return 0;
    if (number(head + 8, 4) != part || memcmp(head + 48, root, DIGEST) || memcmp(head + 80, block, DIGEST))
        return 0;
    if (number(head + 24, 8) != payload_bytes || number(head + 32, 8) != payload_bytes ||
        number(head + 40, 8) != payload_xxh3)
        return 0;
    uint8_t tag[16] = "kvblock1", digest[DIGEST];
    memcpy(tag + 8, head + 16, 8); /* the header has both counts as the hash has them */
    return kvstore_hash_chain(head + 112, tag, sizeof tag, head + FIXED, head_bytes - FIXED - CHECKSUM, 1, digest) &&
           !memcmp(digest, block, DIGEST);
}

/* sound[i] = whether header i, of `head_bytes`, and a raw payload of `payload_bytes` with xxh3 sums[i] are part
 * parts[i] of block i of `root`. Headers and blocks lie end to end. */
void kvstore_sound_frames(const uint8_t *heads, size_t head_bytes, size_t payload_bytes, const uint64_t *sums,
                          uint8_t raw_id, const uint8_t *root, const uint8_t *blocks, const uint32_t *parts,
                          size_t count, uint8_t *sound)
{
    memset(sound, 0, count);
    if (head_bytes < FIXED + CHECKSUM)
        return;
    for (size_t i = 0; i < count; i++)
        sound[i] = (uint8_t)is_sound(heads + i * head_bytes, head_bytes, payload_bytes, sums[i], raw_id, root,
                                     blocks + i * DIGEST, parts[i]);
}
