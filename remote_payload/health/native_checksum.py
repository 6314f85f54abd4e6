"""The C of a record's CRC-32 on the CPU: by table, by carry-less products, or by the processor's own instruction."""

from __future__ import annotations

CHECKSUM = r"""/* CRC-32 of zlib's polynomial, without the inversions before and after. */
static u32 table[8][256];
static void __attribute__((constructor)) make_table(void) {
    for (u32 i = 0; i < 256; i++) {
        u32 x = i;
        for (int k = 0; k < 8; k++) x = (x >> 1) ^ (0xEDB88320u & (0u - (x & 1u)));
        table[0][i] = x;
    }
    for (u32 i = 0; i < 256; i++)
        for (int t = 1; t < 8; t++) table[t][i] = (table[t - 1][i] >> 8) ^ table[0][table[t - 1][i] & 0xFF];
}
static u32 crc_by_table(u32 crc, const u8* data, u64 n) {
    for (; n >= 8; n -= 8, data += 8) {
        u64 x = 0;
        for (int k = 0; k < 8; k++) x |= (u64)data[k] << (8 * k);
        x ^= crc;
        crc = 0;
        for (int k = 0; k < 8; k++) crc ^= table[7 - k][(x >> (8 * k)) & 0xFF];
    }
    for (; n; n--, data++) crc = (crc >> 8) ^ table[0][(crc ^ *data) & 0xFF];
    return crc;
}
#if defined(__PCLMUL__) && defined(__SSE4_1__)
/* Folding by carry-less products (Gopal et al. 2009): constants are x**n modulo the polynomial, bits reflected. */
static inline __m128i fold(__m128i x, __m128i by, __m128i next) {
    return _mm_xor_si128(_mm_xor_si128(_mm_clmulepi64_si128(x, by, 0x00), _mm_clmulepi64_si128(x, by, 0x11)), next);
}
static u32 crc_by_folding(u32 crc, const u8* data, u64 n) {
    if (n < 128) return crc_by_table(crc, data, n);
    const __m128i* at = (const __m128i*)data;
    __m128i x[4];
    for (int k = 0; k < 4; k++) x[k] = _mm_loadu_si128(at + k);
    x[0] = _mm_xor_si128(x[0], _mm_cvtsi32_si128((int)crc));
    at += 4; n -= 64;
    const __m128i by_512 = _mm_set_epi64x(0x1C6E41596, 0x154442BD4), by_128 = _mm_set_epi64x(0x0CCAA009E, 0x1751997D0);
    for (; n >= 64; n -= 64, at += 4)
        for (int k = 0; k < 4; k++) x[k] = fold(x[k], by_512, _mm_loadu_si128(at + k));
    __m128i one = fold(fold(fold(x[0], by_128, x[1]), by_128, x[2]), by_128, x[3]);
    u8 rest[16];
    _mm_storeu_si128((__m128i*)rest, one);
    /* 16 bytes that have the same remainder as all before them. */
    return crc_by_table(crc_by_table(0, rest, 16), (const u8*)at, n);
}
#if defined(__VPCLMULQDQ__) && defined(__AVX2__)
/* Two folds by one instruction, eight under way. */
static inline __m256i fold_two(__m256i x, __m256i by, __m256i next) {
    const __m256i low = _mm256_clmulepi64_epi128(x, by, 0x00), high = _mm256_clmulepi64_epi128(x, by, 0x11);
    return _mm256_xor_si256(_mm256_xor_si256(low, high), next);
}
static u32 crc_of(u32 crc, const u8* data, u64 n) {
    if (n < 256) return crc_by_folding(crc, data, n);
    const __m256i* at = (const __m256i*)data;
    __m256i x[4];
    for (int k = 0; k < 4; k++) x[k] = _mm256_loadu_si256(at + k);
    x[0] = _mm256_xor_si256(x[0], _mm256_set_epi64x(0, 0, 0, crc));
    at += 4; n -= 128;
    const __m256i by_1024 = _mm256_set_epi64x(0x14a7fe880, 0x1e88ef372, 0x14a7fe880, 0x1e88ef372);
    for (; n >= 128; n -= 128, at += 4)
        for (int k = 0; k < 4; k++) x[k] = fold_two(x[k], by_1024, _mm256_loadu_si256(at + k));
    u8 rest[128];
    for (int k = 0; k < 4; k++) _mm256_storeu_si256((__m256i*)rest + k, x[k]);
    return crc_by_table(crc_by_folding(0, rest, 128), (const u8*)at, n);
}
#else
static u32 crc_of(u32 crc, const u8* data, u64 n) { return crc_by_folding(crc, data, n); }
#endif
#elif defined(__ARM_FEATURE_CRC32)
static u32 crc_of(u32 crc, const u8* data, u64 n) {
    for (; n >= 8; n -= 8, data += 8) { u64 x; memcpy(&x, data, 8); crc = __crc32d(crc, x); }
    for (; n; n--, data++) crc = __crc32b(crc, *data);
    return crc;
}
#else
static u32 crc_of(u32 crc, const u8* data, u64 n) { return crc_by_table(crc, data, n); }
#endif
u32 checksum(const u8* data, u64 n) { return ~crc_of(~0u, data, n); }

"""
