/* Linear layers of a decoding step, for weights in every number format of quantized.h.

   With up to four inputs a step takes as long as reading the weights. With more inputs the multiplications take longer, so
   `many_inputs` uses each weight and each input more often. Both ways add the same products in the same order. */

#include "cpu_decode.h"

/* totals[b][r] = the sixteen partial sums of w . x[b] for b < NB, where NB is a compile-time constant. Four running sums
   hide the latency of an addition. The last columns, fewer than sixteen, are left out. The
   bytes that lie `prefetch` further on are requested from memory. */
INLINE void dot(const void *w, int64_t cols, const float *const *x, const int NB, const int64_t bfloat16,
                int64_t prefetch, int r, vec totals[4][4]) {
    vec acc[4][4] = {{{0}}};
    int64_t i = 0;
    for (; i + 64 <= cols; i += 64)
        for (int part = 0; part < 4; part++) {
            vec weight = load(w, i + 16 * part, bfloat16);
            if (part % 2 == 0) request((const char *)at(w, i + 16 * part, bfloat16) + prefetch);
            for (int b = 0; b < NB; b++) acc[part][b] += weight * load(x[b], i + 16 * part, 0);
        }
    for (; i + 16 <= cols; i += 16) {
        vec weight = load(w, i, bfloat16);
        for (int b = 0; b < NB; b++) acc[0][b] += weight * load(x[b], i, 0);
    }
    for (int b = 0; b < NB; b++) totals[b][r] = (acc[0][b] + acc[1][b]) + (acc[2][b] + acc[3][b]);
}

#ifdef AVX512
/* `dot` of four rows for one input, with the same additions. The rows are read side by side. */
INLINE void dot_four_rows(const char *w, int64_t bytes, int64_t cols, const float *x, const int64_t bfloat16,
                          int64_t prefetch, vec totals[4][4]) {
    vec acc[4][4] = {{{0}}};
    int64_t i = 0;
    for (; i + 64 <= cols; i += 64)
        for (int part = 0; part < 4; part++) {
            vec input = load(x, i + 16 * part, 0);
            for (int r = 0; r < 4; r++) {
                const char *row = w + r * bytes;
                if (part % 2 == 0 || !bfloat16) request((const char *)at(row, i + 16 * part, bfloat16) + prefetch);
                acc[part][r] += load(row, i + 16 * part, bfloat16) * input;
            }
        }
    for (; i + 16 <= cols; i += 16)
        for (int r = 0; r < 4; r++) acc[0][r] += load(w + r * bytes, i, bfloat16) * load(x, i, 0);
    for (int r = 0; r < 4; r++) totals[0][r] = (acc[0][r] + acc[1][r]) + (acc[2][r] + acc[3][r]);
}
#endif

/* `dot` for quantised weights. The products, and the order in which they are added, are those of float32 weights. */
INLINE void quantized_dot(const uint8_t *w, int64_t cols, const float *const *x, const int NB, const int64_t format,
                          int r, vec totals[4][4]) {
    enum { COUNT = BLOCK / LANES };
    const int64_t bytes = format_bytes(BLOCK, format);
    lanes acc[4][2 * COUNT] = {{{0}}}, weights[COUNT];
    int64_t i = 0;
    for (; i + 2 * BLOCK <= cols; i += 2 * BLOCK)
        for (int block = 0; block < 2; block++, w += bytes) {
            load_block(w, format, weights);
            request(w + 4096);
            for (int part = 0; part < COUNT; part++)
                for (int b = 0; b < NB; b++)
                    acc[b][block * COUNT + part] +=
                        weights[part] * load_some(x[b], i + block * BLOCK + part * LANES, LANES, 0);
        }
    if (i < cols) { /* one block is left: `dot` adds both of its vectors to the first running sum */
        load_block(w, format, weights);
        for (int part = 0; part < COUNT; part++)
            for (int b = 0; b < NB; b++)
                acc[b][part % (COUNT / 2)] += weights[part] * load_some(x[b], i + part * LANES, LANES, 0);
    }
    for (int b = 0; b < NB; b++) {
        vec v[4];
        memcpy(v, acc[b], sizeof v);
        totals[b][r] = (v[0] + v[1]) + (v[2] + v[3]);
    }
}

