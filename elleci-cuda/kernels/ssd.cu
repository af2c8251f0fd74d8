// The scan of Mamba-2 (state-space dual) in chunks of Q = 64 steps, as matrix products; forward and backward.
//
// Per head, inside a chunk, with a_t = dt_t · A (A < 0), cum_i = Σ_{k<=i} a_k, u_j = dt_j x_j, L_ij = exp(cum_i − cum_j) for i >= j:
//   1 states    S_c = Uᵀ diag(exp(cum_Q − cum)) B                    [head_dim, d_state]; and the chunk's decay exp(cum_Q)
//   2 pass      H_{c+1} = decay_c · H_c + S_c                         in place: S_c becomes H_c, the state that enters
//   3 scan      Y = ((C Bᵀ) ∘ L) U + diag(exp(cum)) C Hᵀ + D x
// Backward, with R_c the gradient of the state that leaves chunk c, w_j = exp(cum_Q − cum_j), e_i = exp(cum_i), G = C Bᵀ, M = G ∘ L:
//   4 dstates   (diag(e) dY)ᵀ C;   5 pass, from the last chunk: becomes R_c
//   6           dU = Mᵀ dY + diag(w) B Rᵀ;   dM = tril(dY Uᵀ);   Z = dM ∘ L;   T = dM ∘ M
//               dC = Σ_heads Z B + diag(e) dY H;   dB = Σ_heads Zᵀ C + diag(w) U R
//               dcum_i = Σ_j T_ij − Σ_k T_ki + e_i ⟨dY_i, H C_i⟩ − f_i,  f_j = w_j ⟨u_j, R B_j⟩;  dcum_Q += Σ f + decay ⟨R, H⟩
//               da_t = Σ_{i>=t} dcum_i;   dx = dt dU + D dY;   ddt = ⟨dU, x⟩ + A da;   dA = Σ dt da;   dD = Σ ⟨dY, x⟩
//   7           the head groups' shares of dB and dC, summed in order
// A head has at most 64 channels and N (64 or 128) states; both are padded with zeros.
//
// Buffers: xbc [tokens, inner + 2 states] (x, B, C), dt [tokens, heads], y [tokens, inner], states [batch, chunks, heads,
// head_dim, d_state], decay [batch, chunks, heads].
#include "tile.cuh"

const int Q = 64, WIDTH = 64;
const int HEADS_EACH = 8; // heads whose dB and dC one block adds up

struct Scan {
    int seq, heads, head_dim, d_state;
    DEVICE int inner() const { return heads * head_dim; }
    DEVICE int width() const { return inner() + 2 * d_state; }
};

// Where a block is: a chunk of a sequence.
struct Chunk {
    i64 token;   // its first
    int len;     // of its steps, at most Q
    i64 at_head; // index of its head 0 in [batch, chunks, heads]

    DEVICE Chunk(Scan s, int chunk, int batch) {
        token = (i64)batch * s.seq + chunk * Q;
        len = min_of(Q, s.seq - chunk * Q);
        at_head = ((i64)batch * ceil_div(s.seq, Q) + chunk) * s.heads;
    }
};

// Step sizes and cum of a head, into shared memory; steps past the end do nothing (dt = 0).
DEVICE void load_steps(float* dt, float* cum, const float* all_dt, float a, Chunk c, Scan s, int head) {
    BARRIER();
    if (threadIdx.x < Q) {
        dt[threadIdx.x] = (int)threadIdx.x < c.len ? all_dt[(c.token + threadIdx.x) * s.heads + head] : 0.0f;
    }
    BARRIER();
    if (threadIdx.x == 0) {
        float sum = 0.0f;
        for (int i = 0; i < Q; i++) {
            sum += dt[i] * a;
            cum[i] = sum;
        }
    }
    BARRIER();
}

template <class P, int N> DEVICE void load_bc(typename P::Element* tile, const float* xbc, Chunk c, Scan s, int offset) {
    fill_tile<P>(tile, Q, N, [&](int t, int n) {
        return t < c.len && n < s.d_state ? xbc[(c.token + t) * s.width() + offset + n] : 0.0f;
    });
}

