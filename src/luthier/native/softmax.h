/* The softmax of attention over segments side by side, for one type of number; included as layers.h is.
 *
 * Scores [segments, heads, width, whole]: of `width` places with the segment's own tokens to `whole` places, of which the
 * first whole - width hold what stands before it, right-aligned. `own` and `before` say how many of each hold tokens.
 */

/* Which of the places the token at `at` sees: from *low up to *high. Nothing, where there is no token. */
static inline void NAME(sees)(long at, long own, long before, long width, long whole, long window, long causal,
                              long *low, long *high) {
    long here = whole - width + at, first = whole - width - before, last = whole - width + own;
    *low = window && here - window + 1 > first ? here - window + 1 : first;
    *high = causal ? here + 1 : window && here + window < last ? here + window : last;
    if (at >= own) *low = *high = 0;
}

/* softmax(scale * z) over what each token sees, in place; 0 elsewhere. whole is at most BLOCK. */
void NAME(seen_softmax)(T *z, const long *own, const long *before, long segments, long heads, long width, long whole,
                        long window, long causal, float scale) {
#pragma omp parallel for schedule(static)
    for (long r = 0; r < segments * heads * width; r++) {
        long s = r / (heads * width), low, high;
        NAME(sees)(r % width, own[s], before[s], width, whole, window, causal, &low, &high);
        T *zr = z + r * whole;
        float shares[BLOCK], lanes[LANES], top = -INFINITY, sum = 0;
        for (int j = 0; j < LANES; j++) lanes[j] = top;
        long i = low;
        for (; i + LANES <= high; i += LANES)
            for (int j = 0; j < LANES; j++) { float v = LOAD(zr[i + j]); lanes[j] = v > lanes[j] ? v : lanes[j]; }
        for (; i < high; i++) { float v = LOAD(zr[i]); top = v > top ? v : top; }
        for (int j = 0; j < LANES; j++) top = lanes[j] > top ? lanes[j] : top;
        for (i = low; i < high; i++) { shares[i] = fast_exp(scale * (LOAD(zr[i]) - top)); sum += shares[i]; }
        float part = 1.0f / sum;
        memset(zr, 0, low * sizeof(T));
        for (i = low; i < high; i++) zr[i] = STORE(part * shares[i]);
        memset(zr + high, 0, (whole - high) * sizeof(T));
    }
}

/* The gradient of z in the place of that of its softmax `y`. */
void NAME(seen_softmax_backward)(T *g, const T *y, const long *own, const long *before, long segments, long heads,
                                 long width, long whole, long window, long causal, float scale) {
#pragma omp parallel for schedule(static)
    for (long r = 0; r < segments * heads * width; r++) {
        long s = r / (heads * width), low, high;
        NAME(sees)(r % width, own[s], before[s], width, whole, window, causal, &low, &high);
        T *gr = g + r * whole;
        const T *yr = y + r * whole;
        float dot = 0;
        for (long i = low; i < high; i++) dot += LOAD(gr[i]) * LOAD(yr[i]);
        memset(gr, 0, low * sizeof(T));
        for (long i = low; i < high; i++) gr[i] = STORE(scale * LOAD(yr[i]) * (LOAD(gr[i]) - dot));
        memset(gr + high, 0, (whole - high) * sizeof(T));
    }
}
