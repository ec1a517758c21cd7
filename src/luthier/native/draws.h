/* A token for each of some rows of scores (fp32), drawn from their softmax or the likeliest part of it.
 *
 * Weights are e^((z - top) / temperature) in fp32, so that the likeliest has 1; they are summed in fp64. Each row is one
 * thread's, and its sums run in one order, whatever is beside it.
 */

/* What is drawn from: 1 / temperature, so many of the likeliest (0: all), those that hold such a share (1: all), those
 * with such a part of the likeliest's weight (0: all), and where the draw falls, from 0 to 1. */
typedef struct { double cooled, top_p, min_p, number; long top_k; } draw;

/* A score as a whole number that falls where the score rises. */
static inline uint32_t falling(float score) {
    union { float f; uint32_t i; } u = {score};
    /* Zeros below and above zero are one number. */
    if (u.i == 0x80000000u) u.i = 0;
    return u.i & 0x80000000u ? u.i : ~(u.i | 0x80000000u);
}

/* Places and their keys by rising key, equal ones as they stood; the result is in places. Three rounds of 11 bits. */
static void sort_places(uint32_t *keys, int32_t *places, uint32_t *keys2, int32_t *places2, long count) {
    for (int round = 0; round < 3; round++) {
        long starts[2048] = {0}, sum = 0;
        int shift = 11 * round;
        for (long i = 0; i < count; i++) starts[keys[i] >> shift & 2047]++;
        if (starts[keys[0] >> shift & 2047] == count) continue;
        for (int b = 0; b < 2048; b++) { long own = starts[b]; starts[b] = sum; sum += own; }
        for (long i = 0; i < count; i++) {
            long to = starts[keys[i] >> shift & 2047]++;
            keys2[to] = keys[i];
            places2[to] = places[i];
        }
        memcpy(keys, keys2, count * sizeof(uint32_t));
        memcpy(places, places2, count * sizeof(int32_t));
    }
}

/* The first place whose sum is beyond the draw, of weights in this order (`places`, or as they stand). Weights of 0 are
 * never taken. */
static long fall_on(const float *weights, const int32_t *places, long count, double goal) {
    double sum = 0;
    long last = -1;
    for (long i = 0; i < count; i++) {
        long at = places ? places[i] : i;
        if (!(weights[at] > 0)) continue;
        sum += weights[at];
        last = at;
        if (sum > goal) break;
    }
    return last;
}

/* A score that at least top_k of the row reach: of stretches of it, the top_k-th of their highest; -inf where stretches
 * are too few. */
static float reached(const float *z, long width, long top_k, float *highest) {
    long stretches = width / PIECE;
    if (top_k > stretches) return -INFINITY;
    for (long s = 0; s < stretches; s++) {
        float top = z[s * PIECE];
        for (long i = 1; i < PIECE; i++) top = z[s * PIECE + i] > top ? z[s * PIECE + i] : top;
        highest[s] = top;
    }
    /* Hoare's selection. */
    long low = 0, high = stretches - 1, want = top_k - 1;
    while (low < high) {
        float middle = highest[(low + high) / 2];
        long i = low, j = high;
        while (i <= j) {
            while (highest[i] > middle) i++;
            while (highest[j] < middle) j--;
            if (i <= j) { float kept = highest[i]; highest[i++] = highest[j]; highest[j--] = kept; }
        }
        if (want <= j) high = j; else if (want >= i) low = i; else break;
    }
    return highest[want];
}

/* One row's token; -1 where its scores are not numbers. `room` is for as many numbers as the row has, five times as many
 * with top_k or top_p. */
