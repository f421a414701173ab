/* The instructions that simd.h, quantized.h and the C files use, computed lane by lane as in Intel's Intrinsics Guide.
   Tests on processors without these instructions include it instead of the compiler's header. */

#pragma once

#include <stdint.h>
#include <string.h>

#define EMULATED static inline __attribute__((always_inline))
#define VECTOR(type, bytes, name) typedef type name __attribute__((vector_size(bytes), may_alias))

VECTOR(float, 64, lanes16);
VECTOR(uint8_t, 16, bytes16);
VECTOR(uint16_t, 32, shorts16);
VECTOR(int32_t, 64, ints16);
VECTOR(int64_t, 64, longs8);
typedef uint16_t mask16;

/* Names that do not clash with the compiler's types and functions. */
#define __m512 lanes16
#define __m512i longs8
#define __m128i bytes16
#define __m256i shorts16
#define __m256bh shorts16
#define __m512bh ints16
#define __mmask16 mask16

/* To bfloat16: to the nearest, ties to even; NaN stays NaN; subnormal numbers become 0. */
EMULATED uint16_t bfloat16_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    if (x != x) return bits >> 16 | 0x40;
    if (!(bits & 0x7f800000)) return bits >> 16 & 0x8000;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

#define EACH_LANE(expression)                                                                                          \
    lanes16 y;                                                                                                         \
    for (int i = 0; i < 16; i++) y[i] = (expression);                                                                  \
    return y

EMULATED lanes16 _mm512_set1_ps(float a) { EACH_LANE(a); }
EMULATED lanes16 _mm512_setzero_ps(void) { EACH_LANE(0.0f); }
EMULATED lanes16 _mm512_add_ps(lanes16 a, lanes16 b) { return a + b; }
EMULATED lanes16 _mm512_max_ps(lanes16 a, lanes16 b) { EACH_LANE(a[i] > b[i] ? a[i] : b[i]); }
EMULATED lanes16 _mm512_fmadd_ps(lanes16 a, lanes16 b, lanes16 c) { EACH_LANE(__builtin_fmaf(a[i], b[i], c[i])); }
EMULATED lanes16 _mm512_fmsub_ps(lanes16 a, lanes16 b, lanes16 c) { EACH_LANE(__builtin_fmaf(a[i], b[i], -c[i])); }

EMULATED lanes16 _mm512_roundscale_ps(lanes16 a, int how) {
    (void)how; /* 1: to whole numbers, downwards */
    EACH_LANE(__builtin_floorf(a[i]));
}

EMULATED lanes16 _mm512_scalef_ps(lanes16 a, lanes16 b) {
    EACH_LANE(__builtin_ldexpf(a[i], (int)__builtin_floorf(b[i])));
}

EMULATED lanes16 _mm512_maskz_mov_ps(mask16 k, lanes16 a) { EACH_LANE(k >> i & 1 ? a[i] : 0.0f); }

EMULATED lanes16 _mm512_mask_mul_ps(lanes16 other, mask16 k, lanes16 a, lanes16 b) {
    EACH_LANE(k >> i & 1 ? a[i] * b[i] : other[i]);
}

EMULATED float _mm512_reduce_add_ps(lanes16 a) {
    for (int n = 8; n; n /= 2)
        for (int i = 0; i < n; i++) a[i] += a[i + n];
    return a[0];
}

EMULATED lanes16 _mm512_loadu_ps(const void *at) {
    lanes16 y;
    memcpy(&y, at, sizeof y);
    return y;
}

EMULATED longs8 _mm512_loadu_si512(const void *at) {
    longs8 y;
    memcpy(&y, at, sizeof y);
    return y;
}

EMULATED shorts16 _mm256_loadu_si256(const void *at) {
    shorts16 y;
    memcpy(&y, at, sizeof y);
    return y;
}

EMULATED bytes16 _mm_loadu_si128(const void *at) {
    bytes16 y;
    memcpy(&y, at, sizeof y);
    return y;
}

