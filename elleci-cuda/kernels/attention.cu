// Causal attention over MLA's pieces, without ever holding the [T, T] scores: forward, and backward in two passes.
//
// Queries q [tokens, heads · (nope + rope)], rotated. Keys are [k_nope; k_rope]: k_nope and v per head in kv [tokens, heads ·
// (nope + v)], k_rope shared by all heads in ckr [tokens, rank + rope], after the latent. A block has 64 queries (or keys)
// of one head in shared memory and walks over the keys (or queries) in blocks of 64:
//
//   forward   S = scale · Q Kᵀ;  running maximum m and sum l of each row;  O = O · exp(m_old − m) + exp(S − m) V;
//             lse = m + ln l
//   backward  P = exp(S − lse);  dP = dO Vᵀ;  dS = P ∘ (dP − δ) · scale with δ = Σ dO ∘ O;
//             dV = Pᵀ dO;  dK = dSᵀ Q  (over queries);  dQ = dS K  (over keys)
//
// Two passes recompute S twice, and need no atomics: the sums have one order.
#include "tile.cuh"

const int BLOCK = 64;

struct Heads {
    int seq, heads, nope, rope, v, rank;
};

struct AttentionInput {
    const float* q;
    const float* kv;
    const float* ckr;
};

template <class P, int D> DEVICE void load_queries(typename P::Element* tile, const float* q, Heads h, int first_token, int head, int t0) {
    const int d = h.nope + h.rope;
    fill_tile<P>(tile, BLOCK, D, [&](int r, int c) {
        return t0 + r < h.seq && c < d ? q[(i64)(first_token + t0 + r) * h.heads * d + head * d + c] : 0.0f;
    });
}

template <class P, int D> DEVICE void load_keys(typename P::Element* tile, AttentionInput in, Heads h, int first_token, int head, int t0) {
    fill_tile<P>(tile, BLOCK, D, [&](int r, int c) {
        if (t0 + r >= h.seq || c >= h.nope + h.rope) {
            return 0.0f;
        }
        const i64 token = first_token + t0 + r;
        return c < h.nope ? in.kv[token * h.heads * (h.nope + h.v) + head * (h.nope + h.v) + c]
                          : in.ckr[token * (h.rank + h.rope) + h.rank + c - h.nope];
    });
}

template <class P, int D> DEVICE void load_values(typename P::Element* tile, AttentionInput in, Heads h, int first_token, int head, int t0) {
    fill_tile<P>(tile, BLOCK, D, [&](int r, int c) {
        return t0 + r < h.seq && c < h.v
                   ? in.kv[(i64)(first_token + t0 + r) * h.heads * (h.nope + h.v) + head * (h.nope + h.v) + h.nope + c]
                   : 0.0f;
    });
}

// A [tokens, heads · v] buffer: the output, or its gradient.
template <class P, int D> DEVICE void load_output(typename P::Element* tile, const float* o, Heads h, int first_token, int head, int t0) {
    fill_tile<P>(tile, BLOCK, D, [&](int r, int c) {
        return t0 + r < h.seq && c < h.v ? o[(i64)(first_token + t0 + r) * h.heads * h.v + head * h.v + c] : 0.0f;
    });
}

