/* How likely given numbers of a row are, for one type of number: z - log sum exp z of row r at the columns of
 * at[first[r]] to at[first[r + 1]]. A row is summed in one order, whatever is beside it. */
void NAME(log_shares)(const T *z, const long *first, const long *at, float *out, long rows, long width, long stride) {
#pragma omp parallel for schedule(static)
    for (long r = 0; r < rows; r++) {
        const T *zr = z + r * stride;
        float lanes[LANES], top = LOAD(zr[0]), sum = 0;
        for (int j = 0; j < LANES; j++) lanes[j] = top;
        long i = 0;
        for (; i + LANES <= width; i += LANES)
            for (int j = 0; j < LANES; j++) { float v = LOAD(zr[i + j]); lanes[j] = v > lanes[j] ? v : lanes[j]; }
        for (; i < width; i++) { float v = LOAD(zr[i]); top = v > top ? v : top; }
        for (int j = 0; j < LANES; j++) top = lanes[j] > top ? lanes[j] : top;
        for (long i = 0; i < width; i++) sum += fast_exp(LOAD(zr[i]) - top);
        float whole = top + logf(sum);
        for (long j = first[r]; j < first[r + 1]; j++) out[j] = LOAD(zr[at[j]]) - whole;
    }
}
