/* One decoding step on the CPU: a token for each of B sequences -> logits, in one call and one parallel region.

   Writing a token is bound by reading the weights once. So matrices are read in their stored type, in order, by all
   threads; everything else is float32. cpu_decode.py holds the mirror of the two structs below and builds this file.

   Every number depends on its own sequence only, and is summed in one order whatever B and the threads are: a batch
   gives the same bits as its sequences one by one.

   B sequences, D hidden_size, H query heads, G groups of key/value heads, L kv_lora_rank, N and R features of a head
   without and with position, E experts, K chosen, F neurons of an expert, C capacity of the cache in tokens. */

#include "simd.h"

#include <math.h>
#include <sched.h>
#include <stdatomic.h>
#ifdef _OPENMP
#include <omp.h>
#else /* a compiler without it: one thread */
static int omp_get_thread_num(void) { return 0; }
static int omp_get_num_threads(void) { return 1; }
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
static void meet(Gate *gate, int all) {
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

/* y[b][o] = sum_i w[o, i] x[b][i] for b < NB, a constant where it is called. One row after the other, as it lies in
   memory: the processor's prefetcher follows that best. Four running sums hide the latency of an addition. */
INLINE void row(const void *w, int64_t cols, const float *const *x, float *const *y, int64_t o, const int NB,
                const int64_t bfloat16) {
    vec acc[4][4] = {{{0}}};
    int64_t i = 0;
    for (; i + 64 <= cols; i += 64)
        for (int part = 0; part < 4; part++) {
            vec weight = load(w, i + 16 * part, bfloat16);
            if (part % 2 == 0) __builtin_prefetch((const char *)at(w, i + 16 * part, bfloat16) + 4096, 0, 0);
            for (int b = 0; b < NB; b++) acc[part][b] += weight * load(x[b], i + 16 * part, 0);
        }
    for (; i + 16 <= cols; i += 16) {
        vec weight = load(w, i, bfloat16);
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
static void rows(const void *w, int64_t bfloat16, int64_t stride, int64_t cols, const float *const *x,
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

static void product(const Model *m, const void *w, const float *bias, int64_t out, int64_t in, const float *x,
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

static void normalise(const float *x, const float *w, float eps, int64_t size, float *y) {
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

INLINE float silu(float x) { return x / (1.0f + expf(-x)); }

/* out[h][j] = sum_s p[h][s] v[s, j], for n heads at once. */
INLINE void mix_tile(const void *v, int64_t stride, int64_t tokens, const float *p, float *out, int64_t out_stride,
                     int64_t j, const int n, const int64_t bfloat16) {
    vec acc[4] = {{0}};
    for (int64_t s = 0; s < tokens; s++) {
        vec value = load(v, s * stride + j, bfloat16);
        for (int h = 0; h < n; h++) acc[h] += value * p[h * CHUNK + s];
    }
    for (int h = 0; h < n; h++) memcpy(out + h * out_stride + j, &acc[h], sizeof acc[h]);
}

INLINE void mix(const void *v, int64_t stride, int64_t tokens, int64_t width, const float *p, float *out,
                int64_t out_stride, int64_t heads, const int64_t bfloat16) {
    int64_t h = 0;
    for (; h < heads; h += heads - h >= 4 ? 4 : 1) {
        const float *ph = p + h * CHUNK;
        float *oh = out + h * out_stride;
        int n = heads - h >= 4 ? 4 : 1;
        int64_t j = 0;
        for (; j + 16 <= width; j += 16) {
            if (n == 4)
                mix_tile(v, stride, tokens, ph, oh, out_stride, j, 4, bfloat16);
            else
                mix_tile(v, stride, tokens, ph, oh, out_stride, j, 1, bfloat16);
        }
        for (; j < width; j++)
            for (int k = 0; k < n; k++) {
                float s = 0;
                for (int64_t t = 0; t < tokens; t++) s += ph[k * CHUNK + t] * load1(v, t * stride + j, bfloat16);
                oh[k * out_stride + j] = s;
            }
    }
}

/* Attend to one chunk of one sequence's cache. part: [H, 2 + width]: the largest score, the sum of the exponentials
   taken against it, and the values weighted with them. */
static void attend(const Model *m, const void *cache, int64_t first, int64_t tokens, const float *q, float *part) {
    int64_t heads = m->H / m->G, key = m->mla ? m->L + m->R : m->R, width = m->mla ? m->L : m->R;
    float p[8 * CHUNK];
    for (int64_t g = 0; g < m->G; g++) {
        const void *k = at(cache, first * m->cached + (m->mla ? 0 : g * key), m->bfloat16);
        const void *v = m->mla ? k : at(k, m->G * key, m->bfloat16);
        for (int64_t h0 = 0; h0 < heads; h0 += 8) { /* eight heads at a time */
            int64_t n = heads - h0 < 8 ? heads - h0 : 8;
            const float *xs[8];
            float *ys[8];
            for (int64_t h = 0; h < n; h++) xs[h] = q + (g * heads + h0 + h) * key, ys[h] = p + h * CHUNK;
            rows(k, m->bfloat16, m->cached, key, xs, ys, n, 0, tokens);
            float *out = part + (g * heads + h0) * (2 + width);
            for (int64_t h = 0; h < n; h++) {
                float top = -INFINITY, total = 0, *ph = p + h * CHUNK;
                for (int64_t s = 0; s < tokens; s++) {
                    ph[s] *= m->scale;
                    top = ph[s] > top ? ph[s] : top;
                }
                for (int64_t s = 0; s < tokens; s += 16)
                    store_some(ph, s, tokens - s, exp16(load_some(ph, s, tokens - s, 0) - top), 0);
                for (int64_t s = 0; s < tokens; s++) total += ph[s];
                out[h * (2 + width)] = top;
                out[h * (2 + width) + 1] = total;
            }
            if (m->bfloat16)
                mix(v, m->cached, tokens, width, p, out + 2, 2 + width, n, 1);
            else
                mix(v, m->cached, tokens, width, p, out + 2, 2 + width, n, 0);
        }
    }
}

/* Put the chunks of one head together: part of chunk c is at part + c * stride. */
static void combine(const float *part, int64_t chunks, int64_t stride, int64_t width, float *out) {
    float top = -INFINITY, total = 0;
    for (int64_t c = 0; c < chunks; c++) top = part[c * stride] > top ? part[c * stride] : top;
    memset(out, 0, width * sizeof *out);
    for (int64_t c = 0; c < chunks; c++) {
        float weight = exp16((vec){part[c * stride] - top})[0];
        total += weight * part[c * stride + 1];
        for (int64_t j = 0; j < width; j++) out[j] += weight * part[c * stride + 2 + j];
    }
    for (int64_t j = 0; j < width; j++) out[j] /= total;
}

/* The largest of n numbers that was not chosen before, marked in `chosen`. As in torch.topk, NaN is the largest. */
static int64_t choose(const float *x, int64_t n, float *chosen) {
    int64_t best = -1;
    for (int64_t i = 0; i < n; i++)
        if (!chosen[i] && (best < 0 || x[i] > x[best] || (x[i] != x[i] && x[best] == x[best]))) best = i;
    chosen[best] = 1;
    return best;
}

/* The K experts of one token, no two of them the same, and their weights (DeepSeek-V3, equations 12-16), as Router of
   model/moe.py. */
static void route(const Model *m, const Layer *l, const float *x, float *scratch, int64_t *experts, float *weights) {
    int64_t E = m->E, size = E / m->groups;
    float *scores = scratch, *choice = scratch + E, *group = choice + E, *chosen = group + E, total = 0;
    rows(l->router, 0, m->D, m->D, &x, &scores, 1, 0, E);
    for (int64_t e = 0; e < E; e++) {
        scores[e] = 1.0f / (1.0f + expf(-scores[e]));
        choice[e] = scores[e] + l->router_bias[e];
    }
    if (m->groups > 1) {
        for (int64_t g = 0; g < m->groups; g++) { /* a group counts by its two best experts */
            float a = -INFINITY, b = -INFINITY, none = 0;
            for (int64_t e = g * size; e < (g + 1) * size; e++) {
                if (choice[e] > a)
                    b = a, a = choice[e];
                else if (choice[e] > b)
                    b = choice[e];
                if (choice[e] != choice[e]) none = choice[e];
            }
            group[g] = a + b + none; /* NaN where one of its experts is */
        }
        memset(chosen, 0, m->groups * sizeof *chosen);
        for (int64_t n = 0; n < m->top_groups; n++) choose(group, m->groups, chosen);
        for (int64_t e = 0; e < E; e++)
            if (!chosen[e / size]) choice[e] = -INFINITY;
    }
    memset(chosen, 0, E * sizeof *chosen);
    for (int64_t k = 0; k < m->K; k++) {
        int64_t best = choose(choice, E, chosen);
        experts[k] = best;
        weights[k] = scores[best];
        total += scores[best];
    }
    for (int64_t k = 0; k < m->K; k++) weights[k] *= (m->normalise ? 1.0f / (total + 1e-20f) : 1.0f) * m->factor;
}

/* Where the intermediate results lie. With a NULL base only the size is counted. */
typedef struct {
    float *x, *h, *q_a, *q, *k, *row, *query, *part, *head, *heads, *up, *shared, *out, *weights, *scratch;
    int64_t *experts, floats;
    Gate *gate;
} Work;

static int64_t part_size(const Model *m) { return m->H * (2 + (m->mla ? m->L : m->R)); }

static Work lay_out(const Model *m, int64_t B, int64_t threads, float *base) {
    Work w;
    int64_t at = 0, chunks = (m->C + CHUNK - 1) / CHUNK, width = m->mla ? m->L : m->R;
#define PLACE(name, count) (w.name = base + at, at += ((count) + 15) / 16 * 16)
    PLACE(x, B * m->D);
    PLACE(h, B * m->D * threads);
    PLACE(q_a, B * m->q_rank * (1 + threads));
    PLACE(q, B * m->H * (m->N + m->R));
    PLACE(k, B * m->cached);
    PLACE(row, m->cached * threads);
    PLACE(query, B * m->H * ((m->mla ? m->L : 0) + m->R));
    PLACE(part, B * chunks * part_size(m));
    PLACE(head, B * m->H * width);
    PLACE(heads, B * m->H * (m->mla ? m->V : m->R));
    PLACE(up, B * m->K * 2 * m->F);
    PLACE(shared, B * 2 * m->widest);
    PLACE(out, B * m->K * m->D);
    PLACE(weights, B * m->K * threads);
    PLACE(scratch, 4 * m->E * threads + B * m->D);
    w.experts = (int64_t *)(base + at);
    w.floats = at + 2 * B * m->K * threads;
    return w;
}

int64_t work_floats(const Model *m, int64_t B, int64_t threads) { return lay_out(m, B, threads, (float *)0).floats; }

static void attention(const Model *m, const Layer *l, const Work *w, const int64_t *positions, int64_t B, int me,
                      int all) {
    int64_t D = m->D, H = m->H, L = m->mla ? m->L : 0, N = m->N, R = m->R, P = R / 2, kind = m->bfloat16;
    int64_t key = L + R, width = m->mla ? L : R, q_size = N + R, value = m->mla ? m->V : R, lo, hi;
    float *h = w->h + B * D * me;
    for (int64_t b = 0; b < B; b++) normalise(w->x + b * D, l->input_norm, m->eps, D, h + b * D);
    if (l->q_a)
        product(m, l->q_a, l->q_a_bias, m->q_rank, D, h, w->q_a, B, me, all);
    else
        product(m, l->q, 0, H * q_size, D, h, w->q, B, me, all);
    if (m->mla) {
        product(m, l->k, l->k_bias, key, D, h, w->k, B, me, all);
    } else { /* keys of all sequences, then their values */
        product(m, l->k, 0, m->G * R, D, h, w->k, B, me, all);
        product(m, l->v, 0, m->G * R, D, h, w->k + B * m->G * R, B, me, all);
    }
    meet(w->gate, all);
    if (l->q_a) {
        float *normed = w->q_a + B * m->q_rank * (1 + me);
        for (int64_t b = 0; b < B; b++)
            normalise(w->q_a + b * m->q_rank, l->q_a_norm, m->latent_eps, m->q_rank, normed + b * m->q_rank);
        product(m, l->q, 0, H * q_size, m->q_rank, normed, w->q, B, me, all);
        meet(w->gate, all);
    }
    for (int64_t b = 0; b < B; b++) {
        const float *cos = m->cos + positions[b] * P, *sin = m->sin + positions[b] * P;
        if ((all - 1 - b % all) == me) { /* the new token's row of the cache */
            float *row = w->row + me * m->cached;
            if (m->mla) {
                const float *k = w->k + b * key;
                if (l->k_norm)
                    normalise(k, l->k_norm, m->latent_eps, L, row);
                else
                    memcpy(row, k, L * sizeof *row);
                rotate(k + L, cos, sin, R, m->interleave, row + L, 0);
            } else {
                const float *k = w->k + b * m->G * R;
                for (int64_t g = 0; g < m->G; g++) rotate(k + g * R, cos, sin, R, m->interleave, row + g * R, 0);
                memcpy(row + m->G * R, k + B * m->G * R, m->G * R * sizeof *row);
            }
            for (int64_t i = 0; i < m->cached; i++)
                store1(l->cache, (b * m->C + positions[b]) * m->cached + i, row[i], kind);
        }
        for (int64_t i = me; i < H; i += all) {
            const float *q = w->q + (b * H + i) * q_size;
            float *query = w->query + (b * H + i) * key;
            if (m->mla) rows(at(l->key_up, i * L * N, kind), kind, N, N, &q, &query, 1, 0, L);
            rotate(q + N, cos, sin, R, m->interleave, query + L, 0);
        }
    }
    meet(w->gate, all);
    int64_t most = (m->C + CHUNK - 1) / CHUNK;
    int64_t turn = 0;
    for (int64_t b = 0; b < B; b++)
        for (int64_t c = 0; c <= positions[b] / CHUNK; c++) {
            int64_t tokens = positions[b] + 1 - c * CHUNK;
            if (turn++ % all == me)
                attend(m, at(l->cache, b * m->C * m->cached, kind), c * CHUNK, tokens < CHUNK ? tokens : CHUNK,
                       w->query + b * H * key, w->part + (b * most + c) * part_size(m));
        }
    meet(w->gate, all);
    for (int64_t i = me; i < B * H; i += all) {
        int64_t b = i / H, head = i % H, chunks = positions[b] / CHUNK + 1;
        float *sum_of = m->mla ? w->head + i * width : w->heads + i * width;
        combine(w->part + b * most * part_size(m) + head * (2 + width), chunks, part_size(m), width, sum_of);
        float *y = w->heads + i * value;
        const float *x = sum_of;
        if (m->mla) rows(at(l->value_up, (head * (N + m->V) + N) * L, kind), kind, L, L, &x, &y, 1, 0, m->V);
    }
    meet(w->gate, all);
    share(D, me, all, &lo, &hi);
    product(m, l->o, l->o_bias, D, H * value, w->heads, w->scratch + 4 * m->E * all, B, me, all);
    for (int64_t b = 0; b < B; b++)
        for (int64_t i = lo; i < hi; i++) w->x[b * D + i] += w->scratch[4 * m->E * all + b * D + i];
    meet(w->gate, all);
}

static void feed_forward(const Model *m, const Layer *l, const Work *w, int64_t B, int me, int all) {
    int64_t D = m->D, F = m->F, K = l->router ? m->K : 0, S = l->shared, wide = m->gated ? 2 * F : F, kind = m->bfloat16;
    int64_t lo, hi, *experts = w->experts + B * m->K * me;
    float *h = w->h + B * D * me, *weights = w->weights + B * m->K * me;
    const float *xs[MAX_BATCH];
    float *ys[MAX_BATCH], *zs[MAX_BATCH];
    for (int64_t b = 0; b < B; b++) {
        normalise(w->x + b * D, l->post_norm, m->eps, D, h + b * D);
        if (K) route(m, l, h + b * D, w->scratch + 4 * m->E * me, experts + b * K, weights + b * K);
    }
    share(F, me, all, &lo, &hi);
    for (int64_t e = 0; e < (K ? m->E : 0); e++) {
        int64_t n = 0;
        for (int64_t i = 0; i < B * K; i++)
            if (experts[i] == e) xs[n] = h + i / K * D, ys[n] = w->up + i * 2 * F, zs[n] = ys[n] + F, n++;
        if (!n) continue;
        const void *up = at(l->up, e * wide * D, kind);
        rows(up, kind, D, D, xs, ys, n, lo, hi);
        if (m->gated) rows(at(up, F * D, kind), kind, D, D, xs, zs, n, lo, hi);
        for (int64_t i = 0; i < n; i++)
            for (int64_t f = lo; f < hi; f++) {
                float bias = l->up_bias ? l->up_bias[e * F + f] : 0;
                ys[i][f] = silu(ys[i][f] + bias) * (m->gated ? zs[i][f] : 1);
            }
    }
    share(S, me, all, &lo, &hi);
    if (S) {
        for (int64_t b = 0; b < B; b++) xs[b] = h + b * D, ys[b] = w->shared + b * 2 * S, zs[b] = ys[b] + S;
        rows(l->gate_shared, kind, D, D, xs, ys, B, lo, hi);
        rows(l->up_shared, kind, D, D, xs, zs, B, lo, hi);
        for (int64_t b = 0; b < B; b++)
            for (int64_t f = lo; f < hi; f++) ys[b][f] = silu(ys[b][f]) * zs[b][f];
    }
    meet(w->gate, all);
    share(D, me, all, &lo, &hi);
    for (int64_t e = 0; e < (K ? m->E : 0); e++) {
        int64_t n = 0;
        for (int64_t i = 0; i < B * K; i++)
            if (experts[i] == e) xs[n] = w->up + i * 2 * F, ys[n] = w->out + i * D, n++;
        rows(at(l->down, e * D * F, kind), kind, F, F, xs, ys, n, lo, hi);
        for (int64_t i = 0; i < n && l->down_bias; i++)
            for (int64_t d = lo; d < hi; d++) ys[i][d] += l->down_bias[e * D + d];
    }
    for (int64_t i = 0; i < B * K; i++)
        for (int64_t d = lo; d < hi; d++) w->x[i / K * D + d] += weights[i] * w->out[i * D + d];
    if (S) {
        float *y = w->scratch + 4 * m->E * all;
        for (int64_t b = 0; b < B; b++) xs[b] = w->shared + b * 2 * S, ys[b] = y + b * D;
        rows(l->down_shared, kind, S, S, xs, ys, B, lo, hi);
        for (int64_t b = 0; b < B; b++)
            for (int64_t d = lo; d < hi; d++) w->x[b * D + d] += ys[b][d];
    }
    meet(w->gate, all);
}

/* Run token ids[b] at positions[b] of each sequence, whose earlier tokens are cached; logits: [B, vocab]. */
void step(const Model *m, int64_t B, const int64_t *ids, const int64_t *positions, float *work, float *logits,
          int64_t threads) {
    Gate gate = {0};
#pragma omp parallel num_threads(threads)
    {
        int me = omp_get_thread_num(), all = omp_get_num_threads();
        Work w = lay_out(m, B, threads, work);
        w.gate = &gate;
        int64_t D = m->D, lo, hi;
        share(D, me, all, &lo, &hi);
        for (int64_t b = 0; b < B; b++)
            for (int64_t i = lo; i < hi; i++) w.x[b * D + i] = load1(m->embedding, ids[b] * D + i, m->bfloat16);
        meet(&gate, all);
        for (int64_t n = 0; n < m->layers; n++) {
            attention(m, m->layer + n, &w, positions, B, me, all);
            feed_forward(m, m->layer + n, &w, B, me, all);
        }
        float *h = w.h + B * D * me;
        for (int64_t b = 0; b < B; b++) normalise(w.x + b * D, m->norm, m->eps, D, h + b * D);
        product(m, m->head, 0, m->vocab, D, h, logits, B, me, all);
    }
}