// grid (query blocks, heads, batch). o [tokens, heads · v], lse [batch, heads, seq].
template <class P, int D> DEVICE void attention_forward(AttentionInput in, Heads h, float scale, float* o, float* lse) {
    typedef typename P::Element E;
    const int ld = pitch<P>(D), ldp = pitch<P>(BLOCK), LDS = BLOCK + 4;
    E* q = (E*)shared_memory();
    E* k = q + BLOCK * ld;
    E* v = k + BLOCK * ld;
    E* p = v + BLOCK * ld;
    float* s = (float*)(p + BLOCK * ldp);
    float* top = s + BLOCK * LDS; // running maximum, then sum, then this block's correction
    float* total = top + BLOCK;
    float* correction = total + BLOCK;
    // The last blocks have the most keys: they go first.
    const int block = gridDim.x - 1 - blockIdx.x, head = blockIdx.y, first_token = blockIdx.z * h.seq;
    const int q0 = block * BLOCK, tid = threadIdx.x;
    load_queries<P, D>(q, in.q, h, first_token, head, q0);
    if (tid < BLOCK) {
        top[tid] = -INFINITY_F;
        total[tid] = 0.0f;
    }
    Accumulator<P, BLOCK, D> out;
    out.clear();
    for (int k0 = 0; k0 <= q0; k0 += BLOCK) {
        BARRIER();
        load_keys<P, D>(k, in, h, first_token, head, k0);
        load_values<P, D>(v, in, h, first_token, head, k0);
        BARRIER();
        Accumulator<P, BLOCK, BLOCK> scores;
        scores.clear();
        scores.template product<KMajor, KMajor>(q, ld, k, ld, D);
        scores.each([&](int i, int j, float& x) { s[i * LDS + j] = k0 + j <= q0 + i ? x * scale : -INFINITY_F; });
        BARRIER();
        // Four threads a row.
        const int row = tid / 4, part = tid % 4 * 16;
        float largest = top[row];
        for (int j = 0; j < 16; j++) largest = fmaxf(largest, s[row * LDS + part + j]);
        largest = fmaxf(largest, lane_xor(largest, 1));
        largest = fmaxf(largest, lane_xor(largest, 2));
        float sum = 0.0f;
        for (int j = 0; j < 16; j++) {
            const float e = expf(s[row * LDS + part + j] - largest);
            sum += e;
            p[row * ldp + part + j] = P::from(e);
        }
        sum += lane_xor(sum, 1);
        sum += lane_xor(sum, 2);
        BARRIER();
        if (tid % 4 == 0) {
            correction[row] = expf(top[row] - largest);
            total[row] = total[row] * correction[row] + sum;
            top[row] = largest;
        }
        BARRIER();
        out.each([&](int i, int, float& x) { x *= correction[i]; });
        out.template product<KMajor, RowMajor>(p, ldp, v, ld, BLOCK);
    }
    out.each([&](int i, int j, float& x) {
        if (q0 + i < h.seq && j < h.v) {
            o[(i64)(first_token + q0 + i) * h.heads * h.v + head * h.v + j] = x / total[i];
        }
    });
    if (tid < BLOCK && q0 + tid < h.seq) {
        lse[((i64)blockIdx.z * h.heads + head) * h.seq + q0 + tid] = top[tid] + logf(total[tid]);
    }
}

// delta [batch, heads, seq] = Σ dO ∘ O. A warp a (token, head).
KERNEL(256, attention_delta)(const float* o, const float* d_o, int tokens, int seq, int heads, int v, float* delta) {
    const int i = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
    const bool inside = i < tokens * heads;
    const i64 at = (i64)(inside ? i : 0) * v;
    float sum = 0.0f;
    for (int c = lane; c < v; c += 32) {
        sum += o[at + c] * d_o[at + c];
    }
    sum = warp_reduce<Sum>(sum);
    if (inside && lane == 0) {
        const int token = i / heads, head = i % heads;
        delta[((i64)(token / seq) * heads + head) * seq + token % seq] = sum;
    }
}

// P and dS of one (queries, keys) pair of blocks, into two shared tiles [query][key].
template <class P, int D>
DEVICE void backward_scores(const typename P::Element* q, const typename P::Element* k, const typename P::Element* v,
                            const typename P::Element* d_o, typename P::Element* p, typename P::Element* ds,
                            const float* lse, const float* delta, int q0, int k0, int seq, float scale) {
    const int ld = pitch<P>(D), ldp = pitch<P>(BLOCK);
    Accumulator<P, BLOCK, BLOCK> scores, dp;
    scores.clear();
    scores.template product<KMajor, KMajor>(q, ld, k, ld, D);
    dp.clear();
    dp.template product<KMajor, KMajor>(d_o, ld, v, ld, D);
    scores.each([&](int i, int j, float& x) {
        const bool seen = k0 + j <= q0 + i && q0 + i < seq;
        x = seen ? expf(x * scale - lse[i]) : 0.0f;
        if (p) p[i * ldp + j] = P::from(x);
    });
    // Both accumulators have the same shape, and so visit the same elements in the same order.
    int e = 0;
    float prob[sizeof(scores.v) / 4];
    scores.each([&](int, int, float& x) { prob[e++] = x; });
    e = 0;
    dp.each([&](int i, int j, float& x) { ds[i * ldp + j] = P::from(prob[e++] * (x - delta[i]) * scale); });
}

