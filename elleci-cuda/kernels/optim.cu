// The optimiser: the norm of the gradients, AdamW over all tensors in one launch, the running mean of the weights.
//
// `settle` ends a step on the device: the norm, the factor that clips it, and whether the step counts at all. So the host queues a
// whole step and reads what came of it when it wants to.
//
// One step of one value (core: optim/adamw.rs), with no fused multiply-add, so that float32 states and weights get the
// bits of the core:
//   g = scale · g;   m += (1−β₁)(g − m);   v = β₂ v + (1−β₂) g²;   p = p · keep − step · (m / (√v / correction + eps))
// bf16 weights are rounded stochastically: up with the probability of their distance from below. 8-bit states are
// dequantised, updated, used and quantised again, block by block of 256 values. Gradients are consumed: they are zero afterwards.
#include "platform.cuh"

const int VALUES_EACH = 4096; // values a block of threads: 16 blocks of states

struct OptimTensor {
    Floats weights;
    Floats grads;
    void* m; // float32, or codes where m_absmax is not null
    void* v;
    float* m_absmax;
    float* v_absmax;
    float* mean; // running mean of the weights, or null
    i64 len;
    u32 first_block;
    float keep; // 1 − rate · decay
    float step; // rate / (1 − β₁ᵗ)
    u32 unused;
};

struct Adam {
    float rise1, beta2, rise2, correction2, eps;
    u32 seed;
    double clip;   // largest norm of the gradient; 0 = any
    double weight; // of all targets of the step: what its loss is divided by
};

// What a step came to.
struct Outcome {
    double loss, norm;
    double scale;   // of every gradient; a float32 value
    double updated; // 1, or 0: loss or norm is not finite, and weights and states stay as they are
};

// The 256 numbers of an 8-bit map by magnitude: code zero ± steps has magnitude values[steps], and covers up to limits[steps].
struct Map {
    float values[256];
    float limits[256];
};

DEVICE const OptimTensor& tensor_here(const OptimTensor* tensors, int count) {
    int low = 0, high = count - 1;
    while (low < high) {
        const int middle = (low + high + 1) / 2;
        if (tensors[middle].first_block <= blockIdx.x) {
            low = middle;
        } else {
            high = middle - 1;
        }
    }
    return tensors[low];
}

DEVICE float decode(const Map* map, u8 code, int zero, float absmax) {
    const int steps = (int)code - zero;
    return (steps < 0 ? -map->values[-steps] : map->values[steps]) * absmax;
}

