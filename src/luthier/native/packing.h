/* Weights to the tiles that products.h multiplies by. */

/* Weights as they come, row after row, to tiles: [n, k] halves; bytes, signed; nibbles 0 to 15, one a byte. */
void pack_halves(const uint16_t *from, uint16_t *to, int64_t n, int64_t k) {
#pragma omp parallel for schedule(static)
    for (int64_t tile = 0; tile < n / LANE; tile++)
        for (int64_t at = 0; at < k / 2; at++)
            for (int64_t i = 0; i < LANE; i++)
                memcpy(to + tile * k * LANE + (at * LANE + i) * 2, from + (tile * LANE + i) * k + at * 2, 4);
}

void pack_bytes(const int8_t *from, uint8_t *to, int64_t n, int64_t k) {
#pragma omp parallel for schedule(static)
    for (int64_t tile = 0; tile < n / LANE; tile++)
        for (int64_t at = 0; at < k / 4; at++)
            for (int64_t i = 0; i < LANE; i++)
                for (int j = 0; j < 4; j++)
                    to[tile * k * LANE + (at * LANE + i) * 4 + place_in_four(j)] =
                        (uint8_t)(from[(tile * LANE + i) * k + at * 4 + j] + 128);
}

void pack_nibbles(const uint8_t *from, uint8_t *to, int64_t n, int64_t k) {
#pragma omp parallel for schedule(static)
    for (int64_t tile = 0; tile < n / LANE; tile++)
        for (int64_t g = 0; g < k / GROUP; g++)
            for (int64_t at = 0; at < 8; at++)
                for (int64_t i = 0; i < LANE; i++)
                    for (int64_t j = 0; j < 4; j++) {
                        const uint8_t *row = from + (tile * LANE + i) * k + g * GROUP + at * 4 + j;
                        to[tile * k * LANE / 2 + (g * 8 + at) * WIDE + i * 4 + j] = (uint8_t)(row[0] | row[32] << 4);
                    }
}

/* A row of bf16 to whole numbers from -127 to 127, 128 higher, and its scale: what `forms.to_int8` makes of it, to the last bit.
 * What is no number is above all, as bits too, so it becomes the scale and stays visible. */
static float row_to_bytes(const uint16_t *from, uint8_t *to, int64_t given, int64_t k) {
    uint16_t most = 0;
    for (int64_t i = 0; i < given; i++) {
        uint16_t size = from[i] & 0x7fff;
        most = size > most ? size : most;
    }
    union { uint32_t bits; float value; } largest = {(uint32_t)most << 16};
    float scale = largest.value / 127.0f;
    if (scale < 1e-12f) scale = 1e-12f;
    for (int64_t i = 0; i < given; i++) {
        union { uint32_t bits; float value; } x = {(uint32_t)from[i] << 16};
        float whole = rintf(x.value / scale);
        to[i] = (uint8_t)((int32_t)(whole == whole ? whole : 0.0f) + 128);
    }
    memset(to + given, 128, (size_t)(k - given));
    return scale;
}

/* `rows` rows of `given` numbers in bf16, `stride` apart, to tiles of bytes [n, k] and their scales; what is missing of both is
 * filled up with zeros. 0, or 1 where there is no memory. */
int pack_rounded(const uint16_t *from, uint8_t *to, float *scale, int64_t rows, int64_t given, int64_t stride, int64_t n,
                 int64_t k) {
    int failed = 0;
#pragma omp parallel reduction(| : failed)
    {
        uint8_t *own = malloc((size_t)(LANE * k));
        if (!own) failed = 1;
#pragma omp for schedule(static)
        for (int64_t tile = 0; tile < n / LANE; tile++) {
            if (!own) continue;
            for (int64_t i = 0; i < LANE; i++) {
                int64_t row = tile * LANE + i;
                scale[row] = row_to_bytes(from + row * stride, own + i * k, row < rows ? given : 0, k);
            }
            for (int64_t at = 0; at < k / 4; at++)
                for (int64_t i = 0; i < LANE; i++) {
                    uint32_t word;
                    memcpy(&word, own + i * k + at * 4, 4);
                    word = in_places(word);
                    memcpy(to + tile * k * LANE + (at * LANE + i) * 4, &word, 4);
                }
        }
        free(own);
    }
    return failed;
}