EMULATED float _cvtsh_ss(uint16_t bits) {
    _Float16 y;
    memcpy(&y, &bits, sizeof y);
    return y;
}

EMULATED void _mm512_storeu_ps(void *at, lanes16 a) { memcpy(at, &a, sizeof a); }
EMULATED void _mm512_storeu_si512(void *at, longs8 a) { memcpy(at, &a, sizeof a); }

EMULATED longs8 _mm512_setzero_si512(void) { return (longs8){0}; }
EMULATED longs8 _mm512_set1_epi32(int32_t a) { return (longs8)((ints16){0} + a); }
EMULATED longs8 _mm512_or_si512(longs8 a, longs8 b) { return a | b; }
EMULATED longs8 _mm512_slli_epi32(longs8 a, int by) { return (longs8)((ints16)a << by); }
EMULATED longs8 _mm512_cvtepu16_epi32(shorts16 a) { return (longs8)__builtin_convertvector(a, ints16); }

EMULATED longs8 _mm512_cvtepu8_epi32(bytes16 a) {
    ints16 y;
    for (int i = 0; i < 16; i++) y[i] = a[i];
    return (longs8)y;
}

EMULATED longs8 _mm512_cvtepi8_epi32(bytes16 a) {
    ints16 y;
    for (int i = 0; i < 16; i++) y[i] = (int8_t)a[i];
    return (longs8)y;
}

EMULATED lanes16 _mm512_permutexvar_ps(longs8 index, lanes16 a) { EACH_LANE(a[((ints16)index)[i] & 15]); }
EMULATED lanes16 _mm512_permute_ps(lanes16 a, int which) { EACH_LANE(a[i / 4 * 4 + (which >> i % 4 * 2 & 3)]); }

/* In each 128-bit part of the register, as the instructions do. */
EMULATED longs8 unpack32(longs8 a, longs8 b, int high) {
    ints16 x = (ints16)a, z = (ints16)b, y;
    for (int i = 0; i < 16; i++) y[i] = (i % 2 ? z : x)[i / 4 * 4 + 2 * high + i % 4 / 2];
    return (longs8)y;
}

EMULATED longs8 unpack64(longs8 a, longs8 b, int high) {
    longs8 y;
    for (int i = 0; i < 8; i++) y[i] = (i % 2 ? b : a)[i / 2 * 2 + high];
    return y;
}

EMULATED longs8 _mm512_unpacklo_epi32(longs8 a, longs8 b) { return unpack32(a, b, 0); }
EMULATED longs8 _mm512_unpackhi_epi32(longs8 a, longs8 b) { return unpack32(a, b, 1); }
EMULATED longs8 _mm512_unpacklo_epi64(longs8 a, longs8 b) { return unpack64(a, b, 0); }
EMULATED longs8 _mm512_unpackhi_epi64(longs8 a, longs8 b) { return unpack64(a, b, 1); }

/* 128-bit parts of a, a, b and b, each chosen by two bits. */
EMULATED longs8 _mm512_shuffle_i32x4(longs8 a, longs8 b, int which) {
    longs8 y;
    for (int i = 0; i < 8; i++) y[i] = (i < 4 ? a : b)[(which >> i / 2 * 2 & 3) * 2 + i % 2];
    return y;
}

EMULATED lanes16 _mm512_shuffle_f32x4(lanes16 a, lanes16 b, int which) {
    return (lanes16)_mm512_shuffle_i32x4((longs8)a, (longs8)b, which);
}

EMULATED shorts16 _mm512_cvtneps_pbh(lanes16 a) {
    shorts16 y;
    for (int i = 0; i < 16; i++) y[i] = bfloat16_bits(a[i]);
    return y;
}

/* sums + the products of each lane's pair. */
EMULATED lanes16 _mm512_dpbf16_ps(lanes16 sums, ints16 a, ints16 b) {
    lanes16 high = (lanes16)(a & (int32_t)0xffff0000) * (lanes16)(b & (int32_t)0xffff0000);
    return sums + high + (lanes16)(a << 16) * (lanes16)(b << 16);
}
