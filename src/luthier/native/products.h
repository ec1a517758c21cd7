/* Products of few rows with a weight that is packed once: bf16, int8 with a scale a row of it, int4 with one for 64.
 *
 * A weight [n, k] lies in tiles of LANE of its rows: for every word of 4 bytes along k, the rows' words side by side.
 * What a row of the result is does not depend on the rows beside it: every sum runs along k in one order. */

/* Tiles and rows at once: as many sums as there are registers for. */
#if LANE == 16
#define TILES 3
#define MOST 8
#define FEW 8
#else
#define TILES 2
#define MOST 4
#define FEW 4
#endif
#define MOST_NIBBLES 4
#define FEW_NIBBLES 4
/* Bytes before they are read that weights are fetched, where rows are few. */
#define BEFORE 8192
#define GROUP 64

typedef struct {
    int64_t n, k, bits;         /* n whole tiles; k a multiple of GROUP for bytes, of 2 for halves */
    const uint8_t *weight;
    const float *scale;         /* [n], int8 */
    const uint16_t *scales;     /* [n / LANE][k / GROUP][LANE] in bf16, int4 */
    const float *bias;          /* [n], or none */
} Product;

/* Rows to multiply, in the form of the weight: as Half, or whole numbers of a byte with a scale a row; as Byte for weights in
 * bytes, as they are for nibbles. Weights are kept 128 higher than they are, or 8, as instructions want them without sign;
 * `shifts` take it back: for nibbles of each GROUP, for bytes at the end of all. */
typedef struct {
    int64_t k;
    Half *halves;
    Byte *bytes;
    float *scale;
    int32_t *shifts;
} Rows;

/* The best of LANE columns' places, of each row. */
typedef struct {
    float *value;
    int32_t *at;
} Best;

INLINE void keep(const Product *p, int64_t tile, int64_t m, vf x, float *out, int64_t stride, Best *best) {
    if (p->bias) x += load(p->bias + tile * LANE);
    if (out) store(out + m * stride + tile * LANE, x);
    if (best) {
        float *value = best->value + m * LANE;
        int32_t *at = best->at + m * LANE;
        /* What is no number is above all, and nothing above it. */
        vi above = (x > load(value)) | (x != x);
        store(value, pick(above, x, load(value)));
        *(vi_any *)at = (all_words((int32_t)(tile * LANE)) & above) | (load_words(at) & ~above);
    }
}

INLINE void halves_block(const Product *p, int64_t tile, int64_t m, const int MR, const int NR, const Rows *rows,
                         float *out, int64_t stride, Best *best, const uint8_t *ahead, const int lines) {
    int64_t k = p->k, step = k * LANE * 2;
    const uint8_t *w = p->weight + tile * step;
    vf sum[MOST][TILES];
    UNROLL for (int i = 0; i < MR; i++) UNROLL for (int n = 0; n < NR; n++) sum[i][n] = all(0);
    for (int64_t at = 0; at < k / 2; at++) {
        Twos word[TILES];
        UNROLL for (int n = 0; n < NR; n++) word[n] = twos(load_words(w + n * step + at * WIDE));
        UNROLL for (int n = 0; n < lines; n++) fetch_far(ahead + (at * lines + n) * WIDE);
        UNROLL for (int i = 0; i < MR; i++) {
            Twos a = same_twos(rows->halves + (m + i) * rows->k + at * 2);
            UNROLL for (int n = 0; n < NR; n++) sum[i][n] = dot_twos(sum[i][n], word[n], a);
        }
    }
    UNROLL for (int i = 0; i < MR; i++) UNROLL for (int n = 0; n < NR; n++)
        keep(p, tile + n, m + i, sum[i][n], out, stride, best);
}

