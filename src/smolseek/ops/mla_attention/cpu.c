/* Latent attention in bfloat16, forward and backward. Rotation, scores, softmax and weighted sums are computed for one
   head after the other, without a full tensor of scores. Matrix multiplications accumulate in float32.

   Shapes: B sequences, T tokens, H heads, N features of a head without RoPE, R features with RoPE, Q = N + R, V features
   of a value, P = R / 2 angles. Scores are stored transposed, as [keys, queries of a block]. In this layout each lane of
   a vector register holds one query's softmax, and the matrix multiplications with values and keys read the scores in
   order.

   The dot-product instruction multiplies pairs of bfloat16 numbers. The suffix `_vnni` marks a matrix [rows, columns]
   that is stored for this instruction as [rows / 2, columns] pairs of neighbouring rows (oneDNN's VNNI layout). The
   suffix `_transposed` marks the transpose of a matrix in the same layout. */

#include "simd.h"

#ifdef BF16_PRODUCTS

#include <math.h>
#include <stdlib.h>

#define BLOCK 64 /* queries of a block */

/* Compute the scores of `rows` keys (at most TILE_ROWS) with BLOCK queries `b`, which are packed and transposed. */
static void scores(const bf16 *keys, int64_t stride, int64_t rows, int64_t size, const uint32_t *b,
                   __m512 sums[TILE_ROWS][4]) {
    const bf16x2 *a[TILE_ROWS];
    for (int64_t r = 0; r < TILE_ROWS; r++) a[r] = (const bf16x2 *)(keys + (r < rows ? r : 0) * stride);
    tile_rows(a, 1, size / 2, b, BLOCK, rows, 4, sums);
}

/* Multiply matrices: to = a b, or to += a b with `add`. a has [rows, depth] pairs, which are `stride` apart from row to
   row and `step` apart within a row. b has [depth, size] pairs. to is [rows, size]. */
static void product(const bf16x2 *a_in, int64_t stride, int64_t step, int64_t rows, int64_t depth, const uint32_t *b,
                    int64_t size, float *to, int add) {
    for (int64_t first = 0; first < rows; first += TILE_ROWS) {
        int64_t count = rows - first < TILE_ROWS ? rows - first : TILE_ROWS;
        const bf16x2 *a[TILE_ROWS];
        for (int64_t r = 0; r < TILE_ROWS; r++) a[r] = a_in + (first + (r < count ? r : 0)) * stride;
        for (int64_t n = 0, vectors; n < size; n += 16 * vectors) {
            __m512 sums[TILE_ROWS][4];
            int64_t left = (size - n) / 16;
            vectors = left == 6 || left == 3 ? 3 : left >= 4 ? 4 : left; /* 96 columns are 48 + 48 */
            switch (vectors) {
            case 1: tile_rows(a, step, depth, b + n, size, count, 1, sums); break;
            case 2: tile_rows(a, step, depth, b + n, size, count, 2, sums); break;
            case 3: tile_rows(a, step, depth, b + n, size, count, 3, sums); break;
            default: tile_rows(a, step, depth, b + n, size, count, 4, sums);
            }
            for (int64_t r = 0; r < count; r++)
                for (int64_t v = 0; v < vectors; v++) {
                    float *at = to + (first + r) * size + n + 16 * v;
                    _mm512_storeu_ps(at, add ? _mm512_add_ps(_mm512_loadu_ps(at), sums[r][v]) : sums[r][v]);
                }
        }
    }
}

/* Pack the transpose of at most BLOCK rows of `size` numbers, a multiple of 32; columns of missing rows are 0. */
static void pack_block_transposed(const bf16 *w, int64_t stride, int64_t rows, int64_t size, uint32_t *to) {
    for (int64_t first = 0; first < BLOCK; first += 16)
        pack_vnni_transposed(w + (first < rows ? first : 0) * stride, stride, rows - first, size, to + first, BLOCK);
}

