/* What happens between the products of a training step, row by row, in one pass each: activations, the tokens' way to
   their experts and back, the loss. Built by kernels.py; rows_float.c has the same for float32. Numbers are bfloat16
   (half) or float32; sums are float32 and always in the same order, for any number of threads.

   Shapes: N tokens, D features, K experts of a token, M = N * K pairs sorted by expert, F neurons, V vocabulary. D, F and
   V are multiples of 16. */

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512DQ__)
#include "registers.h"

#include <math.h>

int64_t has_pairs(void) { return 1; }

/* y = silu(gate) * up. Rows of gate and up are `next` numbers from each other, those of y are F. */
void swiglu(const half *gate, const half *up, int64_t next, int64_t M, int64_t F, half *y, int64_t threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t m = 0; m < M; m++)
        for (int64_t f = 0; f < F; f += 16) {
            __m512 g = number(gate + m * next + f);
            put(y + m * F + f, _mm512_mul_ps(_mm512_mul_ps(g, sigmoid16(g)), number(up + m * next + f)));
        }
}

/* From dy: dgate, dup (rows as those of gate and up), and y once more. */
void swiglu_back(const half *gate, const half *up, int64_t next, int64_t M, int64_t F, const half *dy, half *dgate,
                 half *dup, half *y, int64_t threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t m = 0; m < M; m++)
        for (int64_t f = 0; f < F; f += 16) {
            __m512 g = number(gate + m * next + f), u = number(up + m * next + f), d = number(dy + m * F + f);
            __m512 s = sigmoid16(g), silu = _mm512_mul_ps(g, s);
            /* silu' = s + silu (1 - s) */
            __m512 slope = _mm512_fmadd_ps(silu, _mm512_sub_ps(_mm512_set1_ps(1.0f), s), s);
            put(dgate + m * next + f, _mm512_mul_ps(_mm512_mul_ps(d, u), slope));
            put(dup + m * next + f, _mm512_mul_ps(d, silu));
            put(y + m * F + f, _mm512_mul_ps(silu, u));
        }
}

/* y[m] = x[order[m] / K], rounded. x: [N, D] float32. */
void spread(const float *x, const int64_t *order, int64_t M, int64_t K, int64_t D, half *y, int64_t threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t m = 0; m < M; m++) {
        const float *from = x + order[m] / K * D;
        for (int64_t d = 0; d < D; d += 16) put(y + m * D + d, _mm512_loadu_ps(from + d));
    }
}

/* dx[n] = the sum of dy[places[n K + k]] over k. */
void gather(const half *dy, const int64_t *places, int64_t N, int64_t K, int64_t D, float *dx, int64_t threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t n = 0; n < N; n++)
        for (int64_t d = 0; d < D; d += 16) {
            __m512 sum = _mm512_setzero_ps();
            for (int64_t k = 0; k < K; k++) sum = _mm512_add_ps(sum, number(dy + places[n * K + k] * D + d));
            _mm512_storeu_ps(dx + n * D + d, sum);
        }
}

/* y[n] = the sum of weights[n, k] x[places[n K + k]] over k. */
void combine(const half *x, const int64_t *places, const float *weights, int64_t N, int64_t K, int64_t D, half *y,
             int64_t threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t n = 0; n < N; n++)
        for (int64_t d = 0; d < D; d += 16) {
            __m512 sum = _mm512_setzero_ps();
            for (int64_t k = 0; k < K; k++)
                sum = _mm512_fmadd_ps(number(x + places[n * K + k] * D + d), _mm512_set1_ps(weights[n * K + k]), sum);
            put(y + n * D + d, sum);
        }
}

/* dx[places[n K + k]] = weights[n, k] dy[n], dweights[n, k] = dy[n] . x[places[n K + k]]. */
void combine_back(const half *x, const int64_t *places, const float *weights, const half *dy, int64_t N, int64_t K,
                  int64_t D, half *dx, float *dweights, int64_t threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t n = 0; n < N; n++)
        for (int64_t k = 0; k < K; k++) {
            int64_t place = places[n * K + k] * D;
            __m512 weight = _mm512_set1_ps(weights[n * K + k]), dot = _mm512_setzero_ps();
            for (int64_t d = 0; d < D; d += 16) {
                __m512 own = number(dy + n * D + d);
                dot = _mm512_fmadd_ps(own, number(x + place + d), dot);
                put(dx + place + d, _mm512_mul_ps(own, weight));
            }
            dweights[n * K + k] = _mm512_reduce_add_ps(dot);
        }
}

/* losses[n] = log sum_v e^x[n, v] - x[n, target]; with d: d[n] = (softmax - one at the target) * factor. */
void cross_entropy(const half *x, const int64_t *targets, int64_t N, int64_t V, float factor, float *losses, half *d,
                   int64_t threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t n = 0; n < N; n++) {
        const half *row = x + n * V;
        half *to = d + n * V;
        __m512 tops[4], sums[4];
        for (int i = 0; i < 4; i++) tops[i] = _mm512_set1_ps(-INFINITY), sums[i] = _mm512_setzero_ps();
        int64_t whole = V / 64 * 64;
        for (int64_t v = 0; v < whole; v += 64)
            for (int i = 0; i < 4; i++) tops[i] = _mm512_max_ps(tops[i], number(row + v + 16 * i));
        for (int64_t v = whole; v < V; v += 16) tops[0] = _mm512_max_ps(tops[0], number(row + v));
        __m512 both = _mm512_max_ps(_mm512_max_ps(tops[0], tops[1]), _mm512_max_ps(tops[2], tops[3]));
        float best = _mm512_reduce_max_ps(both);
        __m512 top = _mm512_set1_ps(best);
        for (int64_t v = 0; v < whole; v += 64)
            for (int i = 0; i < 4; i++)
                sums[i] = _mm512_add_ps(sums[i], exp16(_mm512_sub_ps(number(row + v + 16 * i), top)));
        for (int64_t v = whole; v < V; v += 16)
            sums[0] = _mm512_add_ps(sums[0], exp16(_mm512_sub_ps(number(row + v), top)));
        both = _mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3]));
        float sum = _mm512_reduce_add_ps(both), target = value(row[targets[n]]);
        losses[n] = logf(sum) + best - target;
        if (!d) continue;
        /* The row is in the nearest cache still: to compute again costs less than to keep in float32. */
        __m512 share = _mm512_set1_ps(factor / sum);
        for (int64_t v = 0; v < V; v += 16)
            put(to + v, _mm512_mul_ps(exp16(_mm512_sub_ps(number(row + v), top)), share));
        to[targets[n]] = rounded((expf(target - best) / sum - 1) * factor);
    }
}

#else
#include <stdint.h>

int64_t has_pairs(void) { return 0; }

#endif
