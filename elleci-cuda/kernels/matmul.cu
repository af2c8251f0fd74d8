// The large products of a step on tensor cores: C [m, n] = Σ_k A(m, k) · B(n, k), operands of bf16, int8 or e4m3.
//
// Operands lie ready in memory (operands.cu made them, with rows padded to 64 elements by zeros), so that tiles come by asynchronous
// copies of 16 bytes, past the registers, while the tensor cores work on earlier ones:
//
//   STAGES tiles of each operand in shared memory, 64 bytes of k deep (32 bf16, 64 int8 or e4m3)
//   for every tile t:  wait for tile t; meet; start the copies of tile t + STAGES − 1 into the place of tile t − 1, which all
//                      threads have left; multiply tile t
//
// An operand is KMajor ([row][k]) or, in bf16, RowMajor ([k][row]); matrices of 8 x 8 are turned as they are loaded. Rows of tiles are
// 16 bytes longer than what they hold, an odd multiple of 16 bytes, so that 8 rows below each other lie in different banks.
// A device with cuBLASLt uses that instead, unless told otherwise: on sm_90 only its kernels reach the full rate (wgmma), and `mma` of
// e4m3 is there made of products of fp16.
#include "platform.cuh"

const int STAGES = 4, DEPTH = 64; // bytes of k in a tile