// x or y of a head, each step times factor[t] where it is not null.
template <class P>
DEVICE void load_head(typename P::Element* tile, const float* data, int row, const float* factor, Chunk c, Scan s, int head) {
    fill_tile<P>(tile, Q, WIDTH, [&](int t, int p) {
        if (t >= c.len || p >= s.head_dim) {
            return 0.0f;
        }
        const float v = data[(c.token + t) * row + head * s.head_dim + p];
        return factor ? v * factor[t] : v;
    });
}

template <class P, int N> DEVICE void load_state(typename P::Element* tile, const float* states, i64 at, Scan s) {
    fill_tile<P>(tile, WIDTH, N, [&](int p, int n) {
        return p < s.head_dim && n < s.d_state ? states[(at * s.head_dim + p) * s.d_state + n] : 0.0f;
    });
}

// 1 and 4: grid (heads, chunks, batch). states = Σ_t factor_t · left_t ⊗ right_t, with left x·dt·w and right B, or left
// dY·e and right C.
template <class P, int N, bool BACKWARD>
DEVICE void chunk_states(const float* xbc, const float* dy, const float* all_dt, const float* a_log, Scan s, float* states, float* decay) {
    typedef typename P::Element E;
    E* left = (E*)shared_memory();
    E* right = left + Q * pitch<P>(WIDTH);
    float* dt = (float*)(right + Q * pitch<P>(N));
    float* cum = dt + Q;
    float* factor = cum + Q;
    const int head = blockIdx.x;
    const Chunk c(s, blockIdx.y, blockIdx.z);
    load_steps(dt, cum, all_dt, -expf(a_log[head]), c, s, head);
    if (threadIdx.x < Q) {
        factor[threadIdx.x] = BACKWARD ? expf(cum[threadIdx.x]) : dt[threadIdx.x] * expf(cum[Q - 1] - cum[threadIdx.x]);
    }
    BARRIER();
    load_head<P>(left, BACKWARD ? dy : xbc, BACKWARD ? s.inner() : s.width(), factor, c, s, head);
    load_bc<P, N>(right, xbc, c, s, s.inner() + (BACKWARD ? s.d_state : 0));
    BARRIER();
    Accumulator<P, WIDTH, N> sum;
    sum.clear();
    sum.template product<RowMajor, RowMajor>(left, pitch<P>(WIDTH), right, pitch<P>(N), Q);
    const i64 at = c.at_head + head;
    sum.each([&](int p, int n, float& v) {
        if (p < s.head_dim && n < s.d_state) {
            states[(at * s.head_dim + p) * s.d_state + n] = v;
        }
    });
    if (!BACKWARD && threadIdx.x == 0) {
        decay[at] = expf(cum[Q - 1]);
    }
}

// 2 and 5: what each chunk adds becomes what enters it (forward), or what comes back to it (backward, from the last).
KERNEL(256, ssd_pass)(float* states, const float* decay, int batch, int chunks, int heads, int state_len, int backward) {
    const i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x, per_sequence = (i64)heads * state_len;
    if (i >= batch * per_sequence) {
        return;
    }
    const i64 b = i / per_sequence, rest = i % per_sequence, head = rest / state_len;
    float running = 0.0f;
    for (int k = 0; k < chunks; k++) {
        const i64 chunk = b * chunks + (backward ? chunks - 1 - k : k);
        float* at = states + chunk * per_sequence + rest;
        const float own = *at;
        *at = running;
        running = decay[chunk * heads + head] * running + own;
    }
}