INLINE void bytes_block(const Product *p, int64_t tile, int64_t m, const int MR, const int NR, const Rows *rows,
                        float *out, int64_t stride, Best *best, const uint8_t *ahead, const int lines) {
    int64_t k = p->k, step = k * LANE, groups = rows->k / GROUP;
    const uint8_t *w = p->weight + tile * step;
    vi sum[MOST][TILES];
    UNROLL for (int i = 0; i < MR; i++) {
        vi shift = all_words(rows->shifts[(m + i) * (groups + 1) + groups]);
        UNROLL for (int n = 0; n < NR; n++) sum[i][n] = shift;
    }
    for (int64_t at = 0; at < k / 4; at++) {
        Fours word[TILES];
        UNROLL for (int n = 0; n < NR; n++) word[n] = fours(load_words(w + n * step + at * WIDE));
        UNROLL for (int n = 0; n < lines; n++) fetch_far(ahead + (at * lines + n) * WIDE);
        UNROLL for (int i = 0; i < MR; i++) {
            Fours a = same_fours(rows->bytes + (m + i) * rows->k + at * 4);
            UNROLL for (int n = 0; n < NR; n++) sum[i][n] = dot_fours(sum[i][n], word[n], a);
        }
    }
    UNROLL for (int i = 0; i < MR; i++) {
        vf scale = all(rows->scale[m + i]);
        UNROLL for (int n = 0; n < NR; n++)
            keep(p, tile + n, m + i, from_words(sum[i][n]) * scale * load(p->scale + (tile + n) * LANE), out, stride, best);
    }
}

/* A group of 64 along k is 8 words of each row: the low halves of their bytes the first 32, the high ones the rest. All
 * of a group is written out, or addresses and copies take a fifth of the time. */
INLINE void nibbles_block(const Product *p, int64_t tile, int64_t m, const int MR, const int NR, const Rows *rows,
                          float *out, int64_t stride, Best *best, const uint8_t *ahead, const int lines) {
    int64_t k = p->k, step = k * LANE / 2, groups = rows->k / GROUP;
    const uint8_t *w = p->weight + tile * step;
    vf whole[MOST][TILES];
    UNROLL for (int i = 0; i < MR; i++) UNROLL for (int n = 0; n < NR; n++) whole[i][n] = all(0);
    const int8_t *four[MOST];
    const int32_t *shifts[MOST];
    UNROLL for (int i = 0; i < MR; i++) {
        four[i] = (const int8_t *)rows->bytes + (m + i) * rows->k;
        shifts[i] = rows->shifts + (m + i) * (groups + 1);
    }
    const uint16_t *scales = p->scales + tile * groups * LANE;
    for (int64_t g = 0; g < groups; g++, w += 8 * WIDE, ahead += 8 * WIDE * lines) {
        vi sum[MOST][TILES];
        UNROLL for (int part = 0; part < 16 / RUN; part++) {
            Small run[MOST][TILES];
            UNROLL for (int i = 0; i < MR; i++) UNROLL for (int n = 0; n < NR; n++)
                if (!part) sum[i][n] = all_words(shifts[i][g]);
            UNROLL for (int one = 0; one < RUN / 2; one++) {
                const int at = part * (RUN / 2) + one;
                vi low[TILES], high[TILES];
                UNROLL for (int n = 0; n < NR; n++) {
                    vi word = load_words(w + n * step + at * WIDE);
                    low[n] = word & 0x0f0f0f0f;
                    high[n] = (vi)((vu)word >> 4) & 0x0f0f0f0f;
                }
                UNROLL for (int n = 0; n < lines; n++) fetch_far(ahead + (at * lines + n) * WIDE);
                UNROLL for (int i = 0; i < MR; i++) {
                    vi a = same_small(four[i] + g * GROUP + at * 4), b = same_small(four[i] + g * GROUP + at * 4 + 32);
                    UNROLL for (int n = 0; n < NR; n++) {
                        run[i][n] = one ? dot_small(run[i][n], low[n], a) : first_small(sum[i][n], low[n], a);
                        run[i][n] = dot_small(run[i][n], high[n], b);
                    }
                }
            }
            UNROLL for (int i = 0; i < MR; i++) UNROLL for (int n = 0; n < NR; n++)
                sum[i][n] = taken(sum[i][n], run[i][n]);
        }
        UNROLL for (int n = 0; n < NR; n++) {
            vf scale = from_halves(scales + (n * groups + g) * LANE);
            UNROLL for (int i = 0; i < MR; i++) whole[i][n] += from_words(sum[i][n]) * scale;
        }
    }
    UNROLL for (int i = 0; i < MR; i++) {
        vf scale = all(rows->scale[m + i]);
        UNROLL for (int n = 0; n < NR; n++) keep(p, tile + n, m + i, whole[i][n] * scale, out, stride, best);
    }
}