DEVICE void load_rows(float* to, const float* from, int t0, int seq) {
    if (threadIdx.x < BLOCK) {
        to[threadIdx.x] = t0 + (int)threadIdx.x < seq ? from[t0 + threadIdx.x] : 0.0f;
    }
}

// grid (query blocks, heads, batch). dq [tokens, heads · (nope + rope)].
template <class P, int D>
DEVICE void attention_dq(AttentionInput in, Heads h, float scale, const float* lse, const float* delta, const float* d_o, float* dq) {
    typedef typename P::Element E;
    const int ld = pitch<P>(D), ldp = pitch<P>(BLOCK);
    E* q = (E*)shared_memory();
    E* k = q + BLOCK * ld;
    E* v = k + BLOCK * ld;
    E* go = v + BLOCK * ld;
    E* ds = go + BLOCK * ld;
    float* lse_rows = (float*)(ds + BLOCK * ldp);
    float* delta_rows = lse_rows + BLOCK;
    const int block = gridDim.x - 1 - blockIdx.x, head = blockIdx.y, first_token = blockIdx.z * h.seq, q0 = block * BLOCK;
    const i64 rows = ((i64)blockIdx.z * h.heads + head) * h.seq;
    load_queries<P, D>(q, in.q, h, first_token, head, q0);
    load_output<P, D>(go, d_o, h, first_token, head, q0);
    load_rows(lse_rows, lse + rows, q0, h.seq);
    load_rows(delta_rows, delta + rows, q0, h.seq);
    Accumulator<P, BLOCK, D> sum;
    sum.clear();
    for (int k0 = 0; k0 <= q0; k0 += BLOCK) {
        BARRIER();
        load_keys<P, D>(k, in, h, first_token, head, k0);
        load_values<P, D>(v, in, h, first_token, head, k0);
        BARRIER();
        backward_scores<P, D>(q, k, v, go, (E*)nullptr, ds, lse_rows, delta_rows, q0, k0, h.seq, scale);
        BARRIER();
        sum.template product<KMajor, RowMajor>(ds, ldp, k, ld, BLOCK);
    }
    const int d = h.nope + h.rope;
    sum.each([&](int i, int j, float& x) {
        if (q0 + i < h.seq && j < d) {
            dq[(i64)(first_token + q0 + i) * h.heads * d + head * d + j] = x;
        }
    });
}

// grid (key blocks, heads, batch). dkv [tokens, heads · (nope + v)], and each head's share of the shared key's gradient,
// dkr_heads [heads, tokens, rope].
template <class P, int D>
DEVICE void attention_dkv(AttentionInput in, Heads h, float scale, const float* lse, const float* delta, const float* d_o,
                          float* dkv, float* dkr_heads) {
    typedef typename P::Element E;
    const int ld = pitch<P>(D), ldp = pitch<P>(BLOCK);
    E* q = (E*)shared_memory();
    E* k = q + BLOCK * ld;
    E* v = k + BLOCK * ld;
    E* go = v + BLOCK * ld;
    E* p = go + BLOCK * ld;
    E* ds = p + BLOCK * ldp;
    float* lse_rows = (float*)(ds + BLOCK * ldp);
    float* delta_rows = lse_rows + BLOCK;
    const int head = blockIdx.y, first_token = blockIdx.z * h.seq, k0 = blockIdx.x * BLOCK;
    const i64 rows = ((i64)blockIdx.z * h.heads + head) * h.seq;
    load_keys<P, D>(k, in, h, first_token, head, k0);
    load_values<P, D>(v, in, h, first_token, head, k0);
    Accumulator<P, BLOCK, D> dk, dv;
    dk.clear();
    dv.clear();
    for (int q0 = k0; q0 < h.seq; q0 += BLOCK) {
        BARRIER();
        load_queries<P, D>(q, in.q, h, first_token, head, q0);
        load_output<P, D>(go, d_o, h, first_token, head, q0);
        load_rows(lse_rows, lse + rows, q0, h.seq);
        load_rows(delta_rows, delta + rows, q0, h.seq);
        BARRIER();
        backward_scores<P, D>(q, k, v, go, p, ds, lse_rows, delta_rows, q0, k0, h.seq, scale);
        BARRIER();
        dv.template product<RowMajor, RowMajor>(p, ldp, go, ld, BLOCK);
        dk.template product<RowMajor, RowMajor>(ds, ldp, q, ld, BLOCK);
    }
    const i64 tokens = (i64)gridDim.z * h.seq;
    dk.each([&](int i, int j, float& x) {
        const i64 token = first_token + k0 + i;
        if (k0 + i < h.seq && j < h.nope) {
            dkv[token * h.heads * (h.nope + h.v) + head * (h.nope + h.v) + j] = x;
        } else if (k0 + i < h.seq && j < h.nope + h.rope) {
            dkr_heads[(head * tokens + token) * h.rope + j - h.nope] = x;
        }
    });
    dv.each([&](int i, int j, float& x) {
        if (k0 + i < h.seq && j < h.v) {
            dkv[(i64)(first_token + k0 + i) * h.heads * (h.nope + h.v) + head * (h.nope + h.v) + h.nope + j] = x;
        }
    });
}