// 3: grid (heads, chunks, batch).
template <class P, int N>
DEVICE void chunk_scan(const float* xbc, const float* all_dt, const float* a_log, const float* skip, const float* states, Scan s, float* y) {
    typedef typename P::Element E;
    const int ldn = pitch<P>(N), ldp = pitch<P>(WIDTH), ldq = pitch<P>(Q);
    E* c_tile = (E*)shared_memory();
    E* b_tile = c_tile + Q * ldn; // B, then the state
    E* u = b_tile + Q * ldn;
    E* m = u + Q * ldp;
    float* dt = (float*)(m + Q * ldq);
    float* cum = dt + Q;
    const int head = blockIdx.x;
    const Chunk c(s, blockIdx.y, blockIdx.z);
    load_steps(dt, cum, all_dt, -expf(a_log[head]), c, s, head);
    load_bc<P, N>(b_tile, xbc, c, s, s.inner());
    load_bc<P, N>(c_tile, xbc, c, s, s.inner() + s.d_state);
    load_head<P>(u, xbc, s.width(), dt, c, s, head);
    BARRIER();
    Accumulator<P, Q, Q> g;
    g.clear();
    g.template product<KMajor, KMajor>(c_tile, ldn, b_tile, ldn, N);
    g.each([&](int i, int j, float& v) { m[i * ldq + j] = P::from(i >= j ? v * expf(cum[i] - cum[j]) : 0.0f); });
    BARRIER();
    load_state<P, N>(b_tile, states, c.at_head + head, s);
    BARRIER();
    Accumulator<P, Q, WIDTH> out;
    out.clear();
    out.template product<KMajor, KMajor>(c_tile, ldn, b_tile, ldn, N);
    out.each([&](int i, int, float& v) { v *= expf(cum[i]); });
    out.template product<KMajor, RowMajor>(m, ldq, u, ldp, Q);
    out.each([&](int i, int p, float& v) {
        if (i < c.len && p < s.head_dim) {
            const i64 token = c.token + i;
            y[token * s.inner() + head * s.head_dim + p] = v + skip[head] * xbc[token * s.width() + head * s.head_dim + p];
        }
    });
}

// Adds the rows of a [Q, WIDTH] float tile: thread t < Q gets row t's sum.
DEVICE float row_sum(const float* tile, int ld) {
    float sum = 0.0f;
    if (threadIdx.x < Q) {
        for (int p = 0; p < WIDTH; p++) sum += tile[threadIdx.x * ld + p];
    }
    return sum;
}

