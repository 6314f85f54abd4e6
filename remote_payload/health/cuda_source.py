"""The CUDA C++ of the pass, compiled on the node for the GPU that is there. Same arithmetic as on the CPU, bit for bit
where it decides (histograms, hashes, steps); float64 sums agree to rounding."""

from __future__ import annotations

ELEMENTS_PER_HISTOGRAM = 65024
"""At most so many elements per thread block: its counters have 16 bits, two in a word, and cannot overflow."""
HISTOGRAM_BYTES = 1 << 17
HISTOGRAM_THREADS = 1024
TILE_ELEMENTS = 8192
TILE_VALUES = 15
"""What `tiles` writes for each tile, in float64, in the order of `cuda_worker.TILE_FIELDS`."""
CRC_CHUNK_BYTES = 1024
CRC_THREADS = 256
KERNELS = ("histogram", "tiles", "rows", "joint", "crc")

SOURCE = r"""
typedef unsigned char u8; typedef unsigned short u16; typedef unsigned int u32; typedef unsigned long long u64;
enum { BF16 = 0, FP16 = 1, FP32 = 2 };

__device__ __forceinline__ float half_to_float(u16 bits) {
    float value; asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits)); return value;
}
__device__ __forceinline__ float load(const void* data, u64 at, int kind) {
    if (kind == BF16) return __uint_as_float((u32)((const u16*)data)[at] << 16);
    if (kind == FP16) return half_to_float(((const u16*)data)[at]);
    return ((const float*)data)[at];
}
__device__ __forceinline__ bool finite(float x) { return (__float_as_uint(x) & 0x7F800000u) != 0x7F800000u; }

// Rounded to the stored type and back: to nearest, ties to even.
__device__ __forceinline__ float rounded(float x, int kind) {
    if (kind == BF16) {
        u32 bits = __float_as_uint(x);
        return __uint_as_float((bits + 0x7FFFu + ((bits >> 16) & 1u)) & 0xFFFF0000u);
    }
    if (kind == FP16) { u16 bits; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x)); return half_to_float(bits); }
    return x;
}

// Counters of 16 bits, two in a word: the whole histogram of a part fits in one multiprocessor's shared memory.
__device__ __forceinline__ void bump(u32* bins, u32 pattern, u32 first, u32 count, u32 by) {
    pattern -= first;
    if (pattern < count) atomicAdd(&bins[pattern >> 1], by << ((pattern & 1u) << 4));
}
// `flag` is set if a pattern has all bits of `mask`: the exponent of NaN and infinity.
extern "C" __global__ void histogram(const void* data, u64 n, u64 share, int wide, u32 first, u32 count, u32 mask,
                                     u32* flag, u64* out) {
    extern __shared__ u32 bins[];
    for (u32 i = threadIdx.x; i < count / 2; i += blockDim.x) bins[i] = 0;
    __syncthreads();
    const u64 begin = (u64)blockIdx.x * share, end = begin + share < n ? begin + share : n;
    const int per = wide ? 4 : 8;
    const uint4* vectors = (const uint4*)data;
    const u64 last = end / per;
    for (u64 i = begin / per + threadIdx.x; i < last; i += blockDim.x) {
        const uint4 v = vectors[i];
        const u32 words[4] = {v.x, v.y, v.z, v.w};
        if (wide) {
            #pragma unroll
            for (int k = 0; k < 4; k++) bump(bins, words[k] >> 16, first, count, 1);
        } else if (v.x == v.y && v.y == v.z && v.z == v.w && (v.x >> 16) == (v.x & 0xFFFFu)) {
            bump(bins, v.x >> 16, first, count, 8);
        } else {
            #pragma unroll
            for (int k = 0; k < 4; k++) {
                bump(bins, words[k] & 0xFFFFu, first, count, 1);
                bump(bins, words[k] >> 16, first, count, 1);
            }
        }
    }
    for (u64 i = last * per + threadIdx.x; i < end; i += blockDim.x) {
        const u32 pattern = wide ? ((const u32*)data)[i] >> 16 : ((const u16*)data)[i];
        bump(bins, pattern, first, count, 1);
    }
    __syncthreads();
    for (u32 i = threadIdx.x; i < count / 2; i += blockDim.x) {
        const u32 word = bins[i];
        if (word == 0) continue;
        const u32 pattern = first + 2 * i;
        if (word & 0xFFFFu) atomicAdd(&out[pattern], (u64)(word & 0xFFFFu));
        if (word >> 16) atomicAdd(&out[pattern + 1], (u64)(word >> 16));
        if ((pattern & mask) == mask || ((pattern + 1) & mask) == mask) *flag = 1;
    }
}

template <typename T> __device__ __forceinline__ T across(T x, int offset) {
    return __shfl_down_sync(0xFFFFFFFFu, x, offset);
}
// Sums over the thread block, always in the same order; every thread gets the result.
template <typename T> __device__ __noinline__ T block_sum(T x, T* scratch) {
    for (int offset = 16; offset; offset >>= 1) x += across(x, offset);
    __syncthreads();
    if ((threadIdx.x & 31) == 0) scratch[threadIdx.x >> 5] = x;
    __syncthreads();
    T total = 0;
    for (u32 i = 0; i < (blockDim.x + 31) / 32; i++) total += scratch[i];
    return total;
}
template <typename T> __device__ __noinline__ T block_extreme(T x, T* scratch, bool largest) {
    for (int offset = 16; offset; offset >>= 1) {
        T other = across(x, offset);
        if (largest ? other > x : other < x) x = other;
    }
    __syncthreads();
    if ((threadIdx.x & 31) == 0) scratch[threadIdx.x >> 5] = x;
    __syncthreads();
    T total = scratch[0];
    for (u32 i = 1; i < (blockDim.x + 31) / 32; i++)
        if (largest ? scratch[i] > total : scratch[i] < total) total = scratch[i];
    return total;
}

// 256 threads, 32 float32 each, which stay in registers: the mean first, then the powers of distances from it.
extern "C" __global__ void __launch_bounds__(256) tiles(const float* data, u64 n, double* out) {
    __shared__ double scratch[32];
    const u64 begin = (u64)blockIdx.x * 8192;
    float x[32];
    u32 count = 0, nan = 0, above = 0, below = 0, zeros = 0, ones = 0, over = 0, denormal = 0, saturated = 0;
    double sum = 0, smallest = __longlong_as_double(0x7FF0000000000000ll), largest = -smallest;
    #pragma unroll
    for (int k = 0; k < 32; k++) {
        const u64 at = begin + k * 256 + threadIdx.x;
        const bool there = at < n;
        x[k] = there ? data[at] : __uint_as_float(0x7FC00000u);
        const float size = fabsf(x[k]);
        if (finite(x[k])) {
            count++; sum += x[k];
            smallest = fmin(smallest, (double)x[k]); largest = fmax(largest, (double)x[k]);
            zeros += size == 0; ones += x[k] == 1.0f; over += size > 65504.0f;
            denormal += size > 0 && __float_as_uint(size) < 0x00800000u;
            saturated += __float_as_uint(size) == 0x7F7FFFFFu;
        } else if (there) {
            nan += x[k] != x[k]; above += x[k] > 0; below += x[k] < 0;
        }
    }
    const double total = block_sum((double)count, scratch);
    double mean = total ? block_sum(sum, scratch) / total : 0;
    smallest = block_extreme(smallest, scratch, false);
    largest = block_extreme(largest, scratch, true);
    if (smallest == largest) mean = smallest;
    double squares = 0, cubes = 0, fourths = 0;
    #pragma unroll
    for (int k = 0; k < 32; k++) {
        if (finite(x[k])) {
            const double d = x[k] - mean, s = d * d;
            squares += s; cubes += s * d; fourths += s * s;
        }
    }
    const double values[15] = {total, mean, block_sum(squares, scratch), block_sum(cubes, scratch),
        block_sum(fourths, scratch), smallest, largest, block_sum((double)nan, scratch),
        block_sum((double)above, scratch), block_sum((double)below, scratch), block_sum((double)zeros, scratch),
        block_sum((double)ones, scratch), block_sum((double)over, scratch), block_sum((double)denormal, scratch),
        block_sum((double)saturated, scratch)};
    if (threadIdx.x == 0)
        for (int k = 0; k < 15; k++) out[(u64)blockIdx.x * 15 + k] = values[k];
}

__device__ __forceinline__ u64 multiplier(u64 column) {
    u64 x = (column + 1) * 0x9E3779B97F4A7C15ull;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
    return (x ^ (x >> 31)) | 1ull;
}
// One thread block for each of the `segments` of each row of which a part is here.
extern "C" __global__ void rows(const void* data, int kind, u64 position, u64 n, u64 columns, u64 first, u64 count,
                                u64 segments, double* squares, u32* low, u32* high, u64* hashes, u8* alive) {
    __shared__ double scratch[32];
    u64* words = (u64*)scratch;
    u32* bits = (u32*)scratch;
    const u64 length = (columns + segments - 1) / segments;
    for (u64 job = blockIdx.x; job < count * segments; job += gridDim.x) {
        const u64 start = (first + job / segments) * columns;
        u64 begin = start + (job % segments) * length, end = begin + length;
        if (end > start + columns) end = start + columns;
        if (end > position + n) end = position + n;
        if (begin < position) begin = position;
        double sum = 0; u64 hash = 0; u32 least = 0xFFFFFFFFu, most = 0;
        for (u64 at = begin + threadIdx.x; at < end; at += blockDim.x) {
            const u64 here = at - position, column = at - start;
            const u32 pattern = kind == FP32 ? ((const u32*)data)[here] : ((const u16*)data)[here];
            const double x = load(data, here, kind);
            sum += x * x;
            least = min(least, pattern); most = max(most, pattern);
            u64 word = pattern * 0x9E3779B97F4A7C15ull;
            word ^= word >> 29;
            hash += word * multiplier(column);
            if (alive != 0 && x != 0 && alive[column] == 0) alive[column] = 1;
        }
        sum = block_sum(sum, scratch);
        hash = block_sum(hash, words);
        least = block_extreme(least, bits, false);
        most = block_extreme(most, bits, true);
        if (threadIdx.x == 0) { squares[job] = sum; low[job] = least; high[job] = most; hashes[job] = hash; }
        __syncthreads();
    }
}

extern "C" __global__ void joint(const void* w, const void* m, const void* v, int w_kind, int m_kind, int v_kind,
                                 u64 n, float rate, float rate_at_peak, float root, float eps, u64* out) {
    __shared__ u64 scratch[32];
    u32 found[7] = {0, 0, 0, 0, 0, 0, 0};
    for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (u64)gridDim.x * blockDim.x) {
        const float weight = load(w, i, w_kind), first = load(m, i, m_kind), second = load(v, i, v_kind);
        found[6] += weight == 0 && second > 0;
        const float under = __fadd_rn(__fmul_rn(__fsqrt_rn(second), root), eps);
        const float step = __fdiv_rn(__fmul_rn(first, rate), under);
        if (!(finite(weight) && finite(step) && step != 0)) continue;
        const float at_peak = __fdiv_rn(__fmul_rn(first, rate_at_peak), under);
        const bool stays = rounded(__fsub_rn(weight, step), w_kind) == weight;
        const bool stays_at_peak = rounded(__fsub_rn(weight, at_peak), w_kind) == weight;
        const bool one = weight == 1.0f;
        found[0]++; found[1] += stays; found[2] += stays_at_peak;
        found[3] += one; found[4] += one && stays; found[5] += one && stays_at_peak;
    }
    for (int k = 0; k < 7; k++) {
        const u64 total = block_sum((u64)found[k], scratch);
        if (threadIdx.x == 0 && total) atomicAdd(&out[k], total);
    }
}

// Product of two polynomials modulo CRC-32's, bits reflected.
__device__ u32 multiply(u32 left, u32 right) {
    u32 product = 0;
    for (int k = 0; k < 32; k++) {
        product ^= right & (0u - (left >> 31));
        left <<= 1;
        right = (right >> 1) ^ (0xEDB88320u & (0u - (right & 1u)));
    }
    return product;
}
// CRC-32 without its inversions, which makes it linear: chunks' remainders are shifted to their places and added.
// `powers[k]` is x**(8 * 1024 * 2**k).
extern "C" __global__ void __launch_bounds__(256) crc(const uint4* data, u64 chunks, const u32* powers, u32* out) {
    __shared__ u32 table[4][256];
    __shared__ u32 parts[256];
    u32 entry = threadIdx.x;
    for (int k = 0; k < 8; k++) entry = (entry >> 1) ^ (0xEDB88320u & (0u - (entry & 1u)));
    table[0][threadIdx.x] = entry;
    __syncthreads();
    for (int t = 1; t < 4; t++) {
        entry = (entry >> 8) ^ table[0][entry & 0xFFu];
        table[t][threadIdx.x] = entry;
    }
    __syncthreads();
    const u64 chunk = (u64)blockIdx.x * 256 + threadIdx.x;
    u32 rest = 0;
    if (chunk < chunks) {
        for (int i = 0; i < 64; i++) {
            const uint4 v = data[chunk * 64 + i];
            const u32 words[4] = {v.x, v.y, v.z, v.w};
            #pragma unroll
            for (int k = 0; k < 4; k++) {
                const u32 x = rest ^ words[k];
                rest = table[3][x & 0xFFu] ^ table[2][(x >> 8) & 0xFFu];
                rest ^= table[1][(x >> 16) & 0xFFu] ^ table[0][x >> 24];
            }
        }
        // To the end of the data, by the bits of the number of chunks behind this one.
        u64 behind = chunks - 1 - chunk;
        for (int k = 0; behind; k++, behind >>= 1)
            if (behind & 1) rest = multiply(powers[k], rest);
    }
    parts[threadIdx.x] = rest;
    __syncthreads();
    for (int half = 128; half; half >>= 1) {
        if (threadIdx.x < half) parts[threadIdx.x] ^= parts[threadIdx.x + half];
        __syncthreads();
    }
    if (threadIdx.x == 0) atomicXor(out, parts[0]);
}
"""
