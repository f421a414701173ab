/* What the files of a decoding step share: the model as cpu_decode.py binds it, the room of the intermediate results, and
   products of many rows. */

#include "simd.h"

#include <math.h>
#include <sched.h>
#include <stdatomic.h>
#ifdef _OPENMP
#include <omp.h>
#else /* a compiler without it: one thread */
static inline int omp_get_thread_num(void) { return 0; }
static inline int omp_get_num_threads(void) { return 1; }
#endif

#define CHUNK 64 /* cached tokens that one thread attends to at a time */
#define MAX_BATCH 512

typedef struct {
    const float *input_norm, *post_norm;
    const void *q_a, *q, *k, *v, *o; /* k is kv_a_proj_with_mqa under MLA; q_a is NULL without a query rank */
    const float *q_a_bias, *q_a_norm, *k_bias, *k_norm, *o_bias;
    const void *key_up, *value_up; /* MLA: W_UK of each head transposed [H, L, N]; kv_b_proj [H, N + V, L] */
    const float *router, *router_bias;
    const void *up, *down; /* routed experts [E, 2F or F, D] and [E, D, F] */
    const float *up_bias, *down_bias;
    const void *gate_shared, *up_shared, *down_shared; /* shared experts, or the layer's dense MLP */
    int64_t shared;                                    /* its neurons */
    void *cache;                                       /* [B, C, cached] */
} Layer;

typedef struct {
    int64_t bfloat16, layers, vocab, D, H, G, mla, q_rank, L, N, R, V, interleave, E, K, F, gated;
    int64_t groups, top_groups, normalise, cached, C, widest; /* widest: neurons of the widest shared part */
    float eps, latent_eps, factor, scale;
    const void *embedding, *head;
    const float *norm, *cos, *sin; /* cos, sin: [C, R/2] */
    const Layer *layer;
} Model;

typedef struct {
    atomic_int arrived, round;
} Gate;

/* Wait for all threads. OpenMP's own barrier spins for long; on a machine with other work to do that takes the
   processor from the very thread that is waited for, so this one soon yields. */
static inline void meet(Gate *gate, int all) {
    if (all == 1) return;
    int now = atomic_load(&gate->round);
    if (atomic_fetch_add(&gate->arrived, 1) == all - 1) {
        atomic_store(&gate->arrived, 0);
        atomic_fetch_add(&gate->round, 1);
        return;
    }
    for (int spins = 0; atomic_load_explicit(&gate->round, memory_order_acquire) == now; spins++)
        if (spins > 4000) sched_yield();
}

/* As `load`, for what is read from memory once: with the compiler's own conversion of bfloat16 a step is a tenth faster
   than with the one instruction that `load` names (AMD EPYC, GCC). */
INLINE vec load_once(const void *w, int64_t i, int64_t bfloat16) {
    if (!bfloat16) return load(w, i, 0);
    short_vec bits;
    memcpy(&bits, (const bf16 *)w + i, sizeof bits);
    return (vec)(__builtin_convertvector(bits, uint_vec) << 16);
}

/* y[b][o] = sum_i w[o, i] x[b][i] for b < NB, a constant where it is called. One row after the other, as it lies in
   memory: the processor's prefetcher follows that best. Four running sums hide the latency of an addition. */
INLINE void row(const void *w, int64_t cols, const float *const *x, float *const *y, int64_t o, const int NB,
                const int64_t bfloat16) {
    vec acc[4][4] = {{{0}}};
    int64_t i = 0;
    for (; i + 64 <= cols; i += 64)
        for (int part = 0; part < 4; part++) {
            vec weight = load_once(w, i + 16 * part, bfloat16);
            if (part % 2 == 0) __builtin_prefetch((const char *)at(w, i + 16 * part, bfloat16) + 4096, 0, 0);
            for (int b = 0; b < NB; b++) acc[part][b] += weight * load(x[b], i + 16 * part, 0);
        }
    for (; i + 16 <= cols; i += 16) {
        vec weight = load_once(w, i, bfloat16);
        for (int b = 0; b < NB; b++) acc[0][b] += weight * load(x[b], i, 0);
    }
    for (int b = 0; b < NB; b++) {
        float s = sum((acc[0][b] + acc[1][b]) + (acc[2][b] + acc[3][b]));
        for (int64_t j = i; j < cols; j++) s += load1(w, j, bfloat16) * x[b][j];
        y[b][o] = s;
    }
}

