/* Paged attention over a layer's KV cache. */
#ifndef FLEXPIPED_PAGED_ATTENTION_H
#define FLEXPIPED_PAGED_ATTENTION_H

#include "vectors.h"

typedef struct {
    int32_t num_tokens, num_sequences, max_blocks, block_tokens;
    int32_t num_heads, num_kv_heads, head_dim;
    int32_t window;             /* a token attends to so many, itself included; 0: to all before it */
    float scale, softcap;       /* scores go through softcap * tanh(score / softcap); 0: they do not */
    const int32_t *table;       /* (rows, max_blocks): KV block ids of each sequence */
    const int32_t *rows;        /* (num_sequences): row of the sequence in the table */
    const int32_t *sequence_of; /* (num_tokens): which sequence a token belongs to */
    const int32_t *positions;   /* (num_tokens) */
} Step;

typedef struct {
    const float *data;
    int64_t token_stride, head_stride; /* in elements; head_dim is contiguous */
} Rows;

/* out: (num_tokens, num_heads, head_dim), contiguous. Returns 0, or -1 when the shape is not supported. */
int flexpiped_paged_attention(const Step *step, float *keys, float *values, const Rows *q, const Rows *k, const Rows *v,
                              float *out);

#endif
