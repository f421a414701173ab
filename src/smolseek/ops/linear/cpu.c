/* Products with weights in bfloat16, with float32 sums, where no gradient is wanted (reading a prompt).

   Matrices stay as they are stored. A block of one is brought into the instruction's order (pairs of a column's inputs,
   64 columns abreast) just before it is used, by the thread that uses it; with some ten rows of input that costs little
   beside the products. Every number of the result is summed in one order, whatever the other rows and the threads are.

   M rows, E matrices. */

#include "simd.h"

#ifdef BF16_PRODUCTS

#include <stdlib.h>

#define WIDE 64 /* columns of a tile */

/* y[m] = W_e x[m] for the rows m of matrix e, which end before ends[e]; with `up`, y[m] = silu(W_e x) * (U_e x).

   x: [M, in]. w, up: [out, in] for each matrix, `apart` numbers from the next. y: [M, out]. in is a multiple of 32, out
   of 16, with `up` of 32. */
void linear(const bf16 *x, const int64_t *ends, int64_t E, const bf16 *w, const bf16 *up, int64_t apart, int64_t in,
            int64_t out, bf16 *y, int64_t threads) {
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
                turn_rows(from + e * apart + (here ? row : 0) * in, in, here, in, ordered + 16 * v, WIDE);
            }
            for (int64_t m = first; m < ends[e]; m += ROWS) {
                int64_t rows = ends[e] - m < ROWS ? ends[e] - m : ROWS;
                const pair *a[ROWS];
                __m512 sums[ROWS][4];
                for (int64_t r = 0; r < rows; r++) a[r] = (const pair *)(x + (m + r) * in);
                tile_rows(a, 1, in / 2, ordered, WIDE, rows, 4, sums);
                for (int64_t r = 0; r < rows; r++) {
                    bf16 *to = y + (m + r) * out + column;
                    if (up)
                        for (int v = 0; v < 2; v++)
                            store(to, 16 * v, sums[r][v] * sigmoid(sums[r][v]) * sums[r][v + 2], 1);
                    else
                        for (int v = 0; v < 4 && column + 16 * v < out; v++) store(to, 16 * v, sums[r][v], 1);
                }
            }
        }
        free(ordered);
    }
}

#endif
