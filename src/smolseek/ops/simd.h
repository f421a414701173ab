/* Float32 vectors for all C files of the package. In memory the numbers are float32 or bfloat16.

   The argument `bfloat16` selects the number format in memory. Callers pass a constant, so that one source file is
   compiled for both formats. A `vec` has 16 lanes on every processor, so that the order of its sum is the same
   everywhere. A `lanes` has as many lanes as a register. */

#include <stdint.h>
#include <string.h>

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512DQ__)
#define BF16_PRODUCTS /* the processor has a dot product of bfloat16 pairs */
#endif
#if defined(__AVX512F__) || defined(BF16_PRODUCTS)
#define AVX512
#define LANES 16
#include <immintrin.h>
#elif defined(__AVX__)
#define LANES 8
#include <immintrin.h>
#else
#define LANES 4
#endif

#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(64)));
typedef float vec8 __attribute__((vector_size(32)));
typedef float vec4 __attribute__((vector_size(16)));
typedef uint16_t short_vec __attribute__((vector_size(32)));
typedef uint32_t uint_vec __attribute__((vector_size(64)));
typedef float lanes __attribute__((vector_size(4 * LANES)));
typedef int32_t int_lanes __attribute__((vector_size(4 * LANES)));
typedef uint16_t bf16; /* the bits of a bfloat16 */

/* Call `f` with the number format as a constant. */
#define TYPED(f, ...) (bfloat16 ? f(__VA_ARGS__, 1) : f(__VA_ARGS__, 0))

INLINE const void *at(const void *w, int64_t i, int64_t bfloat16) {
    return (const char *)w + i * (bfloat16 ? 2 : 4);
}

#ifdef AVX512
INLINE __m512i widen(const bf16 *at) { return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)at)); }
#else
INLINE uint_vec widen(const bf16 *at) {
    short_vec s;
    memcpy(&s, at, sizeof s);
    return __builtin_convertvector(s, uint_vec);
}
#endif

INLINE vec load(const void *w, int64_t i, int64_t bfloat16) {
    vec out;
    if (bfloat16) return (vec)((uint_vec)widen((const bf16 *)w + i) << 16);
    memcpy(&out, (const float *)w + i, sizeof out);
    return out;
}

INLINE float load1(const void *w, int64_t i, int64_t bfloat16) {
    if (!bfloat16) return ((const float *)w)[i];
    uint32_t bits = (uint32_t)((const bf16 *)w)[i] << 16;
    float out;
    memcpy(&out, &bits, sizeof out);
    return out;
}

/* Load the first n numbers, at most LANES, and then zeros. For bfloat16, `c_supports` in backend.py accepts only rows of
   a multiple of 16 numbers, and only with BF16_PRODUCTS. */
INLINE lanes load_some(const void *w, int64_t i, int64_t n, int64_t bfloat16) {
#ifdef BF16_PRODUCTS
    if (bfloat16) return load(w, i, 1);
#endif
    lanes out = {0};
    if (n >= LANES)
        memcpy(&out, (const float *)w + i, sizeof out);
    else
        memcpy(&out, (const float *)w + i, n * sizeof(float));
    return out;
}

INLINE void store1(void *w, int64_t i, float value, int64_t bfloat16) {
    if (!bfloat16) {
        ((float *)w)[i] = value;
        return;
    }
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if (value != value)
        bits = 0x7FC00000; /* rounding the bits of a NaN could give a number */
    else
        bits += 0x7FFF + ((bits >> 16) & 1); /* round to nearest, ties to even */
    ((bf16 *)w)[i] = (bf16)(bits >> 16);
}

INLINE void store(void *w, int64_t i, vec x, int64_t bfloat16) {
    if (!bfloat16) {
        memcpy((float *)w + i, &x, sizeof x);
        return;
    }
#ifdef BF16_PRODUCTS
    __m256bh rounded = _mm512_cvtneps_pbh(x);
    memcpy((bf16 *)w + i, &rounded, sizeof rounded);
#else
    for (int64_t l = 0; l < 16; l++) store1(w, i + l, x[l], 1);
#endif
}

/* Store the first n numbers, as `load_some` loads them. */
INLINE void store_some(void *w, int64_t i, int64_t n, lanes x, int64_t bfloat16) {
#ifdef BF16_PRODUCTS
    if (bfloat16) {
        store(w, i, x, 1);
        return;
    }
#endif
    if (n >= LANES)
        memcpy((float *)w + i, &x, sizeof x);
    else
        memcpy((float *)w + i, &x, n * sizeof(float));
}

INLINE float sum(vec v) {
    vec8 eight[2];
    vec4 four[2];
    memcpy(eight, &v, sizeof v);
    eight[0] += eight[1];
    memcpy(four, eight, sizeof eight[0]);
    four[0] += four[1];
    return (four[0][0] + four[0][2]) + (four[0][1] + four[0][3]);
}

/* Return the sum of all lanes: for bfloat16 in the order of `sum`, for float32 one lane after the other. */
INLINE float sum_lanes(lanes v, int64_t bfloat16) {
#ifdef BF16_PRODUCTS
    if (bfloat16) return sum(v);
#endif
    float total = 0;
    for (int l = 0; l < LANES; l++) total += v[l];
    return total;
}

INLINE lanes max_lanes(lanes a, lanes b) {
#ifdef AVX512
    return _mm512_max_ps(a, b);
#elif defined(__AVX__)
    return _mm256_max_ps(a, b);
#else
    int_lanes more = a > b;
    return (lanes)(((int_lanes)a & more) | ((int_lanes)b & ~more));
#endif
}

