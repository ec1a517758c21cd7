/* What adapters add to a product: y += B (A x), for each token those of its own adapter (Hu et al. 2021, arXiv:2106.09685).
 *
 * A and B lie in tiles of bf16 as other weights do, with the scale in B. A fused product has a part for each of the layers
 * in it: where its outputs begin and end, and its own A and B. */

#define PARTS 3

typedef struct {
    int64_t from, to;               /* of the product's outputs: whole tiles */
    int64_t rank;                   /* whole tiles */
    const uint16_t *a, *b;          /* [rank, k], [to - from, rank] */
} Low;

/* Of one adapter, for one product. */
typedef struct {
    int64_t parts;
    Low part[PARTS];
} LowSet;

/* The tokens of a step and their adapters (or -1), and room for what A gives. */
typedef struct {
    const int32_t *adapter;
    int64_t stride;
    Half *inner;
} Lows;

/* A x of one row, for all parts one after another. `halves` is room for x. */
static void lower(const Lows *lows, const LowSet *sets, int64_t m, const float *x, int64_t width, Half *halves) {
    if (!lows->adapter || !sets || lows->adapter[m] < 0) return;
    const LowSet *set = sets + lows->adapter[m];
    Half *to = lows->inner + m * lows->stride;
    if (set->parts)
        for (int64_t i = 0; i < width; i += LANE) store_half(halves + i, load(x + i));
    for (int64_t p = 0; p < set->parts; p++)
        for (int64_t tile = 0; tile < set->part[p].rank / LANE; tile++, to += LANE) {
            const uint16_t *a = set->part[p].a + tile * width * LANE;
            vf sum = all(0);
            for (int64_t at = 0; at < width / 2; at++)
                sum = dot_twos(sum, twos(load_words(a + at * LANE * 2)), same_twos(halves + at * 2));
            store_half(to, sum);
        }
}

/* B times that, added to the rows of a product: the share of one thread, as in multiply. */
static void raise_rows(const Lows *lows, const LowSet *sets, const Product *product, int64_t count, float *out,
                       int thread, int threads) {
    if (!lows->adapter || !sets) return;
    int64_t tiles = product->n / LANE, from = tiles * thread / threads, to = tiles * (thread + 1) / threads;
    for (int64_t m = 0; m < count; m++) {
        if (lows->adapter[m] < 0) continue;
        const LowSet *set = sets + lows->adapter[m];
        const Half *inner = lows->inner + m * lows->stride;
        for (int64_t p = 0; p < set->parts; inner += set->part[p++].rank) {
            const Low *low = set->part + p;
            int64_t begin = low->from / LANE, end = low->to / LANE;
            int64_t first = from > begin ? from : begin, last = to < end ? to : end;
            for (int64_t tile = first; tile < last; tile++) {
                const uint16_t *b = low->b + (tile - begin) * low->rank * LANE;
                float *at = out + m * product->n + tile * LANE;
                vf sum = load(at);
                for (int64_t i = 0; i < low->rank / 2; i++)
                    sum = dot_twos(sum, twos(load_words(b + i * LANE * 2)), same_twos(inner + i * 2));
                store(at, sum);
            }
        }
    }
}
