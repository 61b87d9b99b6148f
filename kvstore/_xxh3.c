/* SPDX-License-Identifier: Apache-2.0
 *
 * XXH3, 64 bits, no seed, over bytes that arrive or leave in pieces: each piece is hashed while it is in the cache.
 *
 * The algorithm is Yann Collet's (https://github.com/Cyan4973/xxHash, doc/xxhash_spec.md). Written here because the
 * loops that receive and send have no interpreter at hand, and the Python package can be called from nowhere else.
 * For 129 bytes or more. The caller keeps where it is: the bytes stay where they are, so nothing is buffered.
 */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define BY_PROCESSOR 1
#endif

enum { STRIPE = 64, BLOCK = 1024, SHORT = 240, LEAST_SECRET = 136 };

static const uint8_t SECRET[192] __attribute__((aligned(64))) = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c,
    0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f,
    0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21,
    0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c,
    0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8,
    0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d,
    0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64,
    0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce,
    0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e};

static const uint64_t PRIME32[3] = {0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D};
static const uint64_t PRIME64[5] = {0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x85EBCA77C2B2AE63,
                                    0x27D4EB2F165667C5};

static inline uint64_t word(const uint8_t *from)
{
    uint64_t value;
    memcpy(&value, from, sizeof value);
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    value = __builtin_bswap64(value);
#endif
    return value;
}

static inline uint64_t fold(uint64_t a, uint64_t b)
{
    const unsigned __int128 product = (unsigned __int128)a * b;
    return (uint64_t)product ^ (uint64_t)(product >> 64);
}

static inline uint64_t avalanche(uint64_t hash)
{
    hash = (hash ^ hash >> 37) * 0x165667919E3779F9;
    return hash ^ hash >> 32;
}

/* ── stripes of 64 bytes into eight sums, a scramble after each 16 of them ─────────────────────────────────────── */

typedef void stripes_fn(uint64_t *sums, const uint8_t *from, size_t num_stripes, const uint8_t *secret);
typedef void blocks_fn(uint64_t *sums, const uint8_t *from, size_t num_blocks);

static inline void scramble(uint64_t *sums)
{
    for (int lane = 0; lane < 8; lane++)
        sums[lane] = (sums[lane] ^ sums[lane] >> 47 ^ word(SECRET + 128 + 8 * lane)) * PRIME32[0];
}

static inline void stripes_plain(uint64_t *sums, const uint8_t *from, size_t num_stripes, const uint8_t *secret)
{
    for (size_t number = 0; number < num_stripes; number++, from += STRIPE, secret += 8)
        for (int lane = 0; lane < 8; lane++) {
            const uint64_t data = word(from + 8 * lane), key = data ^ word(secret + 8 * lane);
            sums[lane ^ 1] += data;
            sums[lane] += (key & 0xFFFFFFFF) * (key >> 32);
        }
}

#define BLOCKS_BY(name, stripes)                                                                                       \
    static void name(uint64_t *sums, const uint8_t *from, size_t num_blocks)                                           \
    {                                                                                                                  \
        for (; num_blocks--; from += BLOCK) {                                                                          \
            stripes(sums, from, BLOCK / STRIPE, SECRET);                                                               \
            scramble(sums);                                                                                            \
        }                                                                                                              \
    }

BLOCKS_BY(blocks_plain, stripes_plain)

#ifdef BY_PROCESSOR
enum { AHEAD = 768 }; /* bytes fetched ahead: the core's own prefetcher stops at each page */

__attribute__((target("avx2"))) static inline void stripes_avx2(uint64_t *sums, const uint8_t *from, size_t num_stripes,
                                                                const uint8_t *secret)
{
    __m256i *const all = (__m256i *)sums;
    __m256i low = _mm256_loadu_si256(all), high = _mm256_loadu_si256(all + 1);
    for (; num_stripes--; from += STRIPE, secret += 8) {
        const __m256i a = _mm256_loadu_si256((const __m256i *)from), b = _mm256_loadu_si256((const __m256i *)from + 1);
        const __m256i ka = _mm256_xor_si256(a, _mm256_loadu_si256((const __m256i *)secret));
        const __m256i kb = _mm256_xor_si256(b, _mm256_loadu_si256((const __m256i *)secret + 1));
        _mm_prefetch((const char *)from + AHEAD, _MM_HINT_T0);
        low = _mm256_add_epi64(low, _mm256_add_epi64(_mm256_mul_epu32(ka, _mm256_srli_epi64(ka, 32)),
                                                     _mm256_shuffle_epi32(a, 0x4E)));
        high = _mm256_add_epi64(high, _mm256_add_epi64(_mm256_mul_epu32(kb, _mm256_srli_epi64(kb, 32)),
                                                       _mm256_shuffle_epi32(b, 0x4E)));
    }
    _mm256_storeu_si256(all, low);
    _mm256_storeu_si256(all + 1, high);
}

