// The matrix products of a step: C [m, n] = Σ_k A(m, k) · B(n, k), tile by tile through shared memory.
//
// These are the portable forms: every product of the step can run on them, and the emulation does. Where cuBLASLt has
// a faster one, the driver may take that for bf16 and int8 operands; the sums of the ternary forward are equal either way.
#include "tile.cuh"

template <class P> struct Shape;
template <> struct Shape<F32> {
    static const int M = 64, N = 64, K = 16;
};
template <> struct Shape<Bf16> {
    static const int M = 128, N = 128, K = 32;
};

// Bytes of shared memory, which the host computes alike: (M + N) rows of K elements, or K rows of M and of N.
template <class P, Order O> DEVICE int tile_elements(int rows, int depth) {
    return O == KMajor ? rows * pitch<P>(depth) : depth * pitch<P>(rows);
}

template <class P, Order O, class Load>
DEVICE void load_tile(typename P::Element* tile, int rows, int depth, int row0, int k0, int row_end, int k_end, Load load) {
    for (int i = threadIdx.x; i < rows * depth; i += THREADS) {
        const int r = O == KMajor ? i / depth : i % rows, k = O == KMajor ? i % depth : i / rows;
        const bool inside = row0 + r < row_end && k0 + k < k_end;
        tile[O == KMajor ? r * pitch<P>(depth) + k : k * pitch<P>(rows) + r] =
            P::from(inside ? load(row0 + r, k0 + k) : 0.0f);
    }
}

// blockIdx: (tiles of n, tiles of m). `a(m, k)` and `b(n, k)` read the operands, `store(m, n, sum)` takes the result.
template <class P, Order OA, Order OB, class A, class B, class Store>
DEVICE void gemm(int m, int n, int depth, A a, B b, Store store) {
    typedef Shape<P> S;
    typename P::Element* tile_a = (typename P::Element*)shared_memory();
    typename P::Element* tile_b = tile_a + tile_elements<P, OA>(S::M, S::K);
    const int m0 = blockIdx.y * S::M, n0 = blockIdx.x * S::N;
    Accumulator<P, S::M, S::N> sum;
    sum.clear();
    for (int k0 = 0; k0 < depth; k0 += S::K) {
        BARRIER();
        load_tile<P, OA>(tile_a, S::M, S::K, m0, k0, m, depth, a);
        load_tile<P, OB>(tile_b, S::N, S::K, n0, k0, n, depth, b);
        BARRIER();
        sum.template product<OA, OB>(tile_a, pitch<P>(OA == KMajor ? S::K : S::M), tile_b,
                                     pitch<P>(OB == KMajor ? S::K : S::N), S::K);
    }
    sum.each([&](int i, int j, float& v) {
        if (m0 + i < m && n0 + j < n) {
            store(m0 + i, n0 + j, v);
        }
    });
}

DEVICE int code_at(const u8* packed, int row_bytes, int row, int col) {
    const u32 code = packed[(i64)row * row_bytes + col / 4] >> (col % 4 * 2) & 3u;
    return code == 3u ? -1 : (int)code;
}

// y [rows, out] = x [rows, in] · Wᵀ, W [out, in].
template <class P> DEVICE void dense_forward(const float* x, int rows, int in, Floats w, int out, float* y) {
    gemm<P, KMajor, KMajor>(
        rows, out, in, [&](int m, int k) { return x[(i64)m * in + k]; },
        [&](int n, int k) { return read(w, (i64)n * in + k); },
        [&](int m, int n, float v) { y[(i64)m * out + n] = v; });
}

// dx [rows, in] (=|+=) dy [rows, out] · W.
template <class P> DEVICE void dense_dx(const float* dy, int rows, int out, Floats w, int in, float* dx, int add) {
    gemm<P, KMajor, RowMajor>(
        rows, in, out, [&](int m, int k) { return dy[(i64)m * out + k]; },
        [&](int n, int k) { return read(w, (i64)k * in + n); },
        [&](int m, int n, float v) {
            float* at = dx + (i64)m * in + n;
            *at = add ? *at + v : v;
        });
}

