/* Attention of a decoding step. The new token of each sequence attends to the cache of its sequence in chunks of tokens.
   The results of the chunks are merged afterwards, as in flash decoding. The shapes are listed in cpu_decode.c. */

#include "cpu_decode.h"

/* out[h][j] = sum_s p[h][s] v[s, j] for n heads and 16 * `vectors` features from j on. */
INLINE void mix_tile(const void *v, int64_t stride, int64_t tokens, const float *p, float *out, int64_t out_stride,
                     int64_t j, const int n, const int vectors, const int64_t bfloat16) {
    vec acc[4][2] = {{{0}}};
    for (int64_t s = 0; s < tokens; s++) {
        request(at(v, (s + 16) * stride + j, bfloat16));
        for (int i = 0; i < vectors; i++) {
            vec value = load(v, s * stride + j + 16 * i, bfloat16);
            for (int h = 0; h < n; h++) acc[h][i] += value * p[h * CHUNK + s];
        }
    }
    for (int h = 0; h < n; h++) memcpy(out + h * out_stride + j, acc[h], vectors * sizeof(vec));
}

INLINE void mix_heads(const void *v, int64_t stride, int64_t tokens, int64_t width, const float *p, float *out,
                      int64_t out_stride, const int n, const int64_t bfloat16) {
    int64_t j = 0;
    for (; j + 32 <= width; j += 32) mix_tile(v, stride, tokens, p, out, out_stride, j, n, 2, bfloat16);
    if (j + 16 <= width) mix_tile(v, stride, tokens, p, out, out_stride, j, n, 1, bfloat16), j += 16;
    for (; j < width; j++)
        for (int k = 0; k < n; k++) {
            float s = 0;
            for (int64_t t = 0; t < tokens; t++) s += p[k * CHUNK + t] * load1(v, t * stride + j, bfloat16);
            out[k * out_stride + j] = s;
        }
}

INLINE void mix(const void *v, int64_t stride, int64_t tokens, int64_t width, const float *p, float *out,
                int64_t out_stride, int64_t heads, const int64_t bfloat16) {
    for (; heads >= 4; heads -= 4, p += 4 * CHUNK, out += 4 * out_stride)
        mix_heads(v, stride, tokens, width, p, out, out_stride, 4, bfloat16);
    if (heads == 3)
        mix_heads(v, stride, tokens, width, p, out, out_stride, 3, bfloat16);
    else if (heads == 2)
        mix_heads(v, stride, tokens, width, p, out, out_stride, 2, bfloat16);
    else if (heads == 1)
        mix_heads(v, stride, tokens, width, p, out, out_stride, 1, bfloat16);
}

/* Replace each of n heads' scores p[h][s] by exp(score - largest score). `out` gets the largest score and the sum. */
static void softmax(float *p, int64_t tokens, int64_t n, float scale, float *out, int64_t out_stride) {
    float totals[8] = {0};
    for (int64_t h = 0; h < n; h++) {
        float *ph = p + h * CHUNK, top = -INFINITY;
        lanes tops = (lanes){0} - INFINITY;
        int64_t s = 0;
        for (; s + LANES <= tokens; s += LANES) {
            lanes score = load_some(ph, s, LANES, 0) * scale;
            store_some(ph, s, LANES, score, 0);
            tops = max_lanes(score, tops);
        }
        for (int l = 0; l < LANES; l++) top = tops[l] > top ? tops[l] : top;
        for (; s < tokens; s++) {
            ph[s] *= scale;
            top = ph[s] > top ? ph[s] : top;
        }
        for (s = 0; s < tokens; s += LANES)
            store_some(ph, s, tokens - s, exp_lanes(load_some(ph, s, tokens - s, 0) - top), 0);
        out[h * out_stride] = top;
    }
    for (int64_t s = 0; s < tokens; s++) /* the heads hide the latency of an addition */
        for (int64_t h = 0; h < n; h++) totals[h] += p[h * CHUNK + s];
    for (int64_t h = 0; h < n; h++) out[h * out_stride + 1] = totals[h];
}

/* Attend to one chunk of one sequence's cache, the tokens from `first` on. `part` [H, 2 + width] gets for each head the
   largest score, the sum of exp(score - largest score), and the sum of the values weighted with these exponentials. */
static void attend(const Model *m, Matrix cache, int64_t first, int64_t tokens, const float *q, float *part) {
    int64_t heads = m->H / m->G, key = m->mla ? m->L + m->R : m->R, width = m->mla ? m->L : m->R;
    int64_t bfloat16 = cache.format == BFLOAT16;
    float p[8 * CHUNK];
    for (int64_t g = 0; g < m->G; g++) {
        Matrix k = from(cache, first * m->cached + (m->mla ? 0 : g * key));
        const void *v = m->mla ? k.data : from(k, m->G * key).data;
        for (int64_t h0 = 0; h0 < heads; h0 += 8) { /* eight heads at a time */
            int64_t n = heads - h0 < 8 ? heads - h0 : 8;
            const float *xs[8];
            float *ys[8];
            for (int64_t h = 0; h < n; h++) xs[h] = q + (g * heads + h0 + h) * key, ys[h] = p + h * CHUNK;
            linear_outputs(k, m->cached, key, xs, ys, n, 0, tokens);
            float *out = part + (g * heads + h0) * (2 + width);
            softmax(p, tokens, n, m->scale, out, 2 + width);
            TYPED(mix, v, m->cached, tokens, width, p, out + 2, 2 + width, n);
        }
    }
}

