"""The C that reduces elements to numbers: histograms, moments, rows, and what Adam's next step would do.

Where it decides (histograms, hashes, steps, counts) it agrees with `kernels.py`, `rows.py` and `joint.py` bit for bit;
float64 sums agree to rounding, and are added in the same order each time. Its types are those of `native_source.py`.
"""

from __future__ import annotations

REDUCTIONS = r"""static float widen_half(u32 bits) {
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

"""