INLINE lanes floor_lanes(lanes x) {
#ifdef AVX512
    return _mm512_roundscale_ps(x, 1);
#elif defined(__AVX__)
    return _mm256_floor_ps(x);
#else
    lanes truncated = __builtin_convertvector(__builtin_convertvector(x, int_lanes), lanes);
    return truncated + __builtin_convertvector(truncated > x, lanes); /* a true lane is -1 */
#endif
}

/* Return e^x for x <= 0, computed as 2^n times a polynomial on [-ln2/2, ln2/2]. The error is about two units in the last
   place. The result is exactly 0 below -87, and NaN for NaN. */
INLINE lanes exp_lanes(lanes x) {
    lanes n = floor_lanes(x * 1.44269504f + 0.5f);
    lanes r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    lanes p = (lanes){0} + 1.0f / 720;
    const float terms[] = {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
    for (int i = 0; i < 6; i++) p = p * r + terms[i];
#ifdef AVX512
    lanes y = _mm512_scalef_ps(p, n);
#else
    lanes y = p * (lanes)((__builtin_convertvector(n, int_lanes) + 127) << 23);
#endif
    return (lanes)((int_lanes)y & ~(x < -87.0f));
}

/* Return 1 / (1 + e^-x), computed from e^-|x|. */
INLINE lanes sigmoid(lanes x) {
    lanes small = exp_lanes(-(lanes)((int_lanes)x & 0x7fffffff)), one = (lanes){0} + 1.0f;
    int_lanes below = x < 0.0f;
    return (lanes)(((int_lanes)small & below) | ((int_lanes)one & ~below)) / (one + small);
}

/* Rotate the R features of x. Angle i rotates the features 2i and 2i + 1 if `interleaved`, else i and i + R/2. The
   result is never interleaved, as in ops/rotary.py. */
INLINE void rotate(const void *x, const float *cos, const float *sin, int64_t R, int64_t interleaved, void *y,
                   int64_t bfloat16) {
    for (int64_t i = 0; i < R / 2; i++) {
        float a = load1(x, interleaved ? 2 * i : i, bfloat16);
        float b = load1(x, interleaved ? 2 * i + 1 : i + R / 2, bfloat16);
        store1(y, i, a * cos[i] - b * sin[i], bfloat16);
        store1(y, i + R / 2, b * cos[i] + a * sin[i], bfloat16);
    }
}

#ifdef BF16_PRODUCTS
#define TILE_ROWS 6 /* 6 x 4 sums, 4 vectors of columns and an input fill the 32 registers */

typedef int32_t bf16x2 __attribute__((may_alias)); /* two bfloat16 */

/* Multiply the matrices of a tile: sums = a b. a[r] is a row of `depth` pairs, which are `step` apart. b has
   [depth, 16 * vectors] pairs, in rows that are `stride` apart. */
INLINE void tile(const bf16x2 *const *a, int64_t step, int64_t depth, const uint32_t *b, int64_t stride, const int rows,
                 const int vectors, __m512 sums[TILE_ROWS][4]) {
    __m512 s[TILE_ROWS][4] = {{{0}}};
    for (int64_t p = 0; p < depth; p++) {
        __m512i column[4];
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) column[v] = _mm512_loadu_si512(b + p * stride + 16 * v);
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++) {
            __m512i input = _mm512_set1_epi32(a[r][p * step]);
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++)
                s[r][v] = _mm512_dpbf16_ps(s[r][v], (__m512bh)input, (__m512bh)column[v]);
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) sums[r][v] = s[r][v];
}

/* `tile` for a number of rows that is not a constant. */
INLINE void tile_rows(const bf16x2 *const *a, int64_t step, int64_t depth, const uint32_t *b, int64_t stride,
                      int64_t rows, const int vectors, __m512 sums[TILE_ROWS][4]) {
    switch (rows) {
    case 1: tile(a, step, depth, b, stride, 1, vectors, sums); break;
    case 2: tile(a, step, depth, b, stride, 2, vectors, sums); break;
    case 3: tile(a, step, depth, b, stride, 3, vectors, sums); break;
    case 4: tile(a, step, depth, b, stride, 4, vectors, sums); break;
    case 5: tile(a, step, depth, b, stride, 5, vectors, sums); break;
    default: tile(a, step, depth, b, stride, 6, vectors, sums);
    }
}

/* Transpose 16 rows of 16 pairs, rows `stride` numbers apart, into rows `line` pairs apart; missing rows count as 0. */
static inline void transpose_16x16(const bf16 *w, int64_t stride, int64_t rows, uint32_t *to, int64_t line) {
    __m512i r[16], t[16];
    for (int i = 0; i < 16; i++) r[i] = i < rows ? _mm512_loadu_si512(w + i * stride) : _mm512_setzero_si512();
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) { /* then 128-bit lane l of r[i + j] has pair 4 l + j of rows i .. i + 3 */
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int j = 0; j < 4; j++) {
        __m512i even = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88), odd = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xdd);
        __m512i even2 = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88);
        __m512i odd2 = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xdd);
        _mm512_storeu_si512(to + j * line, _mm512_shuffle_i32x4(even, even2, 0x88));
        _mm512_storeu_si512(to + (4 + j) * line, _mm512_shuffle_i32x4(odd, odd2, 0x88));
        _mm512_storeu_si512(to + (8 + j) * line, _mm512_shuffle_i32x4(even, even2, 0xdd));
        _mm512_storeu_si512(to + (12 + j) * line, _mm512_shuffle_i32x4(odd, odd2, 0xdd));
    }
}

/* `transpose_16x16` for rows of `size` numbers, a multiple of 32. */
static inline void pack_vnni_transposed(const bf16 *w, int64_t stride, int64_t rows, int64_t size, uint32_t *to,
                                        int64_t line) {
    for (int64_t p = 0; p < size / 2; p += 16) transpose_16x16(w + 2 * p, stride, rows, to + p * line, line);
}
#endif
