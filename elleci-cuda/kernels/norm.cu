// RmsNorm with the int8 quantiser, and its backward. A block takes a row at a time; what the row is made of is computed
// anew in every pass over it (twice the square, once the codes), which costs less than keeping it.
#include "platform.cuh"

// The row that is normed: x, or y · silu(z), or relu(gate)² · up.
enum Source { Plain, Gated, Squared };

// A plain row may be bf16 (the residual stream); both factors of a product are float32.
struct Row {
    Floats a;
    i64 from;
    const float* b;

    template <int S> DEVICE float first(int i) const {
        return S == Plain ? read(a, from + i) : ((const float*)a.data)[from + i];
    }

    template <int S> DEVICE float at(int i) const {
        const float x = first<S>(i);
        if (S == Gated) {
            return x * silu(b[i]);
        }
        if (S == Squared) {
            const float r = fmaxf(x, 0.0f);
            return r * r * b[i];
        }
        return x;
    }
};

// codes [rows, pitch] (zeros past `width`), scales [rows], rstd [rows]; `normed` [rows, width] where it is not null, and
// no codes where `codes` is null.
template <int S>
DEVICE void norm_rows(Floats a, int stride_a, const float* b, int stride_b, const float* gain, float eps, int rows,
                      int width, int pitch, s8* codes, float* scales, float* rstds, float* normed) {
    float* room = (float*)shared_memory();
    for (int row = blockIdx.x; row < rows; row += gridDim.x) {
        const Row x = {a, (i64)row * stride_a, S == Plain ? nullptr : b + (i64)row * stride_b};
        float squares = 0.0f;
        for (int i = threadIdx.x; i < width; i += blockDim.x) {
            const float v = x.at<S>(i);
            squares += v * v;
        }
        squares = block_reduce<Sum>(squares, room);
        const float rstd = 1.0f / sqrtf(squares / (float)width + eps);
        float largest = 1e-5f;
        for (int i = threadIdx.x; i < width; i += blockDim.x) {
            const float n = x.at<S>(i) * rstd * gain[i];
            largest = Max::of(fabsf(n), largest);
            if (normed) {
                normed[(i64)row * width + i] = n;
            }
        }
        if (threadIdx.x == 0) {
            rstds[row] = rstd;
        }
        if (!codes) {
            continue;
        }
        const float amax = block_reduce<Max>(largest, room);
        const float scale = 127.0f / amax;
        for (int i = threadIdx.x; i < pitch; i += blockDim.x) {
            float v = i < width ? x.at<S>(i) * rstd * gain[i] * scale : 0.0f;
            codes[(i64)row * pitch + i] = v != v ? 0 : (s8)(int)rintf(fminf(fmaxf(v, -128.0f), 127.0f));
        }
        if (threadIdx.x == 0) {
            scales[row] = amax / 127.0f;
        }
    }
}

#define NORM(name, source)                                                                                             \
    KERNEL(256, name)(Floats a, int stride_a, const float* b, int stride_b, const float* gain, float eps,       \
                      int rows, int width, int pitch, s8* codes, float* scales, float* rstds, float* normed) {         \
        norm_rows<source>(a, stride_a, b, stride_b, gain, eps, rows, width, pitch, codes, scales, rstds, normed);      \
    }
NORM(norm_plain, Plain)
NORM(norm_gated, Gated)
NORM(norm_squared, Squared)

// dn may lie where da does: a thread reads what it then writes.
// dx = r·(s − x̂·mean(s ⊙ x̂)) with x̂ = x·r, s = gain ⊙ dn; then through the product that made x. A block takes `rows_each`
// rows and leaves its share of dgain in partials [blocks, width]. `add`: da += (Plain only).
template <int S>
DEVICE void norm_backward_rows(Floats a, int stride_a, const float* b, int stride_b, const float* gain,
                               const float* rstds, const float* dn, int rows, int width, int rows_each, float* da,
                               int stride_da, float* db, int stride_db, int add, float* partials) {
    float* room = (float*)shared_memory();
    float* partial = partials + (i64)blockIdx.x * width;
    const int first = blockIdx.x * rows_each, last = min_of(first + rows_each, rows);
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        partial[i] = 0.0f;
    }
    for (int row = first; row < last; row++) {
        const Row x = {a, (i64)row * stride_a, S == Plain ? nullptr : b + (i64)row * stride_b};
        const float* d = dn + (i64)row * width;
        const float rstd = rstds[row];
        float dot = 0.0f;
        for (int i = threadIdx.x; i < width; i += blockDim.x) {
            const float v = x.at<S>(i);
            dot += gain[i] * d[i] * v;
            partial[i] += d[i] * v * rstd;
        }
        const float mean = block_reduce<Sum>(dot, room) * rstd * rstd / (float)width;
        for (int i = threadIdx.x; i < width; i += blockDim.x) {
            const float dx = rstd * (gain[i] * d[i] - x.at<S>(i) * mean);
            float* out = da + (i64)row * stride_da + i;
            if (S == Plain) {
                *out = add ? *out + dx : dx;
            } else if (S == Gated) {
                const float y = x.first<S>(i), z = x.b[i];
                *out = dx * silu(z);
                db[(i64)row * stride_db + i] = dx * y * silu_grad(z);
            } else {
                const float r = fmaxf(x.first<S>(i), 0.0f), up = x.b[i];
                *out = dx * 2.0f * r * up;
                db[(i64)row * stride_db + i] = dx * r * r;
            }
        }
    }
}

#define NORM_BACKWARD(name, source)                                                                                    \
    KERNEL(256, name)(Floats a, int stride_a, const float* b, int stride_b, const float* gain,                   \
                      const float* rstds, const float* dn, int rows, int width, int rows_each, float* da,              \
                      int stride_da, float* db, int stride_db, int add, float* partials) {                             \
        norm_backward_rows<source>(a, stride_a, b, stride_b, gain, rstds, dn, rows, width, rows_each, da, stride_da,   \
                                   db, stride_db, add, partials);                                                      \
    }
NORM_BACKWARD(norm_backward_plain, Plain)
NORM_BACKWARD(norm_backward_gated, Gated)
NORM_BACKWARD(norm_backward_squared, Squared)

// out[i] += Σ over rows of partials [rows, width], row after row.
DEVICE void sum_column(const float* partials, int rows, int len, int stride, float* out) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < len) {
        float sum = 0.0f;
        for (int row = 0; row < rows; row++) {
            sum += partials[(i64)row * stride + i];
        }
        out[i] += sum;
    }
}

KERNEL(256, column_sum)(const float* partials, int rows, int width, float* out) {
    sum_column(partials, rows, width, width, out);
}

// The same for `len` columns of wider rows.
KERNEL(256, column_sum_part)(const float* partials, int rows, int len, int stride, float* out) {
    sum_column(partials, rows, len, stride, out);
}
