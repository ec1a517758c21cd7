/* What a decoder is, and a step of it: as library.py lays them out. */

typedef struct {
    Norm before_attention, query, key, after_attention, before_mlp, after_mlp;
    Product qkv, out, up, down;
    const float *cosine, *sine;     /* [places][turned / 2]; none: no positions here */
    int64_t window;                 /* 0: all */
    uint8_t *keys, *values;         /* [blocks][kv], each what cached.h says of a block */
    const LowSet *low_qkv, *low_out, *low_up, *low_down;    /* by adapter; or none */
} Layer;

typedef struct {
    int64_t width, heads, kv, size, turned, inner, layers, gated, activation, parallel;
    int64_t kept;                   /* bits of keys and values: 16 or 8 */
    float scale, softcap, residual, embedding_scale;
    const uint16_t *embedding;      /* [V, width] in bf16 */
    const float *places;            /* [places, width], learned; or none */
    Norm last;
    Product head;
    float head_scale, head_softcap;
    const Layer *layer;
} Decoder;

/* A step: `count` tokens, each with its place in its text and where the table of its text begins; `wanted` of them are to
 * predict the next: their logits, as wide as the head's n, or the likeliest token alone, -1 where its logit is not finite.
 * `adapters`: of each token, or -1; what they add is `low` wide before B at most. `states`: in place of what is predicted, what
 * it would be predicted from. */
typedef struct {
    int64_t count, wanted, threads, low;
    const int32_t *ids, *places, *first, *tables, *rows;
    float *logits;
    int32_t *best;
    const int32_t *adapters;
    float *states;
} Step;