// 6: grid (head groups, chunks, batch). dxbc's x columns, ddt, shares [batch, chunks, heads] of the gradients of a_log and of D,
// and the group's shares of dB and dC: dbc [groups, tokens, 2 states].
template <class P, int N>
DEVICE void chunk_backward(const float* xbc, const float* all_dt, const float* a_log, const float* skip, const float* states,
                           const float* dstates, const float* decay, const float* dy, Scan s, float* dxbc, float* ddt,
                           float* da_log, float* dskip, float* dbc) {
    typedef typename P::Element E;
    const int ldn = pitch<P>(N), ldp = pitch<P>(WIDTH), ldq = pitch<P>(Q), LDF = WIDTH + 4;
    E* b_tile = (E*)shared_memory();
    E* c_tile = b_tile + Q * ldn;
    E* state = c_tile + Q * ldn; // H, then R
    E* u = state + WIDTH * ldn;
    E* g_y = u + Q * ldp;
    E* m = g_y + Q * ldp; // M, then Z
    float* f32_tile = (float*)(m + Q * ldq);
    float* dt = f32_tile + Q * LDF;
    float* cum = dt + Q;
    float* dcum = cum + Q;
    float* ddt_rows = dcum + Q;
    float* room = ddt_rows + Q;
    const Chunk c(s, blockIdx.y, blockIdx.z);
    const int tid = threadIdx.x, group = blockIdx.x;
    load_bc<P, N>(b_tile, xbc, c, s, s.inner());
    load_bc<P, N>(c_tile, xbc, c, s, s.inner() + s.d_state);
    Accumulator<P, Q, N> db, dc;
    db.clear();
    dc.clear();
    const int last_head = min_of((group + 1) * HEADS_EACH, s.heads);
    for (int head = group * HEADS_EACH; head < last_head; head++) {
        const float a = -expf(a_log[head]);
        const i64 at = c.at_head + head, x_column = head * s.head_dim;
        load_steps(dt, cum, all_dt, a, c, s, head);
        load_head<P>(u, xbc, s.width(), dt, c, s, head);
        load_head<P>(g_y, dy, s.inner(), (const float*)nullptr, c, s, head);
        load_state<P, N>(state, states, at, s);
        BARRIER();
        // M, and T = dM ∘ M, whose row sums minus column sums start dcum; then Z takes M's place after dU has used it.
        Accumulator<P, Q, Q> g, dm;
        g.clear();
        g.template product<KMajor, KMajor>(c_tile, ldn, b_tile, ldn, N);
        dm.clear();
        dm.template product<KMajor, KMajor>(g_y, ldp, u, ldp, WIDTH);
        g.each([&](int i, int j, float& v) {
            v = i >= j ? v * expf(cum[i] - cum[j]) : 0.0f;
            m[i * ldq + j] = P::from(v);
            f32_tile[i * LDF + j] = v;
        });
        dm.each([&](int i, int j, float& v) { f32_tile[i * LDF + j] *= v; });
        BARRIER();
        float cum_share = 0.0f;
        if (tid < Q) {
            for (int j = 0; j < Q; j++) cum_share += f32_tile[tid * LDF + j] - f32_tile[j * LDF + tid];
        }
        BARRIER();
        // e_i ⟨dY_i, H C_i⟩
        Accumulator<P, Q, WIDTH> wide;
        wide.clear();
        wide.template product<KMajor, KMajor>(c_tile, ldn, state, ldn, N);
        wide.each([&](int i, int p, float& v) { f32_tile[i * LDF + p] = v * expf(cum[i]) * P::to(g_y[i * ldp + p]); });
        BARRIER();
        cum_share += row_sum(f32_tile, LDF);
        // ⟨R, H⟩ from the buffers themselves
        const float* r_full = dstates + at * s.head_dim * s.d_state;
        const float* h_full = states + at * s.head_dim * s.d_state;
        float inner = 0.0f;
        for (int i = tid; i < s.head_dim * s.d_state; i += THREADS) inner += r_full[i] * h_full[i];
        inner = block_reduce<Sum>(inner, room);
        // diag(e) dY H into dC: the product of all heads has one accumulator, so e goes into dY's place for a moment.
        wide.clear();
        wide.template product<RowMajor, RowMajor>(m, ldq, g_y, ldp, Q); // Mᵀ dY, while dY is still whole
        BARRIER();
        for (int i = tid; i < Q * WIDTH; i += THREADS) {
            const int r = i / WIDTH, p = i % WIDTH;
            g_y[r * ldp + p] = P::from(P::to(g_y[r * ldp + p]) * expf(cum[r]));
        }
        BARRIER();
        dc.template product<KMajor, RowMajor>(g_y, ldp, state, ldn, WIDTH);
        BARRIER();
        load_state<P, N>(state, dstates, at, s);
        // Z = tril(dM) ∘ L
        dm.each([&](int i, int j, float& v) { m[i * ldq + j] = P::from(i >= j ? v * expf(cum[i] - cum[j]) : 0.0f); });
        BARRIER();
        dc.template product<KMajor, RowMajor>(m, ldq, b_tile, ldn, Q);
        db.template product<RowMajor, RowMajor>(m, ldq, c_tile, ldn, Q);
        // B Rᵀ: f, and its part of dU
        Accumulator<P, Q, WIDTH> past;
        past.clear();
        past.template product<KMajor, KMajor>(b_tile, ldn, state, ldn, N);
        past.each([&](int j, int p, float& v) {
            v *= expf(cum[Q - 1] - cum[j]);
            f32_tile[j * LDF + p] = v * P::to(u[j * ldp + p]);
        });
        BARRIER();
        const float f = row_sum(f32_tile, LDF);
        cum_share -= f;
        const float f_sum = block_reduce<Sum>(f, room);
        for (int i = tid; i < Q * WIDTH; i += THREADS) {
            const int r = i / WIDTH, p = i % WIDTH;
            u[r * ldp + p] = P::from(P::to(u[r * ldp + p]) * expf(cum[Q - 1] - cum[r]));
        }
        BARRIER();
        db.template product<KMajor, RowMajor>(u, ldp, state, ldn, WIDTH);
        if (tid == Q - 1) {
            cum_share += f_sum + decay[at] * inner;
        }
        // dU whole: `past` holds diag(w) B Rᵀ where `wide` holds Mᵀ dY
        int e = 0;
        float rest[sizeof(past.v) / 4];
        past.each([&](int, int, float& v) { rest[e++] = v; });
        e = 0;
        wide.each([&](int, int, float& v) { v += rest[e++]; });
        float skip_share = 0.0f;
        wide.each([&](int j, int p, float& v) {
            float product = 0.0f;
            if (j < c.len && p < s.head_dim) {
                const i64 token = c.token + j;
                const float x = xbc[token * s.width() + x_column + p], d = dy[token * s.inner() + x_column + p];
                dxbc[token * s.width() + x_column + p] = dt[j] * v + skip[head] * d;
                product = v * x;
                skip_share += d * x;
            }
            f32_tile[j * LDF + p] = product;
        });
        skip_share = block_reduce<Sum>(skip_share, room);
        const float through_u = row_sum(f32_tile, LDF);
        if (tid < Q) {
            dcum[tid] = cum_share;
        }
        BARRIER();
        if (tid == 0) {
            float sum = 0.0f, total = 0.0f;
            for (int t = Q - 1; t >= 0; t--) {
                sum += dcum[t];
                dcum[t] = sum; // da
                total += dt[t] * sum;
            }
            da_log[at] = total * a; // a = -exp(a_log): da/da_log = a
            dskip[at] = skip_share;
        }
        BARRIER();
        if (tid < c.len) {
            ddt[(c.token + tid) * s.heads + head] = through_u + a * dcum[tid];
        }
    }
    const i64 row0 = (i64)group * gridDim.z * s.seq + c.token;
    db.each([&](int j, int n, float& v) {
        if (j < c.len && n < s.d_state) dbc[(row0 + j) * 2 * s.d_state + n] = v;
    });
    dc.each([&](int j, int n, float& v) {
        if (j < c.len && n < s.d_state) dbc[(row0 + j) * 2 * s.d_state + s.d_state + n] = v;
    });
}

