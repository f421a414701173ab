/* Expands quantised weights to float32 or bfloat16. */

#include "quantized.h"

INLINE void typed_expand(const uint8_t *x, int64_t number, void *y, int64_t bfloat16, int64_t threads,
                         const int64_t format) {
    int64_t part = 1024;
#pragma omp parallel for num_threads(threads)
    for (int64_t n = 0; n < number; n += part)
        for (int64_t i = n; i < n + part && i < number; i++)
            expand_block(x + i * format_bytes(BLOCK, format), format, y, i * BLOCK, bfloat16);
}

/* y: the weights of `number` blocks. */
void expand(const uint8_t *x, int64_t number, int64_t format, void *y, int64_t bfloat16, int64_t threads) {
    switch (format) {
    case Q8_0: typed_expand(x, number, y, bfloat16, threads, Q8_0); break;
    case Q4_0: typed_expand(x, number, y, bfloat16, threads, Q4_0); break;
    default: typed_expand(x, number, y, bfloat16, threads, Q4_1);
    }
}