// dW [out, in] += dyᵀ · x.
template <class P> DEVICE void dense_dw(const float* dy, const float* x, int rows, int out, int in, Floats dw) {
    gemm<P, RowMajor, RowMajor>(
        out, in, rows, [&](int m, int k) { return dy[(i64)k * out + m]; },
        [&](int n, int k) { return x[(i64)k * in + n]; },
        [&](int m, int n, float v) { write(dw, (i64)m * in + n, read(dw, (i64)m * in + n) + v); });
}

// dx [rows, in] (=|+=) γ · dy [rows, out] · W₃, straight through the quantiser.
template <class P>
DEVICE void ternary_dx(const float* dy, int rows, int out, const u8* w, const float* gamma, int in, float* dx, int add) {
    const int row_bytes = ceil_div(in, 64) * 16;
    const float g = *gamma;
    gemm<P, KMajor, RowMajor>(
        rows, in, out, [&](int m, int k) { return dy[(i64)m * out + k]; },
        [&](int n, int k) { return (float)code_at(w, row_bytes, k, n); },
        [&](int m, int n, float v) {
            float* at = dx + (i64)m * in + n;
            *at = add ? *at + v * g : v * g;
        });
}

// dW [out, in] += dyᵀ · (codes · scale of the token). The codes are exact in bf16; the scale goes to dy.
template <class P>
DEVICE void ternary_dw(const float* dy, const s8* codes, const float* scales, int rows, int out, int in, int pitch_codes, Floats dw) {
    gemm<P, RowMajor, RowMajor>(
        out, in, rows, [&](int m, int k) { return dy[(i64)k * out + m] * scales[k]; },
        [&](int n, int k) { return (float)codes[(i64)k * pitch_codes + n]; },
        [&](int m, int n, float v) { write(dw, (i64)m * in + n, read(dw, (i64)m * in + n) + v); });
}

#define PRODUCTS(P, suffix)                                                                                            \
    KERNEL(256, dense_forward_##suffix)(const float* x, int rows, int in, Floats w, int out, float* y) {               \
        dense_forward<P>(x, rows, in, w, out, y);                                                                      \
    }                                                                                                                  \
    KERNEL(256, dense_dx_##suffix)(const float* dy, int rows, int out, Floats w, int in, float* dx, int add) {         \
        dense_dx<P>(dy, rows, out, w, in, dx, add);                                                                    \
    }                                                                                                                  \
    KERNEL(256, dense_dw_##suffix)(const float* dy, const float* x, int rows, int out, int in, Floats dw) {            \
        dense_dw<P>(dy, x, rows, out, in, dw);                                                                         \
    }                                                                                                                  \
    KERNEL(256, ternary_dx_##suffix)(const float* dy, int rows, int out, const u8* w, const float* gamma, int in,      \
                                     float* dx, int add) {                                                             \
        ternary_dx<P>(dy, rows, out, w, gamma, in, dx, add);                                                           \
    }                                                                                                                  \
    KERNEL(256, ternary_dw_##suffix)(const float* dy, const s8* codes, const float* scales, int rows, int out, int in, \
                                     int pitch_codes, Floats dw) {                                                     \
        ternary_dw<P>(dy, codes, scales, rows, out, in, pitch_codes, dw);                                              \
    }
PRODUCTS(F32, f32)
PRODUCTS(Bf16, bf16)

// --- the forward of a ternary projection --------------------------------------------------------------------------
//
// y [rows, out] = (W₃ · q) · (γ · scale of the token), plus `addend` where it is not null (the residual stream). Integers
// through int8 tensor cores; below 2^24, so that the conversion is exact and the result that of the core, bit for bit.
// Tiles of TM tokens and TN outputs; 64 columns of the operands at a time. 8 warps, 4 down and 2 across.

