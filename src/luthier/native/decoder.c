/* One step of a decoder: new tokens of several texts through all layers, in one region of threads that wait for one
 * another between its parts. No headers but the compiler's own.
 *
 * Sums of a token run in one order whatever is beside it, so what a text becomes does not depend on the others. Weights are
 * packed (products.h); the residual stream, norms and softmax are fp32, keys and values bf16 or bytes. */
#define _GNU_SOURCE
#include <omp.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/mman.h>
#include "lanes.h"
#include "dots.h"
#include "products.h"
#include "packing.h"
#include "lowrank.h"
#include "rowwise.h"
#include "cached.h"
#include "cached_bytes.h"
#include "decoder.h"
#include "placing.h"

/* Where threads wait for one another: awake, for a part takes microseconds. */
typedef struct {
    _Alignas(64) atomic_int here;
    _Alignas(64) atomic_int round;
} Gate;

static void meet(Gate *gate, int threads) {
    if (threads == 1) return;
    int round = atomic_load_explicit(&gate->round, memory_order_relaxed);
    if (atomic_fetch_add_explicit(&gate->here, 1, memory_order_acq_rel) == threads - 1) {
        atomic_store_explicit(&gate->here, 0, memory_order_relaxed);
        atomic_store_explicit(&gate->round, round + 1, memory_order_release);
        return;
    }
    for (int turns = 0; atomic_load_explicit(&gate->round, memory_order_acquire) == round; turns++) {
#if defined(__x86_64__)
        _mm_pause();
#endif
        if (turns > 20000) { turns = 0; sched_yield(); }
    }
}

/* Memory for a step, kept for the next. */
typedef struct { void *at; size_t bytes; } Room;

static void *room(Room *held, size_t bytes) {
    if (held->bytes < bytes) {
        free(held->at);
        bytes = (bytes + bytes / 4 + 4095) & ~(size_t)4095;
        held->at = aligned_alloc(64, bytes);
        held->bytes = held->at ? bytes : 0;
    }
    return held->at;
}

static __thread Room wide_room, made_room, branch_room, halves_room, bytes_room, scale_room, shift_room, query_room,
    span_room, score_room, share_room, best_room, place_room, low_room, own_room;

/* Tokens of a text that follow one another and are attended together. */
typedef struct { int64_t first, count; } Span;

/* Of the tokens at `rows`, or where there are none of all. */
static int64_t find_spans(const Step *step, const int32_t *rows, int64_t count, int64_t most, Span *spans) {
    int64_t found = 0;
    for (int64_t i = 0; i < count; i++) {
        int64_t n = rows ? rows[i] : i;
        Span *last = spans + found - 1;
        if (found && last->count < most && last->first + last->count == n && step->first[n] == step->first[n - 1] &&
            step->places[n] == step->places[n - 1] + 1)
            last->count++;
        else
            spans[found++] = (Span){n, 1};
    }
    return found;
}

/* The first blocks that attention of this token and head reads: keys, and where there are few of them, values. */
static void find_next(const Decoder *d, const Layer *layer, const Step *step, int64_t n, int64_t head, const uint8_t **found) {
    int64_t place = step->places[n], from = layer->window && place >= layer->window ? place + 1 - layer->window : 0;
    const int32_t *table = step->tables + step->first[n] + from / TOKENS;
    int64_t count = place / TOKENS - from / TOKENS + 1;
    for (int64_t at = 0; at < AHEAD; at++)
        found[at] = at < count ? layer->keys + (table[at] * d->kv + head) * key_bytes(d)
                               : layer->values + (table[(at - count) % count] * d->kv + head) * value_bytes(d);
}

/* One head of keys for the tokens of a span. */
static void attend_span(const Decoder *d, const Layer *layer, const Step *step, Cached cached, Span span, int64_t head,
                        const Half *queries, float *out, const uint8_t *const *after) {
    int64_t group = d->heads / d->kv, size = d->size, stride = d->heads * size;
    const Half *query[QUERIES];
    float *to[QUERIES];
    int64_t from[QUERIES], seen[QUERIES];
    cached.head = head;
    cached.table = step->tables + step->first[span.first];
    for (int64_t at = 0, all_of = span.count * group; at < all_of; at += QUERIES) {
        int count = (int)(all_of - at < QUERIES ? all_of - at : QUERIES);
        int64_t low = INT64_MAX, high = 0;
        for (int i = 0; i < count; i++) {
            int64_t n = span.first + (at + i) / group, h = head * group + (at + i) % group, place = step->places[n];
            query[i] = queries + n * stride + h * size;
            to[i] = out + n * stride + h * size;
            seen[i] = place + 1;
            from[i] = layer->window && place >= layer->window ? place + 1 - layer->window : 0;
            low = from[i] < low ? from[i] : low;
            high = seen[i] > high ? seen[i] : high;
        }
        int64_t first = low / TOKENS, last = (high + TOKENS - 1) / TOKENS;
        if (d->kept == 8) attend_bytes(&cached, count, query, from, seen, first, last, to, after);
        else attend_halves(&cached, count, query, from, seen, first, last, to, after);
    }
}

