/* Keys and values of a token to their block, and its queries as attention takes them: in bf16, or in bytes with scales. */

/* Of one head of a block. */
INLINE int64_t key_bytes(const Decoder *d) { return TOKENS * d->size * d->kept / 8 + (d->kept == 8 ? (int64_t)SCALES : 0); }
INLINE int64_t value_bytes(const Decoder *d) { return TOKENS * d->size * d->kept / 8; }

static void place_query(const Decoder *d, float *x, Half *to) {
    vf scale = all(d->scale);
    if (d->kept == 16) {
        for (int64_t i = 0; i < d->size; i += LANE) store_half(to + i, load(x + i) * scale);
        return;
    }
    int8_t whole[1024];
    Byte *bytes = (Byte *)to;
    int32_t sum;
    for (int64_t i = 0; i < d->size; i += LANE) store(x + i, load(x + i) * scale);
    float own = to_bytes(x, d->size, sizeof(Byte) == 1 ? (int8_t *)to : whole, &sum);
    if (sizeof(Byte) > 1)
        for (int64_t i = 0; i < d->size; i++) bytes[i] = whole[i];
    memcpy(bytes + d->size, &own, 4);
    memcpy((uint8_t *)(bytes + d->size) + 4, &sum, 4);
}

static void place_key(const Decoder *d, const float *x, uint8_t *block, int64_t inside) {
    uint32_t words[256];
    int64_t size = d->size;
    if (d->kept == 16) {
        for (int64_t i = 0; i < size; i += LANE) store_halves((uint16_t *)words + i, load(x + i));
        for (int64_t i = 0; i < size / 2; i++) memcpy(block + (i * TOKENS + inside) * 4, words + i, 4);
        return;
    }
    int32_t sum;
    float scale = to_bytes(x, size, (int8_t *)words, &sum);
    for (int64_t i = 0; i < size / 4; i++) {
        uint32_t higher = in_places(words[i]) ^ 0x80808080;
        memcpy(block + (i * TOKENS + inside) * 4, &higher, 4);
    }
    memcpy(block + TOKENS * size + inside * 4, &scale, 4);
}

/* `keys`: the block of its key, where its scale is kept. */
static void place_value(const Decoder *d, const float *x, uint8_t *block, uint8_t *keys, int64_t inside, int last) {
    int64_t size = d->size;
    if (d->kept == 8) {
        int8_t bytes[1024], *to = (int8_t *)block + (inside / 4) * size * 4 + place_in_four((int)(inside % 4));
        int32_t sum;
        float scale = to_bytes(x, size, bytes, &sum);
        for (int64_t i = 0; i < size; i++) to[i * 4] = bytes[i];
        memcpy(keys + TOKENS * (size + 4) + inside * 4, &scale, 4);
        return;
    }
    uint16_t halves[512], *to = (uint16_t *)block + (inside / 2) * size * 2 + inside % 2;
    for (int64_t i = 0; i < size; i += LANE) store_halves(halves + i, load(x + i));
    for (int64_t i = 0; i < size; i++) to[i * 2] = halves[i];
    /* What follows the last token of a text in its block counts nothing, but nothing times what is no number is none: a
     * block may hold what a text that overflowed left there. */
    if (!last) return;
    if (inside % 2 == 0)
        for (int64_t i = 0; i < size; i++) to[i * 2 + 1] = 0;
    memset(block + (inside / 2 + 1) * size * 4, 0, (size_t)((TOKENS / 2 - 1 - inside / 2) * size) * 4);
}

/* The keys and values of a token to their block, and its queries, scaled. */
static void place_token(const Decoder *d, const Layer *layer, const Step *step, int64_t n, float *made, Half *queries) {
    int64_t size = d->size, place = step->places[n];
    int64_t block = step->tables[step->first[n] + place / TOKENS], inside = place % TOKENS;
    const float *cosine = layer->cosine ? layer->cosine + place * (d->turned / 2) : 0;
    const float *sine = layer->cosine ? layer->sine + place * (d->turned / 2) : 0;
    int last = n + 1 == step->count || step->first[n + 1] != step->first[n];
    for (int64_t h = 0; h < d->heads + d->kv; h++) {
        float *x = made + h * size;
        const Norm *norm = h < d->heads ? &layer->query : &layer->key;
        if (norm->kind != NO_NORM) normalise(norm, x, x, size);
        if (cosine) turn(x, cosine, sine, d->turned);
        if (h < d->heads) place_query(d, x, queries + h * size);
        else place_key(d, x, layer->keys + (block * d->kv + h - d->heads) * key_bytes(d), inside);
    }
    for (int64_t h = 0; h < d->kv; h++)
        place_value(d, made + (d->heads + d->kv + h) * size, layer->values + (block * d->kv + h) * value_bytes(d),
                    layer->keys + (block * d->kv + h) * key_bytes(d), inside, last);
}
