/* Matrix multiplications with bfloat16 weights and float32 sums, for inference (reading a prompt).

   Weights keep the layout of the checkpoint. Each thread packs 64 columns of the weights for the dot-product instruction
   just before it uses these columns. From about ten input rows on, packing takes little time beside the multiplication.
   The result of a row does not depend on the other rows or on the number of threads.

   Shapes: M rows, E matrices. */

#include "simd.h"

#ifdef BF16_PRODUCTS

#include <stdlib.h>

#define TILE_COLUMNS 64 /* columns of a tile */

/* y[m] = W_e x[m] for the rows m from offsets[e - 1] to offsets[e]; with `up`, y[m] = silu(W_e x) * (U_e x).

   x: [M, in]. w, up: E matrices [out, in], `stride` numbers apart. y: [M, out]. `in` is a multiple of 32. `out` is a
   multiple of 16, or of 32 with `up`. */
void linear(const bf16 *x, const int64_t *offsets, int64_t E, const bf16 *w, const bf16 *up, int64_t stride, int64_t in,
            int64_t out, bf16 *y, int64_t threads) {
    int64_t columns = up ? TILE_COLUMNS / 2 : TILE_COLUMNS, tiles = (out + columns - 1) / columns;
#pragma omp parallel num_threads(threads)
    {
        uint32_t *packed = aligned_alloc(64, in / 2 * TILE_COLUMNS * sizeof *packed);
#pragma omp for schedule(dynamic)
        for (int64_t n = 0; n < E * tiles; n++) {
            int64_t e = n / tiles, column = n % tiles * columns, first = e ? offsets[e - 1] : 0;
            if (first == offsets[e]) continue;
            for (int64_t v = 0; v < 4; v++) {
                const bf16 *from = up && v >= 2 ? up : w;
                int64_t row = column + (up ? v % 2 : v) * 16, rows = row < out ? 16 : 0;
                from += e * stride + (rows ? row : 0) * in;
                pack_vnni_transposed(from, in, rows, in, packed + 16 * v, TILE_COLUMNS);
            }
            for (int64_t m = first; m < offsets[e]; m += TILE_ROWS) {
                int64_t rows = offsets[e] - m < TILE_ROWS ? offsets[e] - m : TILE_ROWS;
                const bf16x2 *a[TILE_ROWS];
                __m512 sums[TILE_ROWS][4];
                for (int64_t r = 0; r < rows; r++) a[r] = (const bf16x2 *)(x + (m + r) * in);
                tile_rows(a, 1, in / 2, packed, TILE_COLUMNS, rows, 4, sums);
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
        free(packed);
    }
}

#endif
