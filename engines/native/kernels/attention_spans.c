/* Queries of one token that attend alone, one for each of several heads.
 *
 * Their keys lie side by side, SPAN vectors of each token, and so do their values. These are read in order, one row after
 * the other, for only then does the processor fetch what comes next by itself; the first line of each row tells it ahead of
 * time. Sums are those of ``paged_attention.c``.
 */
#include "attention_spans.h"

#include "transpose.h"

#define SPAN 16 /* vectors that stay in registers while tokens go by */

INLINE void score_span(Work *work, const Tile *tile, int64_t stride, int row, const int chunks) {
    const int64_t dim = chunks * LANES;
    Vec query[SPAN];
#pragma GCC unroll 16
    for (int i = 0; i < SPAN; i++) query[i] = load(work->query + row * dim + i * LANES);
    for (int part = 0; part < tile->parts; part++) {
        const int begin = tile->begin - part * LANES, end = tile->end - part * LANES;
        for (int j = 0; j < LANES; j++) {
            const float *key = tile->keys[part] + j * stride;
            __builtin_prefetch(tile->values[part] + j * stride, 0, 1);
            const int counts = j >= begin && j < end;
#pragma GCC unroll 16
            for (int head = 0; head < SPAN / chunks; head++) {
                Vec sum = {0};
                if (counts)
#pragma GCC unroll 16
                    for (int c = 0; c < chunks; c++)
                        sum += load(key + (head * chunks + c) * LANES) * query[head * chunks + c];
                store(work->keys + (head * LANES + j) * LANES, sum);
            }
        }
        for (int head = 0; head < SPAN / chunks; head++) {
            Vec sums[LANES];
            for (int j = 0; j < LANES; j++) sums[j] = load(work->keys + (head * LANES + j) * LANES);
            store(work->weights + (row + head) * TILE + part * LANES, sums_of_all(sums));
        }
    }
}

INLINE void add_span(Work *work, const Tile *tile, int64_t stride, int row, const int chunks) {
    float *to = work->sum + row * chunks * LANES;
    Vec sum[SPAN];
#pragma GCC unroll 16
    for (int i = 0; i < SPAN; i++) sum[i] = load(to + i * LANES);
    for (int part = 0; part < tile->parts; part++) {
        const int begin = tile->begin > part * LANES ? tile->begin - part * LANES : 0;
        const int end = tile->end - part * LANES < LANES ? tile->end - part * LANES : LANES;
        const float *weights = work->weights + row * TILE + part * LANES;
        for (int j = begin; j < end; j++) {
            const float *value = tile->values[part] + j * stride;
            if (tile->next_keys[part] != NULL) __builtin_prefetch(tile->next_keys[part] + j * stride, 0, 1);
#pragma GCC unroll 16
            for (int head = 0; head < SPAN / chunks; head++) {
                const Vec weight = all(weights[head * TILE + j]);
#pragma GCC unroll 16
                for (int c = 0; c < chunks; c++)
                    sum[head * chunks + c] += load(value + (head * chunks + c) * LANES) * weight;
            }
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < SPAN; i++) store(to + i * LANES, sum[i]);
}

INLINE void attend_span(Work *work, const Tile *tile, int64_t stride, int row, const int chunks) {
    score_span(work, tile, stride, row, chunks);
    for (int head = 0; head < SPAN / chunks; head++) weigh_rows(work, tile, row + head, 1);
    add_span(work, tile, stride, row, chunks);
}

void flexpiped_attend_span(Work *work, const Tile *tile, int64_t stride, int row) {
    switch (work->dim / LANES) {
    case 1: attend_span(work, tile, stride, row, 1); break;
    case 2: attend_span(work, tile, stride, row, 2); break;
    case 4: attend_span(work, tile, stride, row, 4); break;
    case 8: attend_span(work, tile, stride, row, 8); break;
    default: attend_span(work, tile, stride, row, SPAN); break;
    }
}

int flexpiped_span_heads(const Work *work, int heads) {
    const int64_t span = SPAN * LANES;
    return work->rows == 1 && work->dim % LANES == 0 && span % work->dim == 0 && heads * work->dim % span == 0
               ? (int)(span / work->dim)
               : 0;
}
