/* Matrix multiplications with bfloat16 weights and float32 sums, for inference (reading a prompt).

   Weights keep the layout of the checkpoint. With the dot-product instruction, each thread packs 64 columns of the weights
   just before it uses these columns. From about ten input rows on, packing takes little time beside the multiplication.
   With the tile registers of AMX, the inputs are packed instead, and the products are transposed.
   The result of a row does not depend on the other rows or on the number of threads.

   Shapes: M rows, E matrices. */

#include "simd.h"

#ifdef BF16_PRODUCTS

#include <stdlib.h>

#define BLOCK 64 /* columns of the weights that are packed together */

INLINE vec silu_times(vec gate, vec up) { return gate * sigmoid(gate) * up; }

#ifdef __AMX_BF16__
#include <sys/syscall.h>
#include <unistd.h>

/* Return whether this process may use the tile registers; Linux must be asked once. */
static int amx_allowed(void) {
    static int allowed = -1;
    if (allowed < 0) allowed = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0;
    return allowed;
}

/* Give all eight tile registers 16 rows of 64 bytes. */
static void configure_tiles(void) {
    struct {
        uint8_t palette, start, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } config __attribute__((aligned(64))) = {.palette = 1};
    for (int t = 0; t < 8; t++) config.bytes[t] = 64, config.rows[t] = 16;
    _tile_loadconfig(&config);
}

#define INPUTS 32 /* inputs that are packed together, as [in / 2, INPUTS] pairs */
#define GROUP 256 /* inputs that stay in the cache while all weights of a matrix are read */

/* sums[s][o][m] = w_s[o] . x[m] for 16 rows of each of two matrices, and 16 * `tiles` packed inputs. */
INLINE void products(const bf16 *const w[2], int64_t in, const uint32_t *x, const int tiles, float sums[2][16][INPUTS]) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t i = 0; i < in; i += 32, x += 16 * INPUTS) {
        _tile_loadd(4, w[0] + i, in * sizeof(bf16));
        _tile_loadd(5, w[1] + i, in * sizeof(bf16));
        _tile_loadd(6, x, INPUTS * sizeof *x);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 5, 6);
        if (tiles > 1) {
            _tile_loadd(7, x + 16, INPUTS * sizeof *x);
            _tile_dpbf16ps(2, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, sums[0][0], INPUTS * sizeof(float));
    _tile_stored(1, sums[1][0], INPUTS * sizeof(float));
    if (tiles > 1) _tile_stored(2, sums[0][0] + 16, INPUTS * sizeof(float));
    if (tiles > 1) _tile_stored(3, sums[1][0] + 16, INPUTS * sizeof(float));
}

/* Store the outputs of at most INPUTS inputs. With `up` the result is silu(sums[0]) * sums[1]. */
static void store_transposed(float sums[2][16][INPUTS], int64_t rows, int64_t up, bf16 *y, int64_t out) {
    for (int64_t m = 0; m < rows; m += 16) {
        float transposed[16][16] __attribute__((aligned(64)));
        for (int o = 0; o < 16 && up; o++)
            store(sums[0][o], m, silu_times(load(sums[0][o], m, 0), load(sums[1][o], m, 0)), 0);
        for (int s = 0; s < (up ? 1 : 2); s++) {
            transpose_16x16((const bf16 *)(sums[s][0] + m), 2 * INPUTS, 16, (uint32_t *)transposed, 16);
            for (int64_t r = 0; r < 16 && m + r < rows; r++)
                store(y + (m + r) * out, 16 * s, load(transposed[r], 0, 0), 1);
        }
    }
}

typedef struct {
    int64_t e, first, rows;
    uint32_t *packed;
} Group; /* at most GROUP inputs of one matrix */