/* The sums of four vectors, each with the additions of `sum`. */
INLINE vec4 sum_4(const vec *v) {
#ifdef AVX512
    __m512 ab = _mm512_shuffle_f32x4(v[0], v[1], 0x44) + _mm512_shuffle_f32x4(v[0], v[1], 0xEE);
    __m512 cd = _mm512_shuffle_f32x4(v[2], v[3], 0x44) + _mm512_shuffle_f32x4(v[2], v[3], 0xEE);
    __m512 four = _mm512_shuffle_f32x4(ab, cd, 0x88) + _mm512_shuffle_f32x4(ab, cd, 0xDD); /* 4 numbers of each */
    four += _mm512_permute_ps(four, 0x4E); /* 0 + 2, 1 + 3 */
    four += _mm512_permute_ps(four, 0xB1);
    return (vec4){four[0], four[4], four[8], four[12]};
#else
    return (vec4){sum(v[0]), sum(v[1]), sum(v[2]), sum(v[3])};
#endif
}

/* The outputs o to o + rows - 1, at most four, for NB inputs. */
INLINE void four_outputs(const char *w, int64_t bytes, int64_t cols, const float *const *x, float *const *y, int64_t o,
                         int64_t rows, int64_t prefetch, const int NB, const int64_t format) {
    vec totals[4][4] = {{{0}}};
#ifdef AVX512
    if (NB == 1 && rows == 4 && (format == FLOAT32 || format == BFLOAT16)) {
        dot_four_rows(w + o * bytes, bytes, cols, x[0], format, prefetch, totals);
    } else
#endif
    for (int r = 0; r < rows; r++) {
        if (format == FLOAT32 || format == BFLOAT16)
            dot(w + (o + r) * bytes, cols, x, NB, format, prefetch, r, totals);
        else
            quantized_dot((const uint8_t *)w + (o + r) * bytes, cols, x, NB, format, r, totals);
    }
    for (int b = 0; b < NB; b++) {
        vec4 sums = sum_4(totals[b]);
        for (int r = 0; r < rows; r++) {
            float s = sums[r];
            if (format == FLOAT32 || format == BFLOAT16)
                for (int64_t j = cols / 16 * 16; j < cols; j++) s += load1(w + (o + r) * bytes, j, format) * x[b][j];
            y[b][o + r] = s;
        }
    }
}

#ifdef AVX512
#define LONGEST 16384 /* columns of a row that `many_inputs` supports */

/* totals[b][r] as in `dot`, for two rows of float32 at once: their sums for three inputs fill the registers. */
INLINE void dot_two_rows(const float *w, int64_t stride, int64_t cols, const float *const *x, const int NB, int first,
                         vec totals[4][4]) {
    vec acc[4][2][3] = {{{{0}}}};
    int64_t i = 0;
    for (; i + 64 <= cols; i += 64)
        for (int part = 0; part < 4; part++)
            for (int b = 0; b < NB; b++)
                for (int r = 0; r < 2; r++)
                    acc[part][r][b] += load(w + r * stride, i + 16 * part, 0) * load(x[b], i + 16 * part, 0);
    for (; i + 16 <= cols; i += 16)
        for (int b = 0; b < NB; b++)
            for (int r = 0; r < 2; r++) acc[0][r][b] += load(w + r * stride, i, 0) * load(x[b], i, 0);
    for (int b = 0; b < NB; b++)
        for (int r = 0; r < 2; r++)
            totals[b][first + r] = (acc[0][r][b] + acc[1][r][b]) + (acc[2][r][b] + acc[3][r][b]);
}

/* Four outputs for NB inputs, at most three, and float32 weights with a multiple of 16 columns. */
INLINE void four_outputs_of_float32(const float *w, int64_t stride, int64_t cols, const float *const *x, float *const *y,
                                    int64_t o, const int NB) {
    vec totals[4][4];
    for (int r = 0; r < 4; r += 2) dot_two_rows(w + r * stride, stride, cols, x, NB, r, totals);
    for (int b = 0; b < NB; b++) {
        vec4 sums = sum_4(totals[b]);
        memcpy(y[b] + o, &sums, sizeof sums);
    }
}

/* Expand a row to float32. The bytes that lie `prefetch` further on are requested from memory. */
INLINE void expand_row(const char *w, int64_t cols, float *y, int64_t prefetch, const int64_t format) {
    int64_t i = 0;
    if (format == BFLOAT16) {
        for (; i + 32 <= cols; i += 32) {
            request(w + 2 * i + prefetch);
            store(y, i, load(w, i, 1), 0);
            store(y, i + 16, load(w, i + 16, 1), 0);
        }
        for (; i < cols; i++) y[i] = load1(w, i, 1);
    } else
        for (; i < cols; i += BLOCK) {
            const uint8_t *block = (const uint8_t *)w + format_bytes(i, format);
            request(block + prefetch);
            expand_block(block, format, y, i, 0);
        }
}

