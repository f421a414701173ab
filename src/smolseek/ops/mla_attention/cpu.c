/* Latent attention in bfloat16, forward and backward: every head's rotation, scores, softmax and
   sums in one go, without a tensor between them. Products accumulate in float32.

   Shapes: B sequences, T tokens, H heads, N and R features of a head without and with position, Q = N + R, V features
   of a value, P = R / 2 angles. Scores are held transposed, [keys, queries of a block]: then softmax runs along the
   vector registers, and what the products for values and keys need lies in order already. */

#include "simd.h"

#ifdef BF16_PRODUCTS

#include <math.h>
#include <stdlib.h>

#define BLOCK 64 /* queries of a block */

/* A tile of scores: each row with step 1, BLOCK columns. */
static void scores(const bf16 *rows_at, int64_t stride, int64_t rows, int64_t size, const uint32_t *b,
                   __m512 sums[ROWS][4]) {
    const pair *a[ROWS];
    for (int64_t r = 0; r < ROWS; r++) a[r] = (const pair *)(rows_at + (r < rows ? r : 0) * stride);
    tile_rows(a, 1, size / 2, b, BLOCK, rows, 4, sums);
}

/* to[r] = (or +=, with `add`) pairs of row r times b: [pairs, size], for `rows` rows of a that are `next` pairs from each
   other and whose pairs are `step` from each other. */
static void product(const pair *a_at, int64_t next, int64_t step, int64_t rows, int64_t pairs, const uint32_t *b,
                    int64_t size, float *to, int add) {
    for (int64_t first = 0; first < rows; first += ROWS) {
        int64_t count = rows - first < ROWS ? rows - first : ROWS;
        const pair *a[ROWS];
        for (int64_t r = 0; r < ROWS; r++) a[r] = a_at + (first + (r < count ? r : 0)) * next;
        for (int64_t n = 0, wide; n < size; n += 16 * wide) {
            __m512 sums[ROWS][4];
            int64_t left = (size - n) / 16;
            wide = left == 6 || left == 3 ? 3 : left >= 4 ? 4 : left; /* 96 columns as 48 and 48 */
            switch (wide) {
            case 1: tile_rows(a, step, pairs, b + n, size, count, 1, sums); break;
            case 2: tile_rows(a, step, pairs, b + n, size, count, 2, sums); break;
            case 3: tile_rows(a, step, pairs, b + n, size, count, 3, sums); break;
            default: tile_rows(a, step, pairs, b + n, size, count, 4, sums);
            }
            for (int64_t r = 0; r < count; r++)
                for (int64_t v = 0; v < wide; v++) {
                    float *at = to + (first + r) * size + n + 16 * v;
                    _mm512_storeu_ps(at, add ? _mm512_add_ps(_mm512_loadu_ps(at), sums[r][v]) : sums[r][v]);
                }
        }
    }
}

/* Bring BLOCK rows (fewer too; the rest is 0) of `size` numbers, a multiple of 32, into lines of pairs. */
static void turn_block(const bf16 *w, int64_t stride, int64_t rows, int64_t size, uint32_t *to) {
    for (int64_t first = 0; first < BLOCK; first += 16)
        turn_rows(w + (first < rows ? first : 0) * stride, stride, rows - first, size, to + first, BLOCK);
}

