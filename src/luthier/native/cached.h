/* Attention over keys and values in blocks of 32 tokens, as the dot instruction reads them: in bf16 here, in bytes in
 * cached_bytes.h.
 *
 * A block holds for every head of keys [size / 2][32][2], and of values [16][size][2]. A few queries that see the same
 * keys are worked on together: the heads of a group, and tokens that follow one another in a text. Scores, softmax and sums
 * of a query go in one order whatever is beside it; what it does not see counts nothing, exactly. */

#define TOKENS 32
/* Registers that one word of a block's tokens takes. */
#define PARTS_OF (TOKENS / LANE)
/* Queries at once, and how many registers of keys, and of values, these are worked on with: as many sums as there is room for. */
#if LANE == 16
#define QUERIES 12
#define KEYS_AT_ONCE(n) PARTS_OF
#define VALUES_AT_ONCE(n) ((n) > 5 ? 2 : 4)
#else
#define QUERIES 6
#define KEYS_AT_ONCE(n) ((n) > 4 ? 1 : (n) > 2 ? 2 : 4)
#define VALUES_AT_ONCE(n) KEYS_AT_ONCE(n)
#endif
/* So many blocks before it is read one is fetched. */
#define AHEAD 4
/* Lower than any score, and what becomes of it. */
#define UNSEEN -1e30f

typedef struct {
    const uint8_t *keys, *values;   /* of this layer */
    int64_t key_bytes, value_bytes; /* of one head of a block */
    const int32_t *table;
    int64_t heads, head, size;      /* of keys; which one; its width, a multiple of 16 */
    float softcap;
    float *score;                   /* room for QUERIES x the places of a text */
    Half *share;                    /* the same */
} Cached;

INLINE const uint8_t *keys_of(const Cached *c, int64_t at) {
    return c->keys + ((int64_t)c->table[at] * c->heads + c->head) * c->key_bytes;
}

INLINE const uint8_t *values_of(const Cached *c, int64_t at) {
    return c->values + ((int64_t)c->table[at] * c->heads + c->head) * c->value_bytes;
}

/* What is read so many blocks later: keys, then values, then what `after` says. */
INLINE const uint8_t *upcoming(const Cached *c, int64_t at, int64_t first, int64_t last, const uint8_t *const *after) {
    if (at < last) return keys_of(c, at);
    at += first - last;
    if (at < last) return values_of(c, at);
    return after[at - last];
}

/* The scores of a query in their final form, from the block `first` on: softly capped, and none where it sees nothing. The
 * largest, in every lane. */
INLINE vf settle(const Cached *c, float *score, int64_t room, int64_t from, int64_t seen, int64_t first) {
    if (c->softcap > 0)
        for (int64_t t = 0; t < room; t += LANE) {
            /* tanh(x) = 1 - 2 / (e^2x + 1) */
            vf twice = exp_of(load(score + t) * (2.0f / c->softcap));
            store(score + t, c->softcap * (1.0f - 2.0f / (twice + 1.0f)));
        }
    /* In whole lanes: what was written piece by piece is slow to read as one. */
    int64_t begin = from - first * TOKENS, end = seen - first * TOKENS;
    for (int64_t t = 0; t < begin; t += LANE)
        store(score + t, pick(counted() < (int32_t)(begin - t), all(UNSEEN), load(score + t)));
    for (int64_t t = end / LANE * LANE; t < room; t += LANE)
        store(score + t, pick(counted() < (int32_t)(end - t), load(score + t), all(UNSEEN)));
    vf high = all(UNSEEN);
    for (int64_t t = 0; t < room; t += LANE) high = larger(high, load(score + t));
    return all(most_of(high));
}

/* N queries (scaled), which see the places from[i] to seen[i]; blocks from `first` to `last` hold all
 * of these. Writes out[i]. `after`: AHEAD blocks that are read next, and are fetched meanwhile. */