// The last channels of dckr rows [tokens, rank + rope]: the heads' shares, summed head by head.
KERNEL(256, sum_heads)(const float* dkr_heads, int tokens, int heads, int rank, int rope, float* dckr) {
    const i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < (i64)tokens * rope) {
        float sum = 0.0f;
        for (int head = 0; head < heads; head++) {
            sum += dkr_heads[head * (i64)tokens * rope + i];
        }
        dckr[i / rope * (rank + rope) + rank + i % rope] = sum;
    }
}

// Rotates, in place, the `rope` channels at `offset` of each of a row's groups; sign -1 turns back. table [seq, rope / 2] of
// cosines, then as many sines.
KERNEL(256, rotate)(float* data, const float* table, int tokens, int seq, int groups, int group, int offset, int rope, float sign) {
    const i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    const int half = rope / 2;
    if (i >= (i64)tokens * groups * half) {
        return;
    }
    const int j = (int)(i % half), g = (int)(i / half % groups);
    const i64 token = i / half / groups;
    const int at = (int)(token % seq) * half + j;
    const float c = table[at], s = table[(i64)seq * half + at] * sign;
    float* a = data + (token * groups + g) * group + offset + j;
    const float x = a[0], y = a[half];
    a[0] = x * c - y * s;
    a[half] = y * c + x * s;
}

// Tiles of 128 columns leave room for one block in the shared memory of most cards.
#define DKV_64 256
#define DKV_128 ONE_BLOCK

#define ATTENTION(P, D, suffix)                                                                                        \
    KERNEL(256, attention_forward_##suffix)(const float* q, const float* kv, const float* ckr, int seq, int heads,     \
                                            int nope, int rope, int v, int rank, float scale, float* o, float* lse) {  \
        attention_forward<P, D>(AttentionInput{q, kv, ckr}, Heads{seq, heads, nope, rope, v, rank}, scale, o, lse);    \
    }                                                                                                                  \
    KERNEL(256, attention_dq_##suffix)(const float* q, const float* kv, const float* ckr, int seq, int heads, int nope, \
                                       int rope, int v, int rank, float scale, const float* lse, const float* delta,   \
                                       const float* d_o, float* dq) {                                                  \
        attention_dq<P, D>(AttentionInput{q, kv, ckr}, Heads{seq, heads, nope, rope, v, rank}, scale, lse, delta, d_o, dq); \
    }                                                                                                                  \
    KERNEL(DKV_##D, attention_dkv_##suffix)(const float* q, const float* kv, const float* ckr, int seq, int heads, int nope, \
                                        int rope, int v, int rank, float scale, const float* lse, const float* delta,  \
                                        const float* d_o, float* dkv, float* dkr_heads) {                              \
        attention_dkv<P, D>(AttentionInput{q, kv, ckr}, Heads{seq, heads, nope, rope, v, rank}, scale, lse, delta, d_o, \
                            dkv, dkr_heads);                                                                           \
    }
ATTENTION(F32, 64, f32_64)
ATTENTION(F32, 128, f32_128)
ATTENTION(Bf16, 64, bf16_64)
ATTENTION(Bf16, 128, bf16_128)