/* x += branch, after its norm if it has one. */
static void add_branch(const Norm *norm, float times, float *branch, float *x, int64_t width) {
    normalise(norm, branch, branch, width);
    for (int64_t i = 0; i < width; i += LANE) store(x + i, load(x + i) + times * load(branch + i));
}

/* Logits as the family makes them. */
static void finish_logits(const Decoder *d, float *logits, int64_t from, int64_t to) {
    for (int64_t i = from; i < to; i++) {
        float x = logits[i] * d->head_scale;
        logits[i] = d->head_softcap > 0 ? d->head_softcap * tanhf(x / d->head_softcap) : x;
    }
}

/* Of LANE candidates a thread, the highest; the first of equals; -1 where that is no finite number. */
static int32_t best_of(const Best *best, int64_t rows, int64_t row, int threads) {
    float high = -INFINITY;
    int32_t at = 0;
    for (int thread = 0; thread < threads; thread++)
        for (int64_t i = 0; i < LANE; i++) {
            int64_t lane = (thread * rows + row) * LANE + i;
            int32_t column = best->at[lane] + (int32_t)i;
            if (best->value[lane] != best->value[lane]) return -1;
            if (best->value[lane] > high || (best->value[lane] == high && column < at)) {
                high = best->value[lane];
                at = column;
            }
        }
    return isfinite(high) ? at : -1;
}

static int64_t wider(int64_t a, int64_t b) { return a > b ? a : b; }

/* Of a layer, what was taken: heads that are attended, and tiles of its four products; and once those of the head. */
#define COUNTERS 5

/* Whether the rows that are wanted follow one another, none of them twice. */
static int in_order(const Step *step) {
    for (int64_t r = 1; r < step->wanted; r++)
        if (step->rows[r] <= step->rows[r - 1]) return 0;
    return 1;
}

/* A product, and what the adapters of its rows add. */
static void project(const Product *p, const Rows *rows, int64_t count, float *out, const Lows *lows, const LowSet *sets,
                    int thread, int threads, const Product *next, atomic_long *taken, Gate *gate) {
    multiply(p, rows, count, out, 0, thread, threads, next, taken);
    if (!lows->adapter || !sets) return;
    meet(gate, threads);
    raise_rows(lows, sets, p, count, out, thread, threads);
}

