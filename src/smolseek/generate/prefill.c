/* Products and causal attention over the tokens of a prompt, in bfloat16 with float32 sums.

   Needs a processor with AVX512_BF16, whose one instruction multiplies 32 numbers and adds them up in pairs;
   `has_pairs` says whether this file was built for one. Matrices stay as they are stored. A block of one is brought
   into the instruction's order (pairs of a column's inputs, 64 columns abreast) just before it is used, by the thread
   that uses it; with some ten rows of input that costs little beside the products.

   Every number of the result is summed in one order, whatever the other rows and the threads are.

   T tokens, A of them that ask (the last ones), H query heads, G groups of key/value heads, E experts. */

#include "simd.h"

#ifdef BF16_PRODUCTS

#include <math.h>
#include <stdlib.h>

#define WIDE 64  /* columns of a tile */

int64_t has_pairs(void) { return 1; }

/* Bring `rows` rows (fewer than 16 too; the rest is 0) of `size` numbers, a multiple of 32, into order. */
static void order(const bf16 *w, int64_t stride, int64_t rows, int64_t size, uint32_t *to, int64_t line) {
    for (int64_t p = 0; p < size / 2; p += 16) turn(w + 2 * p, stride, rows, to + p * line, line);
}

/* y[m] = W_e x[m] for the rows m of expert e, which end before ends[e]; with `up`, y[m] = silu(W_e x) * (U_e x).

   x: row m is number tokens[m], or m where tokens is NULL, of size in. w, up: [out, in] for each expert, `apart`
   numbers from the next. y: [M, out]. in is a multiple of 32, out of 16, with `up` of 32. */
void products(const bf16 *x, const int64_t *tokens, const int64_t *ends, int64_t E, const bf16 *w, const bf16 *up,
              int64_t apart, int64_t in, int64_t out, bf16 *y, int64_t threads) {
    int64_t wide = up ? WIDE / 2 : WIDE, blocks = (out + wide - 1) / wide;
#pragma omp parallel num_threads(threads)
    {
        uint32_t *ordered = aligned_alloc(64, in / 2 * WIDE * sizeof *ordered);
#pragma omp for schedule(dynamic)
        for (int64_t n = 0; n < E * blocks; n++) {
            int64_t e = n / blocks, column = n % blocks * wide, first = e ? ends[e - 1] : 0;
            if (first == ends[e]) continue;
            for (int64_t v = 0; v < 4; v++) {
                const bf16 *from = up && v >= 2 ? up : w;
                int64_t row = column + (up ? v % 2 : v) * 16;
                int64_t here = row < out ? 16 : 0;
                order(from + e * apart + (here ? row : 0) * in, in, here, in, ordered + 16 * v, WIDE);
            }
            for (int64_t m = first; m < ends[e]; m += ROWS) {
                int64_t rows = ends[e] - m < ROWS ? ends[e] - m : ROWS;
                const pair *a[ROWS];
                __m512 sums[ROWS][4];
                for (int64_t r = 0; r < rows; r++) a[r] = (const pair *)(x + (tokens ? tokens[m + r] : m + r) * in);
                tile_rows(a, 1, in / 2, ordered, WIDE, rows, 4, sums);
                for (int64_t r = 0; r < rows; r++) {
                    bf16 *to = y + (m + r) * out + column;
                    if (up)
                        for (int v = 0; v < 2; v++) {
                            vec gate = sums[r][v];
                            store(to, 16 * v, gate * sigmoid16(gate) * sums[r][v + 2], 1);
                        }
                    else
                        for (int v = 0; v < 4 && column + 16 * v < out; v++) store(to, 16 * v, sums[r][v], 1);
                }
            }
        }
        free(ordered);
    }
}

/* y[t] = sum_k weights[t, k] x[places[t, k]], plus `more`[t] where that is given. x: [M, D], y, more: [T, D]. */
void combine_experts(const bf16 *x, const int64_t *places, const float *weights, const bf16 *more, int64_t T, int64_t K,
                     int64_t D, bf16 *y, int64_t threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t t = 0; t < T; t++)
        for (int64_t d = 0; d < D; d += 16) {
            __m512 s = _mm512_setzero_ps();
            for (int64_t k = 0; k <= K; k++) {
                const bf16 *from = k < K ? x + places[t * K + k] * D + d : more + t * D + d;
                if (k == K && !more) continue;
                s = _mm512_fmadd_ps(load(from, 0, 1), _mm512_set1_ps(k < K ? weights[t * K + k] : 1.0f), s);
            }
            store(y, t * D + d, s, 1);
        }
}

/* Where a tensor's heads lie: token t's part of head h begins at at + t * token + h * head. */
typedef struct {
    const bf16 *at;
    int64_t token, head;
} Heads;

/* Bring the values of 2 tokens into order: number n of both, side by side. */
INLINE void interleave(const bf16 *a, const bf16 *b, int64_t V, uint32_t *to) {
    for (int64_t n = 0; n < V; n += 16) {
        __m512i high = b ? widen(b + n) : _mm512_setzero_si512();
        _mm512_storeu_si512(to + n, _mm512_or_si512(widen(a + n), _mm512_slli_epi32(high, 16)));
    }
}

/* Add p times 16 `wide` columns of the values of a block to what is held, times `keep`. */
INLINE void add_values(const pair *const *p, const uint32_t *values, int64_t V, int64_t rows, const int wide,
                       const float *keep, float *held) {
    __m512 sums[ROWS][4];
    tile_rows(p, 1, WIDE / 2, values, V, rows, wide, sums);
    for (int64_t r = 0; r < rows; r++)
        for (int v = 0; v < wide; v++) {
            float *to = held + r * V + 16 * v;
            _mm512_storeu_ps(to, _mm512_fmadd_ps(_mm512_loadu_ps(to), _mm512_set1_ps(keep[r]), sums[r][v]));
        }
}