/* The outputs lo <= o < hi for many inputs, four at a time. The weights of four outputs are expanded once for all inputs.
   Returns the first output that is left. */
INLINE int64_t many_inputs(const char *w, int64_t stride, int64_t cols, const float *const *x, float *const *y, int64_t n,
                           int64_t lo, int64_t hi, int64_t prefetch, const int64_t format) {
    float expanded[format == FLOAT32 ? 1 : 4 * LONGEST];
    int64_t bytes = format_bytes(stride, format), o = lo;
    for (; o + 4 <= hi; o += 4) {
        const float *weights = (const float *)(w + o * bytes);
        if (format != FLOAT32) {
            for (int r = 0; r < 4; r++) expand_row(w + (o + r) * bytes, cols, expanded + r * cols, prefetch, format);
            weights = expanded;
        }
        int64_t b = 0, width = format == FLOAT32 ? stride : cols;
        for (; b + 3 <= n; b += 3) four_outputs_of_float32(weights, width, cols, x + b, y + b, o, 3);
        if (n - b == 2)
            four_outputs_of_float32(weights, width, cols, x + b, y + b, o, 2);
        else if (n - b == 1)
            four_outputs_of_float32(weights, width, cols, x + b, y + b, o, 1);
    }
    return o;
}
#endif

INLINE void typed_outputs(const char *w, int64_t stride, int64_t cols, const float *const *x, float *const *y, int64_t n,
                          int64_t lo, int64_t hi, const int64_t format) {
    /* A matrix is read in the order of memory; rows of a cache are far apart. */
    int64_t bytes = format_bytes(stride, format), prefetch = stride == cols ? 8192 : 16 * bytes, o = lo;
#ifdef AVX512
    if (n > 4 && cols % 16 == 0 && cols <= LONGEST)
        o = many_inputs(w, stride, cols, x, y, n, lo, hi, prefetch, format);
#endif
    for (; o < hi; o += 4) {
        int64_t rows = hi - o < 4 ? hi - o : 4, b = 0;
        for (; b + 4 <= n; b += 4) four_outputs(w, bytes, cols, x + b, y + b, o, rows, prefetch, 4, format);
        if (n - b == 3)
            four_outputs(w, bytes, cols, x + b, y + b, o, rows, prefetch, 3, format);
        else if (n - b == 2)
            four_outputs(w, bytes, cols, x + b, y + b, o, rows, prefetch, 2, format);
        else if (n - b == 1)
            four_outputs(w, bytes, cols, x + b, y + b, o, rows, prefetch, 1, format);
    }
}

void linear_outputs(Matrix w, int64_t stride, int64_t cols, const float *const *x, float *const *y, int64_t n, int64_t lo,
                    int64_t hi) {
    switch (w.format) {
    case FLOAT32: typed_outputs(w.data, stride, cols, x, y, n, lo, hi, FLOAT32); break;
    case BFLOAT16: typed_outputs(w.data, stride, cols, x, y, n, lo, hi, BFLOAT16); break;
    case Q8_0: typed_outputs(w.data, stride, cols, x, y, n, lo, hi, Q8_0); break;
    case Q4_0: typed_outputs(w.data, stride, cols, x, y, n, lo, hi, Q4_0); break;
    default: typed_outputs(w.data, stride, cols, x, y, n, lo, hi, Q4_1);
    }
}

void linear(Matrix w, const float *bias, int64_t out, int64_t in, const float *x, float *y, int64_t B, int me, int all) {
    const float *xs[MAX_BATCH];
    float *ys[MAX_BATCH];
    int64_t lo, hi;
    share(out, me, all, &lo, &hi);
    for (int64_t b = 0; b < B; b++) xs[b] = x + b * in, ys[b] = y + b * out;
    linear_outputs(w, in, in, xs, ys, B, lo, hi);
    if (bias)
        for (int64_t b = 0; b < B; b++)
            for (int64_t o = lo; o < hi; o++) ys[b][o] += bias[o];
}

void load_row(Matrix w, int64_t cols, int64_t row, float *y) {
    const char *from = (const char *)w.data + row * format_bytes(cols, w.format);
    if (w.format == FLOAT32 || w.format == BFLOAT16)
        for (int64_t i = 0; i < cols; i++) y[i] = load1(from, i, w.format);
    else
        for (int64_t i = 0; i < cols; i += BLOCK)
            expand_block((const uint8_t *)from + format_bytes(i, w.format), w.format, y, i, 0);
}
