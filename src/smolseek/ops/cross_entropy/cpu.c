/* The cross-entropy of a chunk of logits, and its gradient, which overwrites the logits. Shapes: N tokens, V logits of a
   token. */

#include "simd.h"

#include <math.h>

#define PART 1024 /* numbers that are added in float32; the sums of all parts are added in float64 */

INLINE float largest(const void *x, int64_t at, int64_t V, int64_t bfloat16) {
    lanes tops[4];
    for (int i = 0; i < 4; i++) tops[i] = (lanes){0} - INFINITY;
    int64_t v = 0;
    for (; v + 4 * LANES <= V; v += 4 * LANES)
        for (int i = 0; i < 4; i++) tops[i] = max_lanes(load_some(x, at + v + LANES * i, LANES, bfloat16), tops[i]);
    lanes top = max_lanes(max_lanes(tops[0], tops[1]), max_lanes(tops[2], tops[3]));
    float best = -INFINITY;
    for (int l = 0; l < LANES; l++) best = top[l] > best ? top[l] : best;
    for (; v < V; v++) {
        float one = load1(x, at + v, bfloat16);
        best = one > best ? one : best;
    }
    return best;
}

/* Return the sum of e^(x - top). Logits in bfloat16 are so coarse that their sum does not need float64. */
INLINE double exponentials(const void *x, int64_t at, int64_t V, float top, int64_t bfloat16) {
    if (bfloat16) {
        lanes sums[4] = {{0}};
        int64_t v = 0;
        for (; v + 4 * LANES <= V; v += 4 * LANES)
            for (int i = 0; i < 4; i++) sums[i] += exp_lanes(load_some(x, at + v + LANES * i, LANES, 1) - top);
        for (; v < V; v += LANES) sums[0] += exp_lanes(load_some(x, at + v, LANES, 1) - top);
        return sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]), 1);
    }
    double total = 0.0;
    for (int64_t begin = 0; begin < V; begin += PART) {
        int64_t v = begin, end = begin + PART < V ? begin + PART : V;
        lanes part = {0};
        for (; v + LANES <= end; v += LANES) part += exp_lanes(load_some(x, at + v, LANES, 0) - top);
        total += sum_lanes(part, 0);
        for (; v < end; v++) total += exp_lanes((lanes){load1(x, at + v, 0) - top})[0];
    }
    return total;
}

/* d = e^(x - top) * share, for n numbers. */
INLINE void probabilities(const void *x, int64_t i, int64_t n, float top, float share, void *d, int64_t bfloat16) {
    store_some(d, i, n, exp_lanes(load_some(x, i, n, bfloat16) - top) * share, bfloat16);
}

INLINE void row(const void *x, int64_t at, int64_t target, int64_t V, float factor, float *loss, void *d,
                int64_t bfloat16) {
    float top = largest(x, at, V, bfloat16), target_logit = load1(x, at + target, bfloat16);
    double total = exponentials(x, at, V, top, bfloat16);
    *loss = bfloat16 ? logf(total) + top - target_logit : (float)(log(total) + ((double)top - target_logit));
    if (!d) return;
    /* The row is still in the L1 or L2 cache, and computing the exponentials again is cheaper than storing them. */
    float share = (float)(factor / total);
    int64_t v = 0;
    for (; v + LANES <= V; v += LANES) probabilities(x, at + v, LANES, top, share, d, bfloat16);
    if (v < V) probabilities(x, at + v, V - v, top, share, d, bfloat16);
    store1(d, at + target, (float)((exp((double)target_logit - top) / total - 1.0) * factor), bfloat16);
}

/* losses[n] = log sum_v e^x[n, v] - x[n, target]. If d is not NULL, d[n] = (softmax - one-hot target) * factor. d may be
   x. */
void cross_entropy(const void *x, const int64_t *targets, int64_t N, int64_t V, float factor, float *losses, void *d,
                   int64_t bfloat16, int64_t threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t n = 0; n < N; n++) TYPED(row, x, n * V, targets[n], V, factor, losses + n, d);
}
