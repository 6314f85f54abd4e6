"""The C of the pass on the CPU, compiled on the node for the processor that is there.

Where it decides (histograms, hashes, steps, counts) it agrees with `kernels.py`, `rows.py` and `joint.py` bit for bit;
float64 sums agree to rounding, and are added in the same order each time.
"""

from __future__ import annotations

from remote_payload.health.stats import MAX_LOCATIONS

TILE_BYTES = 1 << 17
SCRATCH_BYTES = 6 * TILE_BYTES + 3 * 2 * 4 * (1 << 16)
"""Three tiles, as many of float32, and two histograms for each."""
LOCATIONS = MAX_LOCATIONS
MOMENT_COUNTS = ("nan", "positive_inf", "negative_inf", "zeros", "ones", "over_fp16", "denormals", "saturated")
"""What stands in a piece's `moments` behind the number of finite elements; `MOMENT_VALUES` come after them."""
MOMENT_VALUES = ("minimum", "maximum", "mean", "squares", "cubes", "fourths")

SOURCE = (
    f"enum {{ TILE = {TILE_BYTES}, LOCATIONS = {LOCATIONS} }};\n"
    + r"""
#define _GNU_SOURCE
#define _FILE_OFFSET_BITS 64
#include <errno.h>
#include <math.h>
#include <stdint.h>
#include <string.h>
#include <unistd.h>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_FEATURE_CRC32)
#include <arm_acle.h>
#endif
typedef uint8_t u8; typedef uint16_t u16; typedef uint32_t u32; typedef uint64_t u64;
/* As wide as the processor's own: compilers take wider vectors apart badly. */
#if defined(__AVX512F__) && defined(__AVX512DQ__)
enum { LANES = 8 };
typedef double reals __attribute__((vector_size(64)));
typedef u64 words __attribute__((vector_size(64)));
static inline reals reals_of(const float* x) { return (reals)_mm512_cvtps_pd(_mm256_loadu_ps(x)); }
static inline words words_of_16(const u16* x) {
    return (words)_mm512_cvtepu16_epi64(_mm_loadu_si128((const __m128i*)x));
}
static inline words words_of_32(const u32* x) {
    return (words)_mm512_cvtepu32_epi64(_mm256_loadu_si256((const __m256i*)x));
}
#elif defined(__AVX2__)
enum { LANES = 4 };
typedef double reals __attribute__((vector_size(32)));
typedef u64 words __attribute__((vector_size(32)));
static inline reals reals_of(const float* x) { return (reals)_mm256_cvtps_pd(_mm_loadu_ps(x)); }
static inline words words_of_16(const u16* x) {
    return (words)_mm256_cvtepu16_epi64(_mm_loadl_epi64((const __m128i*)x));
}
static inline words words_of_32(const u32* x) {
    return (words)_mm256_cvtepu32_epi64(_mm_loadu_si128((const __m128i*)x));
}
#else
enum { LANES = 2 };
typedef double reals __attribute__((vector_size(16)));
typedef u64 words __attribute__((vector_size(16)));
static inline reals reals_of(const float* x) { const reals v = {x[0], x[1]}; return v; }
static inline words words_of_16(const u16* x) { const words v = {x[0], x[1]}; return v; }
static inline words words_of_32(const u32* x) { const words v = {x[0], x[1]}; return v; }
#endif
/* Where a product and a sum may be rounded once; Adam's arithmetic, elsewhere, rounds twice. */
#if defined(__clang__) || !defined(__GNUC__)
#define CONTRACTED
#else
#define CONTRACTED __attribute__((optimize("fp-contract=fast")))
#endif
enum { BF16 = 0, FP16 = 1, FP32 = 2 };
enum { MOMENT_TILE = 4096, BINS = 1 << 16 };

typedef struct {
    u64 start, length, position;
    int32_t kind, nan_count, inf_count, unused;
    int64_t* counts;
    double* moments;
    u64 columns, first;
    double* squares; u32* low; u32* high; u64* hashes; u8* alive; const u64* multipliers;
    u64 nan[LOCATIONS], inf[LOCATIONS];
} Piece;
typedef struct {
    u64 offset, length;
    int32_t file, wants_crc;
    u32 crc;
    int32_t pieces;
    Piece* piece;
} Span;
typedef struct {
    int32_t spans, has_joint;
    Span* span;
    float rate, rate_at_peak, root, eps;
    u64 joint[7];
    u8* scratch;
} Job;

static float as_float(u32 bits) { float x; memcpy(&x, &bits, 4); return x; }
static u32 as_bits(float x) { u32 bits; memcpy(&bits, &x, 4); return bits; }

/* CRC-32 of zlib's polynomial, without the inversions before and after. */
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

static float widen_half(u32 bits) {
    const u32 size = bits & 0x7FFFu;
    const float x = as_float(size << 13) * as_float(0x77800000u);
    const u32 finite = as_bits(x), strange = (size << 13) | 0x7F800000u;
    return as_float((size >= 0x7C00u ? strange : finite) | ((bits & 0x8000u) << 16));
}
static const float* widen(const u8* data, u64 n, int kind, float* out) {
    if (kind == FP32) return (const float*)data;
    const u16* bits = (const u16*)data;
    u32* words = (u32*)out;
    if (kind == BF16) for (u64 i = 0; i < n; i++) words[i] = (u32)bits[i] << 16;
    else for (u64 i = 0; i < n; i++) out[i] = widen_half(bits[i]);
    return out;
}

/* Two histograms in turn: equal neighbours would wait for each other's store. */
static void count_16(const u16* data, u64 n, u32* even, u32* odd) {
    u64 i = 0;
    for (; i + 4 <= n; i += 4) {
        u64 x; memcpy(&x, data + i, 8);
        even[x & 0xFFFF]++; odd[(x >> 16) & 0xFFFF]++; even[(x >> 32) & 0xFFFF]++; odd[x >> 48]++;
    }
    for (; i < n; i++) even[data[i]]++;
}
static void count_high(const u32* data, u64 n, u32* even, u32* odd) {
    u64 i = 0;
    for (; i + 2 <= n; i += 2) {
        u64 x; memcpy(&x, data + i, 8);
        even[(x >> 16) & 0xFFFF]++; odd[x >> 48]++;
    }
    for (; i < n; i++) even[data[i] >> 16]++;
}

static void add_part(double* total, double n, double mean, double squares, double cubes, double fourths) {
    double* t = total + 9 + 2;
    const double here = total[0], all = here + n, d = mean - t[0], s = d / all;
    t[3] += fourths + d * s * s * s * here * n * (here * here - here * n + n * n)
          + 6.0 * s * s * (here * here * squares + n * n * t[1]) + 4.0 * s * (here * cubes - n * t[2]);
    t[2] += cubes + d * s * s * here * n * (here - n) + 3.0 * s * (here * squares - n * t[1]);
    t[1] += squares + d * s * here * n;
    t[0] += s * n;
    total[0] = all;
}
static double sum_of(reals x) {
    double total = 0;
    for (int k = 0; k < LANES; k++) total += x[k];
    return total;
}

/* What lies between which integers that are in the order of the floats, and the smallest size, as bits. */
typedef struct { int32_t least, most; u32 smallest; } Range;
static int32_t order_of(u32 bits) { return (int32_t)(bits ^ ((u32)((int32_t)bits >> 31) & 0x7FFFFFFFu)); }
static float of_order(int32_t order) { return as_float((u32)order ^ ((u32)(order >> 31) & 0x7FFFFFFFu)); }
static Range range_of(const float* x, u64 n) {
    const u32* bits = (const u32*)x;
    int32_t least = INT32_MAX, most = INT32_MIN;
    u32 smallest = 0xFFFFFFFFu;
    for (u64 i = 0; i < n; i++) {
        const u32 size = bits[i] & 0x7FFFFFFFu;
        const int32_t order = order_of(bits[i]);
        least = order < least ? order : least; most = order > most ? order : most;
        smallest = size < smallest ? size : smallest;
    }
    const Range found = {least, most, smallest};
    return found;
}
static int has_strange(Range r) { return r.most >= 0x7F800000 || r.least <= ~0x7F800000; }

/* What is rare is looked for only where the range allows it. */
static void count_special(const float* x, u64 n, Range r, double low, double high, double* total) {
    const u32* bits = (const u32*)x;
    u32 zeros = 0, ones = 0, over = 0, denormal = 0, saturated = 0;
    if (r.smallest < 0x00800000u)
        for (u64 i = 0; i < n; i++) {
            const u32 size = bits[i] & 0x7FFFFFFFu;
            zeros += size == 0; denormal += size - 1 < 0x007FFFFFu;
        }
    if (low <= 1 && high >= 1) for (u64 i = 0; i < n; i++) ones += bits[i] == 0x3F800000u;
    if (low < -65504 || high > 65504)
        for (u64 i = 0; i < n; i++) {
            const u32 size = bits[i] & 0x7FFFFFFFu;
            over += size > 0x477FE000u; saturated += size == 0x7F7FFFFFu;
        }
    total[4] += zeros; total[5] += ones; total[6] += over; total[7] += denormal; total[8] += saturated;
}
/* Finite values only: their counts, the mean, then the powers of distances from it. */
static void CONTRACTED add_finite(const float* x, u64 n, Range r, double* total) {
    if (!n) return;
    const double low = (double)of_order(r.least) + 0.0, high = (double)of_order(r.most) + 0.0;
    count_special(x, n, r, low, high, total);
    if (total[0] == 0 || low < total[9]) total[9] = low;
    if (total[0] == 0 || high > total[10]) total[10] = high;
    if (low == high) { add_part(total, (double)n, low, 0, 0, 0); return; }
    reals sums[4] = {{0}};
    u64 i = 0;
    for (; i + 4 * LANES <= n; i += 4 * LANES)
        for (int k = 0; k < 4; k++) sums[k] += reals_of(x + i + LANES * k);
    double sum = sum_of((sums[0] + sums[1]) + (sums[2] + sums[3]));
    for (u64 k = i; k < n; k++) sum += x[k];
    const double mean = sum / (double)n;
    reals two[4] = {{0}}, three[4] = {{0}}, four[4] = {{0}};
    for (i = 0; i + 4 * LANES <= n; i += 4 * LANES)
        for (int k = 0; k < 4; k++) {
            const reals d = reals_of(x + i + LANES * k) - mean, s = d * d;
            two[k] += s; three[k] += s * d; four[k] += s * s;
        }
    double squares = sum_of((two[0] + two[1]) + (two[2] + two[3]));
    double cubes = sum_of((three[0] + three[1]) + (three[2] + three[3]));
    double fourths = sum_of((four[0] + four[1]) + (four[2] + four[3]));
    for (; i < n; i++) {
        const double d = x[i] - mean, s = d * d;
        squares += s; cubes += s * d; fourths += s * s;
    }
    add_part(total, (double)n, mean, squares, cubes, fourths);
}
static void note_strange(Piece* p, const float* x, u64 n, u64 at) {
    for (u64 i = 0; i < n; i++) {
        const u32 size = as_bits(x[i]) & 0x7FFFFFFFu;
        if (size < 0x7F800000u) continue;
        if (size > 0x7F800000u) { if (p->nan_count < LOCATIONS) p->nan[p->nan_count++] = at + i; }
        else if (p->inf_count < LOCATIONS) p->inf[p->inf_count++] = at + i;
    }
}
static void add_moments(Piece* p, const float* x, u64 n, u64 at, float* room) {
    for (u64 begin = 0; begin < n; begin += MOMENT_TILE) {
        const u64 count = n - begin < MOMENT_TILE ? n - begin : MOMENT_TILE;
        const float* part = x + begin;
        const Range range = range_of(part, count);
        if (!has_strange(range)) { add_finite(part, count, range, p->moments); continue; }
        note_strange(p, part, count, at + begin);
        u64 kept = 0;
        for (u64 i = 0; i < count; i++) {
            const u32 bits = as_bits(part[i]), size = bits & 0x7FFFFFFFu;
            if (size < 0x7F800000u) room[kept++] = part[i];
            else if (size > 0x7F800000u) p->moments[1]++;
            else p->moments[2 + (bits >> 31)]++;
        }
        add_finite(room, kept, range_of(room, kept), p->moments);
    }
}

/* One stretch of one row. */
static void CONTRACTED add_row(Piece* p, const u8* data, const float* x, u64 n, u64 row, u64 column) {
    const u64* multipliers = p->multipliers + column;
    reals squares[2] = {{0}};
    words hashes = {0};
    u32 low = 0xFFFFFFFFu, high = 0;
    u64 i = 0;
    for (; i + 2 * LANES <= n; i += 2 * LANES)
        for (int k = 0; k < 2; k++) {
            const reals d = reals_of(x + i + LANES * k);
            squares[k] += d * d;
        }
    double sum = sum_of(squares[0] + squares[1]);
    for (; i < n; i++) sum += (double)x[i] * (double)x[i];
    u64 hash = 0;
    i = 0;
    if (p->kind == FP32) {
        const u32* bits = (const u32*)data;
        for (; i + LANES <= n; i += LANES) {
            words m; memcpy(&m, multipliers + i, sizeof m);
            words word = words_of_32(bits + i) * 0x9E3779B97F4A7C15ull;
            word ^= word >> 29;
            hashes += word * m;
        }
        for (u64 k = i; k < n; k++) {
            u64 word = bits[k] * 0x9E3779B97F4A7C15ull;
            hash += (word ^ (word >> 29)) * multipliers[k];
        }
        for (u64 k = 0; k < n; k++) { low = bits[k] < low ? bits[k] : low; high = bits[k] > high ? bits[k] : high; }
    } else {
        const u16* bits = (const u16*)data;
        for (; i + LANES <= n; i += LANES) {
            words m; memcpy(&m, multipliers + i, sizeof m);
            words word = words_of_16(bits + i) * 0x9E3779B97F4A7C15ull;
            word ^= word >> 29;
            hashes += word * m;
        }
        for (u64 k = i; k < n; k++) {
            u64 word = bits[k] * 0x9E3779B97F4A7C15ull;
            hash += (word ^ (word >> 29)) * multipliers[k];
        }
        u16 least = 0xFFFF, most = 0;
        for (u64 k = 0; k < n; k++) {
            least = bits[k] < least ? bits[k] : least;
            most = bits[k] > most ? bits[k] : most;
        }
        low = least; high = most;
    }
    for (int k = 0; k < LANES; k++) hash += hashes[k];
    p->squares[row] += sum; p->hashes[row] += hash;
    if (low < p->low[row]) p->low[row] = low;
    if (high > p->high[row]) p->high[row] = high;
    if (p->alive) {
        u8* alive = p->alive + column;
        const u32* bits = (const u32*)x;
        for (u64 k = 0; k < n; k++) alive[k] |= (bits[k] & 0x7FFFFFFFu) != 0;
    }
}
static void add_rows(Piece* p, const u8* data, const float* x, u64 n, u64 at) {
    const u64 width = p->kind == FP32 ? 4 : 2, position = p->position / width + at;
    for (u64 done = 0; done < n;) {
        const u64 row = (position + done) / p->columns, column = (position + done) % p->columns;
        const u64 count = n - done < p->columns - column ? n - done : p->columns - column;
        add_row(p, data + done * width, x + done, count, row - p->first, column);
        done += count;
    }
}

static void reduce(Piece* p, const u8* data, u64 n, u64 at, float* room, u32* bins) {
    if (p->kind == FP32) {
        count_high((const u32*)data, n, bins, bins + BINS);
        add_moments(p, (const float*)data, n, at, room);
        if (p->columns) add_rows(p, data, (const float*)data, n, at);
        return;
    }
    count_16((const u16*)data, n, bins, bins + BINS);
    const float* x = widen(data, n, p->kind, room);
    if (p->nan_count < LOCATIONS || p->inf_count < LOCATIONS)
        if (has_strange(range_of(x, n))) note_strange(p, x, n, at);
    if (p->columns) add_rows(p, data, x, n, at);
}

static float round_bf16(float x) {
    const u32 bits = as_bits(x);
    return as_float((bits + 0x7FFFu + ((bits >> 16) & 1u)) & 0xFFFF0000u);
}
static float round_fp16(float x) {
#ifdef __FLT16_MAX__
    return (float)(_Float16)x;
#else
    return x;
#endif
}
static void add_joint(Job* job, const float* w, const float* m, const float* v, u64 n, int kind) {
    const float rate = job->rate, at_peak = job->rate_at_peak, root = job->root, eps = job->eps;
    u32 found[7] = {0};
    /* At the peak's rate too only where it is another. */
    #define JOINT(ROUNDED, PEAK) \
        for (u64 i = 0; i < n; i++) { \
            const float under = sqrtf(v[i]) * root + eps, step = m[i] * rate / under; \
            const u32 valid = ((as_bits(w[i]) & 0x7F800000u) != 0x7F800000u) \
                & ((as_bits(step) & 0x7F800000u) != 0x7F800000u) & (step != 0); \
            const u32 stays = valid & (ROUNDED(w[i] - step) == w[i]), later = valid & (PEAK); \
            const u32 one = valid & (w[i] == 1.0f); \
            found[0] += valid; found[1] += stays; found[2] += later; \
            found[3] += one; found[4] += one & stays; found[5] += one & later; \
            found[6] += (w[i] == 0) & (v[i] > 0); \
        }
    #define BOTH(ROUNDED) \
        if (rate == at_peak) JOINT(ROUNDED, stays) \
        else JOINT(ROUNDED, ROUNDED(w[i] - m[i] * at_peak / under) == w[i])
    if (kind == BF16) { BOTH(round_bf16) }
    else if (kind == FP16) { BOTH(round_fp16) }
    else { BOTH() }
    for (int k = 0; k < 7; k++) job->joint[k] += found[k];
}

/* 0, the error's number, or -1 where the file ends early. */
static int read_all(int file, u8* target, u64 n, u64 offset) {
    while (n) {
        const ssize_t got = pread(file, target, n, (off_t)offset);
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) return errno;
        if (got == 0) return -1;
        target += got; n -= (u64)got; offset += (u64)got;
    }
    return 0;
}
static void flush(Piece* p, u32* bins) {
    for (u32 i = 0; i < BINS; i++) p->counts[i] += (int64_t)bins[i] + bins[BINS + i];
    memset(bins, 0, 2 * BINS * sizeof(u32));
}

/* One span, tile by tile; an element is never cut, as tiles and pieces begin at multiples of its width. */
static int run_alone(Span* span, u8* tile, float* room, u32* bins) {
    u32 crc = ~0u;
    Piece* pending = 0;
    int first = 0;
    for (u64 at = 0; at < span->length; at += TILE) {
        const u64 n = span->length - at < TILE ? span->length - at : TILE;
        const int error = read_all(span->file, tile, n, span->offset + at);
        if (error) return error;
        if (span->wants_crc) crc = crc_of(crc, tile, n);
        while (first < span->pieces && span->piece[first].start + span->piece[first].length <= at) first++;
        for (int k = first; k < span->pieces; k++) {
            Piece* p = span->piece + k;
            const u64 end = p->start + p->length;
            if (p->start >= at + n) break;
            if (end <= at) continue;
            const u64 from = p->start > at ? p->start - at : 0, to = end < at + n ? end - at : n;
            const u64 width = p->kind == FP32 ? 4 : 2;
            if (pending && pending != p) flush(pending, bins);
            pending = p;
            reduce(p, tile + from, (to - from) / width, (at + from - p->start) / width, room, bins);
        }
    }
    if (pending) flush(pending, bins);
    span->crc = ~crc;
    return 0;
}
/* A parameter and its moments: the same elements of each, each its own only piece. */
static int run_together(Job* job, u8* tile, float* room, u32* bins) {
    u32 crc[3] = {~0u, ~0u, ~0u};
    u64 width[3];
    const float* x[3];
    for (int k = 0; k < 3; k++) width[k] = job->span[k].piece->kind == FP32 ? 4 : 2;
    const u64 total = job->span[0].length / width[0], step = TILE / 4;
    for (u64 at = 0; at < total; at += step) {
        const u64 n = total - at < step ? total - at : step;
        for (int k = 0; k < 3; k++) {
            Span* span = job->span + k;
            u8* data = tile + (u64)k * TILE;
            const int error = read_all(span->file, data, n * width[k], span->offset + at * width[k]);
            if (error) return error;
            if (span->wants_crc) crc[k] = crc_of(crc[k], data, n * width[k]);
        }
        for (int k = 0; k < 3; k++) {
            u8* data = tile + (u64)k * TILE;
            reduce(job->span[k].piece, data, n, at, room, bins + 2 * BINS * (u64)k);
        }
        if (job->has_joint) {
            for (u64 k = 0; k < 3; k++) x[k] = widen(tile + k * TILE, n, job->span[k].piece->kind, room + k * step);
            add_joint(job, x[0], x[1], x[2], n, job->span[0].piece->kind);
        }
    }
    for (int k = 0; k < 3; k++) { flush(job->span[k].piece, bins + 2 * BINS * (u64)k); job->span[k].crc = ~crc[k]; }
    return 0;
}
/* Scratch: three tiles; three of float32, as long; three pairs of histograms, zero on entry and on return. */
int run(Job* job) {
    u8* tile = job->scratch;
    float* room = (float*)(tile + 3 * TILE);
    u32* bins = (u32*)(tile + 6 * TILE);
    return job->spans == 3 ? run_together(job, tile, room, bins) : run_alone(job->span, tile, room, bins);
}
int has_half(void) {
#ifdef __FLT16_MAX__
    return 1;
#else
    return 0;
#endif
}
"""
)