/* Pack `rows` rows of `size` numbers, a multiple of 16. If `rows` is odd, the last row is paired with zeros. */
static void pack_vnni(const bf16 *w, int64_t stride, int64_t rows, int64_t size, uint32_t *to) {
    for (int64_t i = 0; i < rows; i += 2, to += size)
        for (int64_t n = 0; n < size; n += 16) {
            __m512i low = widen(w + i * stride + n), high = _mm512_setzero_si512();
            if (i + 1 < rows) high = widen(w + (i + 1) * stride + n);
            _mm512_storeu_si512(to + n, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
        }
}

/* Return which queries may attend to `key`, as a mask over vector `v` of the block that starts at query `first`. */
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

/* Write the rotated queries or keys [T, N + R] of one head. */
static void pack(const bf16 *nope, int64_t nope_stride, const bf16 *rope, int64_t rope_stride, const float *cos,
                 const float *sin, int64_t interleaved, int64_t T, int64_t N, int64_t R, bf16 *to) {
    for (int64_t t = 0; t < T; t++, to += N + R) {
        memcpy(to, nope + t * nope_stride, N * sizeof *to);
        rotate(rope + t * rope_stride, cos + t * R / 2, sin + t * R / 2, R, interleaved, to + N, 1);
    }
}

int64_t has_bf16_products(void) { return 1; }

static void *alloc(int64_t bytes) { return aligned_alloc(64, (bytes + 63) / 64 * 64); }

/* Attention of the last A of T tokens. H / G query heads share the keys and values of a group. `_stride_t` and
   `_stride_h` are the distances, in numbers, from token to token and from head to head. pe [B, T, R] holds the last R
   features of the keys. This function rotates pe and the last R features of the queries. cos, sin: [T, P],
   out: [B, A, H, V], log_sums: [B, H, A]. */
void mla_attention(const bf16 *q_in, int64_t q_stride_t, int64_t q_stride_h, const bf16 *key, int64_t key_stride_t,
                   int64_t key_stride_h, const bf16 *value, int64_t value_stride_t, int64_t value_stride_h,
                   const bf16 *pe, int64_t pe_stride_t, const float *cos, const float *sin, int64_t interleaved,
                   int64_t B, int64_t A, int64_t T, int64_t H, int64_t G, int64_t N, int64_t R, int64_t V, float scale,
                   bf16 *out, float *log_sums, int64_t threads) {
    const int64_t Q = N + R, before = T - A;
    const __m512 minus_infinity = _mm512_set1_ps(-INFINITY);
#pragma omp parallel num_threads(threads)
    {
        bf16 *q = alloc(A * Q * 2), *k = alloc(T * Q * 2);
        uint32_t *q_transposed = alloc(Q / 2 * BLOCK * 4), *v_vnni = alloc((T + 1) / 2 * V * 4);
        uint32_t *p_vnni = alloc((T + 1) / 2 * BLOCK * 4);
        float *s = alloc((T + 1) * BLOCK * 4), *sums = alloc(BLOCK * V * 4);
#pragma omp for schedule(dynamic)
        for (int64_t n = 0; n < B * H; n++) {
            int64_t b = n / H, h = n % H, g = h / (H / G), angle = before * R / 2;
            const bf16 *q_head = q_in + b * A * q_stride_t + h * q_stride_h;
            const bf16 *k_head = key + b * T * key_stride_t + g * key_stride_h;
            pack(q_head, q_stride_t, q_head + N, q_stride_t, cos + angle, sin + angle, interleaved, A, N, R, q);
            pack(k_head, key_stride_t, pe + b * T * pe_stride_t, pe_stride_t, cos, sin, interleaved, T, N, R, k);
            pack_vnni(value + b * T * value_stride_t + g * value_stride_h, value_stride_t, T, V, v_vnni);
            for (int64_t first = 0; first < A; first += BLOCK) {
                int64_t queries = A - first < BLOCK ? A - first : BLOCK, keys = before + first + queries;
                __m512 top[4], total[4], tiled[TILE_ROWS][4];
                pack_block_transposed(q + first * Q, Q, queries, Q, q_transposed);
                for (int v = 0; v < 4; v++) top[v] = minus_infinity, total[v] = _mm512_setzero_ps();
                for (int64_t i = 0; i < keys; i += TILE_ROWS) {
                    int64_t rows = keys - i < TILE_ROWS ? keys - i : TILE_ROWS;
                    scores(k + i * Q, Q, rows, Q, q_transposed, tiled);
                    for (int64_t r = 0; r < rows; r++)
                        for (int v = 0; v < 4; v++) {
                            __mmask16 mask = seen(i + r, before + first, v);
                            __m512 x = _mm512_mask_mul_ps(minus_infinity, mask, tiled[r][v], _mm512_set1_ps(scale));
                            top[v] = _mm512_max_ps(top[v], x);
                            _mm512_storeu_ps(s + (i + r) * BLOCK + 16 * v, x);
                        }
                }
                for (int64_t i = 0; i < keys; i += 2)
                    for (int v = 0; v < 4; v++) {
                        const float *at = s + i * BLOCK + 16 * v;
                        __m512 low = exp_lanes(_mm512_loadu_ps(at) - top[v]), high = _mm512_setzero_ps();
                        if (i + 1 < keys) high = exp_lanes(_mm512_loadu_ps(at + BLOCK) - top[v]);
                        total[v] += low + high;
                        __m512i low_bits = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(low));
                        __m512i high_bits = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(high));
                        low_bits = _mm512_or_si512(low_bits, _mm512_slli_epi32(high_bits, 16));
                        _mm512_storeu_si512(p_vnni + i / 2 * BLOCK + 16 * v, low_bits);
                    }
                product((const bf16x2 *)p_vnni, 1, BLOCK, queries, (keys + 1) / 2, v_vnni, V, sums, 0);
                float tops[BLOCK], totals[BLOCK];
                memcpy(tops, top, sizeof tops);
                memcpy(totals, total, sizeof totals);
                for (int64_t t = 0; t < queries; t++) {
                    bf16 *to = out + ((b * A + first + t) * H + h) * V;
                    __m512 share = _mm512_set1_ps(1.0f / totals[t]);
                    log_sums[(b * H + h) * A + first + t] = tops[t] + logf(totals[t]);
                    for (int64_t i = 0; i < V; i += 16) store(to, i, _mm512_loadu_ps(sums + t * V + i) * share, 1);
                }
            }
        }
        free(q), free(k), free(q_transposed), free(v_vnni), free(p_vnni), free(s), free(sums);
    }
}

