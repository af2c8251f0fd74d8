// Kernels with faults of every sort that the emulation promises to find, and one without.
#include "platform.cuh"

// Each thread reads its neighbour's word; with `barrier` this is right, without it a race.
KERNEL(128, fault_race)(float* out, int barrier) {
    float* shared = (float*)shared_memory();
    shared[threadIdx.x] = (float)threadIdx.x;
    if (barrier) {
        BARRIER();
    }
    out[threadIdx.x] = shared[(threadIdx.x + 1) % blockDim.x];
}

// Writes `len` elements.
KERNEL(32, fault_bounds)(float* out, int len) {
    for (int i = threadIdx.x; i < len; i += 32) {
        out[i] = 1.0f;
    }
}

// Reads shared memory past what was asked for, or that nothing wrote.
KERNEL(32, fault_shared)(float* out, int at) {
    float* shared = (float*)shared_memory();
    if (threadIdx.x == 0) {
        shared[0] = 1.0f;
        out[0] = shared[at];
    }
}

// One lane of a warp stays away from an exchange.
KERNEL(64, fault_exchange)(float* out) {
    if (threadIdx.x != 40) {
        out[threadIdx.x] = lane_xor((float)threadIdx.x, 1);
    }
}

// All blocks write the same word.
KERNEL(32, fault_blocks)(float* out) {
    if (threadIdx.x == 0) {
        out[0] = (float)blockIdx.x;
    }
}

// One product of each kind, straight from and to memory, by the fragment layouts of the PTX manual.
KERNEL(32, fragment_bf16)(const float* a, const float* b, float* d) {
    const int g = threadIdx.x / 4, q = threadIdx.x % 4 * 2;
    u32 x[4], y[2];
    float z[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    for (int r = 0; r < 4; r++) {
        const float* at = a + (g + r % 2 * 8) * 16 + q + r / 2 * 8;
        x[r] = bf16_pair(at[0], at[1]);
    }
    for (int r = 0; r < 2; r++) {
        y[r] = bf16_pair(b[(q + 8 * r) * 8 + g], b[(q + 1 + 8 * r) * 8 + g]);
    }
    mma_bf16(z, x, y);
    for (int e = 0; e < 4; e++) {
        d[(g + e / 2 * 8) * 8 + q + e % 2] = z[e];
    }
}
