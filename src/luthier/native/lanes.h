/* As many numbers at a time as a register of the processor holds: GCC's vectors, and the few instructions that are worth
 * asking for. 16 with AVX-512, 8 with AVX2, else 4. (Vectors that are wider than registers are kept in memory by compilers.) */
#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

/* A test may ask for another width, in plain C then. */
#if defined(LANE)
#elif defined(__AVX512F__)
#define LANE 16
#define X86(name) _mm512_##name
typedef __m512 xf;
typedef __m512i xi;
#elif defined(__AVX2__)
#define LANE 8
#define X86(name) _mm256_##name
typedef __m256 xf;
typedef __m256i xi;
#elif defined(__SSE2__)
#define LANE 4
#define X86(name) _mm_##name
typedef __m128 xf;
typedef __m128i xi;
#else
#define LANE 4
#endif
/* Bytes of a register. */
#define WIDE (4 * LANE)
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

typedef float vf __attribute__((vector_size(WIDE)));
typedef int32_t vi __attribute__((vector_size(WIDE)));
typedef uint32_t vu __attribute__((vector_size(WIDE)));
typedef uint16_t vh __attribute__((vector_size(2 * LANE)));
typedef int16_t vs __attribute__((vector_size(2 * LANE)));
typedef int8_t vb __attribute__((vector_size(LANE)));
typedef float vf_any __attribute__((vector_size(WIDE), aligned(4), may_alias));
typedef int32_t vi_any __attribute__((vector_size(WIDE), aligned(1), may_alias));
typedef uint16_t vh_any __attribute__((vector_size(2 * LANE), aligned(2), may_alias));
typedef int16_t vs_any __attribute__((vector_size(2 * LANE), aligned(2), may_alias));
typedef int8_t vb_any __attribute__((vector_size(LANE), aligned(1), may_alias));

INLINE vf load(const float *from) { return *(const vf_any *)from; }
INLINE void store(float *to, vf x) { *(vf_any *)to = x; }
INLINE vi load_words(const void *from) { return *(const vi_any *)from; }
/* In a register from here on: compilers else read a word that is used several times from memory each time. */
INLINE vi held(vi x) {
#if defined(X86) && LANE == 16
    __asm__("" : "+v"(x));
#endif
    return x;
}

INLINE vf all(float x) {
#if defined(X86)
    return (vf)X86(set1_ps)(x);
#else
    return x - (vf){0};
#endif
}

INLINE vi all_words(int32_t x) {
#if defined(X86)
    return (vi)X86(set1_epi32)(x);
#else
    return x - (vi){0};
#endif
}

/* 0, 1, 2 and so on. */
INLINE vi counted(void) {
    static const int32_t from[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return load_words(from);
}

INLINE vf pick(vi mask, vf yes, vf no) { return (vf)(((vi)yes & mask) | ((vi)no & ~mask)); }

/* b where either is no number, as below. */
INLINE vf larger(vf a, vf b) {
#if defined(X86)
    return (vf)X86(max_ps)((xf)a, (xf)b);
#else
    return pick(a > b, a, b);
#endif
}

INLINE vf smaller(vf a, vf b) {
#if defined(X86)
    return (vf)X86(min_ps)((xf)a, (xf)b);
#else
    return pick(a < b, a, b);
#endif
}

INLINE vi larger_words(vi a, vi b) {
#if defined(X86) && (LANE > 4 || defined(__SSE4_1__))
    return (vi)X86(max_epi32)((xi)a, (xi)b);
#else
    vi above = a > b;
    return (a & above) | (b & ~above);
#endif
}

INLINE vf size_of(vf x) { return (vf)((vi)x & 0x7fffffff); }

/* The lanes in the second half, a quarter and so on in the place of the first, to be put together with these. */
#if defined(X86) && LANE < 16
INLINE xi crossed(xi x, int step) {
#if LANE == 8
    if (step == 4) return _mm256_permute2x128_si256(x, x, 1);
#endif
    return step == 2 ? X86(shuffle_epi32)(x, 0x4e) : X86(shuffle_epi32)(x, 0xb1);
}
#define ACROSS(x, put) for (int step = LANE / 2; step; step /= 2) x = put(x, (__typeof__(x))crossed((xi)x, step));
#endif
INLINE vf plus(vf a, vf b) { return a + b; }
INLINE vi plus_words(vi a, vi b) { return a + b; }

/* One order of adding, by halves. */
INLINE float sum_of(vf x) {
#if defined(X86) && LANE == 16
    return _mm512_reduce_add_ps((__m512)x);  /* the same halves */
#elif defined(X86)
    UNROLL ACROSS(x, plus)
    return x[0];
#else
    for (int step = LANE / 2; step; step /= 2)
        for (int i = 0; i < step; i++) x[i] += x[i + step];
    return x[0];
#endif
}

INLINE float most_of(vf x) {
#if defined(X86) && LANE == 16
    return _mm512_reduce_max_ps((__m512)x);
#elif defined(X86)
    UNROLL ACROSS(x, larger)
    return x[0];
#else
    float most = x[0];
    for (int i = 1; i < LANE; i++) most = x[i] > most ? x[i] : most;
    return most;
#endif
}

INLINE int32_t most_of_words(vi x) {
#if defined(X86) && LANE == 16
    return _mm512_reduce_max_epi32((__m512i)x);
#elif defined(X86)
    UNROLL ACROSS(x, larger_words)
    return x[0];
#else
    int32_t most = x[0];
    for (int i = 1; i < LANE; i++) most = x[i] > most ? x[i] : most;
    return most;
#endif
}

INLINE int32_t total_of(vi x) {
#if defined(X86) && LANE == 16
    return _mm512_reduce_add_epi32((__m512i)x);
#elif defined(X86)
    UNROLL ACROSS(x, plus_words)
    return x[0];
#else
    int32_t total = 0;
    for (int i = 0; i < LANE; i++) total += x[i];
    return total;
#endif
}

/* To the nearest whole number, ties to even. */
INLINE vi round_words(vf x) {
#if defined(X86)
    return (vi)X86(cvtps_epi32)((xf)x);
#else
    vi out;
    for (int i = 0; i < LANE; i++) out[i] = (int32_t)lrintf(x[i]);
    return out;
#endif
}

INLINE vf from_words(vi x) { return __builtin_convertvector(x, vf); }

/* From bf16. */
INLINE vf from_halves(const uint16_t *from) {
    vu wide = __builtin_convertvector(*(const vh_any *)from, vu);
    return (vf)(wide << 16);
}

/* To bf16: to the nearest, ties to even. */
INLINE void store_halves(uint16_t *to, vf x) {
#if defined(X86) && defined(__AVX512BF16__)
    _mm256_storeu_si256((__m256i *)to, (__m256i)_mm512_cvtneps_pbh((__m512)x));
#else
    vu bits = (vu)x;
    bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    *(vh_any *)to = __builtin_convertvector(bits, vh);
#endif
}

/* e^x as fast_exp in kernels.c. */
INLINE vf exp_of(vf x) {
    x = larger(all(-87.0f), x);  /* in this order: what is no number stays none */
    x = smaller(all(88.0f), x);
#if defined(X86) && LANE == 16
    vf n = (vf)_mm512_roundscale_ps((__m512)(x * 1.44269504088896341f), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    vi whole = round_words(x * 1.44269504088896341f);
    vf n = from_words(whole);
#endif
    vf r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vf p = all(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
#if defined(X86) && LANE == 16
    return (vf)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    return p * (vf)((whole + 127) << 23);
#endif
}

INLINE void fetch_far(const void *from) { __builtin_prefetch(from, 0, 2); }
