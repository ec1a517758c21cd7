/* Sixteen numbers at a time: GCC's vectors, which any processor has, and the few instructions that are worth asking for.
 *
 * A processor without 512-bit vectors gets the same in halves or quarters from the compiler. */
#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define LANE 16
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

typedef float vf __attribute__((vector_size(64)));
typedef int32_t vi __attribute__((vector_size(64)));
typedef uint32_t vu __attribute__((vector_size(64)));
typedef uint16_t vh __attribute__((vector_size(32)));
typedef int8_t vb __attribute__((vector_size(16)));
typedef float vf_any __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t vi_any __attribute__((vector_size(64), aligned(1), may_alias));
typedef uint16_t vh_any __attribute__((vector_size(32), aligned(2), may_alias));
typedef int8_t vb_any __attribute__((vector_size(16), aligned(1), may_alias));

INLINE vf load(const float *from) { return *(const vf_any *)from; }
INLINE void store(float *to, vf x) { *(vf_any *)to = x; }
INLINE vi load_words(const void *from) { return *(const vi_any *)from; }
/* In a register from here on: compilers else read a word that is used several times from memory each time. */
INLINE vi held(vi x) {
#if defined(__AVX512F__)
    __asm__("" : "+v"(x));
#endif
    return x;
}

INLINE vf all(float x) {
#if defined(__AVX512F__)
    return (vf)_mm512_set1_ps(x);
#else
    return (vf){x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x};
#endif
}

INLINE vi all_words(int32_t x) {
#if defined(__AVX512F__)
    return (vi)_mm512_set1_epi32(x);
#else
    return (vi){x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x};
#endif
}

/* 0 to 15. */
INLINE vi counted(void) { return (vi){0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}; }

INLINE vf pick(vi mask, vf yes, vf no) { return (vf)(((vi)yes & mask) | ((vi)no & ~mask)); }

INLINE vf larger(vf a, vf b) {
#if defined(__AVX512F__)
    return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#else
    return pick(a > b, a, b);
#endif
}

INLINE vi larger_words(vi a, vi b) {
#if defined(__AVX512F__)
    return (vi)_mm512_max_epi32((__m512i)a, (__m512i)b);
#else
    vi above = a > b;
    return (a & above) | (b & ~above);
#endif
}

INLINE vf size_of(vf x) { return (vf)((vi)x & 0x7fffffff); }

/* One order of adding on every processor. */
INLINE float sum_of(vf x) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)x);  /* the same halves */
#else
    float at[LANE];
    store(at, x);
    for (int step = LANE / 2; step; step /= 2)
        for (int i = 0; i < step; i++) at[i] += at[i + step];
    return at[0];
#endif
}

INLINE float most_of(vf x) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)x);
#else
    float at[LANE], most;
    store(at, x);
    most = at[0];
    for (int i = 1; i < LANE; i++) most = at[i] > most ? at[i] : most;
    return most;
#endif
}

INLINE int32_t most_of_words(vi x) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_epi32((__m512i)x);
#else
    int32_t most = x[0];
    for (int i = 1; i < LANE; i++) most = x[i] > most ? x[i] : most;
    return most;
#endif
}

INLINE int32_t total_of(vi x) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_epi32((__m512i)x);
#else
    int32_t total = 0;
    for (int i = 0; i < LANE; i++) total += x[i];
    return total;
#endif
}

/* To the nearest whole number, ties to even. */
INLINE vi round_words(vf x) {
#if defined(__AVX512F__)
    return (vi)_mm512_cvtps_epi32((__m512)x);
#else
    vi out;
    for (int i = 0; i < LANE; i++) out[i] = (int32_t)lrintf(x[i]);
    return out;
#endif
}

INLINE vf from_words(vi x) { return __builtin_convertvector(x, vf); }
INLINE vf from_halves(const uint16_t *from) {
    vu wide = __builtin_convertvector(*(const vh_any *)from, vu);
    return (vf)(wide << 16);
}

/* bf16, to the nearest, ties to even. */
INLINE void store_halves(uint16_t *to, vf x) {
#if defined(__AVX512BF16__)
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
#if defined(__AVX512F__)
    x = (vf)_mm512_min_ps((__m512)all(88.0f), (__m512)x);
    vf n = (vf)_mm512_roundscale_ps((__m512)(x * 1.44269504088896341f), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    x = pick(x > 88.0f, all(88.0f), x);
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
#if defined(__AVX512F__)
    return (vf)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    return p * (vf)((whole + 127) << 23);
#endif
}

/* c + w . a of pairs of bf16 in each word. */
INLINE vf dot_halves(vf c, vi w, vi a) {
#if defined(__AVX512BF16__)
    /* In assembly, since compilers fill loops over the intrinsic with copies of registers. */
    __asm__("vdpbf16ps %2, %1, %0" : "+v"(c) : "v"(w), "v"(a));
    return c;
#else
    c += (vf)((vu)w << 16) * (vf)((vu)a << 16);
    return c + (vf)(w & (int32_t)0xffff0000) * (vf)(a & (int32_t)0xffff0000);
#endif
}

/* c + w . a of four unsigned bytes w and four signed bytes a in each word. */
INLINE vi dot_bytes(vi c, vi w, vi a) {
#if defined(__AVX512VNNI__)
    __asm__("vpdpbusd %2, %1, %0" : "+v"(c) : "v"(w), "v"(a));
    return c;
#elif defined(__AVX2__)
    typedef union { vi whole; __m256i half[2]; } two;
    two sum = {c}, weights = {w}, acts = {a};
    for (int i = 0; i < 2; i++) {
#if defined(__AVXVNNI__)
        __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum.half[i]) : "x"(weights.half[i]), "x"(acts.half[i]));
#else
        /* In words of 16 bits: the instruction for bytes saturates. */
        __m256i even = _mm256_madd_epi16(_mm256_and_si256(weights.half[i], _mm256_set1_epi16(255)),
                                         _mm256_srai_epi16(_mm256_slli_epi16(acts.half[i], 8), 8));
        __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(weights.half[i], 8), _mm256_srai_epi16(acts.half[i], 8));
        sum.half[i] = _mm256_add_epi32(sum.half[i], _mm256_add_epi32(even, odd));
#endif
    }
    return sum.whole;
#else
    for (int shift = 0; shift < 32; shift += 8)
        c += (vi)(((vu)w >> shift) & 255) * ((vi)((vu)a << (24 - shift)) >> 24);
    return c;
#endif
}

INLINE void fetch(const void *from) { __builtin_prefetch(from, 0, 3); }
INLINE void fetch_far(const void *from) { __builtin_prefetch(from, 0, 2); }