// 7: the last columns of dxbc [tokens, inner + 2 states] = Σ over groups of dbc [groups, tokens, 2 states].
KERNEL(256, ssd_sum_groups)(const float* dbc, int tokens, int groups, int inner, int d_state, float* dxbc) {
    const i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x, len = (i64)tokens * 2 * d_state;
    if (i < len) {
        float sum = 0.0f;
        for (int g = 0; g < groups; g++) sum += dbc[g * len + i];
        dxbc[i / (2 * d_state) * (inner + 2 * d_state) + inner + i % (2 * d_state)] = sum;
    }
}

#define SSD(P, N, suffix)                                                                                              \
    KERNEL(256, ssd_states_##suffix)(const float* xbc, const float* dt, const float* a_log, int seq, int heads,        \
                                     int head_dim, int d_state, float* states, float* decay) {                         \
        chunk_states<P, N, false>(xbc, nullptr, dt, a_log, Scan{seq, heads, head_dim, d_state}, states, decay);        \
    }                                                                                                                  \
    KERNEL(256, ssd_scan_##suffix)(const float* xbc, const float* dt, const float* a_log, const float* skip,           \
                                   const float* states, int seq, int heads, int head_dim, int d_state, float* y) {     \
        chunk_scan<P, N>(xbc, dt, a_log, skip, states, Scan{seq, heads, head_dim, d_state}, y);                        \
    }                                                                                                                  \
    KERNEL(256, ssd_dstates_##suffix)(const float* xbc, const float* dy, const float* dt, const float* a_log, int seq, \
                                      int heads, int head_dim, int d_state, float* dstates) {                          \
        chunk_states<P, N, true>(xbc, dy, dt, a_log, Scan{seq, heads, head_dim, d_state}, dstates, nullptr);           \
    }                                                                                                                  \
    KERNEL(256, ssd_backward_##suffix)(const float* xbc, const float* dt, const float* a_log, const float* skip,       \
                                       const float* states, const float* dstates, const float* decay, const float* dy, \
                                       int seq, int heads, int head_dim, int d_state, float* dxbc, float* ddt,         \
                                       float* da_log, float* dskip, float* dbc) {                                      \
        chunk_backward<P, N>(xbc, dt, a_log, skip, states, dstates, decay, dy, Scan{seq, heads, head_dim, d_state},    \
                             dxbc, ddt, da_log, dskip, dbc);                                                           \
    }
SSD(F32, 64, f32_64)
SSD(F32, 128, f32_128)
SSD(Bf16, 64, bf16_64)
SSD(Bf16, 128, bf16_128)