/* Bring `rows` rows of `size` numbers, a multiple of 16, into pairs of rows side by side, with zeros after an odd one. */
static void interleave(const bf16 *w, int64_t stride, int64_t rows, int64_t size, uint32_t *to) {
    for (int64_t i = 0; i < rows; i += 2, to += size)
        for (int64_t n = 0; n < size; n += 16) {
            __m512i low = widen(w + i * stride + n), high = _mm512_setzero_si512();
            if (i + 1 < rows) high = widen(w + (i + 1) * stride + n);
            _mm512_storeu_si512(to + n, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
        }
}

/* The queries of vector `v` of the block at `first` that may see key `key`. */
INLINE __mmask16 seen(int64_t key, int64_t first, int v) {
    int64_t hidden = key - first - 16 * v;
    return hidden <= 0 ? 0xffff : hidden >= 16 ? 0 : (__mmask16)(0xffff << hidden);
}

INLINE void rotate_back(const float *d, const float *cos, const float *sin, int64_t P, int64_t interleaved, bf16 *to) {
    for (int64_t i = 0; i < P; i++) {
        store1(to, interleaved ? 2 * i : i, d[i] * cos[i] + d[i + P] * sin[i], 1);
        store1(to, interleaved ? 2 * i + 1 : i + P, d[i + P] * cos[i] - d[i] * sin[i], 1);
    }
}

/* One head's queries or keys, rotated: [T, N + R]. */
static void pack(const bf16 *plain, int64_t plain_next, const bf16 *turned, int64_t turned_next, const float *cos,
                 const float *sin, int64_t interleaved, int64_t T, int64_t N, int64_t R, bf16 *to) {
    for (int64_t t = 0; t < T; t++, to += N + R) {
        memcpy(to, plain + t * plain_next, N * sizeof *to);
        rotate(turned + t * turned_next, cos + t * R / 2, sin + t * R / 2, R, interleaved, to + N, 1);
    }
}

int64_t has_bf16_products(void) { return 1; }

static void *room(int64_t bytes) { return aligned_alloc(64, (bytes + 63) / 64 * 64); }

/* The last A of T tokens have queries; H / G heads of queries share keys and values. Of q, key and value, `_next` numbers
   lie from token to token and `_head` from head to head. The keys' last R features are those of pe, [B, T, R], rotated, as
   are the queries'. cos, sin: [T, P], out: [B, A, H, V], log_sums: [B, H, A]. */
void mla_attention(const bf16 *q_all, int64_t q_next, int64_t q_head, const bf16 *key, int64_t key_next,
                   int64_t key_head, const bf16 *value, int64_t value_next, int64_t value_head, const bf16 *pe,
                   int64_t pe_next, const float *cos, const float *sin, int64_t interleaved, int64_t B, int64_t A,
                   int64_t T, int64_t H, int64_t G, int64_t N, int64_t R, int64_t V, float scale, bf16 *out,
                   float *log_sums, int64_t threads) {
    const int64_t Q = N + R, before = T - A;
#pragma omp parallel num_threads(threads)
    {
        bf16 *q = room(A * Q * 2), *k = room(T * Q * 2);
        uint32_t *turned = room(Q / 2 * BLOCK * 4), *values = room((T + 1) / 2 * V * 4);
        uint32_t *weights = room((T + 1) / 2 * BLOCK * 4);
        float *s = room((T + 1) * BLOCK * 4), *sums = room(BLOCK * V * 4);
#pragma omp for schedule(dynamic)
        for (int64_t n = 0; n < B * H; n++) {
            int64_t b = n / H, h = n % H, g = h / (H / G), angle = before * R / 2;
            const bf16 *own_q = q_all + b * A * q_next + h * q_head, *own_k = key + b * T * key_next + g * key_head;
            pack(own_q, q_next, own_q + N, q_next, cos + angle, sin + angle, interleaved, A, N, R, q);
            pack(own_k, key_next, pe + b * T * pe_next, pe_next, cos, sin, interleaved, T, N, R, k);
            interleave(value + b * T * value_next + g * value_head, value_next, T, V, values);
            for (int64_t first = 0; first < A; first += BLOCK) {
                int64_t queries = A - first < BLOCK ? A - first : BLOCK, keys = before + first + queries;
                __m512 top[4], total[4], tiled[ROWS][4];
                turn_block(q + first * Q, Q, queries, Q, turned);
                for (int v = 0; v < 4; v++) top[v] = _mm512_set1_ps(-INFINITY), total[v] = _mm512_setzero_ps();
                for (int64_t i = 0; i < keys; i += ROWS) {
                    int64_t rows = keys - i < ROWS ? keys - i : ROWS;
                    scores(k + i * Q, Q, rows, Q, turned, tiled);
                    for (int64_t r = 0; r < rows; r++)
                        for (int v = 0; v < 4; v++) {
                            __m512 x = _mm512_mask_mul_ps(_mm512_set1_ps(-INFINITY), seen(i + r, before + first, v),
                                                          tiled[r][v], _mm512_set1_ps(scale));
                            top[v] = _mm512_max_ps(top[v], x);
                            _mm512_storeu_ps(s + (i + r) * BLOCK + 16 * v, x);
                        }
                }
                for (int64_t i = 0; i < keys; i += 2)
                    for (int v = 0; v < 4; v++) {
                        const float *at = s + i * BLOCK + 16 * v;
                        __m512 low = exp_lanes(_mm512_sub_ps(_mm512_loadu_ps(at), top[v])), high = _mm512_setzero_ps();
                        if (i + 1 < keys) high = exp_lanes(_mm512_sub_ps(_mm512_loadu_ps(at + BLOCK), top[v]));
                        total[v] = _mm512_add_ps(total[v], _mm512_add_ps(low, high));
                        __m512i bits = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(low));
                        __m512i more = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(high));
                        _mm512_storeu_si512(weights + i / 2 * BLOCK + 16 * v,
                                            _mm512_or_si512(bits, _mm512_slli_epi32(more, 16)));
                    }
                product((const pair *)weights, 1, BLOCK, queries, (keys + 1) / 2, values, V, sums, 0);
                float tops[BLOCK], totals[BLOCK];
                memcpy(tops, top, sizeof tops);
                memcpy(totals, total, sizeof totals);
                for (int64_t t = 0; t < queries; t++) {
                    bf16 *to = out + ((b * A + first + t) * H + h) * V;
                    __m512 share = _mm512_set1_ps(1.0f / totals[t]);
                    log_sums[(b * H + h) * A + first + t] = tops[t] + logf(totals[t]);
                    for (int64_t i = 0; i < V; i += 16) store(to, i, _mm512_mul_ps(_mm512_loadu_ps(sums + t * V + i), share), 1);
                }
            }
        }
        free(q), free(k), free(turned), free(values), free(weights), free(s), free(sums);
    }
}

