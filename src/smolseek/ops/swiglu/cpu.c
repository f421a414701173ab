/* silu(gate) * up and its gradient. Shapes: M rows, F neurons. */

#include "simd.h"

/* Whether the compiler supports OpenMP; otherwise all functions use one thread. */
int64_t has_openmp(void) {
#ifdef _OPENMP
    return 1;
#else
    return 0;
#endif
}

INLINE void forward(const void *gate, const void *up, int64_t at, int64_t F, void *y, int64_t to, int64_t bfloat16) {
    for (int64_t f = 0; f < F; f += LANES) {
        lanes g = load_some(gate, at + f, F - f, bfloat16);
        store_some(y, to + f, F - f, g * sigmoid(g) * load_some(up, at + f, F - f, bfloat16), bfloat16);
    }
}

INLINE void backward(const void *gate, const void *up, int64_t at, int64_t F, const void *dy, void *dgate, void *dup,
                     void *y, int64_t to, int64_t bfloat16) {
    for (int64_t f = 0; f < F; f += LANES) {
        lanes g = load_some(gate, at + f, F - f, bfloat16), u = load_some(up, at + f, F - f, bfloat16);
        lanes d = load_some(dy, to + f, F - f, bfloat16), s = sigmoid(g), silu = g * s;
        store_some(dgate, at + f, F - f, d * u * (s + silu * (1.0f - s)), bfloat16);
        store_some(dup, at + f, F - f, d * silu, bfloat16);
        store_some(y, to + f, F - f, silu * u, bfloat16);
    }
}

/* The rows of gate and up are `stride` numbers apart, the rows of y are F numbers apart. */
void swiglu(const void *gate, const void *up, int64_t stride, int64_t M, int64_t F, void *y, int64_t bfloat16,
            int64_t threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t m = 0; m < M; m++) TYPED(forward, gate, up, m * stride, F, y, m * F);
}

/* Compute dgate and dup from dy, and compute y again. The rows of gate, up, dgate and dup are `stride` numbers apart. */
void swiglu_backward(const void *gate, const void *up, int64_t stride, int64_t M, int64_t F, const void *dy,
                     void *dgate, void *dup, void *y, int64_t bfloat16, int64_t threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t m = 0; m < M; m++) TYPED(backward, gate, up, m * stride, F, dy, dgate, dup, y, m * F);
}