static long draw_row(const float *z, long width, const draw *how, float *room) {
    float *weights = room, *spare = room + width, top = z[0], lanes[LANES];
    for (int j = 0; j < LANES; j++) lanes[j] = top;
    long i = 0;
    for (; i + LANES <= width; i += LANES)
        for (int j = 0; j < LANES; j++) lanes[j] = z[i + j] > lanes[j] ? z[i + j] : lanes[j];
    for (; i < width; i++) top = z[i] > top ? z[i] : top;
    for (int j = 0; j < LANES; j++) top = lanes[j] > top ? lanes[j] : top;
    float cooled = how->cooled > 1e30 ? 1e30f : (float)how->cooled;
    float least = how->top_k || how->top_p < 1 ? 0.0f : (float)how->min_p;
    double sums[1 + width / BLOCK], total = 0;
    for (long b = 0; b * BLOCK < width; b++) {
        long end = (b + 1) * BLOCK < width ? (b + 1) * BLOCK : width;
        double sum = 0;
        for (i = b * BLOCK; i < end; i++) {
            float under = (z[i] - top) * cooled, weight = fast_exp(under);
            /* Also for what is not a number, which stays one. */
            weight = under < -87.0f ? 0.0f : weight;
            weights[i] = weight < least ? 0.0f : weight;
            sum += weights[i];
        }
        total += sums[b] = sum;
    }
    if (!(total > 0 && total < INFINITY)) return -1;
    if (!how->top_k && !(how->top_p < 1)) {
        double goal = how->number * total, before = 0;
        if (goal > total * (1 - 1e-12)) goal = total * (1 - 1e-12);
        long b = 0, blocks = (width + BLOCK - 1) / BLOCK;
        /* A block whose sum is 0 holds nothing to take. */
        while (b + 1 < blocks && (before + sums[b] <= goal || !(sums[b] > 0))) before += sums[b++];
        while (b > 0 && !(sums[b] > 0)) before -= sums[--b];
        long end = (b + 1) * BLOCK < width ? BLOCK : width - b * BLOCK;
        return b * BLOCK + fall_on(weights + b * BLOCK, 0, end, goal - before);
    }
    /* Those that may be among the ones sought. What is below this weight holds less than is left out, all together. */
    float lowest = how->top_k ? reached(z, width, how->top_k, spare) : -INFINITY;
    float light = how->top_k ? 0.0f : (float)((1 - how->top_p) * total / width * (1 - 1e-5));
    uint32_t *keys = (uint32_t *)spare, *keys2 = keys + width;
    int32_t *places = (int32_t *)(keys2 + width), *places2 = places + width;
    long count = 0;
    for (i = 0; i < width; i++) {
        places[count] = i;
        count += z[i] >= lowest && weights[i] >= light && weights[i] > 0;
    }
    for (i = 0; i < count; i++) keys[i] = falling(z[places[i]]);
    sort_places(keys, places, keys2, places2, count);
    if (how->top_k) {
        if (count > how->top_k) count = how->top_k;
        for (total = 0, i = 0; i < count; i++) total += weights[places[i]];
    }
    double held = 0;
    for (i = 0; i < count && (i == 0 || how->top_p >= 1 || held < how->top_p * total); i++) {
        if (weights[places[i]] < how->min_p * weights[places[0]]) break;
        held += weights[places[i]];
    }
    double goal = how->number * held;
    return fall_on(weights, places, i, goal > held * (1 - 1e-12) ? held * (1 - 1e-12) : goal);
}

/* The token of each of `count` rows, which are `stride` apart in z; `how` has a draw for each. */
void draw_rows_f32(const float *z, const long *rows, const draw *how, long *tokens, long count, long width, long stride) {
    long rooms = 1;
    for (long r = 0; r < count; r++) if (how[r].top_k || how[r].top_p < 1) rooms = 5;
#pragma omp parallel if (count > 1)
    {
        float *room = malloc(rooms * width * sizeof(float));
#pragma omp for schedule(dynamic, 1)
        for (long r = 0; r < count; r++) tokens[r] = room ? draw_row(z + rows[r] * stride, width, how + r, room) : -2;
        free(room);
    }
}
