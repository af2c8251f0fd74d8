// What stands around the scan of a Mamba-2 mixer: the step sizes, and the short causal convolution with silu.
//
// The convolution reads its channels where the projections left them: x in the second half of zx [tokens, 2 inner], then
// B and C in the first 2 N columns of bcdt [tokens, 2 N + heads]. No copy is made; gradients go to the same places.
#include "platform.cuh"

struct ConvShape {
    int seq, channels, inner, taps, bcdt_width;
};

DEVICE float conv_input(const float* zx, const float* bcdt, ConvShape s, int token, int c) {
    return c < s.inner ? zx[(i64)token * 2 * s.inner + s.inner + c] : bcdt[(i64)token * s.bcdt_width + c - s.inner];
}

// bias + Σ_k weight[c, k] · input[t − (taps − 1) + k]; the input before a sequence is 0.
DEVICE float conv_sum(const float* zx, const float* bcdt, const float* weight, const float* bias, ConvShape s, int token, int c) {
    const int t = token % s.seq;
    float sum = bias[c];
    for (int k = 0; k < s.taps; k++) {
        const int back = s.taps - 1 - k;
        if (back <= t) {
            sum += weight[c * s.taps + k] * conv_input(zx, bcdt, s, token - back, c);
        }
    }
    return sum;
}

KERNEL(256, conv_silu)(const float* zx, const float* bcdt, const float* weight, const float* bias, int tokens, int seq,
                       int channels, int inner, int taps, int bcdt_width, float* out) {
    const ConvShape s = {seq, channels, inner, taps, bcdt_width};
    const int c = blockIdx.x * blockDim.x + threadIdx.x, token = blockIdx.y;
    if (c < channels && token < tokens) {
        out[(i64)token * channels + c] = silu(conv_sum(zx, bcdt, weight, bias, s, token, c));
    }
}

// In place: the gradient of the output becomes that of the sum before silu.
KERNEL(256, conv_silu_pre)(const float* zx, const float* bcdt, const float* weight, const float* bias, int tokens, int seq,
                           int channels, int inner, int taps, int bcdt_width, float* d) {
    const ConvShape s = {seq, channels, inner, taps, bcdt_width};
    const int c = blockIdx.x * blockDim.x + threadIdx.x, token = blockIdx.y;
    if (c < channels && token < tokens) {
        d[(i64)token * channels + c] *= silu_grad(conv_sum(zx, bcdt, weight, bias, s, token, c));
    }
}

// From the gradient of the sums to that of the input, in its two places.
KERNEL(256, conv_dx)(const float* dsum, const float* weight, int tokens, int seq, int channels, int inner, int taps,
                     int bcdt_width, float* dzx, float* dbcdt) {
    const int c = blockIdx.x * blockDim.x + threadIdx.x, token = blockIdx.y;
    if (c >= channels || token >= tokens) {
        return;
    }
    const int t = token % seq;
    float sum = 0.0f;
    for (int k = 0; k < taps; k++) {
        const int ahead = taps - 1 - k;
        if (t + ahead < seq) {
            sum += weight[c * taps + k] * dsum[(i64)(token + ahead) * channels + c];
        }
    }
    if (c < inner) {
        dzx[(i64)token * 2 * inner + inner + c] = sum;
    } else {
        dbcdt[(i64)token * bcdt_width + c - inner] = sum;
    }
}

// Shares of the gradients of taps and bias: partials [blocks of tokens, channels · (taps + 1)], the taps first.
KERNEL(256, conv_dw)(const float* zx, const float* bcdt, const float* dsum, int tokens, int seq, int channels, int inner,
                     int taps, int bcdt_width, int tokens_each, float* partials) {
    const ConvShape s = {seq, channels, inner, taps, bcdt_width};
    const int c = blockIdx.x * blockDim.x + threadIdx.x;
    if (c >= channels) {
        return;
    }
    const int first = blockIdx.y * tokens_each, last = min_of(first + tokens_each, tokens);
    float* partial = partials + (i64)blockIdx.y * channels * (taps + 1);
    for (int k = 0; k < taps; k++) {
        const int back = taps - 1 - k;
        float sum = 0.0f;
        for (int token = first; token < last; token++) {
            if (back <= token % seq) {
                sum += dsum[(i64)token * channels + c] * conv_input(zx, bcdt, s, token - back, c);
            }
        }
        partial[c * taps + k] = sum;
    }
    float sum = 0.0f;
    for (int token = first; token < last; token++) {
        sum += dsum[(i64)token * channels + c];
    }
    partial[channels * taps + c] = sum;
}

// dt = softplus(raw + bias); raw is the last `heads` columns of bcdt.
KERNEL(256, step_sizes)(const float* bcdt, const float* bias, int tokens, int heads, int bcdt_width, float* dt) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < tokens * heads) {
        const int token = i / heads, h = i % heads;
        dt[i] = softplus(bcdt[(i64)token * bcdt_width + bcdt_width - heads + h] + bias[h]);
    }
}

// The gradient of the raw step sizes, into their columns of dbcdt; their shares of that of the bias in partials [blocks, heads].
KERNEL(256, step_sizes_backward)(const float* bcdt, const float* bias, const float* ddt, int tokens, int heads, int bcdt_width,
                                 int tokens_each, float* dbcdt, float* partials) {
    const int h = blockIdx.x * blockDim.x + threadIdx.x;
    if (h >= heads) {
        return;
    }
    const int first = blockIdx.y * tokens_each, last = min_of(first + tokens_each, tokens);
    float sum = 0.0f;
    for (int token = first; token < last; token++) {
        const i64 at = (i64)token * bcdt_width + bcdt_width - heads + h;
        const float d = ddt[(i64)token * heads + h] * sigmoid(bcdt[at] + bias[h]);
        dbcdt[at] = d;
        sum += d;
    }
    partials[(i64)blockIdx.y * heads + h] = sum;
}