__attribute__((target("avx512f"))) static inline void stripes_avx512(uint64_t *sums, const uint8_t *from,
                                                                     size_t num_stripes, const uint8_t *secret)
{
    __m512i all = _mm512_loadu_si512(sums);
    for (; num_stripes--; from += STRIPE, secret += 8) {
        const __m512i data = _mm512_loadu_si512(from), key = _mm512_xor_si512(data, _mm512_loadu_si512(secret));
        _mm_prefetch((const char *)from + AHEAD, _MM_HINT_T0);
        all = _mm512_add_epi64(all, _mm512_add_epi64(_mm512_mul_epu32(key, _mm512_srli_epi64(key, 32)),
                                                     _mm512_shuffle_epi32(data, (_MM_PERM_ENUM)0x4E)));
    }
    _mm512_storeu_si512(sums, all);
}

__attribute__((target("avx2"))) BLOCKS_BY(blocks_avx2, stripes_avx2)
__attribute__((target("avx512f"))) BLOCKS_BY(blocks_avx512, stripes_avx512)
#endif

static blocks_fn *blocks_of_this_processor(void)
{
#ifdef BY_PROCESSOR
    if (__builtin_cpu_supports("avx512f"))
        return blocks_avx512;
    if (__builtin_cpu_supports("avx2"))
        return blocks_avx2;
#endif
    return blocks_plain;
}

/* ── in pieces ─────────────────────────────────────────────────────────────────────────────────────────────────── */

void kvstore_xxh3_begin(uint64_t *sums)
{
    sums[0] = PRIME32[2];
    memcpy(sums + 1, PRIME64, 4 * sizeof *sums);
    sums[5] = PRIME32[1];
    sums[6] = PRIME64[4];
    sums[7] = PRIME32[0];
}

/* Hashes what can be hashed of the bytes `at` … `until` of `bytes`; where the next call goes on. */
size_t kvstore_xxh3_more(uint64_t *sums, const uint8_t *bytes, size_t at, size_t until)
{
    if (until <= at + BLOCK)
        return at;
    const size_t num_blocks = (until - 1 - at) / BLOCK; /* the last byte belongs to what ends the hash */
    blocks_of_this_processor()(sums, bytes + at, num_blocks);
    return at + num_blocks * BLOCK;
}

static uint64_t short_hash(const uint8_t *bytes, size_t num_bytes)
{
    uint64_t hash = num_bytes * PRIME64[0];
    for (size_t at = 0; at + 16 <= num_bytes; at += 16) {
        if (at == 128)
            hash = avalanche(hash);
        const uint8_t *const secret = SECRET + (at < 128 ? at : at - 128 + 3);
        hash += fold(word(bytes + at) ^ word(secret), word(bytes + at + 8) ^ word(secret + 8));
    }
    if (num_bytes < 144)
        hash = avalanche(hash);
    const uint8_t *const secret = SECRET + LEAST_SECRET - 17, *const last = bytes + num_bytes - 16;
    return avalanche(hash + fold(word(last) ^ word(secret), word(last + 8) ^ word(secret + 8)));
}

/* The hash of all `num_bytes`, of which `at` have been seen to. */
uint64_t kvstore_xxh3_end(uint64_t *sums, const uint8_t *bytes, size_t at, size_t num_bytes)
{
    if (num_bytes <= SHORT)
        return short_hash(bytes, num_bytes);
    at = kvstore_xxh3_more(sums, bytes, at, num_bytes);
    stripes_plain(sums, bytes + at, (num_bytes - 1 - at) / STRIPE, SECRET);
    stripes_plain(sums, bytes + num_bytes - STRIPE, 1, SECRET + sizeof SECRET - STRIPE - 7);
    uint64_t hash = num_bytes * PRIME64[0];
    for (int pair = 0; pair < 4; pair++)
        hash += fold(sums[2 * pair] ^ word(SECRET + 11 + 16 * pair),
                     sums[2 * pair + 1] ^ word(SECRET + 11 + 16 * pair + 8));
    return avalanche(hash);
}

uint64_t kvstore_xxh3(const uint8_t *bytes, size_t num_bytes)
{
    uint64_t sums[8];
    kvstore_xxh3_begin(sums);
    return kvstore_xxh3_end(sums, bytes, 0, num_bytes);
}