/* Merge the results of all chunks for one head. The result of chunk c is at part + c * stride. */
static void merge_chunks(const float *part, int64_t chunks, int64_t stride, int64_t width, float *out) {
    float top = -INFINITY, total = 0;
    for (int64_t c = 0; c < chunks; c++) top = part[c * stride] > top ? part[c * stride] : top;
    memset(out, 0, width * sizeof *out);
    for (int64_t c = 0; c < chunks; c++) {
        float weight = exp_lanes((lanes){part[c * stride] - top})[0];
        total += weight * part[c * stride + 1];
        for (int64_t j = 0; j < width; j++) out[j] += weight * part[c * stride + 2 + j];
    }
    for (int64_t j = 0; j < width; j++) out[j] /= total;
}

void attention(const Model *m, const Layer *l, const Work *w, const Batch *batch, int me, int all) {
    const int64_t *positions = batch->positions, *first = batch->first, B = batch->B, most = batch->most;
    int64_t D = m->D, H = m->H, L = m->mla ? m->L : 0, N = m->N, R = m->R, P = R / 2;
    int64_t key = L + R, width = m->mla ? L : R, q_size = N + R, value = m->mla ? m->V : R, lo, hi;
    float *h = w->h + B * D * me;
    for (int64_t b = 0; b < B; b++) normalise(w->x + b * D, l->input_norm, m->eps, D, h + b * D);
    if (l->q_a.data)
        linear(l->q_a, l->q_a_bias, m->q_rank, D, h, w->q_a, B, me, all);
    else
        linear(l->q, 0, H * q_size, D, h, w->q, B, me, all);
    if (m->mla) {
        linear(l->k, l->k_bias, key, D, h, w->k, B, me, all);
    } else { /* keys of all sequences, then their values */
        linear(l->k, 0, m->G * R, D, h, w->k, B, me, all);
        linear(l->v, 0, m->G * R, D, h, w->k + B * m->G * R, B, me, all);
    }
    wait_for_all(w->barrier, all);
    if (l->q_a.data) {
        float *normed = w->q_a + B * m->q_rank * (1 + me);
        for (int64_t b = 0; b < B; b++)
            normalise(w->q_a + b * m->q_rank, l->q_a_norm, m->latent_eps, m->q_rank, normed + b * m->q_rank);
        linear(l->q, 0, H * q_size, m->q_rank, normed, w->q, B, me, all);
        wait_for_all(w->barrier, all);
    }
    for (int64_t b = 0; b < B; b++) {
        const float *cos = m->cos + positions[b] * P, *sin = m->sin + positions[b] * P;
        if ((all - 1 - b % all) == me) { /* cache the new token */
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
            int64_t token = first[b * most + positions[b] / CHUNK] + positions[b] % CHUNK;
            for (int64_t i = 0; i < m->cached; i++)
                store1((void *)l->cache.data, token * m->cached + i, row[i], l->cache.format);
        }
        for (int64_t i = me; i < H; i += all) {
            const float *q = w->q + (b * H + i) * q_size;
            float *query = w->query + (b * H + i) * key;
            if (m->mla) linear_outputs(from(l->key_up, i * L * N), N, N, &q, &query, 1, 0, L);
            rotate(q + N, cos, sin, R, m->interleave, query + L, 0);
        }
    }
    wait_for_all(w->barrier, all);
    int64_t turn = 0;
    for (int64_t b = 0; b < B; b++)
        for (int64_t c = 0; c <= positions[b] / CHUNK; c++, turn++) {
            int64_t tokens = positions[b] + 1 - c * CHUNK;
            if (turn % all == me)
                attend(m, l->cache, first[b * most + c], tokens < CHUNK ? tokens : CHUNK, w->query + b * H * key,
                       w->part + turn * part_size(m));
        }
    wait_for_all(w->barrier, all);
    int64_t before = 0, counted = 0; /* `before`: number of chunks of the first `counted` sequences */
    for (int64_t i = me; i < B * H; i += all) {
        int64_t b = i / H, head = i % H, chunks = positions[b] / CHUNK + 1;
        for (; counted < b; counted++) before += positions[counted] / CHUNK + 1;
        float *sum_of = m->mla ? w->head + i * width : w->heads + i * width;
        merge_chunks(w->part + before * part_size(m) + head * (2 + width), chunks, part_size(m), width, sum_of);
        float *y = w->heads + i * value;
        const float *x = sum_of;
        if (m->mla) linear_outputs(from(l->value_up, (head * (N + m->V) + N) * L), L, L, &x, &y, 1, 0, m->V);
    }
    wait_for_all(w->barrier, all);
    share(D, me, all, &lo, &hi);
    linear(l->o, l->o_bias, D, H * value, w->heads, w->scratch + 4 * m->E * all, B, me, all);
    for (int64_t b = 0; b < B; b++)
        for (int64_t i = lo; i < hi; i++) w->x[b * D + i] += w->scratch[4 * m->E * all + b * D + i];
    wait_for_all(w->barrier, all);
}
