/* Registers of 16 numbers and bfloat16 in memory, for the C files of this folder. */

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
typedef uint16_t half; /* the bits of a bfloat16 */

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
