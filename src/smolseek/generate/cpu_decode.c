/* One decoding step on the CPU, from one token of each of B sequences to logits, in one call and one parallel region.

   A step takes as long as reading all weights once. Therefore all threads together read the matrices, in their stored
   number format and in the order of memory. All other numbers are float32. cpu_decode.py builds these files and packs the
   structs of cpu_decode.h.

   The numbers of a sequence do not depend on the other sequences. The order of each sum depends neither on B nor on the
   number of threads. Therefore a batch gives the same bits as its sequences one by one.

   Shapes: B sequences, D hidden_size, H query heads, G key/value heads, L kv_lora_rank, N features of a head without
   RoPE, R features with RoPE, E experts, K selected experts, F neurons of an expert. */

#include "cpu_decode.h"

INLINE float silu(float x) { return x / (1.0f + expf(-x)); }

/* Return the index of the largest of n numbers that is not yet marked in `chosen`, and mark it. As in torch.topk, NaN
   counts as the largest number. */
static int64_t choose(const float *x, int64_t n, float *chosen) {
    int64_t best = -1;
    for (int64_t i = 0; i < n; i++)
        if (!chosen[i] && (best < 0 || x[i] > x[best] || (x[i] != x[i] && x[best] == x[best]))) best = i;
    chosen[best] = 1;
    return best;
}

/* Select K different experts for one token and compute their weights, as Router in model/moe.py does (DeepSeek-V3,
   equations 12-16). */
