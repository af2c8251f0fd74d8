// Embedding rows in and their gradients out, and the cross-entropy of a chunk of tokens.
#include "platform.cuh"

// h [tokens, d] = rows of the embedding. A block a token.
KERNEL(256, embed)(const u32* tokens, Floats embedding, int d, Floats h) {
    const i64 from = (i64)tokens[blockIdx.x] * d;
    for (int i = threadIdx.x; i < d; i += blockDim.x) {
        write(h, (i64)blockIdx.x * d + i, read(embedding, from + i));
    }
}

// Adds the gradients of the rows to those of the embedding. The host has sorted the positions by token: row r of `starts` says
// where the positions of the r-th distinct token begin; starts[count[0]] is their number. Blocks past the count end at once,
// so that the grid is the same for every batch.
KERNEL(256, embed_backward)(const u32* tokens, const u32* positions, const u32* starts, const u32* count, const float* dh,
                            int d, Floats grad) {
    if (blockIdx.x >= *count) {
        return;
    }
    const u32 begin = starts[blockIdx.x], end = starts[blockIdx.x + 1];
    const i64 row = (i64)tokens[positions[begin]] * d;
    for (int i = threadIdx.x; i < d; i += blockDim.x) {
        float sum = read(grad, row + i);
        for (u32 p = begin; p < end; p++) {
            sum += dh[(i64)positions[p] * d + i];
        }
        write(grad, row + i, sum);
    }
}

// Turns logits [rows, vocab] into weight · scale · (softmax − onehot(target)); losses [rows] = weight · CE. A block a row. Without
// `grad` the logits stay. `scale` is in device memory: a recorded step runs with another one.
KERNEL(256, cross_entropy)(float* logits, const u32* targets, const float* weights, const float* scale, int vocab, int grad,
                           double* losses) {
    float* room = (float*)shared_memory();
    float* row = logits + (i64)blockIdx.x * vocab;
    const float weight = weights[blockIdx.x];
    if (weight == 0.0f) {
        for (int i = threadIdx.x; grad && i < vocab; i += blockDim.x) {
            row[i] = 0.0f;
        }
        if (threadIdx.x == 0) {
            losses[blockIdx.x] = 0.0;
        }
        return;
    }
    float max = row[(int)threadIdx.x < vocab ? (int)threadIdx.x : 0];
    for (int i = threadIdx.x; i < vocab; i += blockDim.x) {
        max = Max::of(row[i], max);
    }
    max = block_reduce<Max>(max, room);
    const float at_target = row[targets[blockIdx.x]] - max;
    float total = 0.0f;
    for (int i = threadIdx.x; i < vocab; i += blockDim.x) {
        total += expf(row[i] - max);
    }
    total = block_reduce<Sum>(total, room); // its barriers stand between the reading of the target and the writing below
    if (threadIdx.x == 0) {
        losses[blockIdx.x] = (double)weight * (log((double)total) - (double)at_target);
    }
    if (grad) {
        const float full = weight * *scale, factor = full / total;
        for (int i = threadIdx.x; i < vocab; i += blockDim.x) {
            const float p = expf(row[i] - max) * factor;
            row[i] = i == (int)targets[blockIdx.x] ? p - full : p;
        }
    }
}

// out = Σ values [n], in a fixed order; added to `total` too, where there is one. One block.
KERNEL(256, sum_doubles)(const double* values, int n, double* out, double* total) {
    double sum = 0.0;
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        sum += values[i];
    }
    sum = block_reduce<Sum>(sum, (double*)shared_memory());
    if (threadIdx.x == 0) {
        *out = sum;
        if (total != nullptr) {
            *total += sum;
        }
    }
}
