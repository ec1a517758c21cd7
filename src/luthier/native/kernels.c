/* Kernels of Luthier for processors: plain C that compilers turn into vector code. No headers but the compiler's own. */
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define BLOCK 4096
#define LANES 32
#define PIECE 64

/* e^x to about 2 units in the last place of fp32: 2^n by the exponent's bits, the rest by a polynomial (Cephes' expf).
 * Below -87 it stays at 1.6e-38. Written without branches, so that loops over it become vector code. */
static inline float fast_exp(float x) {
    float low = x < -87.0f ? -87.0f : x;
    float bound = low > 88.0f ? 88.0f : low;
    float n = rintf(bound * 1.44269504088896341f);
    float r = bound - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    int32_t bits = ((int32_t)n + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return p * power;
}

typedef uint16_t bf16;

static inline float from_bf16(bf16 x) {
    union { uint32_t i; float f; } u = {(uint32_t)x << 16};
    return u.f;
}

/* To the nearest, ties to even; what is no number stays none. */
static inline bf16 to_bf16(float x) {
    union { float f; uint32_t i; } u = {x};
    uint32_t rounded = (u.i + 0x7fff + ((u.i >> 16) & 1)) >> 16;
    return (u.i & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : (bf16)rounded;
}

#define T bf16
#define LOAD from_bf16
#define STORE to_bf16
#define NAME(x) x##_bf16
#include "layers.h"
#include "likely.h"
#include "masks.h"
#include "softmax.h"
#include "pages.h"
#undef T
#undef LOAD
#undef STORE
#undef NAME

#define T float
#define LOAD(x) (x)
#define STORE(x) (x)
#define NAME(x) x##_f32
#include "layers.h"
#include "likely.h"
#include "masks.h"
#include "softmax.h"
#include "pages.h"

#include "draws.h"

int threads(void) { return omp_get_max_threads(); }
