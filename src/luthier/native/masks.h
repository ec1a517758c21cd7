/* Rows of which only some columns may be chosen, for one type of number: row rows[r] of z gets -inf where its bit is not set,
 * and beyond its words. bits[r] is the address of `words` words; bit b of word w stands for column 32 w + b. */
void NAME(mask_rows)(T *z, const long *rows, const long *bits, long count, long words, long width, long stride) {
    const T lowest = STORE(-INFINITY);
#pragma omp parallel for schedule(static) if (count > 1 && count * width > 1 << 17)
    for (long r = 0; r < count; r++) {
        T *zr = z + rows[r] * stride;
        const uint32_t *mine = (const uint32_t *)(uintptr_t)bits[r];
        for (long w = 0, at = 0; at < width; w++, at += 32) {
            uint32_t word = w < words ? mine[w] : 0;
            long some = width - at < 32 ? width - at : 32;
            if (word == 0xffffffffu) continue;
            if (some < 32)
                for (long j = 0; j < some; j++) zr[at + j] = word >> j & 1 ? zr[at + j] : lowest;
            else if (!word)
                for (long j = 0; j < 32; j++) zr[at + j] = lowest;
            else
                for (long j = 0; j < 32; j++) zr[at + j] = word >> j & 1 ? zr[at + j] : lowest;
        }
    }
}
