/* Permutes tokens into the order of their experts, and back. Shapes: N tokens, D features, K experts of a token,
   M = N * K slots sorted by expert. The slot of token n and its k-th expert is row slots[n K + k]. Sums are computed in
   float32 and in a fixed order. */

#include "simd.h"

INLINE void copy(const float *x, int64_t D, void *y, int64_t to, int64_t bfloat16) {
    for (int64_t d = 0; d < D; d += LANES)
        store_some(y, to + d, D - d, load_some(x, d, D - d, 0), bfloat16);
}

/* y[m] = x[order[m] / K], rounded. x: [N, D] float32. */
void permute(const float *x, const int64_t *order, int64_t M, int64_t K, int64_t D, void *y, int64_t bfloat16,
             int64_t threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t m = 0; m < M; m++) TYPED(copy, x + order[m] / K * D, D, y, m * D);
}

/* Write the sum of a token's K rows of x to y[to..]. `weights` are factors of the rows; if NULL, y is float32. */
INLINE void gather(const void *x, const int64_t *slots, const float *weights, int64_t K, int64_t D, void *y, int64_t to,
                   int64_t bfloat16) {
    for (int64_t d = 0; d < D; d += LANES) {
        lanes sum = {0};
        for (int64_t k = 0; k < K; k++) {
            lanes row = load_some(x, slots[k] * D + d, D - d, bfloat16);
            sum += weights ? row * weights[k] : row;
        }
        store_some(y, to + d, D - d, sum, weights ? bfloat16 : 0);
    }
}

/* dx[n] = the sum of dy[slots[n, k]] over k. dx: [N, D] float32. */
void permute_backward(const void *dy, const int64_t *slots, int64_t N, int64_t K, int64_t D, float *dx,
                      int64_t bfloat16, int64_t threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t n = 0; n < N; n++) TYPED(gather, dy, slots + n * K, NULL, K, D, dx, n * D);
}

/* y[n] = the sum of weights[n, k] x[slots[n, k]] over k. */
void unpermute(const void *x, const int64_t *slots, const float *weights, int64_t N, int64_t K, int64_t D, void *y,
               int64_t bfloat16, int64_t threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t n = 0; n < N; n++) TYPED(gather, x, slots + n * K, weights + n * K, K, D, y, n * D);
}

INLINE void scatter(const void *x, int64_t at, float weight, const void *dy, int64_t from, int64_t D, void *dx,
                    float *dweight, int64_t bfloat16) {
    lanes dot = {0};
    for (int64_t d = 0; d < D; d += LANES) {
        lanes dy_d = load_some(dy, from + d, D - d, bfloat16);
        dot += dy_d * load_some(x, at + d, D - d, bfloat16);
        store_some(dx, at + d, D - d, dy_d * weight, bfloat16);
    }
    *dweight = sum_lanes(dot, bfloat16);
}

/* dx[slots[n, k]] = weights[n, k] dy[n], dweights[n, k] = dy[n] . x[slots[n, k]]. */
void unpermute_backward(const void *x, const int64_t *slots, const float *weights, const void *dy, int64_t N, int64_t K,
                        int64_t D, void *dx, float *dweights, int64_t bfloat16, int64_t threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t n = 0; n < N * K; n++)
        TYPED(scatter, x, slots[n] * D, weights[n], dy, n / K * D, D, dx, dweights + n);
}