/* Compute the dot product of each query's output and the output's gradient, whose rows are `stride` numbers apart. Dot
   products beyond the last query are 0. */
static void output_dots(const bf16 *dout, const bf16 *out, int64_t stride, int64_t queries, int64_t V, float *dots) {
    memset(dots, 0, BLOCK * sizeof *dots);
    for (int64_t t = 0; t < queries; t++) {
        __m512 dot = _mm512_setzero_ps();
        for (int64_t i = 0; i < V; i += 16)
            dot = _mm512_fmadd_ps(load(dout, t * stride + i, 1), load(out, t * stride + i, 1), dot);
        dots[t] = _mm512_reduce_add_ps(dot);
    }
}

/* The gradients of attention in training, where all tokens are queries and every query head has its own keys.
   q: [B, T, H, Q], kv: [B, T, H, N + V]. The other arguments are as in mla_attention. dq, dkv and dpe have the shapes of
   q, kv and pe. dpe_h is scratch memory [B, H, T, R]. */
void mla_attention_backward(const bf16 *q_in, const bf16 *kv, const bf16 *pe, int64_t pe_stride_t, const float *cos,
                            const float *sin, int64_t interleaved, int64_t B, int64_t T, int64_t H, int64_t N,
                            int64_t R, int64_t V, float scale, const bf16 *out, const float *log_sums,
                            const bf16 *dout_in, bf16 *dq_out, bf16 *dkv, bf16 *dpe, float *dpe_h, int64_t threads) {
    const int64_t Q = N + R, E = N + V, score_bytes = (T + 1) * BLOCK * 2;
#pragma omp parallel num_threads(threads)
    {
        bf16 *q = alloc(T * Q * 2), *k = alloc(T * Q * 2), *p = alloc(score_bytes), *ds = alloc(score_bytes);
        uint32_t *q_transposed = alloc(Q / 2 * BLOCK * 4), *dout_transposed = alloc(V / 2 * BLOCK * 4);
        uint32_t *q_vnni = alloc(BLOCK / 2 * Q * 4), *dout_vnni = alloc(BLOCK / 2 * V * 4);
        uint32_t *k_vnni = alloc((T + 1) / 2 * Q * 4), *ds_vnni = alloc((T + 1) / 2 * BLOCK * 4);
        float *dk = alloc(T * Q * 4), *dv = alloc(T * V * 4), *dq = alloc(BLOCK * Q * 4);
#pragma omp for schedule(dynamic)
        for (int64_t n = 0; n < B * H; n++) {
            int64_t b = n / H, h = n % H;
            const bf16 *q_head = q_in + (b * T * H + h) * Q, *kv_head = kv + (b * T * H + h) * E;
            pack(q_head, H * Q, q_head + N, H * Q, cos, sin, interleaved, T, N, R, q);
            pack(kv_head, H * E, pe + b * T * pe_stride_t, pe_stride_t, cos, sin, interleaved, T, N, R, k);
            pack_vnni(k, Q, T, Q, k_vnni);
            memset(dk, 0, T * Q * 4);
            memset(dv, 0, T * V * 4);
            for (int64_t first = 0; first < T; first += BLOCK) {
                int64_t queries = T - first < BLOCK ? T - first : BLOCK, keys = first + queries;
                const bf16 *dout = dout_in + ((b * T + first) * H + h) * V;
                float dots[BLOCK], logs[BLOCK];
                output_dots(dout, out + ((b * T + first) * H + h) * V, H * V, queries, V, dots);
                for (int64_t t = 0; t < BLOCK; t++) /* queries beyond the end get weights of 0 */
                    logs[t] = t < queries ? log_sums[(b * H + h) * T + first + t] : INFINITY;
                pack_block_transposed(q + first * Q, Q, queries, Q, q_transposed);
                pack_block_transposed(dout, H * V, queries, V, dout_transposed);
                memset(q_vnni, 0, BLOCK / 2 * Q * 4);
                memset(dout_vnni, 0, BLOCK / 2 * V * 4);
                pack_vnni(q + first * Q, Q, queries, Q, q_vnni);
                pack_vnni(dout, H * V, queries, V, dout_vnni);
                for (int64_t key = 0; key < keys; key += TILE_ROWS) {
                    int64_t rows = keys - key < TILE_ROWS ? keys - key : TILE_ROWS;
                    __m512 s[TILE_ROWS][4], dp[TILE_ROWS][4], factor = _mm512_set1_ps(scale);
                    scores(k + key * Q, Q, rows, Q, q_transposed, s);
                    scores(kv_head + N + key * H * E, H * E, rows, V, dout_transposed, dp);
                    for (int64_t r = 0; r < rows; r++)
                        for (int v = 0; v < 4; v++) {
                            __m512 x = _mm512_fmsub_ps(s[r][v], factor, _mm512_loadu_ps(logs + 16 * v));
                            x = _mm512_maskz_mov_ps(seen(key + r, first, v), exp_lanes(x));
                            store(p, (key + r) * BLOCK + 16 * v, x, 1);
                            __m512 centered = dp[r][v] - _mm512_loadu_ps(dots + 16 * v);
                            store(ds, (key + r) * BLOCK + 16 * v, x * factor * centered, 1);
                        }
                }
                pack_vnni(ds, BLOCK, keys, BLOCK, ds_vnni);
                product((const bf16x2 *)ds_vnni, 1, BLOCK, queries, (keys + 1) / 2, k_vnni, Q, dq, 0);
                product((const bf16x2 *)p, BLOCK / 2, 1, keys, BLOCK / 2, dout_vnni, V, dv, 1);
                product((const bf16x2 *)ds, BLOCK / 2, 1, keys, BLOCK / 2, q_vnni, Q, dk, 1);
                for (int64_t t = 0; t < queries; t++) {
                    bf16 *to = dq_out + ((b * T + first + t) * H + h) * Q;
                    int64_t angle = (first + t) * R / 2;
                    for (int64_t i = 0; i < N; i += 16) store(to, i, _mm512_loadu_ps(dq + t * Q + i), 1);
                    rotate_back(dq + t * Q + N, cos + angle, sin + angle, R / 2, interleaved, to + N);
                }
            }
            for (int64_t t = 0; t < T; t++) {
                bf16 *to = dkv + ((b * T + t) * H + h) * E;
                for (int64_t i = 0; i < N; i += 16) store(to, i, _mm512_loadu_ps(dk + t * Q + i), 1);
                for (int64_t i = 0; i < V; i += 16) store(to, N + i, _mm512_loadu_ps(dv + t * V + i), 1);
                memcpy(dpe_h + ((b * H + h) * T + t) * R, dk + t * Q + N, R * sizeof *dk);
            }
        }
        free(q), free(k), free(p), free(ds), free(q_transposed), free(dout_transposed), free(q_vnni), free(dout_vnni);
        free(k_vnni), free(ds_vnni), free(dk), free(dv), free(dq);
        float *sum = alloc(R * 4);
#pragma omp for
        for (int64_t n = 0; n < B * T; n++) { /* all heads share the rotary features of the keys */
            int64_t b = n / T, t = n % T;
            memset(sum, 0, R * sizeof *sum);
            for (int64_t h = 0; h < H; h++)
                for (int64_t i = 0; i < R; i++) sum[i] += dpe_h[((b * H + h) * T + t) * R + i];
            rotate_back(sum, cos + t * R / 2, sin + t * R / 2, R / 2, interleaved, dpe + n * R);
        }
        free(sum);
    }
}

#else

int64_t has_bf16_products(void) { return 0; }

#endif