static void route(const Model *m, const Layer *l, const float *x, float *scratch, int64_t *experts, float *weights) {
    int64_t E = m->E, size = E / m->groups;
    float *scores = scratch, *choice = scratch + E, *group = choice + E, *chosen = group + E, total = 0;
    linear_outputs((Matrix){l->router, FLOAT32}, m->D, m->D, &x, &scores, 1, 0, E);
    for (int64_t e = 0; e < E; e++) {
        scores[e] = 1.0f / (1.0f + expf(-scores[e]));
        choice[e] = scores[e] + l->router_bias[e];
    }
    if (m->groups > 1) {
        for (int64_t g = 0; g < m->groups; g++) { /* the score of a group is the sum over its two best experts */
            float a = -INFINITY, b = -INFINITY, none = 0;
            for (int64_t e = g * size; e < (g + 1) * size; e++) {
                if (choice[e] > a)
                    b = a, a = choice[e];
                else if (choice[e] > b)
                    b = choice[e];
                if (choice[e] != choice[e]) none = choice[e];
            }
            group[g] = a + b + none; /* NaN if an expert's score is NaN */
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

/* Divide the memory at `base` into the arrays of Work, for sequences that have `chunks` chunks together. With a NULL base
   only the size is computed. */
static Work lay_out(const Model *m, int64_t B, int64_t chunks, int64_t threads, float *base) {
    Work w;
    int64_t at = 0, width = m->mla ? m->L : m->R;
#define PLACE(name, count) (w.name = base + at, at += ((count) + 15) / 16 * 16)
    PLACE(x, B * m->D);
    PLACE(h, B * m->D * threads);
    PLACE(q_a, B * m->q_rank * (1 + threads));
    PLACE(q, B * m->H * (m->N + m->R));
    PLACE(k, B * m->cached);
    PLACE(row, m->cached * threads);
    PLACE(query, B * m->H * ((m->mla ? m->L : 0) + m->R));
    PLACE(part, chunks * part_size(m));
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

int64_t work_floats(const Model *m, int64_t B, int64_t chunks, int64_t threads) {
    return lay_out(m, B, chunks, threads, (float *)0).floats;
}

/* x += mlp(norm(x)). `chosen` [B, K] gets the experts of each sequence, unless it is NULL. */
static void feed_forward(const Model *m, const Layer *l, const Work *w, int64_t B, int64_t *chosen, int me, int all) {
    int64_t D = m->D, F = m->F, K = l->router ? m->K : 0, S = l->shared, wide = m->gated ? 2 * F : F;
    int64_t lo, hi, *experts = w->experts + B * m->K * me;
    float *h = w->h + B * D * me, *weights = w->weights + B * m->K * me;
    const float *xs[MAX_BATCH];
    float *ys[MAX_BATCH], *zs[MAX_BATCH];
    for (int64_t b = 0; b < B; b++) {
        normalise(w->x + b * D, l->post_norm, m->eps, D, h + b * D);
        if (K) route(m, l, h + b * D, w->scratch + 4 * m->E * me, experts + b * K, weights + b * K);
    }
    if (chosen && me == 0) memcpy(chosen, experts, B * K * sizeof *chosen);
    share(F, me, all, &lo, &hi);
    for (int64_t e = 0; e < (K ? m->E : 0); e++) {
        int64_t n = 0;
        for (int64_t i = 0; i < B * K; i++)
            if (experts[i] == e) xs[n] = h + i / K * D, ys[n] = w->up + i * 2 * F, zs[n] = ys[n] + F, n++;
        if (!n) continue;
        Matrix up = from(l->up, e * wide * D);
        linear_outputs(up, D, D, xs, ys, n, lo, hi);
        if (m->gated) linear_outputs(from(up, F * D), D, D, xs, zs, n, lo, hi);
        for (int64_t i = 0; i < n; i++)
            for (int64_t f = lo; f < hi; f++) {
                float bias = l->up_bias ? l->up_bias[e * F + f] : 0;
                ys[i][f] = silu(ys[i][f] + bias) * (m->gated ? zs[i][f] : 1);
            }
    }
    share(S, me, all, &lo, &hi);
    if (S) {
        for (int64_t b = 0; b < B; b++) xs[b] = h + b * D, ys[b] = w->shared + b * 2 * S, zs[b] = ys[b] + S;
        linear_outputs(l->gate_shared, D, D, xs, ys, B, lo, hi);
        linear_outputs(l->up_shared, D, D, xs, zs, B, lo, hi);
        for (int64_t b = 0; b < B; b++)
            for (int64_t f = lo; f < hi; f++) ys[b][f] = silu(ys[b][f]) * zs[b][f];
    }
    wait_for_all(w->barrier, all);
    share(D, me, all, &lo, &hi);
    for (int64_t e = 0; e < (K ? m->E : 0); e++) {
        int64_t n = 0;
        for (int64_t i = 0; i < B * K; i++)
            if (experts[i] == e) xs[n] = w->up + i * 2 * F, ys[n] = w->out + i * D, n++;
        linear_outputs(from(l->down, e * D * F), F, F, xs, ys, n, lo, hi);
        for (int64_t i = 0; i < n && l->down_bias; i++)
            for (int64_t d = lo; d < hi; d++) ys[i][d] += l->down_bias[e * D + d];
    }
    for (int64_t i = 0; i < B * K; i++)
        for (int64_t d = lo; d < hi; d++) w->x[i / K * D + d] += weights[i] * w->out[i * D + d];
    if (S) {
        float *y = w->scratch + 4 * m->E * all;
        for (int64_t b = 0; b < B; b++) xs[b] = w->shared + b * 2 * S, ys[b] = y + b * D;
        linear_outputs(l->down_shared, S, S, xs, ys, B, lo, hi);
        for (int64_t b = 0; b < B; b++)
            for (int64_t d = lo; d < hi; d++) w->x[b * D + d] += ys[b][d];
    }
    wait_for_all(w->barrier, all);
}

/* Run token ids[b] at position positions[b] of each sequence b, whose earlier tokens are cached. Writes logits
   [B, vocab] and, unless `experts` is NULL, the chosen experts [layers with experts, B, K]. */
void step(const Model *m, int64_t B, const int64_t *ids, const int64_t *positions, const int64_t *first, int64_t most,
          float *work, float *logits, int64_t *experts, int64_t threads) {
    Barrier barrier = {0};
    Batch batch = {B, most, ids, positions, first};
    int64_t chunks = 0;
    for (int64_t b = 0; b < B; b++) chunks += positions[b] / CHUNK + 1;
#pragma omp parallel num_threads(threads)
    {
        int me = omp_get_thread_num(), all = omp_get_num_threads();
        Work w = lay_out(m, B, chunks, threads, work);
        w.barrier = &barrier;
        int64_t D = m->D, *chosen = experts;
        for (int64_t b = me; b < B; b += all) load_row(m->embedding, D, ids[b], w.x + b * D);
        wait_for_all(&barrier, all);
        for (int64_t n = 0; n < m->layers; n++) {
            attention(m, m->layer + n, &w, &batch, me, all);
            feed_forward(m, m->layer + n, &w, B, m->layer[n].router ? chosen : 0, me, all);
            if (chosen && m->layer[n].router) chosen += B * m->K;
        }
        float *h = w.h + B * D * me;
        for (int64_t b = 0; b < B; b++) normalise(w.x + b * D, m->norm, m->eps, D, h + b * D);
        linear(m->head, 0, m->vocab, D, h, logits, B, me, all);
    }
}

/* The logits [n, vocab] of n normalised hidden states h [n, D], in float32 whatever the format of the head. */
void head(const Model *m, int64_t n, const float *h, float *logits, int64_t threads) {
#pragma omp parallel num_threads(threads)
    linear(m->head, 0, m->vocab, m->D, h, logits, n, omp_get_thread_num(), omp_get_num_threads());
}

/* For each of B rows of logits [B, V], find the first of the largest logits, and compute log(sum(exp(logit))). */
void summarise(const float *logits, int64_t B, int64_t V, int64_t *best, float *total, int64_t threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t b = 0; b < B; b++) {
        const float *x = logits + b * V;
        float top = -INFINITY, sum_of = 0;
        lanes tops = (lanes){0} - INFINITY, sums = {0};
        int64_t i = 0;
        for (; i + LANES <= V; i += LANES) tops = max_lanes(load_some(x, i, LANES, 0), tops);
        for (int l = 0; l < LANES; l++) top = tops[l] > top ? tops[l] : top;
        for (; i < V; i++) top = x[i] > top ? x[i] : top;
        for (i = 0; i + LANES <= V; i += LANES) sums += exp_lanes(load_some(x, i, LANES, 0) - top);
        for (int l = 0; l < LANES; l++) sum_of += sums[l];
        for (; i < V; i++) sum_of += exp_lanes((lanes){x[i] - top})[0];
        total[b] = top + logf(sum_of);
        for (best[b] = 0; best[b] < V - 1 && x[best[b]] != top;) best[b]++;
    }
}
