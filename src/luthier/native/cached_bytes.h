/* The same attention over keys and values in bytes, a scale for each token and head.
 *
 * Keys are kept 128 higher than they are, as the instruction wants them unsigned, [size / 4][32][4] and after them the scales
 * of 32 keys and of 32 values; values signed, [8][size][4]. A query is bytes, its scale, and the sum of its bytes. The share
 * of a place times the scale of its value is rounded to a byte without sign, with one scale for the places of a block. */

#define SCALES (2 * TOKENS * sizeof(float))

INLINE void bytes_attend(const Cached *c, const int N, const Half *const *query, const int64_t *from,
                         const int64_t *seen, int64_t first, int64_t last, float *const *out, const uint8_t *const *after) {
    int64_t size = c->size, room = (last - first) * TOKENS;
    const int wide_keys = KEYS_AT_ONCE(N), wide = VALUES_AT_ONCE(N);
    float scale[QUERIES];
    int32_t shift[QUERIES];
    UNROLL for (int i = 0; i < N; i++) {
        memcpy(scale + i, (const Byte *)query[i] + size, 4);
        memcpy(shift + i, (const uint8_t *)((const Byte *)query[i] + size) + 4, 4);
    }
    for (int64_t at = first; at < last; at++) {
        const uint8_t *keys = keys_of(c, at), *next = upcoming(c, at + AHEAD, first, last, after);
        const float *scales = (const float *)(keys + TOKENS * size);
        if (at + AHEAD < last) UNROLL for (int n = 0; n < 4; n++) fetch_far(next + TOKENS * size + n * 64);
        for (int part = 0; part < PARTS_OF; part += wide_keys) {
            vi sum[QUERIES][4];
            UNROLL for (int i = 0; i < N; i++) UNROLL for (int r = 0; r < wide_keys; r++) sum[i][r] = all_words(-128 * shift[i]);
            for (int64_t d = 0; d < size / 4; d++) {
                Fours word[4];
                UNROLL for (int r = 0; r < wide_keys; r++) word[r] = fours(held(load_words(keys + d * 128 + (part + r) * WIDE)));
                UNROLL for (int r = 0; r < wide_keys; r++)
                    if ((part + r) * WIDE % 64 == 0) fetch_far(next + d * 128 + (part + r) * WIDE);
                UNROLL for (int i = 0; i < N; i++) {
                    Fours q = same_fours((const Byte *)query[i] + d * 4);
                    UNROLL for (int r = 0; r < wide_keys; r++) sum[i][r] = dot_fours(sum[i][r], word[r], q);
                }
            }
            UNROLL for (int r = 0; r < wide_keys; r++) {
                vf own = load(scales + (part + r) * LANE);
                UNROLL for (int i = 0; i < N; i++)
                    store(c->score + i * room + (at - first) * TOKENS + (part + r) * LANE,
                          from_words(sum[i][r]) * own * all(scale[i]));
            }
        }
    }
    for (int i = 0; i < N; i++) {
        float *score = c->score + i * room;
        Byte *share = (Byte *)(c->share + i * room);
        vf high = settle(c, score, room, from[i], seen[i], first), mass = all(0);
        for (int64_t at = first; at < last; at += LANE, score += LANE * TOKENS, share += LANE * TOKENS) {
            /* As many blocks at a time as lanes, whose scales are made together. */
            int64_t count = last - at < LANE ? last - at : LANE;
            float top[LANE], inverse[LANE];
            store(top, all(0));
            for (int64_t b = 0; b < count; b++) {
                const float *scales = (const float *)(keys_of(c, at + b) + TOKENS * size) + TOKENS;
                vi most = all_words(0);
                UNROLL for (int r = 0; r < PARTS_OF; r++) {
                    float *to = score + b * TOKENS + r * LANE;
                    vf x = load(to);
                    vi none = x <= all(UNSEEN * 0.5f);
                    vf one = pick(none, all(0), exp_of(x - high));
                    mass += one;
                    /* What follows a text in its block may have no scale. */
                    vf e = pick(none, all(0), one * load(scales + r * LANE));
                    store(to, e);
                    /* Sizes as words: what is no number is above all others there. */
                    most = larger_words(most, (vi)size_of(e));
                }
                int32_t bits = most_of_words(most);
                memcpy(top + b, &bits, 4);
            }
            /* Where one is no number the bytes are any, and the scale makes what comes of them none. */
            vf tops = larger(all(1e-30f), load(top));
            store(inverse, 255.0f / tops);
            store(top, tops * (1.0f / 255.0f));
            for (int64_t b = 0; b < count; b++) {
                UNROLL for (int r = 0; r < PARTS_OF; r++) {
                    vi whole = round_words(load(score + b * TOKENS + r * LANE) * all(inverse[b]));
                    store_bytes(share + b * TOKENS + r * LANE, whole);
                }
                /* In the place of the block's first score: its scale. */
                score[b * TOKENS] = top[b];
            }
        }
        scale[i] = 1.0f / sum_of(mass);
        for (int64_t d = 0; d < size; d += LANE) store(out[i] + d, all(0));
    }
    for (int64_t at = first; at < last; at++) {
        const uint8_t *values = values_of(c, at), *next = upcoming(c, last + at - first + AHEAD, first, last, after);
        if (at + AHEAD >= last) UNROLL for (int n = 0; n < 4; n++) fetch_far(next + TOKENS * size + n * 64);
        for (int64_t d = 0; d < size; d += wide * LANE) {
            int columns = size - d >= wide * LANE ? wide : (int)((size - d) / LANE);
            vi sum[QUERIES][4];
            UNROLL for (int i = 0; i < N; i++) UNROLL for (int r = 0; r < wide; r++) sum[i][r] = all_words(0);
            for (int64_t t = 0; t < TOKENS / 4; t++) {
                Fours word[4];
                UNROLL for (int r = 0; r < wide; r++)
                    word[r] = signed_fours(r < columns ? held(load_words(values + (t * size + d + r * LANE) * 4)) : all_words(0));
                UNROLL for (int r = 0; r < wide; r++)
                    if (wide * WIDE < 64 || r * WIDE % 64 == 0) fetch_far(next + (t * size + d + r * LANE) * 4);
                UNROLL for (int i = 0; i < N; i++) {
                    Fours p = same_fours((const Byte *)(c->share + i * room) + (at - first) * TOKENS + t * 4);
                    UNROLL for (int r = 0; r < wide; r++) sum[i][r] = dot_fours(sum[i][r], p, word[r]);
                }
            }
            UNROLL for (int i = 0; i < N; i++) {
                vf top = all(c->score[i * room + (at - first) * TOKENS]);
                UNROLL for (int r = 0; r < wide; r++)
                    if (r < columns) {
                        float *to = out[i] + d + r * LANE;
                        store(to, load(to) + from_words(sum[i][r]) * top);
                    }
            }
        }
    }
    for (int i = 0; i < N; i++)
        for (int64_t d = 0; d < size; d += LANE) store(out[i] + d, load(out[i] + d) * all(scale[i]));
}

ATTEND(attend_bytes, bytes_attend)