/* The dot product of each query's output and its gradient, whose rows of V numbers lie `next` apart; 0 beyond the end. */
static void output_dots(const bf16 *dout, const bf16 *out, int64_t next, int64_t queries, int64_t V, float *dots) {
    memset(dots, 0, BLOCK * sizeof *dots);
    for (int64_t t = 0; t < queries; t++) {
        __m512 dot = _mm512_setzero_ps();
        for (int64_t i = 0; i < V; i += 16)
            dot = _mm512_fmadd_ps(load(dout, t * next + i, 1), load(out, t * next + i, 1), dot);
        dots[t] = _mm512_reduce_add_ps(dot);
    }
}

/* For all T queries, none of whose heads share keys. q: [B, T, H, Q], kv: [B, T, H, N + V], the rest as above; dq, dkv and
   dpe are as q, kv and pe, which for dpe is dense; parts: [B, H, T, R] for the heads' dpe. */
void mla_attention_backward(const bf16 *q_all, const bf16 *kv, const bf16 *pe, int64_t pe_next, const float *cos,
                            const float *sin, int64_t interleaved, int64_t B, int64_t T, int64_t H, int64_t N,
                            int64_t R, int64_t V, float scale, const bf16 *out_all, const float *log_sums,
                            const bf16 *dout_all, bf16 *dq_all, bf16 *dkv, bf16 *dpe, float *parts, int64_t threads) {
    const int64_t Q = N + R, E = N + V;
#pragma omp parallel num_threads(threads)
    {
        bf16 *q = room(T * Q * 2), *k = room(T * Q * 2), *p = room((T + 1) * BLOCK * 2), *ds = room((T + 1) * BLOCK * 2);
        uint32_t *turned_q = room(Q / 2 * BLOCK * 4), *turned_do = room(V / 2 * BLOCK * 4);
        uint32_t *pairs_q = room(BLOCK / 2 * Q * 4), *pairs_do = room(BLOCK / 2 * V * 4);
        uint32_t *pairs_k = room((T + 1) / 2 * Q * 4), *pairs_ds = room((T + 1) / 2 * BLOCK * 4);
        float *dk = room(T * Q * 4), *dv = room(T * V * 4), *dq = room(BLOCK * Q * 4);
#pragma omp for schedule(dynamic)
        for (int64_t n = 0; n < B * H; n++) {
            int64_t b = n / H, h = n % H;
            const bf16 *own_q = q_all + (b * T * H + h) * Q, *own_kv = kv + (b * T * H + h) * E;
            pack(own_q, H * Q, own_q + N, H * Q, cos, sin, interleaved, T, N, R, q);
            pack(own_kv, H * E, pe + b * T * pe_next, pe_next, cos, sin, interleaved, T, N, R, k);
            interleave(k, Q, T, Q, pairs_k);
            memset(dk, 0, T * Q * 4);
            memset(dv, 0, T * V * 4);
            for (int64_t first = 0; first < T; first += BLOCK) {
                int64_t queries = T - first < BLOCK ? T - first : BLOCK, keys = first + queries;
                const bf16 *dout = dout_all + ((b * T + first) * H + h) * V, *out = out_all + ((b * T + first) * H + h) * V;
                float dots[BLOCK], logs[BLOCK];
                output_dots(dout, out, H * V, queries, V, dots);
                for (int64_t t = 0; t < BLOCK; t++) /* beyond the end: weights of 0 */
                    logs[t] = t < queries ? log_sums[(b * H + h) * T + first + t] : INFINITY;
                turn_block(q + first * Q, Q, queries, Q, turned_q);
                turn_block(dout, H * V, queries, V, turned_do);
                memset(pairs_q, 0, BLOCK / 2 * Q * 4);
                memset(pairs_do, 0, BLOCK / 2 * V * 4);
                interleave(q + first * Q, Q, queries, Q, pairs_q);
                interleave(dout, H * V, queries, V, pairs_do);
                for (int64_t key = 0; key < keys; key += ROWS) {
                    int64_t rows = keys - key < ROWS ? keys - key : ROWS;
                    __m512 s[ROWS][4], dp[ROWS][4], factor = _mm512_set1_ps(scale);
                    scores(k + key * Q, Q, rows, Q, turned_q, s);
                    scores(own_kv + N + key * H * E, H * E, rows, V, turned_do, dp);
                    for (int64_t r = 0; r < rows; r++)
                        for (int v = 0; v < 4; v++) {
                            __m512 x = _mm512_fmsub_ps(s[r][v], factor, _mm512_loadu_ps(logs + 16 * v));
                            x = _mm512_maskz_mov_ps(seen(key + r, first, v), exp_lanes(x));
                            store(p, (key + r) * BLOCK + 16 * v, x, 1);
                            __m512 rest = _mm512_sub_ps(dp[r][v], _mm512_loadu_ps(dots + 16 * v));
                            store(ds, (key + r) * BLOCK + 16 * v, _mm512_mul_ps(_mm512_mul_ps(x, factor), rest), 1);
                        }
                }
                interleave(ds, BLOCK, keys, BLOCK, pairs_ds);
                product((const pair *)pairs_ds, 1, BLOCK, queries, (keys + 1) / 2, pairs_k, Q, dq, 0);
                product((const pair *)p, BLOCK / 2, 1, keys, BLOCK / 2, pairs_do, V, dv, 1);
                product((const pair *)ds, BLOCK / 2, 1, keys, BLOCK / 2, pairs_q, Q, dk, 1);
                for (int64_t t = 0; t < queries; t++) {
                    bf16 *to = dq_all + ((b * T + first + t) * H + h) * Q;
                    int64_t angle = (first + t) * R / 2;
                    for (int64_t i = 0; i < N; i += 16) store(to, i, _mm512_loadu_ps(dq + t * Q + i), 1);
                    rotate_back(dq + t * Q + N, cos + angle, sin + angle, R / 2, interleaved, to + N);
                }
            }
            for (int64_t t = 0; t < T; t++) {
                bf16 *to = dkv + ((b * T + t) * H + h) * E;
                for (int64_t i = 0; i < N; i += 16) store(to, i, _mm512_loadu_ps(dk + t * Q + i), 1);
                for (int64_t i = 0; i < V; i += 16) store(to, N + i, _mm512_loadu_ps(dv + t * V + i), 1);
                memcpy(parts + ((b * H + h) * T + t) * R, dk + t * Q + N, R * sizeof *dk);
            }
        }
        free(q), free(k), free(p), free(ds), free(turned_q), free(turned_do), free(pairs_q), free(pairs_do);
        free(pairs_k), free(pairs_ds), free(dk), free(dv), free(dq);
        float *sum = room(R * 4);
#pragma omp for
        for (int64_t n = 0; n < B * T; n++) { /* all heads share the keys' features with position */
            int64_t b = n / T, t = n % T;
            memset(sum, 0, R * sizeof *sum);
            for (int64_t h = 0; h < H; h++)
                for (int64_t i = 0; i < R; i++) sum[i] += parts[((b * H + h) * T + t) * R + i];
            rotate_back(sum, cos + t * R / 2, sin + t * R / 2, R / 2, interleaved, dpe + n * R);
        }
        free(sum);
    }
}

#else

int64_t has_bf16_products(void) { return 0; }

#endif