INLINE void halves_attend(const Cached *c, const int N, const Half *const *query, const int64_t *from,
                          const int64_t *seen, int64_t first, int64_t last, float *const *out, const uint8_t *const *after) {
    int64_t size = c->size, room = (last - first) * TOKENS;
    const int wide_keys = KEYS_AT_ONCE(N), wide = VALUES_AT_ONCE(N);
    vf scale[QUERIES];
    for (int64_t at = first; at < last; at++) {
        const uint8_t *keys = keys_of(c, at), *next = upcoming(c, at + AHEAD, first, last, after);
        for (int part = 0; part < PARTS_OF; part += wide_keys) {
            vf sum[QUERIES][4];
            UNROLL for (int i = 0; i < N; i++) UNROLL for (int r = 0; r < wide_keys; r++) sum[i][r] = all(0);
            for (int64_t d = 0; d < size / 2; d++) {
                Twos word[4];
                UNROLL for (int r = 0; r < wide_keys; r++) word[r] = twos(load_words(keys + d * 128 + (part + r) * WIDE));
                UNROLL for (int r = 0; r < wide_keys; r++)
                    if ((part + r) * WIDE % 64 == 0) fetch_far(next + d * 128 + (part + r) * WIDE);
                UNROLL for (int i = 0; i < N; i++) {
                    Twos q = same_twos(query[i] + d * 2);
                    UNROLL for (int r = 0; r < wide_keys; r++) sum[i][r] = dot_twos(sum[i][r], word[r], q);
                }
            }
            UNROLL for (int i = 0; i < N; i++) UNROLL for (int r = 0; r < wide_keys; r++)
                store(c->score + i * room + (at - first) * TOKENS + (part + r) * LANE, sum[i][r]);
        }
    }
    for (int i = 0; i < N; i++) {
        float *score = c->score + i * room;
        Half *share = c->share + i * room;
        vf high = settle(c, score, room, from[i], seen[i], first), mass = all(0);
        for (int64_t t = 0; t < room; t += LANE) {
            vf x = load(score + t);
            vf e = pick(x <= all(UNSEEN * 0.5f), all(0), exp_of(x - high));
            mass += e;
            store_half(share + t, e);
        }
        scale[i] = all(1.0f / sum_of(mass));
    }
    for (int64_t d = 0; d < size; d += wide * LANE) {
        int columns = size - d >= wide * LANE ? wide : (int)((size - d) / LANE);
        vf sum[QUERIES][4];
        UNROLL for (int i = 0; i < N; i++) UNROLL for (int r = 0; r < wide; r++) sum[i][r] = all(0);
        for (int64_t at = first; at < last; at++) {
            const uint8_t *values = values_of(c, at) + d * 4;
            const uint8_t *next = upcoming(c, last + at - first + AHEAD, first, last, after) + d * 4;
            if (columns == wide)
                for (int64_t t = 0; t < TOKENS / 2; t++) {
                    Twos word[4];
                    UNROLL for (int r = 0; r < wide; r++) word[r] = twos(load_words(values + t * size * 4 + r * WIDE));
                    UNROLL for (int r = 0; r < wide; r++)
                        if (wide * WIDE < 64 || r * WIDE % 64 == 0) fetch_far(next + t * size * 4 + r * WIDE);
                    UNROLL for (int i = 0; i < N; i++) {
                        Twos p = same_twos(c->share + i * room + (at - first) * TOKENS + t * 2);
                        UNROLL for (int r = 0; r < wide; r++) sum[i][r] = dot_twos(sum[i][r], word[r], p);
                    }
                }
            else
                for (int64_t t = 0; t < TOKENS / 2; t++)
                    for (int r = 0; r < columns; r++) {
                        Twos word = twos(load_words(values + t * size * 4 + r * WIDE));
                        UNROLL for (int i = 0; i < N; i++)
                            sum[i][r] = dot_twos(sum[i][r], word, same_twos(c->share + i * room + (at - first) * TOKENS + t * 2));
                    }
        }
        for (int i = 0; i < N; i++)
            for (int r = 0; r < columns; r++) store(out[i] + d + r * LANE, sum[i][r] * scale[i]);
    }
}

/* How many queries there are decides which code they go by. */
#define CASE(some, n) case n: some(c, n, query, from, seen, first, last, out, after); break;
#define CASES_TO_5(some) CASE(some, 1) CASE(some, 2) CASE(some, 3) CASE(some, 4) CASE(some, 5)
#if QUERIES == 12
#define CASES(some) CASES_TO_5(some) CASE(some, 6) CASE(some, 7) CASE(some, 8) CASE(some, 9) CASE(some, 10) CASE(some, 11)
#else
#define CASES(some) CASES_TO_5(some)
#endif
#define ATTEND(name, some)                                                                                            \
    static void name(const Cached *c, int count, const Half *const *query, const int64_t *from, const int64_t *seen,  \
                     int64_t first, int64_t last, float *const *out, const uint8_t *const *after) {                   \
        switch (count) {                                                                                              \
        CASES(some)                                                                                                   \
        default: some(c, QUERIES, query, from, seen, first, last, out, after);                                        \
        }                                                                                                             \
    }

ATTEND(attend_halves, halves_attend)