template <int TM, int TN>
DEVICE void ternary_forward(const s8* q, const float* scales, int rows, int depth, const u8* w, const float* gamma, int out,
                            const float* addend, float* y) {
    const int K = 64, LD = K + 16; // bytes; 16 more keep rows in different banks
    const int ROWS = TM / 4 / 16, COLS = TN / 2 / 8;
    s8* tile_q = (s8*)shared_memory();
    s8* tile_w = tile_q + TM * LD;
    const int m0 = blockIdx.y * TM, n0 = blockIdx.x * TN, tid = threadIdx.x;
    const int warp = tid / 32, g = tid % 32 / 4, l = tid % 4;
    const int row = warp / 2 * (TM / 4), col = warp % 2 * (TN / 2);
    int sum[ROWS][COLS][4];
#pragma unroll
    for (int i = 0; i < ROWS; i++)
#pragma unroll
        for (int j = 0; j < COLS; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) sum[i][j][e] = 0;
    // `depth` is padded to 64, and so are rows of both operands.
    for (int k0 = 0; k0 < depth; k0 += K) {
        BARRIER();
        for (int i = tid; i < TM * K / 16; i += 256) {
            const int r = i / (K / 16), c = i % (K / 16) * 16;
            u32 words[4] = {0, 0, 0, 0};
            if (m0 + r < rows) {
                const u32* from = (const u32*)(q + (i64)(m0 + r) * depth + k0 + c);
                for (int e = 0; e < 4; e++) words[e] = from[e];
            }
            for (int e = 0; e < 4; e++) ((u32*)(tile_q + r * LD + c))[e] = words[e];
        }
        for (int i = tid; i < TN * K / 16; i += 256) {
            const int r = i / (K / 16), c = i % (K / 16) * 16;
            const u32 packed = n0 + r < out ? *(const u32*)(w + ((i64)(n0 + r) * depth + k0 + c) / 4) : 0;
            for (int e = 0; e < 4; e++) {
                // Four codes of two bits to four bytes, each extended by its sign: 3 -> 0xff.
                const u32 codes = packed >> (8 * e);
                const u32 spread = (codes & 3u) | (codes & 0xcu) << 6 | (codes & 0x30u) << 12 | (codes & 0xc0u) << 18;
                ((u32*)(tile_w + r * LD + c))[e] = spread | (spread >> 1 & 0x01010101u) * 0xfcu;
            }
        }
        BARRIER();
#pragma unroll
        for (int k = 0; k < K; k += 32) {
            u32 x[ROWS][4], z[COLS][2];
#pragma unroll
            for (int i = 0; i < ROWS; i++) {
                const s8* at = tile_q + (row + 16 * i + g) * LD + k + 4 * l;
                x[i][0] = *(const u32*)at;
                x[i][1] = *(const u32*)(at + 8 * LD);
                x[i][2] = *(const u32*)(at + 16);
                x[i][3] = *(const u32*)(at + 8 * LD + 16);
            }
#pragma unroll
            for (int j = 0; j < COLS; j++) {
                const s8* at = tile_w + (col + 8 * j + g) * LD + k + 4 * l;
                z[j][0] = *(const u32*)at;
                z[j][1] = *(const u32*)(at + 16);
            }
#pragma unroll
            for (int i = 0; i < ROWS; i++)
#pragma unroll
                for (int j = 0; j < COLS; j++) mma_s8(sum[i][j], x[i], z[j]);
        }
    }
#pragma unroll
    for (int i = 0; i < ROWS; i++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int m = m0 + row + 16 * i + g + 8 * half;
            if (m < rows) {
                const float scale = *gamma * scales[m];
#pragma unroll
                for (int j = 0; j < COLS; j++)
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        const int n = n0 + col + 8 * j + 2 * l + e;
                        if (n < out) {
                            const float v = (float)sum[i][j][2 * half + e] * scale;
                            y[(i64)m * out + n] = addend ? addend[(i64)m * out + n] + v : v;
                        }
                    }
            }
        }
}

KERNEL(256, ternary_forward_small)(const s8* q, const float* scales, int rows, int depth, const u8* w, const float* gamma,
                                   int out, const float* addend, float* y) {
    ternary_forward<64, 64>(q, scales, rows, depth, w, gamma, out, addend, y);
}
KERNEL(256, ternary_forward_large)(const s8* q, const float* scales, int rows, int depth, const u8* w, const float* gamma,
                                   int out, const float* addend, float* y) {
    ternary_forward<128, 128>(q, scales, rows, depth, w, gamma, out, addend, y);
}
