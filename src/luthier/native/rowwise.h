/* What happens to single rows between products: norms, activations, positions, and their form for the next product. */

enum { NO_NORM, RMS, LAYER };
enum { SILU, GELU_TANH, GELU, RELU, RELU_SQUARED };

typedef struct {
    int64_t kind;
    float eps;
    const float *weight, *bias;     /* bias: or none */
} Norm;

/* y = norm(x); both of `width`, a multiple of 16, and may be the same. */
static void normalise(const Norm *norm, const float *x, float *y, int64_t width) {
    float mean = 0;
    if (norm->kind == NO_NORM) {
        if (x != y) memcpy(y, x, (size_t)width * sizeof(float));
        return;
    }
    if (norm->kind == LAYER) {
        vf sum = all(0);
        for (int64_t i = 0; i < width; i += LANE) sum += load(x + i);
        mean = sum_of(sum) / (float)width;
    }
    vf squares = all(0);
    for (int64_t i = 0; i < width; i += LANE) {
        vf apart = load(x + i) - mean;
        squares += apart * apart;
    }
    float scale = 1.0f / sqrtf(sum_of(squares) / (float)width + norm->eps);
    for (int64_t i = 0; i < width; i += LANE) {
        vf made = (load(x + i) - mean) * scale * load(norm->weight + i);
        store(y + i, norm->bias ? made + load(norm->bias + i) : made);
    }
}

/* The scale of a row in bytes: so that its largest number is 127; infinite or none where one of them is. */
INLINE float scale_of(const float *y, int64_t width) {
    /* Sizes as words: what is no number is above all others there. */
    vi most = all_words(0);
    for (int64_t i = 0; i < width; i += LANE) most = larger_words(most, (vi)size_of(load(y + i)));
    int32_t bits = most_of_words(most);
    float scale;
    memcpy(&scale, &bits, 4);
    scale /= 127.0f;
    return scale < 1e-12f ? 1e-12f : scale;
}

/* A head of a query, key or value in bytes, with its scale and the sum of its bytes. Bytes have no number that is none; the
 * scale makes what comes of them none. */
INLINE float to_bytes(const float *y, int64_t width, int8_t *to, int32_t *sum) {
    float scale = scale_of(y, width);
    vf inverse = all(scale < INFINITY ? 1.0f / scale : 0.0f);
    vi total = all_words(0);
    for (int64_t i = 0; i < width; i += LANE) {
        vi whole = scale < INFINITY ? round_words(load(y + i) * inverse) : all_words(0);
        total += whole;
        *(vb_any *)(to + i) = __builtin_convertvector(whole, vb);
    }
    *sum = total_of(total);
    return scale;
}

/* One row for a product of `bits`: y has `width` values, and the rest of the row is zero. */
static void prepare(const Rows *rows, int64_t bits, int64_t m, const float *y, int64_t width) {
    if (bits == 16) {
        Half *to = rows->halves + m * rows->k;
        for (int64_t i = 0; i < width; i += LANE) store_half(to + i, load(y + i));
        memset(to + width, 0, (size_t)(rows->k - width) * sizeof(Half));
        return;
    }
    Byte *to = rows->bytes + m * rows->k;
    int8_t *own = (int8_t *)rows->bytes + m * rows->k;
    int64_t groups = rows->k / GROUP;
    int32_t *shifts = rows->shifts + m * (groups + 1), total = 0;
    float scale = scale_of(y, width);
    rows->scale[m] = scale;
    if (!(scale < INFINITY)) {
        /* Bytes have no such number; the scale makes the row's results none. */
        if (bits == 8) memset(to, 0, (size_t)rows->k * sizeof(Byte));
        else memset(own, 0, (size_t)rows->k);
        memset(shifts, 0, (size_t)(groups + 1) * 4);
        return;
    }
    float inverse = 1.0f / scale;
    for (int64_t g = 0; g < groups; g++) {
        vi sum = all_words(0);
        for (int64_t i = g * GROUP; i < (g + 1) * GROUP; i += LANE) {
            vi whole = i < width ? round_words(load(y + i) * inverse) : all_words(0);
            sum += whole;
            if (bits == 8) store_bytes(to + i, whole);
            else *(vb_any *)(own + i) = __builtin_convertvector(whole, vb);
        }
        int32_t own_sum = total_of(sum);
        shifts[g] = -8 * own_sum;
        total += own_sum;
    }
    shifts[groups] = -128 * total;
}

/* erf by Abramowitz and Stegun 7.1.26: within 1.5e-7. */
INLINE vf erf_of(vf x) {
    vf size = size_of(x), t = 1.0f / (1.0f + 0.3275911f * size);
    vf p = all(1.061405429f);
    p = p * t - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    vf y = 1.0f - p * t * exp_of(-(size * size));
    return (vf)((vi)y | ((vi)x & (int32_t)0x80000000));
}

INLINE vf activate(int64_t kind, vf x) {
    switch (kind) {
    case SILU: return x / (1.0f + exp_of(-x));
    case GELU_TANH: {
        /* x/2 (1 + tanh u) = x (1 - 1 / (e^2u + 1)) */
        vf u = 0.7978845608f * (x + 0.044715f * x * x * x);
        return x * (1.0f - 1.0f / (exp_of(2.0f * u) + 1.0f));
    }
    case GELU: return 0.5f * x * (1.0f + erf_of(x * 0.7071067812f));
    case RELU: return larger(all(0), x);
    default: {
        vf kept = larger(all(0), x);
        return kept * kept;
    }
    }
}

/* y [width] = act(gate) times up, or act(gate) alone. */
static void activate_row(int64_t kind, const float *gate, const float *up, float *y, int64_t width) {
    for (int64_t i = 0; i < width; i += LANE) {
        vf made = activate(kind, load(gate + i));
        store(y + i, up ? made * load(up + i) : made);
    }
}

/* Rotary positions (Su et al. 2021, arXiv:2104.09864) of one head in place: halves of its first `turned` paired. */
static void turn(float *x, const float *cosine, const float *sine, int64_t turned) {
    int64_t half = turned / 2;
    int64_t i = 0;
    for (; i + LANE <= half; i += LANE) {
        vf a = load(x + i), b = load(x + half + i), c = load(cosine + i), s = load(sine + i);
        store(x + i, a * c - b * s);
        store(x + half + i, b * c + a * s);
    }
    for (; i < half; i++) {
        float a = x[i], b = x[half + i];
        x[i] = a * cosine[i] - b * sine[i];
        x[half + i] = b * cosine[i] + a * sine[i];
    }
}
