// The matrix products of a step in float32, for parity: C [m, n] = Σ_k A(m, k) · B(n, k), tile by tile through shared memory. The products
// on tensor cores are those of matmul.cu.
#include "tile.cuh"

template <class P> struct Shape;
template <> struct Shape<F32> {
    static const int M = 64, N = 64, K = 16;
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

// dW [out, in] += dyᵀ · (codes · scale of the token).
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
