// What every kernel may use of the machine: names that NVRTC and the emulation (tests/cuda-emulation) both supply.
//
// Rules that keep one source right on both:
//  - a kernel is declared with KERNEL(threads, name); `threads` is the most that a block may have;
//  - shared memory is dynamic only (`shared_memory()`): the launch says how much, and the emulation guards its end;
//  - lanes exchange through the functions below, which all 32 lanes of a warp reach together;
//  - tensor-core products go through `mma_bf16`, `mma_s8` and `mma_e4m3`, whose host forms do the same arithmetic;
//  - what `copy_async` brings lies in shared memory once its thread has waited for it and all threads have met;
//  - compiled with --fmad=false: a multiply-add is fused only where the source says `fused`.
#pragma once

typedef unsigned char u8;
typedef signed char s8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;
typedef unsigned long long u64;

#ifdef ELLECI_EMULATION
#include "emulation.h"
#else

#define KERNEL(threads, name) extern "C" __global__ void __launch_bounds__(threads) name
// Stands for the threads of a kernel of which a multiprocessor holds one block at a time, so that registers are saved for no other.
#define ONE_BLOCK 256, 1
// And of one that holds two.
#define TWO_BLOCKS 256, 2
#define DEVICE __device__ __forceinline__
#define BARRIER() __syncthreads()

extern __shared__ __align__(16) u8 elleci_shared[];

DEVICE u8* shared_memory() { return elleci_shared; }

DEVICE float fused(float a, float b, float c) { return fmaf(a, b, c); }

// The value of lane `lane ^ mask`.
DEVICE float lane_xor(float v, int mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }
DEVICE double lane_xor(double v, int mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }

// bf16 bits of two floats, rounded to nearest even: `low` in the low half.
DEVICE u32 bf16_pair(float low, float high) {
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

DEVICE float bits_float(u32 bits) { return __uint_as_float(bits); }
DEVICE u32 float_bits(float v) { return __float_as_uint(v); }

// d += a · b, a [16, 16] and b [16, 8] of bf16, d [16, 8] of float32 (PTX mma.m16n8k16).
DEVICE void mma_bf16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// d += a · b, a [16, 32] and b [32, 8] of int8, d [16, 8] of int32 (PTX mma.m16n8k32).
DEVICE void mma_s8(int (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The same with e4m3 and float32, on compute capability 8.9 and newer: the host launches it nowhere else.
DEVICE void mma_e4m3(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
#if __CUDA_ARCH__ >= 890
    asm volatile("mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    __trap();
#endif
}

DEVICE u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// Starts a copy of 16 bytes into shared memory, past the registers; zeros where not `inside`, and `from` is not read. Both are
// multiples of 16.
DEVICE void copy_async(void* to, const void* from, bool inside) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(inside ? 16 : 0)
                 : "memory");
}
// Ends a group of copies of this thread.
DEVICE void copies_end() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits for all groups of this thread but the last N.
template <int N> DEVICE void copies_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

// Four 8 x 8 matrices of 16-bit elements (or 8 rows of 16 bytes each) out of shared memory. Lane l gives the address of row
// l % 8 of matrix l / 8, and takes of each matrix the elements 2 (l % 4) and 2 (l % 4) + 1 of row l / 4.
DEVICE void load_matrices(u32 (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}
// The same with every matrix transposed.
DEVICE void load_matrices_transposed(u32 (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

#endif

#define INFINITY_F bits_float(0x7f800000u)

DEVICE int ceil_div(int a, int b) { return (a + b - 1) / b; }
DEVICE int min_of(int a, int b) { return a < b ? a : b; }

// --- bf16 -------------------------------------------------------------------------------------------------------

DEVICE u16 to_bf16(float v) { return (u16)bf16_pair(v, 0.0f); }
DEVICE float from_bf16(u16 v) { return bits_float((u32)v << 16); }

// --- e4m3 -------------------------------------------------------------------------------------------------------

// The nearest e4m3, ties to even; what is larger than 448 becomes 448, NaN stays.
DEVICE u8 to_e4m3(float v) {
    const u32 bits = float_bits(v), sign = bits >> 24 & 0x80u, magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) {
        return (u8)(sign | 0x7fu);
    }
    if (magnitude < 121u << 23) { // below 2^-6 numbers lie 2^-9 apart
        return (u8)(sign | (u32)rintf(bits_float(magnitude) * 512.0f));
    }
    const u32 code = ((magnitude + 0x7ffffu + (magnitude >> 20 & 1u)) >> 20) - (120u << 3);
    return (u8)(sign | (code < 0x7eu ? code : 0x7eu));
}

// How an operand of a product lies: KMajor, [row][k] with k adjacent; RowMajor, [k][row] with rows adjacent.
enum Order { KMajor, RowMajor };

// Sixteen bytes at once, from a multiple of 16.
struct alignas(16) Four {
    u32 v[4];
};

// A buffer of float32 or bf16, as weights and gradients are; the flag is the same for a whole launch.
struct Floats {
    void* data;
    u32 is_bf16;
    u32 unused;
};

DEVICE float read(Floats f, i64 i) {
    return f.is_bf16 ? from_bf16(((const u16*)f.data)[i]) : ((const float*)f.data)[i];
}

DEVICE void write(Floats f, i64 i, float v) {
    if (f.is_bf16) {
        ((u16*)f.data)[i] = to_bf16(v);
    } else {
        ((float*)f.data)[i] = v;
    }
}

// --- reductions over a block, in a fixed order ------------------------------------------------------------------

struct Sum {
    template <class T> static DEVICE T of(T a, T b) { return a + b; }
};
struct Max {
    // NaN wins, so that it is not lost: a comparison with NaN is false.
    template <class T> static DEVICE T of(T a, T b) { return a > b || a != a ? a : b; }
};

template <class Op, class T> DEVICE T warp_reduce(T v) {
    for (int mask = 16; mask > 0; mask >>= 1) {
        v = Op::of(v, lane_xor(v, mask));
    }
    return v;
}

// The reduction of every thread's `v`, in all threads. `room` holds one T a warp; blocks are whole warps.
template <class Op, class T> DEVICE T block_reduce(T v, T* room) {
    const int warps = blockDim.x / 32;
    v = warp_reduce<Op>(v);
    BARRIER();
    if (threadIdx.x % 32 == 0) {
        room[threadIdx.x / 32] = v;
    }
    BARRIER();
    v = room[0];
    for (int w = 1; w < warps; w++) {
        v = Op::of(v, room[w]);
    }
    return v;
}

// --- activations ------------------------------------------------------------------------------------------------

DEVICE float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }
DEVICE float silu(float x) { return x / (1.0f + expf(-x)); }

// Both sigmoids from one exponential that cannot overflow: 1 - s would cancel for large x.
DEVICE float silu_grad(float x) {
    float e = expf(-fabsf(x));
    float large = 1.0f / (1.0f + e), small = e * large;
    float s = x < 0.0f ? small : large, rest = x < 0.0f ? large : small;
    return s * (1.0f + x * rest);
}

DEVICE float softplus(float x) { return fmaxf(x, 0.0f) + log1pf(expf(-fabsf(x))); }
