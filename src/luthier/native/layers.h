/* The parts of a layer between its matrix products, forward and backward, for one type of number.
 *
 * Included once for each type T, with LOAD (to float), STORE (from float) and NAME (the suffix). Sums are fp32. Rows are
 * shared out over the threads, and each row is summed in one order, so that a result does not depend on its neighbours.
 */

/* y = x / sqrt(mean(x^2) + eps) * (shift + w), and 1 / sqrt(...) of each row. */
void NAME(rms_forward)(const T *x, const T *w, T *y, float *inverse, long rows, long width, float eps, float shift) {
#pragma omp parallel for schedule(static)
    for (long r = 0; r < rows; r++) {
        const T *xr = x + r * width;
        T *yr = y + r * width;
        float sum = 0;
        for (long i = 0; i < width; i++) { float v = LOAD(xr[i]); sum += v * v; }
        float scale = 1.0f / sqrtf(sum / width + eps);
        inverse[r] = scale;
        for (long i = 0; i < width; i++) yr[i] = STORE(LOAD(xr[i]) * scale * (shift + LOAD(w[i])));
    }
}

/* The gradient of x, and, where gw is given, that of w added to gw [threads, width]. */
void NAME(rms_backward)(const T *gy, const T *x, const T *w, const float *inverse, T *gx, float *gw, long rows,
                        long width, float shift) {
#pragma omp parallel
    {
        float *mine = gw ? gw + omp_get_thread_num() * width : 0;
#pragma omp for schedule(static)
        for (long r = 0; r < rows; r++) {
            const T *xr = x + r * width, *gr = gy + r * width;
            T *out = gx + r * width;
            float scale = inverse[r], dot = 0;
            for (long i = 0; i < width; i++) dot += LOAD(gr[i]) * (shift + LOAD(w[i])) * LOAD(xr[i]);
            dot *= scale * scale * scale / width;
            for (long i = 0; i < width; i++)
                out[i] = STORE(LOAD(gr[i]) * (shift + LOAD(w[i])) * scale - LOAD(xr[i]) * dot);
            if (mine)
                for (long i = 0; i < width; i++) mine[i] += LOAD(gr[i]) * LOAD(xr[i]) * scale;
        }
    }
}

/* y = silu(g) * u */
void NAME(swiglu_forward)(const T *g, const T *u, T *y, long count) {
#pragma omp parallel for schedule(static)
    for (long b = 0; b < count; b += BLOCK) {
        long end = b + BLOCK < count ? b + BLOCK : count;
        for (long i = b; i < end; i++) {
            float v = LOAD(g[i]);
            y[i] = STORE(v / (1.0f + fast_exp(-v)) * LOAD(u[i]));
        }
    }
}

/* The gradients of g and u; gg may be g's own place, gu u's. */
void NAME(swiglu_backward)(const T *gy, const T *g, const T *u, T *gg, T *gu, long count) {
#pragma omp parallel for schedule(static)
    for (long b = 0; b < count; b += BLOCK) {
        long end = b + BLOCK < count ? b + BLOCK : count;
        for (long i = b; i < end; i++) {
            float v = LOAD(g[i]), w = LOAD(u[i]), d = LOAD(gy[i]);
            float s = 1.0f / (1.0f + fast_exp(-v));
            gg[i] = STORE(d * w * s * (1.0f + v * (1.0f - s)));
            gu[i] = STORE(d * v * s);
        }
    }
}

/* Rotate the halves of each head in place: a, b = a cos - b sin, b cos + a sin; `sign` -1 turns back.
 * x [rows, heads, size], cosine and sine [rows, size] (the first half is read). */
void NAME(rotate)(T *x, const T *cosine, const T *sine, long rows, long heads, long size, float sign) {
    long half = size / 2;
#pragma omp parallel for schedule(static)
    for (long r = 0; r < rows; r++) {
        const T *c = cosine + r * size, *s = sine + r * size;
        for (long h = 0; h < heads; h++) {
            T *a = x + (r * heads + h) * size, *b = a + half;
            for (long i = 0; i < half; i++) {
                float p = LOAD(a[i]), q = LOAD(b[i]), co = LOAD(c[i]), si = sign * LOAD(s[i]);
                a[i] = STORE(p * co - q * si);
                b[i] = STORE(q * co + p * si);
            }
        }
    }
}

/* -log softmax(z)[target] of each row into loss, and weight * (softmax(z) - one-hot) over z itself. */
void NAME(cross_entropy)(T *z, const long *target, const float *weight, float *loss, long rows, long width) {
#pragma omp parallel for schedule(static)
    for (long r = 0; r < rows; r++) {
        T *zr = z + r * width;
        float lanes[LANES], top, sum = 0, gold = LOAD(zr[target[r]]);
        /* A maximum over lanes, since one over a row is not made vector code where NaN must survive. */
        for (int j = 0; j < LANES; j++) lanes[j] = gold;
        long i = 0;
        for (; i + LANES <= width; i += LANES)
            for (int j = 0; j < LANES; j++) { float v = LOAD(zr[i + j]); lanes[j] = v > lanes[j] ? v : lanes[j]; }
        top = gold;
        for (; i < width; i++) { float v = LOAD(zr[i]); top = v > top ? v : top; }
        for (int j = 0; j < LANES; j++) top = lanes[j] > top ? lanes[j] : top;
        for (long i = 0; i < width; i++) sum += fast_exp(LOAD(zr[i]) - top);
        loss[r] = logf(sum) + top - gold;
        float scale = weight[r] / sum;
        float at_target = scale * fast_exp(gold - top) - weight[r];
        for (long i = 0; i < width; i++) zr[i] = STORE(scale * fast_exp(LOAD(zr[i]) - top));
        zr[target[r]] = STORE(at_target);
    }
}
