/* What adapters add to a product: y += B (A x), for each token those of its own adapter (Hu et al. 2021, arXiv:2106.09685).
 *
 * A and B lie in tiles of bf16 as other weights do, with the scale in B. A fused product has a part for each of the layers
 * in it: where its outputs begin and end, and its own A and B. */

#define PARTS 3

typedef struct {
    int64_t from, to;               /* tiles of the product's outputs */
    int64_t rank;                   /* whole tiles */
    const uint16_t *a, *b;          /* [rank, k], [16 (to - from), rank] */
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
    uint16_t *inner;
} Lows;

/* A x of one row, for all parts one after another. `halves` is room for x. */
static void lower(const Lows *lows, const LowSet *sets, int64_t m, const float *x, int64_t width, uint16_t *halves) {
    if (!lows->adapter || !sets || lows->adapter[m] < 0) return;
    const LowSet *set = sets + lows->adapter[m];
    uint16_t *to = lows->inner + m * lows->stride;
    if (set->parts)
        for (int64_t i = 0; i < width; i += LANE) store_halves(halves + i, load(x + i));
    for (int64_t p = 0; p < set->parts; p++)
        for (int64_t tile = 0; tile < set->part[p].rank / LANE; tile++, to += LANE) {
            const uint16_t *a = set->part[p].a + tile * width * LANE;
            vf sum = all(0);
            for (int64_t at = 0; at < width / 2; at++) {
                int32_t pair;
                memcpy(&pair, halves + at * 2, 4);
                sum = dot_halves(sum, load_words(a + at * LANE * 2), all_words(pair));
            }
            store_halves(to, sum);
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
        const uint16_t *inner = lows->inner + m * lows->stride;
        for (int64_t p = 0; p < set->parts; inner += set->part[p++].rank) {
            const Low *low = set->part + p;
            int64_t first = from > low->from ? from : low->from, last = to < low->to ? to : low->to;
            for (int64_t tile = first; tile < last; tile++) {
                const uint16_t *b = low->b + (tile - low->from) * low->rank * LANE;
                float *at = out + m * product->n + tile * LANE;
                vf sum = load(at);
                for (int64_t i = 0; i < low->rank / 2; i++) {
                    int32_t pair;
                    memcpy(&pair, inner + i * 2, 4);
                    sum = dot_halves(sum, load_words(b + i * LANE * 2), all_words(pair));
                }
                store(at, sum);
            }
        }
    }
}