/* The last rows, fewer than a lot, at once: one after another they would wait for their sums each. */
#define REST_OF(block, most, n) \
    case n: if (n < most) block(p, tile, m, n < most ? n : 1, TILES, rows, out, stride, best, left, 1); break;
#define REST(block, most)                                                                                             \
    switch (count - m) {                                                                                              \
    REST_OF(block, most, 1) REST_OF(block, most, 2) REST_OF(block, most, 3) REST_OF(block, most, 4)                   \
    REST_OF(block, most, 5) REST_OF(block, most, 6) REST_OF(block, most, 7)                                           \
    }

/* All rows by the tiles of one kind: as many rows at once as fit, then the rest. The weights of the next tiles are fetched
 * meanwhile, a tile with each lot of rows from the second on, or where there are fewer lots more with each; at the end of the
 * share, `then`, what this thread reads after it. */
#define LESS (TILES > 1 ? TILES - 1 : 1)
#define PRODUCT(name, block, most, few)                                                                               \
    static void name(const Product *p, const Rows *rows, int64_t count, float *out, int64_t stride, Best *best,       \
                     int64_t from, int64_t to, int64_t bytes, const uint8_t *then) {                                  \
        for (int64_t tile = from; tile < to;) {                                                                       \
            int64_t m = 0;                                                                                            \
            if (to - tile >= TILES) {                                                                                 \
                const uint8_t *next = tile + TILES < to ? p->weight + (tile + TILES) * bytes : then;                  \
                int64_t lots = count / most, skipped = lots > TILES;                                                  \
                if (few < most && !lots) {                                                                            \
                    if (count >= most / 2) block(p, tile, 0, most / 2, TILES, rows, out, stride, best, next, TILES);  \
                    else block(p, tile, 0, 1, TILES, rows, out, stride, best, next, TILES);                           \
                    m = count >= most / 2 ? most / 2 : 1;                                                             \
                }                                                                                                     \
                for (int64_t lot = 0; lot < lots; lot++, m += most) {                                                 \
                    int64_t tiles = lot - skipped;                                                                    \
                    if (count == most) block(p, tile, m, most, TILES, rows, out, stride, best, next, TILES);          \
                    else if (lots < 3 && !lot) block(p, tile, m, most, TILES, rows, out, stride, best, next, LESS);   \
                    else if (lots == 2 && TILES > 1)                                                                  \
                        block(p, tile, m, most, TILES, rows, out, stride, best, next + LESS * bytes, 1);              \
                    else if (lots > 2 && tiles >= 0 && tiles < TILES)                                                 \
                        block(p, tile, m, most, TILES, rows, out, stride, best, next + tiles * bytes, 1);             \
                    else block(p, tile, m, most, TILES, rows, out, stride, best, 0, 0);                               \
                }                                                                                                     \
                /* Where nothing is left to be fetched, what is there already. */                                     \
                const uint8_t *left = lots == 1 && TILES > 1 ? next + LESS * bytes : p->weight + tile * bytes;        \
                REST(block, most)                                                                                     \
                tile += TILES;                                                                                        \
            } else {                                                                                                  \
                for (; m + most <= count; m += most) block(p, tile, m, most, 1, rows, out, stride, best, 0, 0);       \
                for (; m < count; m++) block(p, tile, m, 1, 1, rows, out, stride, best, 0, 0);                        \
                tile++;                                                                                               \
            }                                                                                                         \
        }                                                                                                             \
    }