struct Halves {
    typedef float Sum;
    static const int BYTES = 2;
    static DEVICE void mma(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) { mma_bf16(d, a, b); }
};
struct Bytes {
    typedef int Sum;
    static const int BYTES = 1;
    static DEVICE void mma(int (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) { mma_s8(d, a, b); }
};
struct Eighths {
    typedef float Sum;
    static const int BYTES = 1;
    static DEVICE void mma(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) { mma_e4m3(d, a, b); }
};

// An operand in memory: `pitch` elements from one of its rows to the next, a multiple of 16 bytes.
struct Operand {
    const u8* at;
    int pitch;
};

// A tile of R rows and DEPTH bytes of k.
template <class K, Order O, int R> struct Tile {
    static const int K_ELEMS = DEPTH / K::BYTES;
    static const int LINES = O == KMajor ? R : K_ELEMS;                    // lines in shared memory
    static const int LINE_BYTES = O == KMajor ? DEPTH : R * K::BYTES;      // what a line holds
    static const int LD = LINE_BYTES + 16;                                 // and takes
    static const int SIZE = LINES * LD;

    // Starts the copies of the rows from `row0` and of k from `k0`; zeros past `rows` and `depth`.
    static DEVICE void start(u8* tile, Operand from, int row0, int k0, int rows, int depth) {
        const int CHUNKS = LINE_BYTES / 16, EACH = 16 / K::BYTES;
        const int line0 = O == KMajor ? row0 : k0, along0 = O == KMajor ? k0 : row0;
        const int lines = O == KMajor ? rows : depth, along = O == KMajor ? depth : rows;
#pragma unroll
        for (int i = threadIdx.x; i < LINES * CHUNKS; i += 256) {
            const int line = i / CHUNKS, chunk = i % CHUNKS;
            const bool inside = line0 + line < lines && along0 + chunk * EACH < along;
            const i64 at = ((i64)(line0 + line) * from.pitch + along0 + chunk * EACH) * K::BYTES;
            copy_async(tile + line * LD + chunk * 16, from.at + (inside ? at : 0), inside);
        }
    }

    // 16 rows from `row` and 32 bytes of k from byte `k`, as `mma` takes A.
    static DEVICE void load_a(u32 (&r)[4], const u8* tile, int row, int k) {
        const int lane = threadIdx.x % 32;
        if (O == KMajor) {
            load_matrices(r, tile + (row + lane % 16) * LD + k + lane / 16 * 16);
        } else {
            load_matrices_transposed(r, tile + (k / 2 + lane % 8 + lane / 16 * 8) * LD + (row + lane / 8 % 2 * 8) * 2);
        }
    }

    // The same of two neighbouring groups of 8 rows, as it takes B: first r[0], r[1], then r[2], r[3].
    static DEVICE void load_b(u32 (&r)[4], const u8* tile, int row, int k) {
        const int lane = threadIdx.x % 32;
        if (O == KMajor) {
            load_matrices(r, tile + (row + lane % 8 + lane / 16 * 8) * LD + k + lane / 8 % 2 * 16);
        } else {
            load_matrices_transposed(r, tile + (k / 2 + lane % 16) * LD + (row + lane / 16 * 8) * 2);
        }
    }
};

// blockIdx: (tiles of n, tiles of m). 8 warps, 2 down and 4 across. `store(m, n, sum)` takes the result.
template <class K, Order OA, Order OB, int M, int N, class Store>
DEVICE void matmul(Operand a, Operand b, int m, int n, int depth, Store store) {
    typedef Tile<K, OA, M> A;
    typedef Tile<K, OB, N> B;
    const int ROWS = M / 2 / 16, COLS = N / 4 / 8, STEP = DEPTH / K::BYTES;
    u8* stage = shared_memory();
    const int m0 = blockIdx.y * M, n0 = blockIdx.x * N, warp = threadIdx.x / 32;
    const int row = warp / 4 * (M / 2), col = warp % 4 * (N / 4);
    typename K::Sum sum[ROWS][COLS][4];
#pragma unroll
    for (int i = 0; i < ROWS; i++)
#pragma unroll
        for (int j = 0; j < COLS; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) sum[i][j][e] = 0;
    const int tiles = ceil_div(depth, STEP);
    const auto start = [&](int t) {
        if (t < tiles) {
            u8* tile = stage + t % STAGES * (A::SIZE + B::SIZE);
            A::start(tile, a, m0, t * STEP, m, depth);
            B::start(tile + A::SIZE, b, n0, t * STEP, n, depth);
        }
        copies_end(); // also where there was nothing to copy, so that groups are counted alike
    };
    for (int t = 0; t < STAGES - 1; t++) start(t);
    for (int t = 0; t < tiles; t++) {
        copies_wait<STAGES - 2>();
        BARRIER();
        start(t + STAGES - 1);
        const u8* tile_a = stage + t % STAGES * (A::SIZE + B::SIZE);
        const u8* tile_b = tile_a + A::SIZE;
#pragma unroll
        for (int k = 0; k < DEPTH; k += 32) {
            u32 x[ROWS][4], y[COLS / 2][4];
#pragma unroll
            for (int i = 0; i < ROWS; i++) A::load_a(x[i], tile_a, row + 16 * i, k);
#pragma unroll
            for (int j = 0; j < COLS / 2; j++) B::load_b(y[j], tile_b, col + 16 * j, k);
#pragma unroll
            for (int i = 0; i < ROWS; i++)
#pragma unroll
                for (int j = 0; j < COLS; j++) {
                    const u32 pair[2] = {y[j / 2][j % 2 * 2], y[j / 2][j % 2 * 2 + 1]};
                    K::mma(sum[i][j], x[i], pair);
                }
        }
    }
    copies_wait<0>();
    const int g = threadIdx.x % 32 / 4, l = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < ROWS; i++)
#pragma unroll
        for (int j = 0; j < COLS; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const int r = m0 + row + 16 * i + g + e / 2 * 8, c = n0 + col + 8 * j + 2 * l + e % 2;
                if (r < m && c < n) {
                    store(r, c, sum[i][j][e]);
                }
            }
}

// c [m, n] (=|+=) alpha · A · Bᵀ; alpha is 1 where there is none.
template <Order OA, Order OB, int M, int N>
DEVICE void bf16_product(const u8* a, int pitch_a, const u8* b, int pitch_b, int m, int n, int depth, const float* alpha, Floats c,
                         int add) {
    const float factor = alpha ? *alpha : 1.0f;
    matmul<Halves, OA, OB, M, N>(Operand{a, pitch_a}, Operand{b, pitch_b}, m, n, depth, [&](int i, int j, float v) {
        const i64 at = (i64)i * n + j;
        write(c, at, add ? read(c, at) + v * factor : v * factor);
    });
}

