/* Registers of 16 numbers, bfloat16 in memory, and products of pairs, for the C files that multiply in bfloat16. */

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define ROWS 6   /* rows of a tile: 6 times 4 sums, 4 columns and an input fill the 32 registers */

typedef uint16_t half; /* the bits of a bfloat16 */
typedef int32_t pair __attribute__((may_alias));

INLINE __m512i widen(const half *at) { return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)at)); }

INLINE __m512 number(const half *at) { return _mm512_castsi512_ps(_mm512_slli_epi32(widen(at), 16)); }

INLINE void put(half *to, __m512 x) {
    __m256bh rounded = _mm512_cvtneps_pbh(x);
    memcpy(to, &rounded, sizeof rounded);
}

INLINE float value(half bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float x;
    memcpy(&x, &wide, sizeof x);
    return x;
}

INLINE half rounded(float x) {
    __m128bh bits = _mm_cvtneps_pbh(_mm_set_ss(x));
    half first;
    memcpy(&first, &bits, sizeof first);
    return first;
}

/* e^x for x <= 0, and exactly 0 below -87; what is no number stays so. */
INLINE __m512 exp16(__m512 x) {
    __mmask16 some = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-87.0f), _CMP_NLT_UQ);
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fmadd_ps(n, _mm512_set1_ps(2.12194440e-4f), r);
    const float series[] = {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
    __m512 p = _mm512_set1_ps(1.0f / 720);
#pragma GCC unroll 6
    for (int i = 0; i < 6; i++) p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(series[i]));
    return _mm512_maskz_scalef_ps(some, p, n);
}

/* silu(x) = x s and s = 1 / (1 + e^-x), through e^-|x|. */
INLINE __m512 sigmoid16(__m512 x) {
    __m512 small = exp16(_mm512_sub_ps(_mm512_setzero_ps(), _mm512_abs_ps(x))), one = _mm512_set1_ps(1.0f);
    __mmask16 below = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ);
    return _mm512_div_ps(_mm512_mask_mov_ps(one, below, small), _mm512_add_ps(one, small));
}

/* s[r][v] = pairs a[r][p * step] times columns 16 v .. 16 v + 15 of b: [pairs] lines, `line` columns from each other. */
INLINE void tile(const pair *const *a, int64_t step, int64_t pairs, const uint32_t *b, int64_t line, const int rows,
                 const int wide, __m512 sums[ROWS][4]) {
    __m512 s[ROWS][4];
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < wide; v++) s[r][v] = _mm512_setzero_ps();
    for (int64_t p = 0; p < pairs; p++) {
        __m512i column[4];
#pragma GCC unroll 4
        for (int v = 0; v < wide; v++) column[v] = _mm512_loadu_si512(b + p * line + 16 * v);
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++) {
            __m512i input = _mm512_set1_epi32(a[r][p * step]);
#pragma GCC unroll 4
            for (int v = 0; v < wide; v++)
                s[r][v] = _mm512_dpbf16_ps(s[r][v], (__m512bh)input, (__m512bh)column[v]);
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < wide; v++) sums[r][v] = s[r][v];
}

/* As `tile`, for any number of rows. */
INLINE void tile_rows(const pair *const *a, int64_t step, int64_t pairs, const uint32_t *b, int64_t line, int64_t rows,
                      const int wide, __m512 sums[ROWS][4]) {
    switch (rows) {
    case 1: tile(a, step, pairs, b, line, 1, wide, sums); break;
    case 2: tile(a, step, pairs, b, line, 2, wide, sums); break;
    case 3: tile(a, step, pairs, b, line, 3, wide, sums); break;
    case 4: tile(a, step, pairs, b, line, 4, wide, sums); break;
    case 5: tile(a, step, pairs, b, line, 5, wide, sums); break;
    default: tile(a, step, pairs, b, line, 6, wide, sums);
    }
}

/* Turn 16 rows of 16 pairs, `stride` numbers from each other, into 16 lines: line p gets pair p of each row. */
static inline void turn(const half *w, int64_t stride, int64_t rows, uint32_t *to, int64_t line) {
    __m512i r[16], t[16];
    for (int i = 0; i < 16; i++) r[i] = i < rows ? _mm512_loadu_si512(w + i * stride) : _mm512_setzero_si512();
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) { /* then lane l of r[i + j] has rows i .. i + 3 of pair 4 l + j */
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
