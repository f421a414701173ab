/* e^x in float32 without a call, so that loops over it become vector instructions. */

#include <stdint.h>
#include <string.h>

/* e^x for x <= 0, to about two units of the last place: 2^n times a polynomial on [-ln2/2, ln2/2]. */
static inline __attribute__((always_inline)) float exp_negative(float x) {
    x = x < -87.0f ? -87.0f : x;
    float n = __builtin_floorf(x * 1.44269504f + 0.5f);
    float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    uint32_t bits = (uint32_t)((int32_t)n + 127) << 23;
    float power;
    memcpy(&power, &bits, sizeof power);
    return p * power;
}
