/* SPDX-License-Identifier: Apache-2.0
 *
 * The block hash chain in one call: SHA-256 with the processor's own instructions (FIPS 180-4; Intel SHA extensions).
 *
 * Each block's hash needs its parent's, so nothing runs in parallel and every microsecond a block counts. Python's
 * hashlib spends more on making and reading a hash object than on hashing 300 bytes.
 */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__)
#include <cpuid.h>
#include <immintrin.h>

static const uint32_t ROUND[64] __attribute__((aligned(16))) = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

static const uint32_t INITIAL[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                    0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};

enum { MAX_MESSAGE = 4096, DIGEST = 32 };

static int ask_for_sha(void)
{
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_SSE4_1) || !(c & bit_SSSE3))
        return 0;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b >> 29 & 1);
}

static int has_sha(void)
{
    static int known; /* 0 for not yet: the question leaves a virtual machine each time it is asked */
    int answer = __atomic_load_n(&known, __ATOMIC_RELAXED);
    if (!answer) {
        answer = ask_for_sha() ? 1 : -1;
        __atomic_store_n(&known, answer, __ATOMIC_RELAXED);
    }
    return answer > 0;
}

__attribute__((target("sha,sse4.1,ssse3"))) static void digest_of(const uint8_t *message, size_t num_bytes,
                                                                  uint8_t *digest)
{
    const __m128i big_endian = _mm_set_epi64x(0x0c0d0e0f08090a0bULL, 0x0405060700010203ULL);
    __m128i t = _mm_shuffle_epi32(_mm_loadu_si128((const __m128i *)INITIAL), 0xB1);
    __m128i cdgh = _mm_shuffle_epi32(_mm_loadu_si128((const __m128i *)(INITIAL + 4)), 0x1B);
    __m128i abef = _mm_alignr_epi8(t, cdgh, 8);
    cdgh = _mm_blend_epi16(cdgh, t, 0xF0);
    for (; num_bytes; num_bytes -= 64, message += 64) {
        const __m128i abef_before = abef, cdgh_before = cdgh;
        __m128i w[4];
        for (int i = 0; i < 4; i++)
            w[i] = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)(message + 16 * i)), big_endian);
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) {
            __m128i m = _mm_add_epi32(w[i & 3], _mm_load_si128((const __m128i *)(ROUND + 4 * i)));
            cdgh = _mm_sha256rnds2_epu32(cdgh, abef, m);
            abef = _mm_sha256rnds2_epu32(abef, cdgh, _mm_shuffle_epi32(m, 0x0E));
            if (i < 12) {
                const __m128i near = w[(i + 3) & 3];
                __m128i next = _mm_sha256msg1_epu32(w[i & 3], w[(i + 1) & 3]);
                next = _mm_add_epi32(next, _mm_alignr_epi8(near, w[(i + 2) & 3], 4));
                w[i & 3] = _mm_sha256msg2_epu32(next, near);
            }
        }
        abef = _mm_add_epi32(abef, abef_before);
        cdgh = _mm_add_epi32(cdgh, cdgh_before);
    }
    t = _mm_shuffle_epi32(abef, 0x1B);
    cdgh = _mm_shuffle_epi32(cdgh, 0xB1);
    _mm_storeu_si128((__m128i *)digest, _mm_shuffle_epi8(_mm_blend_epi16(t, cdgh, 0xF0), big_endian));
    _mm_storeu_si128((__m128i *)(digest + 16), _mm_shuffle_epi8(_mm_alignr_epi8(cdgh, t, 8), big_endian));
}

/* digests[i] = SHA-256(parent | head | tokens[i]), parent being digests[i - 1] and before that the one given.
 * Returns 1; or 0, with nothing written, where the processor or the sizes do not allow it. */
int kvstore_hash_chain(const uint8_t *parent, const uint8_t *head, size_t head_bytes, const uint8_t *tokens,
                       size_t block_bytes, size_t num_blocks, uint8_t *digests)
{
    uint8_t message[MAX_MESSAGE];
    if (head_bytes > 64 || block_bytes > MAX_MESSAGE - 256 || !has_sha())
        return 0;
    const size_t length = DIGEST + head_bytes + block_bytes;
    const size_t padded = (length + 9 + 63) / 64 * 64;
    memset(message, 0, padded);
    memcpy(message + DIGEST, head, head_bytes);
    message[length] = 0x80;
    for (int i = 0; i < 8; i++)
        message[padded - 1 - i] = (uint8_t)((uint64_t)length * 8 >> 8 * i);
    for (size_t i = 0; i < num_blocks; i++, tokens += block_bytes, digests += DIGEST) {
        memcpy(message, parent, DIGEST);
        memcpy(message + DIGEST + head_bytes, tokens, block_bytes);
        digest_of(message, padded, digests);
        parent = digests;
    }
    return 1;
}
#else
int kvstore_hash_chain(const uint8_t *parent, const uint8_t *head, size_t head_bytes, const uint8_t *tokens,
                       size_t block_bytes, size_t num_blocks, uint8_t *digests)
{
    (void)parent, (void)head, (void)head_bytes, (void)tokens, (void)block_bytes, (void)num_blocks, (void)digests;
    return 0;
}
#endif
