"""The C of the pass on the CPU, compiled on the node for the processor that is there.

Its types and how it goes through spans stand here; what it makes of their bytes is in `native_checksum.py` and
`native_reductions.py`.
"""

from __future__ import annotations

from remote_payload.health.native_checksum import CHECKSUM
from remote_payload.health.native_reductions import REDUCTIONS
from remote_payload.health.stats import MAX_LOCATIONS

TILE_BYTES = 1 << 17
SCRATCH_BYTES = 6 * TILE_BYTES + 3 * 2 * 4 * (1 << 16)
"""Three tiles, as many of float32, and two histograms for each."""
LOCATIONS = MAX_LOCATIONS
MOMENT_COUNTS = ("nan", "positive_inf", "negative_inf", "zeros", "ones", "over_fp16", "denormals", "saturated")
"""What stands in a piece's `moments` behind the number of finite elements; `MOMENT_VALUES` come after them."""
MOMENT_VALUES = ("minimum", "maximum", "mean", "squares", "cubes", "fourths")

_TYPES = r"""
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

"""

_SPANS = r"""/* 0, the error's number, or -1 where the file ends early. */
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

SOURCE = f"enum {{ TILE = {TILE_BYTES}, LOCATIONS = {LOCATIONS} }};\n" + _TYPES + CHECKSUM + REDUCTIONS + _SPANS