/* Attend causally: token T - A + a looks at those up to itself, block by block with running maxima (2205.14135).

   q: [A, H, N + R]. The keys' first N features are those of the group, the last R those that all groups share.
   out: [A, H, V]. N and R are multiples of 32, V of 16; room: G * blocks * 32 * ((N + R) + V) numbers of 4 bytes. */
void attend_causally(const bf16 *q, const Heads *key, const Heads *shared, const Heads *value, int64_t A, int64_t T,
                     int64_t H, int64_t G, int64_t N, int64_t R, int64_t V, float scale, bf16 *out, uint32_t *room,
                     int64_t threads) {
    int64_t Q = N + R, blocks = (T + WIDE - 1) / WIDE, size = WIDE / 2 * (Q + V), turns = (A + 4 * ROWS - 1) / (4 * ROWS);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t n = 0; n < G * blocks; n++) { /* a block: Q/2 lines of 64 keys, then 32 lines of V values */
            int64_t g = n / blocks, s = n % blocks * WIDE;
            uint32_t *to = room + n * size, *values = to + WIDE / 2 * Q;
            for (int64_t v = 0; v < 4; v++) {
                int64_t t = s + 16 * v, tokens = T - t < 0 ? 0 : T - t < 16 ? T - t : 16;
                order(key->at + t * key->token + g * key->head, key->token, tokens, N, to + 16 * v, WIDE);
                if (R) order(shared->at + t * shared->token, shared->token, tokens, R, to + N / 2 * WIDE + 16 * v, WIDE);
            }
            for (int64_t i = 0; i < WIDE / 2; i++, values += V) {
                const bf16 *a = value->at + (s + 2 * i) * value->token + g * value->head;
                if (s + 2 * i < T)
                    interleave(a, s + 2 * i + 1 < T ? a + value->token : NULL, V, values);
                else
                    memset(values, 0, V * sizeof *values);
            }
        }
        float *held = aligned_alloc(64, ROWS * V * sizeof *held);
#pragma omp for schedule(dynamic)
        for (int64_t n = 0; n < H * turns; n++) {
            /* The last tokens look at most: they come first, so that no thread is left with a long piece. */
            int64_t h = n % H, from = (turns - 1 - n / H) * 4 * ROWS, to = from + 4 * ROWS < A ? from + 4 * ROWS : A;
            for (int64_t first = from; first < to; first += ROWS) {
                int64_t rows = to - first < ROWS ? to - first : ROWS, newest = T - A + first;
                float top[ROWS], total[ROWS];
                const pair *a[ROWS], *ps[ROWS];
                bf16 p[ROWS][WIDE];
                for (int64_t r = 0; r < rows; r++) {
                    a[r] = (const pair *)(q + ((first + r) * H + h) * Q), ps[r] = (const pair *)p[r];
                    top[r] = -INFINITY, total[r] = 0;
                }
                memset(held, 0, ROWS * V * sizeof *held);
                for (int64_t block = 0; block * WIDE <= newest + rows - 1; block++) {
                    const uint32_t *keys = room + (h / (H / G) * blocks + block) * size, *values = keys + WIDE / 2 * Q;
                    __m512 scores[ROWS][4];
                    float keep[ROWS];
                    tile_rows(a, 1, Q / 2, keys, WIDE, rows, 4, scores);
                    for (int64_t r = 0; r < rows; r++) {
                        int64_t seen = newest + r + 1 - block * WIDE; /* keys of the block that this token may see */
                        uint64_t mask = seen >= WIDE ? ~0ull : seen <= 0 ? 0 : (1ull << seen) - 1;
                        __m512 most = _mm512_set1_ps(top[r]), sum = _mm512_setzero_ps();
                        for (int v = 0; v < 4; v++) {
                            __m512 never = _mm512_set1_ps(-INFINITY);
                            scores[r][v] = _mm512_mask_mul_ps(never, (__mmask16)(mask >> 16 * v), scores[r][v],
                                                              _mm512_set1_ps(scale));
                            most = _mm512_max_ps(most, scores[r][v]);
                        }
                        float best = _mm512_reduce_max_ps(most);
                        keep[r] = top[r] == best ? 1.0f : expf(top[r] - best);
                        for (int v = 0; v < 4; v++) {
                            __m512 e = exp16(_mm512_sub_ps(scores[r][v], _mm512_set1_ps(best)));
                            e = _mm512_maskz_mov_ps((__mmask16)(mask >> 16 * v), e);
                            sum = _mm512_add_ps(sum, e);
                            store(p[r], 16 * v, e, 1);
                        }
                        total[r] = total[r] * keep[r] + _mm512_reduce_add_ps(sum);
                        top[r] = best;
                    }
                    int64_t n16 = 0;
                    for (; n16 + 64 <= V; n16 += 64) add_values(ps, values + n16, V, rows, 4, keep, held + n16);
                    for (; n16 + 32 <= V; n16 += 32) add_values(ps, values + n16, V, rows, 2, keep, held + n16);
                    if (n16 < V) add_values(ps, values + n16, V, rows, 1, keep, held + n16);
                }
                for (int64_t r = 0; r < rows; r++)
                    for (int64_t v = 0; v < V; v += 16)
                        store(out, ((first + r) * H + h) * V + v,
                              _mm512_mul_ps(_mm512_loadu_ps(held + r * V + v), _mm512_set1_ps(1.0f / total[r])), 1);
            }
        }
        free(held);
    }
}

#else

int64_t has_pairs(void) { return 0; }

#endif
