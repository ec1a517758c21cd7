/* How numbers of 16, 8 and 4 bits are multiplied and added up, by what the processor has for it.
 *
 * One operand is packed: in every lane a word with two, four or eight numbers of its own row. The other is the same for all
 * lanes: a few numbers of a row of activations, a query or shares, which are kept in the form in which they are multiplied
 * (`Half`, `Byte`), as they are used again and again. */

/* Two bf16 a lane. Without an instruction for them: two in fp32, and the activations, which then need no rounding, as well. */
#if defined(X86) && defined(__AVX512BF16__)
typedef uint16_t Half;
typedef struct { vi both; } Twos;

INLINE void store_half(Half *to, vf x) { store_halves(to, x); }
INLINE Twos twos(vi words) { return (Twos){words}; }
INLINE Twos same_twos(const Half *from) {
    int32_t pair;
    memcpy(&pair, from, 4);
    return (Twos){all_words(pair)};
}
INLINE vf dot_twos(vf c, Twos w, Twos a) {
    /* In assembly, since compilers fill loops over the intrinsic with copies of registers. */
    __asm__("vdpbf16ps %2, %1, %0" : "+v"(c) : "v"(w.both), "v"(a.both));
    return c;
}
#else
typedef float Half;
typedef struct { vf even, odd; } Twos;

INLINE void store_half(Half *to, vf x) { store(to, x); }
INLINE Twos twos(vi words) { return (Twos){(vf)(words << 16), (vf)(words & (int32_t)0xffff0000)}; }
INLINE Twos same_twos(const Half *from) { return (Twos){all(from[0]), all(from[1])}; }
INLINE vf dot_twos(vf c, Twos w, Twos a) {
#if defined(X86) && defined(__FMA__)
    /* Asked for, or compilers round differently from one place to another. */
    return (vf)X86(fmadd_ps)((xf)w.odd, (xf)a.odd, X86(fmadd_ps)((xf)w.even, (xf)a.even, (xf)c));
#else
    c += w.even * a.even;
    return c + w.odd * a.odd;
#endif
}
#endif

/* Four bytes a lane: without sign packed and signed activations, or the other way round. Without an instruction for them: two
 * times two in words of 16 bits, as the instruction for bytes saturates. `place_in_four`: where a number lies in its word. */
#if defined(X86) && (defined(__AVX512VNNI__) || (LANE == 8 && defined(__AVXVNNI__)))
#define VNNI 1
typedef int8_t Byte;
typedef struct { vi four; } Fours;

INLINE int place_in_four(int number) { return number; }
INLINE uint32_t in_places(uint32_t word) { return word; }
INLINE Fours fours(vi words) { return (Fours){words}; }
INLINE Fours signed_fours(vi words) { return fours(words); }
INLINE Fours same_fours(const Byte *from) {
    int32_t four;
    memcpy(&four, from, 4);
    return (Fours){all_words(four)};
}
/* c + a . b of bytes without sign a and signed bytes b. */
INLINE vi dot_fours(vi c, Fours a, Fours b) {
#if LANE == 16
    __asm__("vpdpbusd %2, %1, %0" : "+v"(c) : "v"(a.four), "v"(b.four));
#else
    __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(c) : "x"(a.four), "x"(b.four));
#endif
    return c;
}
INLINE void store_bytes(Byte *to, vi x) { *(vb_any *)to = __builtin_convertvector(x, vb); }
#else
#define VNNI 0
typedef int16_t Byte;
typedef struct { vi even, odd; } Fours;
typedef int16_t v16 __attribute__((vector_size(WIDE)));
typedef uint16_t vu16 __attribute__((vector_size(WIDE)));

