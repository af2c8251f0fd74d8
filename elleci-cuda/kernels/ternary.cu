// Weights to {-1, 0, 1}: γ = max(mean |W|, 1e-5), code = 0 where |w| <= γ/2, else the sign (core: `biased_code`).
//
// All tensors go in one launch: a block looks up its tensor by its number. Codes are packed four to a byte, lowest bits
// first, in two's complement (0, 1, 3 = -1), so that zero bytes are zeros; rows are padded to 64 columns.
#include "platform.cuh"

struct TernaryTensor {
    Floats weights;
    u8* packed;      // [rows, ceil(cols / 64) * 16]
    float* gamma;    // one
    double* partial; // one for every block of the first pass
    int rows, cols;
    u32 first_sum;  // first block of the first pass
    u32 first_pack; // and of the second
};

const int SUM_EACH = 1 << 15;  // weights a block of the first pass
const int PACK_EACH = 1 << 12; // bytes a block of the second

template <class First> DEVICE int tensor_of(const TernaryTensor* tensors, int count, First first) {
    int low = 0, high = count - 1;
    while (low < high) {
        const int middle = (low + high + 1) / 2;
        if (first(tensors[middle]) <= blockIdx.x) {
            low = middle;
        } else {
            high = middle - 1;
        }
    }
    return low;
}

KERNEL(256, ternary_sum)(const TernaryTensor* tensors, int count) {
    const TernaryTensor& t = tensors[tensor_of(tensors, count, [](const TernaryTensor& t) { return t.first_sum; })];
    const u32 part = blockIdx.x - t.first_sum;
    const i64 len = (i64)t.rows * t.cols, begin = (i64)part * SUM_EACH;
    const i64 end = begin + SUM_EACH < len ? begin + SUM_EACH : len;
    double sum = 0.0;
    for (i64 i = begin + threadIdx.x; i < end; i += blockDim.x) {
        sum += (double)fabsf(read(t.weights, i));
    }
    sum = block_reduce<Sum>(sum, (double*)shared_memory());
    if (threadIdx.x == 0) {
        t.partial[part] = sum;
    }
}

KERNEL(32, ternary_gamma)(const TernaryTensor* tensors) {
    const TernaryTensor& t = tensors[blockIdx.x];
    const i64 len = (i64)t.rows * t.cols;
    const int parts = (int)((len + SUM_EACH - 1) / SUM_EACH);
    double sum = 0.0;
    for (int i = threadIdx.x; i < parts; i += 32) {
        sum += t.partial[i];
    }
    sum = warp_reduce<Sum>(sum);
    const float mean = (float)(sum / (double)len);
    if (threadIdx.x == 0) {
        *t.gamma = mean < 1e-5f ? 1e-5f : mean; // a NaN passes
    }
}

KERNEL(256, ternary_pack)(const TernaryTensor* tensors, int count) {
    const TernaryTensor& t = tensors[tensor_of(tensors, count, [](const TernaryTensor& t) { return t.first_pack; })];
    const int row_bytes = ceil_div(t.cols, 64) * 16;
    const i64 len = (i64)t.rows * row_bytes, begin = (i64)(blockIdx.x - t.first_pack) * PACK_EACH;
    const i64 end = begin + PACK_EACH < len ? begin + PACK_EACH : len;
    const float half = *t.gamma / 2.0f;
    for (i64 i = begin + threadIdx.x; i < end; i += blockDim.x) {
        const i64 row = i / row_bytes;
        const int col = (int)(i % row_bytes) * 4;
        u32 byte = 0;
        for (int e = 0; e < 4; e++) {
            if (col + e < t.cols) {
                const float w = read(t.weights, row * t.cols + col + e);
                byte |= (w > half ? 1u : w < -half ? 3u : 0u) << (2 * e);
            }
        }
        t.packed[i] = (u8)byte;
    }
}