// The nearest code of x in [-1, 1]: the first whose limit is not below |x|. The signed map has `zero` = 127 codes below 0.
DEVICE u8 encode(const Map* map, float x, int zero, int highest) {
    const float magnitude = fabsf(x);
    int low = 0, high = highest;
    while (low < high) {
        const int middle = (low + high) / 2;
        if (magnitude > map->limits[middle]) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return (u8)(x < 0.0f ? zero - min_of(low, zero) : zero + low);
}

// 32 well-mixed bits of a counter (a finaliser in the manner of MurmurHash3, twice).
DEVICE u32 random_bits(u32 seed, u64 counter) {
    u32 x = (u32)counter * 0x9e3779b9u ^ seed;
    x = (x ^ x >> 16) * 0x85ebca6bu;
    x ^= (u32)(counter >> 32) * 0xc2b2ae35u;
    x = (x ^ x >> 13) * 0xc2b2ae35u;
    x = (x ^ x >> 16) * 0x27d4eb2fu;
    return x ^ x >> 15;
}

// bf16 from float32: what is cut off, plus 16 random bits, carries or not.
DEVICE u16 round_stochastic(float v, u32 random) {
    const u32 bits = float_bits(v);
    if ((bits & 0x7f800000u) == 0x7f800000u) {
        return to_bf16(v);
    }
    return (u16)((bits + (random & 0xffffu)) >> 16);
}

DEVICE bool is_finite(double v) { return v - v == 0.0; }

// Ends the step whose Σ w·CE is in `total`, which is then 0, and whose Σ g² is in `squares`. The factor is the core's `clip_factor`.
KERNEL(32, settle)(const double* squares, double* total, const Adam* adam, Outcome* outcome) {
    if (threadIdx.x != 0) {
        return;
    }
    const double loss = *total / adam->weight, norm = sqrt(*squares), factor = adam->clip / (norm + 1e-6);
    outcome->loss = loss;
    outcome->norm = norm;
    outcome->scale = adam->clip > 0.0 && factor < 1.0 ? (double)(float)factor : 1.0;
    outcome->updated = is_finite(loss) && is_finite(norm) ? 1.0 : 0.0;
    *total = 0.0;
}

KERNEL(256, adamw)(const OptimTensor* tensors, int count, const Adam* adam, const Map* maps, const Outcome* outcome) {
    float* room = (float*)shared_memory();
    const OptimTensor& t = tensor_here(tensors, count);
    const Adam k = *adam;
    const float scale = (float)outcome->scale;
    const bool counts = outcome->updated != 0.0;
    const i64 begin = (i64)(blockIdx.x - t.first_block) * VALUES_EACH;
    for (i64 block = begin; block < begin + VALUES_EACH && block < t.len; block += 256) {
        const i64 i = block + threadIdx.x;
        const bool inside = i < t.len, coded = t.m_absmax != nullptr;
        if (!counts) { // the same for all threads
            if (inside) {
                write(t.grads, i, 0.0f);
            }
            continue;
        }
        float m = 0.0f, v = 0.0f, p = 0.0f;
        if (inside) {
            const float g = scale * read(t.grads, i);
            write(t.grads, i, 0.0f);
            p = read(t.weights, i);
            if (coded) {
                m = decode(&maps[0], ((u8*)t.m)[i], 127, t.m_absmax[block / 256]);
                v = decode(&maps[1], ((u8*)t.v)[i], 0, t.v_absmax[block / 256]);
            } else {
                m = ((float*)t.m)[i];
                v = ((float*)t.v)[i];
            }
            m += k.rise1 * (g - m);
            v = k.beta2 * v + k.rise2 * (g * g);
            p = p * t.keep - t.step * (m / (sqrtf(v) / k.correction2 + k.eps));
            if (t.weights.is_bf16) {
                ((u16*)t.weights.data)[i] = round_stochastic(p, random_bits(k.seed ^ t.first_block * 0x61c88647u, (u64)i));
            } else {
                ((float*)t.weights.data)[i] = p;
            }
        }
        if (coded) {
            const float m_max = block_reduce<Max>(fabsf(m), room), v_max = block_reduce<Max>(v, room);
            if (inside) {
                ((u8*)t.m)[i] = encode(&maps[0], m / (m_max > 0.0f ? m_max : 1.0f), 127, 128);
                ((u8*)t.v)[i] = encode(&maps[1], v / (v_max > 0.0f ? v_max : 1.0f), 0, 255);
            }
            if (threadIdx.x == 0) {
                t.m_absmax[block / 256] = m_max;
                t.v_absmax[block / 256] = v_max;
            }
        } else if (inside) {
            ((float*)t.m)[i] = m;
            ((float*)t.v)[i] = v;
        }
    }
}

// Σ g² of a block's values, in float64: partials [blocks].
KERNEL(256, squares)(const OptimTensor* tensors, int count, double* partials) {
    const OptimTensor& t = tensor_here(tensors, count);
    const i64 begin = (i64)(blockIdx.x - t.first_block) * VALUES_EACH;
    double sum = 0.0;
    for (i64 i = begin + threadIdx.x; i < begin + VALUES_EACH && i < t.len; i += blockDim.x) {
        const double g = (double)read(t.grads, i);
        sum += g * g;
    }
    sum = block_reduce<Sum>(sum, (double*)shared_memory());
    if (threadIdx.x == 0) {
        partials[blockIdx.x] = sum;
    }
}

// mean += (p − mean) · share, share = 1 / (weights seen, this one included).
KERNEL(256, average)(const OptimTensor* tensors, int count, float share) {
    const OptimTensor& t = tensor_here(tensors, count);
    const i64 begin = (i64)(blockIdx.x - t.first_block) * VALUES_EACH;
    for (i64 i = begin + threadIdx.x; i < begin + VALUES_EACH && i < t.len; i += blockDim.x) {
        t.mean[i] += (read(t.weights, i) - t.mean[i]) * share;
    }
}