static void amx_linear(const bf16 *x, const int64_t *offsets, int64_t E, const bf16 *w, const bf16 *up, int64_t stride,
                       int64_t in, int64_t out, bf16 *y, int64_t threads) {
    int64_t count = 0, most = E + offsets[E - 1] / GROUP, block = in / 2 * INPUTS;
    Group *groups = malloc(most * sizeof *groups);
    uint32_t *packed = aligned_alloc(64, (offsets[E - 1] / INPUTS + most) * block * sizeof *packed), *next = packed;
    for (int64_t e = 0; e < E; e++)
        for (int64_t m = e ? offsets[e - 1] : 0, rows; m < offsets[e]; m += rows) {
            rows = offsets[e] - m < GROUP ? offsets[e] - m : GROUP;
            groups[count++] = (Group){e, m, rows, next};
            next += (rows + INPUTS - 1) / INPUTS * block;
        }
    int64_t outputs = up ? 16 : 32, strips = out / outputs;
#pragma omp parallel num_threads(threads)
    {
        configure_tiles();
#pragma omp for schedule(dynamic)
        for (int64_t n = 0; n < count; n++)
            for (int64_t m = 0; m < groups[n].rows; m += 16)
                pack_vnni_transposed(x + (groups[n].first + m) * in, in, groups[n].rows - m, in,
                                     groups[n].packed + m / INPUTS * block + m % INPUTS, INPUTS);
#pragma omp for schedule(dynamic, 4)
        for (int64_t n = 0; n < count * strips; n++) {
            Group group = groups[n / strips];
            int64_t o = n % strips * outputs;
            const bf16 *from = w + group.e * stride + o * in;
            const bf16 *const both[2] = {from, up ? up + (from - w) : from + 16 * in};
            for (int64_t m = 0; m < group.rows; m += INPUTS) {
                float sums[2][16][INPUTS] __attribute__((aligned(64)));
                int64_t rows = group.rows - m < INPUTS ? group.rows - m : INPUTS;
                if (rows > 16)
                    products(both, in, group.packed + m / INPUTS * block, 2, sums);
                else
                    products(both, in, group.packed + m / INPUTS * block, 1, sums);
                store_transposed(sums, rows, up != 0, y + (group.first + m) * out + o, out);
            }
        }
        _tile_release();
    }
    free(packed);
    free(groups);
}
#endif

static void avx512_linear(const bf16 *x, const int64_t *offsets, int64_t E, const bf16 *w, const bf16 *up, int64_t stride,
                          int64_t in, int64_t out, bf16 *y, int64_t threads) {
    int64_t columns = up ? BLOCK / 2 : BLOCK, tiles = (out + columns - 1) / columns;
#pragma omp parallel num_threads(threads)
    {
        uint32_t *packed = aligned_alloc(64, in / 2 * BLOCK * sizeof *packed);
#pragma omp for schedule(dynamic)
        for (int64_t n = 0; n < E * tiles; n++) {
            int64_t e = n / tiles, column = n % tiles * columns, first = e ? offsets[e - 1] : 0;
            if (first == offsets[e]) continue;
            for (int64_t v = 0; v < 4; v++) {
                const bf16 *from = up && v >= 2 ? up : w;
                int64_t row = column + (up ? v % 2 : v) * 16, rows = row < out ? 16 : 0;
                from += e * stride + (rows ? row : 0) * in;
                pack_vnni_transposed(from, in, rows, in, packed + 16 * v, BLOCK);
            }
            for (int64_t m = first; m < offsets[e]; m += TILE_ROWS) {
                int64_t rows = offsets[e] - m < TILE_ROWS ? offsets[e] - m : TILE_ROWS;
                const bf16x2 *a[TILE_ROWS];
                __m512 sums[TILE_ROWS][4];
                for (int64_t r = 0; r < rows; r++) a[r] = (const bf16x2 *)(x + (m + r) * in);
                tile_rows(a, 1, in / 2, packed, BLOCK, rows, 4, sums);
                for (int64_t r = 0; r < rows; r++) {
                    bf16 *to = y + (m + r) * out + column;
                    if (up)
                        for (int v = 0; v < 2; v++) store(to, 16 * v, silu_times(sums[r][v], sums[r][v + 2]), 1);
                    else
                        for (int v = 0; v < 4 && column + 16 * v < out; v++) store(to, 16 * v, sums[r][v], 1);
                }
            }
        }
        free(packed);
    }
}

/* y[m] = W_e x[m] for the rows m from offsets[e - 1] to offsets[e]; with `up`, y[m] = silu(W_e x) * (U_e x).

   x: [M, in]. w, up: E matrices [out, in], `stride` numbers apart. y: [M, out]. `in` is a multiple of 32. `out` is a
   multiple of 32. */
void linear(const bf16 *x, const int64_t *offsets, int64_t E, const bf16 *w, const bf16 *up, int64_t stride, int64_t in,
            int64_t out, bf16 *y, int64_t threads) {
#ifdef __AMX_BF16__
    if (amx_allowed()) {
        amx_linear(x, offsets, E, w, up, stride, in, out, y, threads);
        return;
    }
#endif
    avx512_linear(x, offsets, E, w, up, stride, in, out, y, threads);
}

#endif
