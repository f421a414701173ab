/* What rows.c does in bfloat16, in float32 and for any processor: plain loops, which the compiler turns into what vector
   instructions there are. Names and shapes are those of rows.c; any D, F and V will do. */

#include "exponential.h"

#include <math.h>

static inline __attribute__((always_inline)) float sigmoid(float x) {
    float small = exp_negative(-__builtin_fabsf(x));
    return (x < 0.0f ? small : 1.0f) / (1.0f + small);
}

void swiglu_float(const float *gate, const float *up, int64_t next, int64_t M, int64_t F, float *y, int64_t threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t m = 0; m < M; m++) {
        const float *g = gate + m * next, *u = up + m * next;
        float *to = y + m * F;
#pragma omp simd
        for (int64_t f = 0; f < F; f++) to[f] = g[f] * sigmoid(g[f]) * u[f];
    }
}

void swiglu_back_float(const float *gate, const float *up, int64_t next, int64_t M, int64_t F, const float *dy,
                       float *dgate, float *dup, float *y, int64_t threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t m = 0; m < M; m++) {
        const float *g = gate + m * next, *u = up + m * next, *d = dy + m * F;
        float *dg = dgate + m * next, *du = dup + m * next, *to = y + m * F;
#pragma omp simd
        for (int64_t f = 0; f < F; f++) {
            float s = sigmoid(g[f]), silu = g[f] * s, own = d[f], other = u[f];
            dg[f] = own * other * (s + silu * (1.0f - s));
            du[f] = own * silu;
            to[f] = silu * other;
        }
    }
}

void spread_float(const float *x, const int64_t *order, int64_t M, int64_t K, int64_t D, float *y, int64_t threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t m = 0; m < M; m++) memcpy(y + m * D, x + order[m] / K * D, D * sizeof *y);
}

void gather_float(const float *dy, const int64_t *places, int64_t N, int64_t K, int64_t D, float *dx, int64_t threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t n = 0; n < N; n++) {
        float *to = dx + n * D;
        memcpy(to, dy + places[n * K] * D, D * sizeof *to);
        for (int64_t k = 1; k < K; k++) {
            const float *from = dy + places[n * K + k] * D;
#pragma omp simd
            for (int64_t d = 0; d < D; d++) to[d] += from[d];
        }
    }
}

void combine_float(const float *x, const int64_t *places, const float *weights, int64_t N, int64_t K, int64_t D,
                   float *y, int64_t threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t n = 0; n < N; n++) {
        float *to = y + n * D;
        memset(to, 0, D * sizeof *to);
        for (int64_t k = 0; k < K; k++) {
            const float *from = x + places[n * K + k] * D, weight = weights[n * K + k];
#pragma omp simd
            for (int64_t d = 0; d < D; d++) to[d] += weight * from[d];
        }
    }
}

void combine_back_float(const float *x, const int64_t *places, const float *weights, const float *dy, int64_t N,
                        int64_t K, int64_t D, float *dx, float *dweights, int64_t threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t n = 0; n < N; n++)
        for (int64_t k = 0; k < K; k++) {
            const float *own = dy + n * D, *from = x + places[n * K + k] * D, weight = weights[n * K + k];
            float *to = dx + places[n * K + k] * D, dot = 0.0f;
#pragma omp simd reduction(+ : dot)
            for (int64_t d = 0; d < D; d++) {
                dot += own[d] * from[d];
                to[d] = weight * own[d];
            }
            dweights[n * K + k] = dot;
        }
}

#define PART 1024 /* numbers whose sum is float32; the sum of these sums is float64 */

void cross_entropy_float(const float *x, const int64_t *targets, int64_t N, int64_t V, float factor, float *losses,
                         float *d, int64_t threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t n = 0; n < N; n++) {
        const float *row = x + n * V;
        float *to = d + n * V, top = -INFINITY;
#pragma omp simd reduction(max : top)
        for (int64_t v = 0; v < V; v++) top = row[v] > top ? row[v] : top;
        double sum = 0.0;
        for (int64_t begin = 0; begin < V; begin += PART) {
            int64_t end = begin + PART < V ? begin + PART : V;
            float part = 0.0f;
#pragma omp simd reduction(+ : part)
            for (int64_t v = begin; v < end; v++) part += exp_negative(row[v] - top);
            sum += part;
        }
        float target = row[targets[n]];
        losses[n] = (float)(log(sum) + ((double)top - target));
        if (!d) continue;
        float share = (float)(factor / sum);
        /* The row may be where the gradient goes: each number is read before its place is written. */
#pragma omp simd
        for (int64_t v = 0; v < V; v++) to[v] = exp_negative(row[v] - top) * share;
        to[targets[n]] = (float)((exp((double)target - top) / sum - 1.0) * factor);
    }
}
