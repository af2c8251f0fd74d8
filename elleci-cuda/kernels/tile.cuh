// Products of matrix tiles in shared memory, which matrix products, attention and the scan are all made of.
//
// An Accumulator<P, M, N> is an [M, N] tile of float32 spread over the registers of a block of THREADS threads;
// `product` adds A · Bᵀ of two shared tiles to it, and `each` visits every element where it lies. P is the arithmetic:
// `F32` (plain multiply-adds, for parity and machines without a choice) or `Bf16` (tensor cores; operands rounded to
// bf16 as they enter shared memory, whose tiles begin at multiples of 16 bytes). Sizes are multiples of 32, and tiles are padded with
// zeros.
#pragma once
#include "platform.cuh"

const int THREADS = 256;

struct F32 {
    typedef float Element;
    static const int PAD = 4;
    static DEVICE Element from(float v) { return v; }
    static DEVICE float to(Element v) { return v; }
};

struct Bf16 {
    typedef u16 Element;
    static const int PAD = 8;
    static DEVICE Element from(float v) { return to_bf16(v); }
    static DEVICE float to(Element v) { return from_bf16(v); }
};

// Elements from one row of a tile to the next: PAD keeps rows out of each other's banks.
template <class P> DEVICE int pitch(int width) { return width + P::PAD; }

template <class P, int M, int N> struct Accumulator;

template <int M, int N> struct Accumulator<F32, M, N> {
    static const int ROWS = M / 16, COLS = N / 16;
    float v[ROWS][COLS];

    DEVICE void clear() {
#pragma unroll
        for (int i = 0; i < ROWS; i++)
#pragma unroll
            for (int j = 0; j < COLS; j++) v[i][j] = 0.0f;
    }

    // Thread (ty, tx) holds rows ty + 16 i and columns tx + 16 j.
    template <Order A, Order B> DEVICE void product(const float* a, int lda, const float* b, int ldb, int depth) {
        const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
        for (int k = 0; k < depth; k++) {
            float x[ROWS], y[COLS];
#pragma unroll
            for (int i = 0; i < ROWS; i++) x[i] = A == KMajor ? a[(ty + 16 * i) * lda + k] : a[k * lda + ty + 16 * i];
#pragma unroll
            for (int j = 0; j < COLS; j++) y[j] = B == KMajor ? b[(tx + 16 * j) * ldb + k] : b[k * ldb + tx + 16 * j];
#pragma unroll
            for (int i = 0; i < ROWS; i++)
#pragma unroll
                for (int j = 0; j < COLS; j++) v[i][j] = fused(x[i], y[j], v[i][j]);
        }
    }

    template <class Visit> DEVICE void each(Visit visit) {
        const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
#pragma unroll
        for (int i = 0; i < ROWS; i++)
#pragma unroll
            for (int j = 0; j < COLS; j++) visit(ty + 16 * i, tx + 16 * j, v[i][j]);
    }
};

// 16 rows from `row` and 16 of k of an operand, as `mma_bf16` takes A.
template <Order O> DEVICE void operand_a(u32 (&r)[4], const u16* tile, int ld, int row, int k) {
    const int lane = threadIdx.x % 32;
    if (O == KMajor) {
        load_matrices(r, tile + (row + lane % 16) * ld + k + lane / 16 * 8);
    } else {
        load_matrices_transposed(r, tile + (k + lane % 8 + lane / 16 * 8) * ld + row + lane / 8 % 2 * 8);
    }
}

// 16 rows as it takes B, 8 after 8: first r[0], r[1], then r[2], r[3].
template <Order O> DEVICE void operand_b(u32 (&r)[4], const u16* tile, int ld, int row, int k) {
    const int lane = threadIdx.x % 32;
    if (O == KMajor) {
        load_matrices(r, tile + (row + lane % 8 + lane / 16 * 8) * ld + k + lane / 8 % 2 * 8);
    } else {
        load_matrices_transposed(r, tile + (k + lane % 16) * ld + row + lane / 16 * 8);
    }
}

template <int M, int N> struct Accumulator<Bf16, M, N> {
    // 8 warps, as tall as the tile allows: warp tiles of [M / DOWN, N / ACROSS].
    static const int DOWN = M >= 128 ? 2 : 4, ACROSS = 8 / DOWN;
    static const int ROWS = M / DOWN / 16, COLS = N / ACROSS / 8;
    float v[ROWS][COLS][4];

    DEVICE void clear() {
#pragma unroll
        for (int i = 0; i < ROWS; i++)
#pragma unroll
            for (int j = 0; j < COLS; j++)
#pragma unroll
                for (int e = 0; e < 4; e++) v[i][j][e] = 0.0f;
    }

    template <Order A, Order B> DEVICE void product(const u16* a, int lda, const u16* b, int ldb, int depth) {
        const int warp = threadIdx.x / 32;
        const int row = warp / ACROSS * (M / DOWN), col = warp % ACROSS * (N / ACROSS);
        // Unrolled further, the addresses of all steps take more registers than there are in the scan's backward.
#pragma unroll 2
        for (int k = 0; k < depth; k += 16) {
            u32 x[ROWS][4], y[COLS / 2][4];
#pragma unroll
            for (int i = 0; i < ROWS; i++) operand_a<A>(x[i], a, lda, row + 16 * i, k);
#pragma unroll
            for (int j = 0; j < COLS / 2; j++) operand_b<B>(y[j], b, ldb, col + 16 * j, k);
#pragma unroll
            for (int i = 0; i < ROWS; i++)
#pragma unroll
                for (int j = 0; j < COLS; j++) {
                    const u32 pair[2] = {y[j / 2][j % 2 * 2], y[j / 2][j % 2 * 2 + 1]};
                    mma_bf16(v[i][j], x[i], pair);
                }
        }
    }

    template <class Visit> DEVICE void each(Visit visit) {
        const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, q = threadIdx.x % 4 * 2;
        const int row = warp / ACROSS * (M / DOWN), col = warp % ACROSS * (N / ACROSS);
#pragma unroll
        for (int i = 0; i < ROWS; i++)
#pragma unroll
            for (int j = 0; j < COLS; j++)
#pragma unroll
                for (int e = 0; e < 4; e++) visit(row + 16 * i + g + e / 2 * 8, col + 8 * j + q + e % 2, v[i][j][e]);
    }
};

// Fills a [rows, width] shared tile with element(row, column); neighbouring threads take neighbouring columns.
template <class P, class Make> DEVICE void fill_tile(typename P::Element* tile, int rows, int width, Make make) {
    const int ld = pitch<P>(width);
    for (int i = threadIdx.x; i < rows * width; i += THREADS) {
        const int r = i / width, c = i % width;
        tile[r * ld + c] = P::from(make(r, c));
    }
}