/* 0, or 1 where there is no memory. */
int decoder_step(const Decoder *d, const Step *step) {
    int64_t count = step->count, width = d->width, mixed = d->heads * d->size, inner = d->inner, wanted = step->wanted;
    int64_t group = d->heads / d->kv, together = group >= QUERIES ? 1 : QUERIES / group;
    int64_t deepest = wider(wider(d->layer[0].qkv.k, d->layer[0].out.k), wider(d->layer[0].down.k, d->head.k));
    int64_t widest = wider(d->layer[0].qkv.n, d->layer[0].up.n), places = 0;
    for (int64_t n = 0; n < count; n++) places = wider(places, step->places[n] + 1);
    int64_t blocks = (places + TOKENS - 1) / TOKENS, threads = step->threads;
    size_t rows = (size_t)wider(count, wanted);
    float *x = room(&wide_room, (size_t)(count * width) * 4);
    float *made = room(&made_room, (size_t)(count * widest) * 4);
    float *branch = room(&branch_room, (size_t)(count * wider(wider(d->layer[0].out.n, d->layer[0].down.n), mixed)) * 4);
    Half *halves = room(&halves_room, rows * (size_t)deepest * sizeof(Half));
    Byte *bytes = room(&bytes_room, rows * (size_t)deepest * sizeof(Byte));
    float *scales = room(&scale_room, rows * 4);
    int32_t *shifts = room(&shift_room, rows * (size_t)(deepest / GROUP + 2) * 4);
    Half *queries = room(&query_room, (size_t)(count * mixed) * sizeof(Half));
    Span *spans = room(&span_room, (size_t)count * sizeof(Span));
    float *score = room(&score_room, (size_t)(threads * QUERIES * blocks * TOKENS) * 4);
    Half *share = room(&share_room, (size_t)(threads * QUERIES * blocks * TOKENS) * sizeof(Half));
    float *most = room(&best_room, (size_t)(threads * wanted * LANE) * 4 + 64);
    int32_t *most_at = room(&place_room, (size_t)(threads * wanted * LANE) * 4 + 64);
    Half *inners = room(&low_room, (size_t)(count * step->low) * sizeof(Half) + 64);
    int32_t *own_adapters = room(&own_room, (size_t)wanted * 4 + 64);
    if (!inners || !x || !made || !branch || !halves || !bytes || !scales || !shifts || !queries || !spans || !score || !share ||
        !most || !most_at || !own_adapters)
        return 1;
    /* What is not wanted ends with its keys and values in the last layer. */
    int ends_early = wanted < count && in_order(step);
    atomic_long *turns = calloc((size_t)d->layers * COUNTERS + 1, sizeof *turns);
    if (!turns) return 1;
    if (step->adapters)
        for (int64_t r = 0; r < wanted; r++) own_adapters[r] = step->adapters[step->rows[r]];
    int64_t spans_found = find_spans(step, 0, count, together, spans);
    Best best = {most, most_at};
    Gate gate = {0};
    for (int64_t i = 0; i < threads * wanted * LANE; i++) { most[i] = -INFINITY; most_at[i] = 0; }
#define ROWS(product) (Rows){(product).k, halves, bytes, scales, shifts}
#pragma omp parallel num_threads((int)threads)
    {
        int thread = omp_get_thread_num(), all_threads = omp_get_num_threads();
        int64_t from = count * thread / all_threads, to = count * (thread + 1) / all_threads;
        int64_t longest = (wider(wider(width, inner), mixed) + 63) & ~63;
        float *row = aligned_alloc(64, (size_t)longest * (sizeof(float) + sizeof(Half)));
        Half *low_row = (Half *)(row + longest);
        for (int64_t n = from; n < to; n++)
            for (int64_t i = 0; i < width; i += LANE) {
                vf one = from_halves(d->embedding + step->ids[n] * width + i) * d->embedding_scale;
                store(x + n * width + i, d->places ? one + load(d->places + step->places[n] * width + i) : one);
            }
        for (int64_t l = 0; l < d->layers; l++) {
            const Layer *layer = d->layer + l;
            Rows in = ROWS(layer->qkv), mix = ROWS(layer->out), into = ROWS(layer->up), low = ROWS(layer->down);
            Lows lows = {step->adapters, step->low, inners};
            atomic_long *taken = turns + l * COUNTERS;
            for (int64_t n = from; n < to; n++) {
                normalise(&layer->before_attention, x + n * width, row, width);
                prepare(&in, layer->qkv.bits, n, row, width);
                lower(&lows, layer->low_qkv, n, row, width, low_row);
            }
            meet(&gate, all_threads);
            project(&layer->qkv, &in, count, made, &lows, layer->low_qkv, thread, all_threads, &layer->out, taken + 1, &gate);
            meet(&gate, all_threads);
            for (int64_t n = from; n < to; n++)
                place_token(d, layer, step, n, made + n * layer->qkv.n, queries + n * mixed);
            const int32_t *at = 0;  /* which tokens go on, where not all do */
            int64_t left = count;
            if (ends_early && l + 1 == d->layers) {
                at = step->rows;
                left = wanted;
                lows.adapter = step->adapters ? own_adapters : 0;
                from = left * thread / all_threads;
                to = left * (thread + 1) / all_threads;
                if (!thread) spans_found = find_spans(step, at, left, together, spans);
            }
            meet(&gate, all_threads);
            /* Whoever is free takes the next span, or where there are few, the next head of one. */
            Cached cached = {layer->keys, layer->values, key_bytes(d), value_bytes(d), 0, d->kv, 0, d->size, d->softcap,
                             score + thread * QUERIES * blocks * TOKENS, share + thread * QUERIES * blocks * TOKENS};
            int64_t lot = spans_found >= 4 * all_threads ? d->kv : 1, works = spans_found * d->kv;
            for (int64_t first; (first = atomic_fetch_add_explicit(taken, lot, memory_order_relaxed)) < works;)
                for (int64_t one = first; one < first + lot; one++) {
                    const uint8_t *after[AHEAD];
                    int64_t next = one + 1 < works ? one + 1 : one;
                    find_next(d, layer, step, spans[next / d->kv].first, next % d->kv, after);
                    attend_span(d, layer, step, cached, spans[one / d->kv], one % d->kv, queries, branch, after);
                }
            meet(&gate, all_threads);
            for (int64_t n = from; n < to; n++) {
                float *mixture = branch + (at ? at[n] : n) * mixed;
                prepare(&mix, layer->out.bits, n, mixture, mixed);
                lower(&lows, layer->low_out, n, mixture, mixed, low_row);
            }
            meet(&gate, all_threads);
            project(&layer->out, &mix, left, branch, &lows, layer->low_out, thread, all_threads, &layer->up, taken + 2, &gate);
            meet(&gate, all_threads);
            for (int64_t n = from; n < to; n++) {
                float *own = x + (at ? at[n] : n) * width;
                /* Where both branches read the same, the norm of the second is of what the first read. */
                if (d->parallel) normalise(&layer->before_mlp, own, row, width);
                add_branch(&layer->after_attention, d->residual, branch + n * layer->out.n, own, width);
                if (!d->parallel) normalise(&layer->before_mlp, own, row, width);
                prepare(&into, layer->up.bits, n, row, width);
                lower(&lows, layer->low_up, n, row, width, low_row);
            }
            meet(&gate, all_threads);
            project(&layer->up, &into, left, made, &lows, layer->low_up, thread, all_threads, &layer->down, taken + 3, &gate);
            meet(&gate, all_threads);
            for (int64_t n = from; n < to; n++) {
                float *gate_row = made + n * layer->up.n;
                activate_row(d->activation, gate_row, d->gated ? gate_row + inner : 0, row, inner);
                prepare(&low, layer->down.bits, n, row, inner);
                lower(&lows, layer->low_down, n, row, inner, low_row);
            }
            meet(&gate, all_threads);
            project(&layer->down, &low, left, branch, &lows, layer->low_down, thread, all_threads,
                    l + 1 < d->layers ? &layer[1].qkv : &d->head, taken + 4, &gate);
            meet(&gate, all_threads);
            for (int64_t n = from; n < to; n++)
                add_branch(&layer->after_mlp, d->residual, branch + n * layer->down.n, x + (at ? at[n] : n) * width, width);
        }
        meet(&gate, all_threads);
        Rows ends = ROWS(d->head);
        for (int64_t r = thread; r < wanted; r += all_threads) {
            normalise(&d->last, x + step->rows[r] * width, row, width);
            if (step->states) memcpy(step->states + r * width, row, (size_t)width * 4);
            prepare(&ends, d->head.bits, r, row, width);
        }
        meet(&gate, all_threads);
        Best own = {best.value + thread * wanted * LANE, best.at + thread * wanted * LANE};
        if (wanted && !step->states)
            multiply(&d->head, &ends, wanted, step->logits, step->best ? &own : 0, thread, all_threads, &d->layer->qkv,
                     turns + d->layers * COUNTERS);
        if (step->logits && (d->head_scale != 1.0f || d->head_softcap > 0)) {
            meet(&gate, all_threads);
            int64_t tiles = d->head.n / LANE;
            int64_t low = tiles * thread / all_threads * LANE, high = tiles * (thread + 1) / all_threads * LANE;
            for (int64_t r = 0; r < wanted; r++) finish_logits(d, step->logits + r * d->head.n, low, high);
        }
        free(row);
    }
    if (step->best)
        for (int64_t r = 0; r < wanted; r++) step->best[r] = best_of(&best, wanted, r, (int)threads);
    free(turns);
    return 0;
}

/* By which instructions bytes and bf16 are multiplied. */
const char *decoder_kernels(void) {
#if defined(X86) && VNNI && defined(__AVX512BF16__)
    return "AVX512-VNNI, AVX512-BF16";
#elif defined(X86) && LANE == 16
    return VNNI ? "AVX512-VNNI" : "AVX512";
#elif defined(X86) && LANE == 8
    return VNNI ? "AVX-VNNI" : "AVX2";
#elif defined(X86)
    return "SSE2";
#else
    return "plain C";
#endif
}

/* Rows of a tile. */
int decoder_lanes(void) { return LANE; }

/* Memory in large pages, where the system has any, that only what is written to takes; none where there is none. */
void *take_pages(size_t bytes) {
    void *at = mmap(0, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED) return 0;
#if defined(MADV_HUGEPAGE)
    madvise(at, bytes, MADV_HUGEPAGE);
#endif
    return at;
}

void give_pages(void *at, size_t bytes) { munmap(at, bytes); }
