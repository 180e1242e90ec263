/* What queries that attend together share: a tile of keys, and how each of them weighs it. */
#ifndef FLEXPIPED_ATTENTION_WORK_H
#define FLEXPIPED_ATTENTION_WORK_H

#include "paged_attention.h"

#define MAX_HEAD_DIM 256
#define MAX_GROUP 16 /* query heads per KV head */
#define MAX_ROWS 32  /* queries that attend together: tokens times query heads of a KV head */
#define TOGETHER 4   /* queries whose sums are in registers at a time */
#define PARTS 4      /* vectors of keys per softmax update */
#define TILE (PARTS * LANES)
#define MASKED (-1e30f)

/* Neighbouring tokens of one sequence with one KV head, or one token with neighbouring KV heads. */
typedef struct {
    int32_t token, count, head, heads;
} Item;

/* What the queries of an item share with the loops. */
typedef struct {
    const Step *step;
    int rows; /* of each KV head; those of the second follow those of the first */
    int64_t dim, padded; /* head_dim, and that rounded up to whole vectors */
    float query[MAX_GROUP * MAX_HEAD_DIM] __attribute__((aligned(64)));
    float sum[MAX_GROUP * MAX_HEAD_DIM] __attribute__((aligned(64)));
    float keys[PARTS * LANES * MAX_HEAD_DIM] __attribute__((aligned(64))); /* of a tile, (parts, padded, LANES) */
    float fetched[LANES * MAX_HEAD_DIM] __attribute__((aligned(64)));      /* of a part, (LANES, padded) */
    float weights[MAX_ROWS * TILE] __attribute__((aligned(64)));
    Vec total[MAX_ROWS];
    float peak[MAX_ROWS];
    int32_t oldest[MAX_ROWS], context[MAX_ROWS]; /* the keys that a query attends to */
} Work;

/* Keys ``begin`` to ``end`` - 1 from position ``base`` on, in parts of LANES that lie in one KV block each. */
typedef struct {
    int32_t base;
    int begin, end, parts;
    const float *keys[PARTS], *values[PARTS];
    const float *next_keys[PARTS], *next_values[PARTS]; /* of the tile that follows, NULL where it has none */
} Tile;

static __attribute__((noinline)) Vec capped(Vec score, float softcap) {
    for (int i = 0; i < LANES; i++) score[i] = softcap * tanhf(score[i] / softcap);
    return score;
}

/* Whether some queries, one after the other, attend to every key of a tile, their scores as they are. */
INLINE int attend_to_all(const Work *work, const Tile *tile, int row, int rows) {
    return tile->parts == PARTS && work->oldest[row + rows - 1] <= tile->base &&
           work->context[row] >= tile->base + TILE && !(work->step->softcap > 0.0f);
}

/* Weigh the tile's keys for one query; ``weights`` has its products with them. */
INLINE void weigh(Work *work, const Tile *tile, int row, const int to_all) {
    const Step *step = work->step;
    float *weights = work->weights + row * TILE;
    const int32_t first = work->oldest[row] - tile->base, last = work->context[row] - tile->base;
    const int parts = to_all ? PARTS : tile->parts;
    Vec score[PARTS], highest = all(MASKED), total = work->total[row];
    Ints counts[PARTS], lane;
    for (int i = 0; i < LANES; i++) lane[i] = i;
    for (int part = 0; part < parts; part++) {
        score[part] = load(weights + part * LANES) * step->scale;
        if (!to_all) {
            if (step->softcap > 0.0f) score[part] = capped(score[part], step->softcap);
            counts[part] = (lane >= first - part * LANES) & (lane < last - part * LANES);
            score[part] = chosen(counts[part], score[part], all(MASKED));
        }
        highest = larger(highest, score[part]);
    }
    const float peak = peak_of(highest);
    if (peak > work->peak[row]) {
        const Vec shrink = exponential(all(work->peak[row] - peak));
        work->peak[row] = peak;
        total *= shrink;
        float *sum = work->sum + row * work->padded;
        for (int64_t d = 0; d < work->padded; d += LANES) store(sum + d, load(sum + d) * shrink);
    }
    const Vec highest_yet = all(work->peak[row]);
    for (int part = 0; part < parts; part++) {
        Vec weight = exponential(score[part] - highest_yet);
        if (!to_all) weight = chosen(counts[part], weight, (Vec){0});
        total += weight;
        store(weights + part * LANES, weight);
    }
    work->total[row] = total;
}

static __attribute__((noinline)) void weigh_all(Work *work, const Tile *tile, int row) { weigh(work, tile, row, 1); }

static __attribute__((noinline)) void weigh_some(Work *work, const Tile *tile, int row) { weigh(work, tile, row, 0); }

/* Weigh the tile's keys for some queries, one after the other. */
INLINE void weigh_rows(Work *work, const Tile *tile, int row, const int rows) {
    if (attend_to_all(work, tile, row, rows))
        for (int r = 0; r < rows; r++) weigh_all(work, tile, row + r);
    else
        for (int r = 0; r < rows; r++) weigh_some(work, tile, row + r);
}

#endif
