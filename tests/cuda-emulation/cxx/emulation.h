// The kernels' view of the emulated machine: what `platform.cuh` needs, for a host compiler.
//
// A block's threads are contexts that take turns; see machine.cpp for how they are scheduled and watched.
#pragma once
#include <cmath>
#include <cstring>

struct Dim3 {
    unsigned x, y, z;
};
extern Dim3 threadIdx, blockIdx, blockDim, gridDim;

#define KERNEL(threads, name)             \
    enum { threads_of_##name = threads }; \
    extern "C" __attribute__((noinline)) void name
#define ONE_BLOCK 256
#define TWO_BLOCKS 256
#define DEVICE inline
// Touches no memory of the device.
#define UNWATCHED __attribute__((no_sanitize("thread")))
#define BARRIER() emulated_barrier()
#define __restrict__ __restrict

extern "C" {
void emulated_barrier();
// The warp's lanes meet; each leaves 8 bytes, and takes those of lane `from`.
u64 emulated_exchange(u64 bits, int from);
// The warp's lanes meet; `work(lanes, result)` runs once on what all of them left, `words` words each.
void emulated_collective(const u32* mine, int words, u32* result, int result_words, void (*work)(const u32*, u32*));
// Copies of 16 bytes that are made when their thread waits for them.
void emulated_copy_async(void* to, const void* from, int inside);
void emulated_copies_end();
void emulated_copies_wait(int but);
// Says so where an address is no multiple of 16.
void emulated_aligned(const void* p);
u8* emulated_shared();
int emulated_lane();
}

DEVICE u8* shared_memory() { return emulated_shared(); }
// Not fused: the tests compare with a host that does not fuse either.
DEVICE float fused(float a, float b, float c) { return a * b + c; }

DEVICE float bits_float(u32 bits) {
    float v;
    memcpy(&v, &bits, 4);
    return v;
}
DEVICE u32 float_bits(float v) {
    u32 bits;
    memcpy(&bits, &v, 4);
    return bits;
}

DEVICE float lane_xor(float v, int mask) {
    return bits_float((u32)emulated_exchange(float_bits(v), emulated_lane() ^ mask));
}
DEVICE double lane_xor(double v, int mask) {
    u64 bits;
    memcpy(&bits, &v, 8);
    bits = emulated_exchange(bits, emulated_lane() ^ mask);
    memcpy(&v, &bits, 8);
    return v;
}

DEVICE u32 bf16_bits(float v) {
    u32 bits = float_bits(v);
    if (v != v) {
        return 0x7fff;
    }
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
DEVICE u32 bf16_pair(float low, float high) { return bf16_bits(low) | bf16_bits(high) << 16; }

// The fragments of mma.m16n8k16: lane l holds rows l/4 and l/4 + 8, and of k the pairs at 2 (l % 4) and 8 further.
UNWATCHED inline void mma_bf16_of_warp(const u32* lanes, u32* out) {
    float a[16][16], b[16][8], d[16][8];
    for (int l = 0; l < 32; l++) {
        const u32* w = lanes + 10 * l;
        const int g = l / 4, q = l % 4 * 2;
        for (int e = 0; e < 2; e++) {
            for (int r = 0; r < 4; r++) {
                a[g + r % 2 * 8][q + e + r / 2 * 8] = bits_float(w[4 + r] >> (16 * e) << 16);
            }
            for (int r = 0; r < 2; r++) {
                b[q + e + 8 * r][g] = bits_float(w[8 + r] >> (16 * e) << 16);
            }
        }
        for (int e = 0; e < 4; e++) {
            d[g + e / 2 * 8][q + e % 2] = bits_float(w[e]);
        }
    }
    for (int i = 0; i < 16; i++) {
        for (int k = 0; k < 16; k++) {
            for (int j = 0; j < 8; j++) {
                d[i][j] += a[i][k] * b[k][j];
            }
        }
    }
    for (int l = 0; l < 32; l++) {
        for (int e = 0; e < 4; e++) {
            out[4 * l + e] = float_bits(d[l / 4 + e / 2 * 8][l % 4 * 2 + e % 2]);
        }
    }
}

// The fragments of mma.m16n8k32: as above with four int8 to a register.
UNWATCHED inline void mma_s8_of_warp(const u32* lanes, u32* out) {
    int a[16][32], b[32][8], d[16][8];
    for (int l = 0; l < 32; l++) {
        const u32* w = lanes + 10 * l;
        const int g = l / 4, q = l % 4 * 4;
        for (int e = 0; e < 4; e++) {
            for (int r = 0; r < 4; r++) {
                a[g + r % 2 * 8][q + e + r / 2 * 16] = (s8)(w[4 + r] >> (8 * e));
            }
            for (int r = 0; r < 2; r++) {
                b[q + e + 16 * r][g] = (s8)(w[8 + r] >> (8 * e));
            }
            d[g + e / 2 * 8][l % 4 * 2 + e % 2] = (int)w[e];
        }
    }
    for (int i = 0; i < 16; i++) {
        for (int k = 0; k < 32; k++) {
            for (int j = 0; j < 8; j++) {
                d[i][j] += a[i][k] * b[k][j];
            }
        }
    }
    for (int l = 0; l < 32; l++) {
        for (int e = 0; e < 4; e++) {
            out[4 * l + e] = (u32)d[l / 4 + e / 2 * 8][l % 4 * 2 + e % 2];
        }
    }
}

DEVICE void mma_bf16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    u32 words[10], out[4];
    memcpy(words, d, 16);
    memcpy(words + 4, a, 16);
    memcpy(words + 8, b, 8);
    emulated_collective(words, 10, out, 4, mma_bf16_of_warp);
    memcpy(d, out, 16);
}

// As above with e4m3.
UNWATCHED inline float e4m3_value(u32 code) {
    const int e = code >> 3 & 15, m = code & 7;
    const float v = e == 15 && m == 7 ? NAN : e == 0 ? ldexpf((float)m, -9) : ldexpf((float)(8 + m), e - 10);
    return code & 0x80 ? -v : v;
}

UNWATCHED inline void mma_e4m3_of_warp(const u32* lanes, u32* out) {
    float a[16][32], b[32][8], d[16][8];
    for (int l = 0; l < 32; l++) {
        const u32* w = lanes + 10 * l;
        const int g = l / 4, q = l % 4 * 4;
        for (int e = 0; e < 4; e++) {
            for (int r = 0; r < 4; r++) {
                a[g + r % 2 * 8][q + e + r / 2 * 16] = e4m3_value(w[4 + r] >> (8 * e) & 0xff);
            }
            for (int r = 0; r < 2; r++) {
                b[q + e + 16 * r][g] = e4m3_value(w[8 + r] >> (8 * e) & 0xff);
            }
            d[g + e / 2 * 8][l % 4 * 2 + e % 2] = bits_float(w[e]);
        }
    }
    for (int i = 0; i < 16; i++) {
        for (int k = 0; k < 32; k++) {
            for (int j = 0; j < 8; j++) {
                d[i][j] += a[i][k] * b[k][j];
            }
        }
    }
    for (int l = 0; l < 32; l++) {
        for (int e = 0; e < 4; e++) {
            out[4 * l + e] = float_bits(d[l / 4 + e / 2 * 8][l % 4 * 2 + e % 2]);
        }
    }
}

DEVICE void mma_e4m3(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    u32 words[10], out[4];
    memcpy(words, d, 16);
    memcpy(words + 4, a, 16);
    memcpy(words + 8, b, 8);
    emulated_collective(words, 10, out, 4, mma_e4m3_of_warp);
    memcpy(d, out, 16);
}

DEVICE void copy_async(void* to, const void* from, bool inside) { emulated_copy_async(to, from, inside); }
DEVICE void copies_end() { emulated_copies_end(); }
template <int N> DEVICE void copies_wait() { emulated_copies_wait(N); }

UNWATCHED inline void matrices_of_warp(const u32* lanes, u32* out) {
    for (int l = 0; l < 32; l++) {
        for (int m = 0; m < 4; m++) {
            out[4 * l + m] = lanes[4 * (8 * m + l / 4) + l % 4];
        }
    }
}
UNWATCHED inline void transposed_of_warp(const u32* lanes, u32* out) {
    const auto element = [&](int m, int r, int c) { return lanes[4 * (8 * m + r) + c / 2] >> (16 * (c % 2)) & 0xffff; };
    for (int l = 0; l < 32; l++) {
        for (int m = 0; m < 4; m++) {
            const int r = l / 4, c = l % 4 * 2;
            out[4 * l + m] = element(m, c, r) | element(m, c + 1, r) << 16;
        }
    }
}

// Every lane reads the row that it names, so that the access is seen as its own.
DEVICE void load_matrices(u32 (&r)[4], const void* row) {
    u32 words[4];
    emulated_aligned(row);
    for (int i = 0; i < 4; i++) words[i] = ((const u32*)row)[i];
    emulated_collective(words, 4, r, 4, matrices_of_warp);
}
DEVICE void load_matrices_transposed(u32 (&r)[4], const void* row) {
    u32 words[4];
    emulated_aligned(row);
    for (int i = 0; i < 4; i++) words[i] = ((const u32*)row)[i];
    emulated_collective(words, 4, r, 4, transposed_of_warp);
}

DEVICE void mma_s8(int (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    u32 words[10], out[4];
    memcpy(words, d, 16);
    memcpy(words + 4, a, 16);
    memcpy(words + 8, b, 8);
    emulated_collective(words, 10, out, 4, mma_s8_of_warp);
    memcpy(d, out, 16);
}