INLINE void typed_rows(const void *w, int64_t stride, int64_t cols, const float *const *x, float *const *y, int64_t n,
                       int64_t lo, int64_t hi, const int64_t bfloat16) {
    for (int64_t o = lo; o < hi; o++) {
        const void *at_o = at(w, o * stride, bfloat16);
        int64_t b = 0;
        for (; b + 4 <= n; b += 4) row(at_o, cols, x + b, y + b, o, 4, bfloat16);
        if (n - b == 3)
            row(at_o, cols, x + b, y + b, o, 3, bfloat16);
        else if (n - b == 2)
            row(at_o, cols, x + b, y + b, o, 2, bfloat16);
        else if (n - b == 1)
            row(at_o, cols, x + b, y + b, o, 1, bfloat16);
    }
}

/* y[b][o] = w[o] . x[b] for rows lo <= o < hi, a row being `cols` numbers, `stride` from the next. */
static inline void rows(const void *w, int64_t bfloat16, int64_t stride, int64_t cols, const float *const *x,
                 float *const *y, int64_t n, int64_t lo, int64_t hi) {
    if (bfloat16)
        typed_rows(w, stride, cols, x, y, n, lo, hi, 1);
    else
        typed_rows(w, stride, cols, x, y, n, lo, hi, 0);
}

/* Thread `me` of `all` does rows lo..hi of `total`, a multiple of four but for the last. */
INLINE void share(int64_t total, int me, int all, int64_t *lo, int64_t *hi) {
    int64_t part = (total / all + 3) / 4 * 4;
    *lo = part * me < total ? part * me : total;
    *hi = me == all - 1 || part * (me + 1) > total ? total : part * (me + 1);
}

static inline void product(const Model *m, const void *w, const float *bias, int64_t out, int64_t in, const float *x,
                    float *y, int64_t B, int me, int all) {
    const float *xs[MAX_BATCH];
    float *ys[MAX_BATCH];
    int64_t lo, hi;
    share(out, me, all, &lo, &hi);
    for (int64_t b = 0; b < B; b++) xs[b] = x + b * in, ys[b] = y + b * out;
    rows(w, m->bfloat16, in, in, xs, ys, B, lo, hi);
    if (bias)
        for (int64_t b = 0; b < B; b++)
            for (int64_t o = lo; o < hi; o++) ys[b][o] += bias[o];
}

static inline void normalise(const float *x, const float *w, float eps, int64_t size, float *y) {
    vec acc = {0};
    int64_t i = 0;
    for (; i + 16 <= size; i += 16) {
        vec v = load(x, i, 0);
        acc += v * v;
    }
    float s = sum(acc);
    for (; i < size; i++) s += x[i] * x[i];
    float r = 1.0f / sqrtf(s / size + eps);
    for (i = 0; i < size; i++) y[i] = x[i] * r * w[i];
}

/* Where the intermediate results lie. */
typedef struct {
    float *x, *h, *q_a, *q, *k, *row, *query, *part, *head, *heads, *up, *shared, *out, *weights, *scratch;
    int64_t *experts, floats;
    Gate *gate;
} Work;

static inline int64_t part_size(const Model *m) { return m->H * (2 + (m->mla ? m->L : m->R)); }

/* The first half of a layer, x += attention(norm(x)), by thread `me` of `all`. */
void attention(const Model *m, const Layer *l, const Work *w, const int64_t *positions, int64_t B, int me, int all);
