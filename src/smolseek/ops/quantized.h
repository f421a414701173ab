/* Number formats of weights: float32, bfloat16 and the blocks of 32 weights of GGUF files, which ops/quantized/reference.py
   defines. Functions that take a `format` are fast where it is a constant.

   Every weight is exactly that of reference.py: the product of a float16 and q has no more bits than a float32. */

#include "simd.h"

enum { FLOAT32, BFLOAT16, Q8_0, Q4_0, Q4_1 }; /* as FORMATS in ops/quantized; the first two are `bfloat16` of simd.h */
#define BLOCK 32

/* Bytes of n numbers, whole blocks where the format has them. */
INLINE int64_t format_bytes(int64_t n, int64_t format) {
    switch (format) {
    case FLOAT32: return 4 * n;
    case BFLOAT16: return 2 * n;
    case Q8_0: return n / BLOCK * 34;
    case Q4_0: return n / BLOCK * 18;
    default: return n / BLOCK * 20;
    }
}

INLINE float load_float16(const uint8_t *at) {
    uint16_t bits;
    memcpy(&bits, at, sizeof bits);
#ifdef __F16C__
    return _cvtsh_ss(bits);
#else
    uint32_t wide = (uint32_t)(bits & 0x7FFF) << 13, sign = (uint32_t)(bits & 0x8000) << 16;
    float value;
    memcpy(&value, &wide, sizeof value);
    value *= 0x1p112f; /* the bias of the exponent; numbers below the normal range come out right, too */
    memcpy(&wide, &value, sizeof wide);
    wide |= sign | ((bits & 0x7C00) == 0x7C00 ? 0x7F800000 : 0); /* infinity and NaN */
    memcpy(&value, &wide, sizeof value);
    return value;
#endif
}

/* LANES bytes as int32. GCC 12 converts vectors of bytes number by number. */
INLINE int_lanes widen_bytes(const uint8_t *at, int64_t is_signed) {
#if defined(AVX512)
    __m128i bytes = _mm_loadu_si128((const __m128i *)at);
    return (int_lanes)(is_signed ? _mm512_cvtepi8_epi32(bytes) : _mm512_cvtepu8_epi32(bytes));
#elif defined(__AVX2__)
    __m128i bytes = _mm_loadl_epi64((const __m128i *)at);
    return (int_lanes)(is_signed ? _mm256_cvtepi8_epi32(bytes) : _mm256_cvtepu8_epi32(bytes));
#else
    int_lanes wide;
    for (int n = 0; n < LANES; n++) wide[n] = is_signed ? (int8_t)at[n] : at[n];
    return wide;
#endif
}

/* The 32 weights of a block. */
INLINE void load_block(const uint8_t *block, int64_t format, lanes weights[BLOCK / LANES]) {
    float scale = load_float16(block);
    if (format == Q8_0) {
        for (int n = 0; n < BLOCK / LANES; n++)
            weights[n] = __builtin_convertvector(widen_bytes(block + 2 + n * LANES, 1), lanes) * scale;
        return;
    }
    float least = format == Q4_1 ? load_float16(block + 2) : 0;
    const uint8_t *from = block + (format == Q4_1 ? 4 : 2);
    for (int n = 0; n < BLOCK / 2 / LANES; n++) {
        int_lanes q = widen_bytes(from + n * LANES, 0);
        lanes *low = weights + n, *high = low + BLOCK / 2 / LANES;
#ifdef AVX512 /* a table of the sixteen weights; only the low four bits of an index count */
        lanes values = (lanes){0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        values = format == Q4_0 ? (values - 8) * scale : values * scale + least;
        *low = _mm512_permutexvar_ps((__m512i)q, values);
        *high = _mm512_permutexvar_ps((__m512i)(q >> 4), values);
#else
        lanes a = __builtin_convertvector(q & 15, lanes), b = __builtin_convertvector(q >> 4, lanes);
        *low = format == Q4_0 ? (a - 8) * scale : a * scale + least;
        *high = format == Q4_0 ? (b - 8) * scale : b * scale + least;
#endif
    }
}

/* Store the weights of a block as y[i] to y[i + 31]. */
INLINE void expand_block(const uint8_t *block, int64_t format, void *y, int64_t i, int64_t bfloat16) {
    lanes weights[BLOCK / LANES];
    vec sixteen[2];
    load_block(block, format, weights);
    memcpy(sixteen, weights, sizeof sixteen);
    for (int n = 0; n < 2; n++) store(y, i + 16 * n, sixteen[n], bfloat16);
}