PRODUCT(multiply_halves, halves_block, MOST, 0)
PRODUCT(multiply_bytes, bytes_block, MOST, FEW)
PRODUCT(multiply_nibbles, nibbles_block, MOST_NIBBLES, FEW_NIBBLES)

INLINE int64_t tile_bytes(const Product *p) { return p->k * LANE * p->bits / 8; }

/* A few rows take less time than reading the weights, so these are read from the first to the last byte of the share, which
 * goes faster than several tiles at once; sums of a tile go on in four, that none waits for the one before. Whole numbers are
 * the same in any order. */
INLINE const uint8_t *before_long(const uint8_t *w, const uint8_t *end, const uint8_t *then) {
    return w + BEFORE < end ? w + BEFORE : then + (w + BEFORE - end);
}

INLINE void bytes_few(const Product *p, const int MR, const Rows *rows, float *out, int64_t stride, Best *best, int64_t from,
                      int64_t to, const uint8_t *then) {
    const int sums = 2 * MR > FEW ? 2 : 4;
    int64_t k = p->k, groups = rows->k / GROUP;
    const uint8_t *w = p->weight + from * tile_bytes(p), *end = p->weight + to * tile_bytes(p);
    for (int64_t tile = from; tile < to; tile++) {
        const uint8_t *next = before_long(w, end, then);
        vi sum[FEW][4];
        UNROLL for (int i = 0; i < MR; i++) {
            sum[i][0] = all_words(rows->shifts[i * (groups + 1) + groups]);
            UNROLL for (int n = 1; n < sums; n++) sum[i][n] = all_words(0);
        }
        for (int64_t at = 0; at < k / 4; at += 4, w += 4 * WIDE, next += 4 * WIDE)
            UNROLL for (int n = 0; n < 4; n++) {
                Fours word = fours(held(load_words(w + n * WIDE)));
                if (n * WIDE % 64 == 0) fetch_far(next + n * WIDE);
                UNROLL for (int i = 0; i < MR; i++)
                    sum[i][n % sums] = dot_fours(sum[i][n % sums], word, same_fours(rows->bytes + i * rows->k + (at + n) * 4));
            }
        UNROLL for (int i = 0; i < MR; i++) {
            vi whole = sum[i][0] + sum[i][1];
            if (sums == 4) whole += sum[i][2] + sum[i][3];
            keep(p, tile, i, from_words(whole) * all(rows->scale[i]) * load(p->scale + tile * LANE), out, stride, best);
        }
    }
}

/* So many sums for the low halves, and for the high ones. */
#define CHAINS (LANE == 16 ? 2 : 1)

INLINE void nibbles_few(const Product *p, const int MR, const Rows *rows, float *out, int64_t stride, Best *best,
                        int64_t from, int64_t to, const uint8_t *then) {
    int64_t groups = rows->k / GROUP;
    const uint8_t *w = p->weight + from * tile_bytes(p), *end = p->weight + to * tile_bytes(p);
    const uint16_t *scales = p->scales + from * groups * LANE;
    for (int64_t tile = from; tile < to; tile++) {
        const uint8_t *next = before_long(w, end, then);
        vf whole[FEW];
        UNROLL for (int i = 0; i < MR; i++) whole[i] = all(0);
        for (int64_t g = 0; g < groups; g++, w += 8 * WIDE, next += 8 * WIDE, scales += LANE) {
            Small run[FEW][2 * CHAINS];
            vi shift[FEW];
            UNROLL for (int i = 0; i < MR; i++) {
                shift[i] = all_words(rows->shifts[i * (groups + 1) + g]);
                run[i][0] = small(shift[i]);
                UNROLL for (int n = 1; n < 2 * CHAINS; n++) run[i][n] = small(all_words(0));
            }
            UNROLL for (int at = 0; at < 8; at++) {
                vi word = load_words(w + at * WIDE), low = word & 0x0f0f0f0f, high = (vi)((vu)word >> 4) & 0x0f0f0f0f;
                if (at * WIDE % 64 == 0) fetch_far(next + at * WIDE);
                UNROLL for (int i = 0; i < MR; i++) {
                    const int8_t *four = (const int8_t *)rows->bytes + i * rows->k + g * GROUP + at * 4;
                    Small *one = run[i] + at % CHAINS, *two = one + CHAINS;
                    *one = dot_small(*one, low, same_small(four));
                    *two = dot_small(*two, high, same_small(four + 32));
                }
            }
            vf scale = from_halves(scales);
            UNROLL for (int i = 0; i < MR; i++) {
                vi sum = taken(shift[i], run[i][0]), zero = all_words(0);
                UNROLL for (int n = 1; n < 2 * CHAINS; n++) sum += taken(zero, run[i][n]);
                whole[i] += from_words(sum) * scale;
            }
        }
        UNROLL for (int i = 0; i < MR; i++) keep(p, tile, i, whole[i] * all(rows->scale[i]), out, stride, best);
    }
}