// y [m, n] = (W₃ · q) · (γ · scale of the token), plus `addend` where `add` (the residual stream). The sums stay below 2^24, so that
// the conversion is exact and the result that of the core, bit for bit.
template <int M, int N>
DEVICE void int8_product(const u8* q, int pitch_q, const u8* w, int pitch_w, int m, int n, int depth, const float* scales,
                         const float* gamma, Floats addend, int add, Floats y) {
    const float g = *gamma;
    matmul<Bytes, KMajor, KMajor, M, N>(Operand{q, pitch_q}, Operand{w, pitch_w}, m, n, depth, [&](int i, int j, int sum) {
        const i64 at = (i64)i * n + j;
        const float v = (float)sum * (g * scales[i]);
        write(y, at, add ? read(addend, at) + v : v);
    });
}

// dx [m, n] (=|+=) (A · Bᵀ) · (γ · scale of the token).
template <int M, int N>
DEVICE void e4m3_product(const u8* a, int pitch_a, const u8* b, int pitch_b, int m, int n, int depth, const float* scales,
                         const float* gamma, float* dx, int add) {
    const float g = *gamma;
    matmul<Eighths, KMajor, KMajor, M, N>(Operand{a, pitch_a}, Operand{b, pitch_b}, m, n, depth, [&](int i, int j, float sum) {
        const i64 at = (i64)i * n + j;
        const float v = sum * (g * scales[i]);
        dx[at] = add ? dx[at] + v : v;
    });
}

#ifndef ELLECI_EMULATION
// What cuBLASLt multiplies a result's old value by: its factors are all on the device or all on the host.
extern "C" __device__ float elleci_switches[2] = {0.0f, 1.0f};
#endif

#define MATMUL(M, suffix)                                                                                              \
    KERNEL(TWO_BLOCKS, matmul_kk_##suffix)(const u8* a, int pitch_a, const u8* b, int pitch_b, int m, int n, int depth, \
                                           const float* alpha, Floats c, int add) {                                    \
        bf16_product<KMajor, KMajor, M, M>(a, pitch_a, b, pitch_b, m, n, depth, alpha, c, add);                        \
    }                                                                                                                  \
    KERNEL(TWO_BLOCKS, matmul_kr_##suffix)(const u8* a, int pitch_a, const u8* b, int pitch_b, int m, int n, int depth, \
                                           const float* alpha, Floats c, int add) {                                    \
        bf16_product<KMajor, RowMajor, M, M>(a, pitch_a, b, pitch_b, m, n, depth, alpha, c, add);                      \
    }                                                                                                                  \
    KERNEL(TWO_BLOCKS, matmul_rr_##suffix)(const u8* a, int pitch_a, const u8* b, int pitch_b, int m, int n, int depth, \
                                           const float* alpha, Floats c, int add) {                                    \
        bf16_product<RowMajor, RowMajor, M, M>(a, pitch_a, b, pitch_b, m, n, depth, alpha, c, add);                    \
    }                                                                                                                  \
    KERNEL(TWO_BLOCKS, matmul_s8_##suffix)(const u8* q, int pitch_q, const u8* w, int pitch_w, int m, int n, int depth, \
                                           const float* scales, const float* gamma, Floats addend, int add, Floats y) { \
        int8_product<M, M>(q, pitch_q, w, pitch_w, m, n, depth, scales, gamma, addend, add, y);                        \
    }                                                                                                                  \
    KERNEL(256, matmul_e4m3_##suffix)(const u8* a, int pitch_a, const u8* b, int pitch_b, int m, int n, int depth,     \
                                      const float* scales, const float* gamma, float* dx, int add) {                   \
        e4m3_product<M, M>(a, pitch_a, b, pitch_b, m, n, depth, scales, gamma, dx, add);                               \
    }
MATMUL(64, small)
MATMUL(128, large)
