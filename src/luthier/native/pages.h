/* Attention of single tokens over keys and values that lie in blocks, for one type of number.
 *
 * q [tokens, heads, size]; keys and values [slots, kv, size]; a token n sees `seen[n]` places, of which place p lies in slot
 * tables[first[n] + p / block] * block + p % block. One token and one head of the keys are one piece of work, summed block
 * after block in fp32 with a running maximum (Milakov and Gimelshein 2018, arXiv:1805.02867): what a token gets does not
 * depend on the tokens beside it.
 */
void NAME(attend_pages)(const T *q, const T *keys, const T *values, const int *tables, const long *first,
                        const long *seen, const float *sinks, T *out, long tokens, long heads, long kv, long size,
                        long block, float scale, long window, float softcap) {
    long group = heads / kv;
#pragma omp parallel
    {
        float query[group * size], sum[group * size], top[group], mass[group], score[group * block];
        float key[size], value[block * size + PIECE];
#pragma omp for collapse(2) schedule(dynamic, 4)
        for (long n = 0; n < tokens; n++)
            for (long h = 0; h < kv; h++) {
                const T *mine = q + (n * heads + h * group) * size;
                for (long i = 0; i < group * size; i++) { query[i] = LOAD(mine[i]) * scale; sum[i] = 0; }
                for (long g = 0; g < group; g++) {
                    /* A sink takes its share of the softmax, and gives nothing. */
                    top[g] = sinks ? sinks[h * group + g] : -1e30f;
                    mass[g] = sinks ? 1.0f : 0.0f;
                }
                long from = window > 0 && seen[n] > window ? seen[n] - window : 0;
                for (long place = from; place < seen[n];) {
                    long end = (place / block + 1) * block;
                    if (end > seen[n]) end = seen[n];
                    long count = end - place;
                    long slot = (long)tables[first[n] + place / block] * block + place % block;
                    for (long j = 0; j < count; j++) {
                        const T *at = keys + ((slot + j) * kv + h) * size;
                        for (long i = 0; i < size; i++) key[i] = LOAD(at[i]);
                        for (long g = 0; g < group; g++) {
                            float dot = 0;
                            for (long i = 0; i < size; i++) dot += query[g * size + i] * key[i];
                            score[g * block + j] = softcap > 0 ? softcap * tanhf(dot / softcap) : dot;
                        }
                    }
                    for (long g = 0; g < group; g++) {
                        float *mark = score + g * block, high = top[g];
                        for (long j = 0; j < count; j++) high = mark[j] > high ? mark[j] : high;
                        float shrink = fast_exp(top[g] - high), total = 0;
                        for (long j = 0; j < count; j++) { mark[j] = fast_exp(mark[j] - high); total += mark[j]; }
                        mass[g] = mass[g] * shrink + total;
                        top[g] = high;
                        for (long i = 0; i < size; i++) sum[g * size + i] *= shrink;
                    }
                    for (long j = 0; j < count; j++) {
                        const T *at = values + ((slot + j) * kv + h) * size;
                        for (long i = 0; i < size; i++) value[j * size + i] = LOAD(at[i]);
                    }
                    for (long g = 0; g < group; g++)
                        for (long i = 0; i < size; i += PIECE) {
                            /* A piece of the sum stays in registers over the block. */
                            float piece[PIECE], *to = sum + g * size + i;
                            long wide = size - i < PIECE ? size - i : PIECE;
                            for (long c = 0; c < PIECE; c++) piece[c] = c < wide ? to[c] : 0;
                            for (long j = 0; j < count; j++) {
                                float share = score[g * block + j];
                                const float *row = value + j * size + i;
                                for (long c = 0; c < PIECE; c++) piece[c] += share * row[c];
                            }
                            for (long c = 0; c < wide; c++) to[c] = piece[c];
                        }
                    place = end;
                }
                T *to = out + (n * heads + h * group) * size;
                for (long g = 0; g < group; g++)
                    for (long i = 0; i < size; i++) to[g * size + i] = STORE(sum[g * size + i] / mass[g]);
            }
    }
}