#define FEW_CASE(block, most, n) \
    case n: if (n <= most) block(p, n <= most ? n : 1, rows, out, stride, best, from, to, then); break;
#define FEW_ROWS(name, block, most)                                                                                   \
    static void name(const Product *p, const Rows *rows, int64_t count, float *out, int64_t stride, Best *best,       \
                     int64_t from, int64_t to, const uint8_t *then) {                                                 \
        switch (count) {                                                                                              \
        FEW_CASE(block, most, 1) FEW_CASE(block, most, 2) FEW_CASE(block, most, 3) FEW_CASE(block, most, 4)           \
        FEW_CASE(block, most, 5) FEW_CASE(block, most, 6) FEW_CASE(block, most, 7) FEW_CASE(block, most, 8)           \
        }                                                                                                             \
    }

FEW_ROWS(multiply_few_bytes, bytes_few, FEW)
FEW_ROWS(multiply_few_nibbles, nibbles_few, FEW_NIBBLES)

/* So many of the tiles, one in that many, are nobody's before: whoever is done with its own takes of them. */
#define SHARED 4

typedef void Multiply(const Product *p, const Rows *rows, int64_t count, float *out, int64_t stride, Best *best, int64_t from,
                      int64_t to, int64_t bytes, const uint8_t *then);

/* The share of one thread of `threads`; after it, it multiplies by `next`. `taken`: how many of those that are nobody's were
 * taken, by all. */
static void multiply(const Product *p, const Rows *rows, int64_t count, float *out, Best *best, int thread, int threads,
                     const Product *next, atomic_long *taken) {
    int64_t tiles = p->n / LANE, bytes = tile_bytes(p), from = tiles * thread / threads, to = tiles * (thread + 1) / threads;
    const uint8_t *then = next->weight + next->n / LANE * thread / threads * tile_bytes(next);
    if (!count) return;
    if (p->bits == 8 && count <= FEW) { multiply_few_bytes(p, rows, count, out, p->n, best, from, to, then); return; }
    if (p->bits == 4 && count <= FEW_NIBBLES) { multiply_few_nibbles(p, rows, count, out, p->n, best, from, to, then); return; }
    Multiply *some = p->bits == 16 ? multiply_halves : p->bits == 8 ? multiply_bytes : multiply_nibbles;
    int64_t own = threads > 1 ? (tiles - tiles / SHARED) / threads / TILES * TILES : tiles;
    int64_t at = threads * own + (threads > 1 ? atomic_fetch_add_explicit(taken, TILES, memory_order_relaxed) : 0);
    if (own)
        some(p, rows, count, out, p->n, best, thread * own, thread * own + own, bytes,
             at < tiles ? p->weight + at * bytes : then);
    while (at < tiles) {
        int64_t following = threads * own + atomic_fetch_add_explicit(taken, TILES, memory_order_relaxed);
        some(p, rows, count, out, p->n, best, at, at + TILES < tiles ? at + TILES : tiles, bytes,
             following < tiles ? p->weight + following * bytes : then);
        at = following;
    }
}