INLINE int place_in_four(int number) { return number == 1 ? 2 : number == 2 ? 1 : number; }
INLINE uint32_t in_places(uint32_t word) { return (word & 0xff0000ff) | (word >> 8 & 0xff00) | (word & 0xff00) << 8; }
INLINE Fours fours(vi words) { return (Fours){words & 0x00ff00ff, (vi)((vu16)words >> 8)}; }
INLINE Fours signed_fours(vi words) { return (Fours){(vi)((v16)((vu16)words << 8) >> 8), (vi)((v16)words >> 8)}; }
INLINE Fours same_fours(const Byte *from) {
    int32_t first, second;
    memcpy(&first, from, 4);
    memcpy(&second, from + 2, 4);
    return (Fours){all_words(first), all_words(second)};
}
/* The sums of two products of 16 bits. */
INLINE vi dot_words(vi a, vi b) {
#if defined(X86) && (LANE < 16 || defined(__AVX512BW__))
    return (vi)X86(madd_epi16)((xi)a, (xi)b);
#else
    return ((vi)((vu)a << 16) >> 16) * ((vi)((vu)b << 16) >> 16) + (a >> 16) * (b >> 16);
#endif
}
INLINE vi dot_fours(vi c, Fours a, Fours b) {
#if defined(X86) && LANE == 8
    /* In assembly, since compilers make all products first, and have no registers left for the sums. */
    vi one, two;
    __asm__("vpmaddwd %[even], %[a_even], %[one]\n\tvpmaddwd %[odd], %[a_odd], %[two]\n\t"
            "vpaddd %[two], %[one], %[one]\n\tvpaddd %[one], %[c], %[c]"
            : [c] "+x"(c), [one] "=&x"(one), [two] "=&x"(two)
            : [a_even] "x"(a.even), [a_odd] "x"(a.odd), [even] "x"(b.even), [odd] "x"(b.odd));
    return c;
#else
    return c + (dot_words(a.even, b.even) + dot_words(a.odd, b.odd));
#endif
}
INLINE void store_bytes(Byte *to, vi x) { *(vs_any *)to = __builtin_convertvector(x, vs); }
#endif

/* Four numbers from 0 to 15 a lane with signed bytes: their sums are small enough for 16 bits, RUN of them. `small` begins such
 * a run over what there is, `first_small` with a first product, and `taken` ends it. */
#if VNNI
#define RUN 16
typedef vi Small;

INLINE Small small(vi c) { return c; }
INLINE Small dot_small(Small c, vi w, vi a) { return dot_fours(c, (Fours){w}, (Fours){a}); }
INLINE Small first_small(vi c, vi w, vi a) { return dot_small(small(c), w, a); }
INLINE vi taken(vi c, Small run) { (void)c; return run; }
#elif defined(X86) && (LANE == 8 || defined(__AVX512BW__) || defined(__SSSE3__))
#define RUN 8
typedef v16 Small;

INLINE Small small(vi c) { (void)c; return (Small){0}; }
INLINE Small dot_small(Small c, vi w, vi a) {
#if LANE == 8
    vi one;
    __asm__("vpmaddubsw %[a], %[w], %[one]\n\tvpaddw %[one], %[c], %[c]"
            : [c] "+x"(c), [one] "=&x"(one) : [w] "x"(w), [a] "x"(a));
    return c;
#else
    return c + (Small)X86(maddubs_epi16)((xi)w, (xi)a);
#endif
}
INLINE Small first_small(vi c, vi w, vi a) { (void)c; return (Small)X86(maddubs_epi16)((xi)w, (xi)a); }
INLINE vi taken(vi c, Small run) { return c + (vi)X86(madd_epi16)((xi)run, X86(set1_epi16)(1)); }
#else
#define RUN 8
typedef vi Small;

INLINE Small small(vi c) { return c; }
INLINE Small dot_small(Small c, vi w, vi a) {
    for (int shift = 0; shift < 32; shift += 8)
        c += (vi)(((vu)w >> shift) & 255) * ((vi)((vu)a << (24 - shift)) >> 24);
    return c;
}
INLINE Small first_small(vi c, vi w, vi a) { return dot_small(small(c), w, a); }
INLINE vi taken(vi c, Small run) { (void)c; return run; }
#endif
INLINE vi same_small(const int8_t *from) {
    int32_t four;
    memcpy(&four, from, 4);
    return all_words(four);
}
