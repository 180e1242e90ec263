/* Paged attention in float32 for the CPU: writes the new keys and values of a step into a layer's KV cache and attends.
 *
 * A layer's cache is two arrays of shape (slots, kv_heads, head_dim); slot = KV block id * block_tokens + offset.
 * Neighbouring tokens of a prompt attend together, so that keys and values are read once for all of them. Every query
 * is summed in the same order all the same (its keys first to last, TILE at a time), whatever else is in the batch and
 * however the prompt was cut into chunks, so attention adds no batch-dependent rounding.
 */
#include "paged_attention.h"

#include "attention_spans.h"
#include "pool.h"
#include "transpose.h"

#include <stdlib.h>

#define BLOCK_MULTIPLE 16 /* of block_tokens; LANES divides it */
#define MAX_FLOATS 2048 /* of these queries, where a group is not larger by itself */
#define LINE 16      /* elements of a line of the cache */
#define PAGE 1024    /* elements of a page, beyond which the processor sees nothing coming by itself */
#define ENOUGH_ITEMS 8 /* so many that no thread waits long for another */
#define FEW_ROWS 8   /* so few compute less than it takes to wait for their keys */
#define PIECE_WORK 65536 /* multiplications that one thread does at a time, at least */
#define NOWHERE (-1)
#define LEVELS (LANES == 16 ? 4 : LANES == 8 ? 3 : 2)

/* Where the keys and values of a tile's parts begin for KV head 0; NOWHERE behind the last one. */
typedef struct {
    int64_t at[PARTS];
} Place;

static inline int64_t slot_of(const Step *step, int32_t token, int32_t position) {
    const int32_t *row = step->table + (int64_t)step->rows[step->sequence_of[token]] * step->max_blocks;
    return (int64_t)row[position / step->block_tokens] * step->block_tokens + position % step->block_tokens;
}

/* Announce rows that are read soon: they lie too far apart for the processor to see by itself which come next. */
INLINE void announce(const float *rows, int64_t stride, int64_t dim) {
    for (int j = 0; j < LANES; j++)
        for (int64_t d = 0; d < dim; d += LINE) __builtin_prefetch(rows + j * stride + d, 0, 1);
}

/* The same part of the tile that follows. */
INLINE void announce_after(const Work *work, const Tile *tile, int part, int64_t stride) {
    if (tile->next_keys[part] == NULL) return;
    announce(tile->next_keys[part], stride, work->dim);
    announce(tile->next_values[part], stride, work->dim);
}

/* Fetch the keys of one part of a tile, each as it lies: their rows are far apart, often by a power of two, and would
 * drive each other out of the cache if they were read across. Those out of the tile's bounds are zero and are not read. */
INLINE void fetch_keys(Work *work, const Tile *tile, int part, int64_t stride) {
    const int begin = tile->begin - part * LANES, end = tile->end - part * LANES;
    for (int j = 0; j < LANES; j++) {
        float *to = work->fetched + j * work->padded;
        const float *from = tile->keys[part] + j * stride;
        int64_t d = 0;
        if (j >= begin && j < end) {
            for (; d + LANES <= work->dim; d += LANES) store(to + d, load(from + d));
            if (d < work->dim) store(to + d, load_part(from + d, work->dim - d));
        } else {
            for (; d < work->padded; d += LANES) store(to + d, (Vec){0});
        }
    }
}

/* LANES elements from ``d`` on of the keys that were fetched, lane by lane. */
INLINE void turned(const Work *work, int64_t d, Vec rows[LANES]) {
    for (int j = 0; j < LANES; j++) rows[j] = load(work->fetched + j * work->padded + d);
    transpose(rows);
}

static void turn_keys(Work *work, const Tile *tile, int part, int64_t stride) {
    float *to = work->keys + part * LANES * work->padded;
    fetch_keys(work, tile, part, stride);
    for (int64_t d = 0; d < work->padded; d += LANES) {
        Vec rows[LANES];
        turned(work, d, rows);
        for (int j = 0; j < LANES; j++) store(to + (d + j) * LANES, rows[j]);
    }
}

/* The products of some queries with the keys of a tile. Each is LANES sums over every LANES-th element, added up as a
 * binary tree does: first those of neighbouring lanes. */
INLINE void score_rows(Work *work, const Tile *tile, int row, const int rows) {
    const float *query = work->query + row * work->padded;
    const int64_t padded = work->padded;
    for (int part = 0; part < tile->parts; part++) {
        const float *keys = work->keys + part * LANES * padded;
        Vec saved[LEVELS + 1][TOGETHER];
#pragma GCC unroll 16
        for (int lane = 0; lane < LANES; lane++) {
            Vec sum[TOGETHER];
            for (int r = 0; r < rows; r++) sum[r] = (Vec){0};
            for (int64_t d = lane; d < padded; d += LANES) {
                Vec key = load(keys + d * LANES);
                KEEP(key);
                for (int r = 0; r < rows; r++) sum[r] += key * query[r * padded + d];
            }
            int level = 0;
#pragma GCC unroll 4
            for (; lane >> level & 1; level++)
                for (int r = 0; r < rows; r++) sum[r] = saved[level][r] + sum[r];
            for (int r = 0; r < rows; r++) saved[level][r] = sum[r];
        }
        for (int r = 0; r < rows; r++) store(work->weights + (row + r) * TILE + part * LANES, saved[LEVELS][r]);
    }
}

/* The same for one query alone, whose keys nobody else needs: they are used as they lie. */
static void score_one(Work *work, const Tile *tile, int64_t stride, int row) {
    static const float nothing[MAX_HEAD_DIM];
    const float *query = work->query + row * work->padded;
    for (int part = 0; part < tile->parts; part++) {
        const int begin = tile->begin - part * LANES, end = tile->end - part * LANES;
        Vec sum[LANES];
        announce_after(work, tile, part, stride);
#pragma GCC unroll 16
        for (int j = 0; j < LANES; j++) {
            const float *key = j >= begin && j < end ? tile->keys[part] + j * stride : nothing;
            int64_t d = 0;
            sum[j] = (Vec){0};
            for (; d + LANES <= work->dim; d += LANES) sum[j] += load(key + d) * load(query + d);
            if (d < work->dim) sum[j] += load_part(key + d, work->dim - d) * load(query + d);
        }
        store(work->weights + row * TILE + part * LANES, sums_of_all(sum));
    }
}

/* Add the values of a tile to the sums of some queries, ``chunks`` vectors of them from element ``d`` on. */
INLINE void add_values(Work *work, const Tile *tile, int64_t stride, int row, int64_t d, const int rows,
                       const int chunks, const int whole) {
    Vec sum[TOGETHER][4];
    float *to = work->sum + row * work->padded + d;
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < chunks; c++) sum[r][c] = load(to + r * work->padded + c * LANES);
    for (int part = 0; part < tile->parts; part++) {
        const int begin = tile->begin > part * LANES ? tile->begin - part * LANES : 0;
        const int end = tile->end - part * LANES < LANES ? tile->end - part * LANES : LANES;
        const float *weights = work->weights + row * TILE + part * LANES;
        const float *values = tile->values[part] + d;
        for (int j = begin; j < end; j++) {
            Vec value[4];
            for (int c = 0; c < chunks; c++) {
                value[c] = whole ? load(values + j * stride + c * LANES) : load_part(values + j * stride, work->dim - d);
                KEEP(value[c]);
            }
            for (int r = 0; r < rows; r++) {
                const Vec weight = all(weights[r * TILE + j]);
                for (int c = 0; c < chunks; c++) sum[r][c] += value[c] * weight;
            }
        }
    }
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < chunks; c++) store(to + r * work->padded + c * LANES, sum[r][c]);
}

INLINE void add_rows(Work *work, const Tile *tile, int64_t stride, int row, const int rows) {
    int64_t d = 0;
    for (; d + 4 * LANES <= work->dim; d += 4 * LANES) add_values(work, tile, stride, row, d, rows, 4, 1);
    for (; d + 2 * LANES <= work->dim; d += 2 * LANES) add_values(work, tile, stride, row, d, rows, 2, 1);
    for (; d + LANES <= work->dim; d += LANES) add_values(work, tile, stride, row, d, rows, 1, 1);
    if (d < work->dim) add_values(work, tile, stride, row, d, rows, 1, 0);
}

INLINE void attend_rows(Work *work, const Tile *tile, int64_t stride, int row, const int rows) {
    score_rows(work, tile, row, rows);
    weigh_rows(work, tile, row, rows);
    add_rows(work, tile, stride, row, rows);
}

/* Which query a row is: the token and the head. */
INLINE void query_of(const Work *work, const Item *item, int row, int64_t *token, int64_t *head) {
    const int group = work->step->num_heads / work->step->num_kv_heads;
    *token = item->token + row % work->rows / group;
    *head = (item->head + row / work->rows) * group + row % group;
}

static void begin_work(Work *work, const Step *step, const Rows *q, const Item *item) {
    work->step = step;
    work->rows = item->count * (step->num_heads / step->num_kv_heads);
    work->dim = step->head_dim;
    work->padded = (work->dim + LANES - 1) / LANES * LANES;
    for (int row = 0; row < work->rows * item->heads; row++) {
        int64_t token, head;
        query_of(work, item, row, &token, &head);
        const int32_t context = step->positions[token] + 1;
        work->context[row] = context;
        work->oldest[row] = step->window > 0 && step->window < context ? context - step->window : 0;
        work->peak[row] = MASKED;
        work->total[row] = (Vec){0};
        const float *from = q->data + token * q->token_stride + head * q->head_stride;
        float *query = work->query + row * work->padded, *sum = work->sum + row * work->padded;
        for (int64_t d = 0; d < work->padded; d += LANES) {
            store(query + d, load_part(from + d, work->dim - d));
            store(sum + d, (Vec){0});
        }
    }
}

static void end_work(const Work *work, const Item *item, float *out) {
    for (int row = 0; row < work->rows * item->heads; row++) {
        int64_t token, head;
        query_of(work, item, row, &token, &head);
        float *to = out + (token * work->step->num_heads + head) * work->dim;
        const float inverse = 1.0f / sum_of(work->total[row]);
        const float *sum = work->sum + row * work->padded;
        for (int64_t d = 0; d < work->dim; d++) to[d] = sum[d] * inverse;
    }
}

/* Find the parts from position ``base`` on that any query of the item attends to. */
static Place place_at(const Work *work, const Item *item, int32_t base) {
    const int32_t context = work->context[work->rows - 1];
    Place place;
    for (int part = 0; part < PARTS; part++) {
        const int32_t position = base + part * LANES;
        place.at[part] = NOWHERE;
        if (position < context)
            place.at[part] = slot_of(work->step, item->token, position) * work->step->num_kv_heads * work->dim;
    }
    return place;
}

/* The keys from position ``base`` on of one KV head. */
INLINE Tile tile_at(const Work *work, const float *keys, const float *values, int32_t head, int32_t base,
                    const Place *here, const Place *next) {
    const int32_t oldest = work->oldest[0], context = work->context[work->rows - 1];
    Tile tile = {.base = base};
    tile.begin = oldest > base ? oldest - base : 0;
    tile.end = context - base < TILE ? context - base : TILE;
    tile.parts = (tile.end + LANES - 1) / LANES;
    for (int part = 0; part < PARTS; part++) {
        const int64_t own = here->at[part] + head * work->dim, after = next->at[part] + head * work->dim;
        tile.keys[part] = here->at[part] == NOWHERE ? NULL : keys + own;
        tile.values[part] = here->at[part] == NOWHERE ? NULL : values + own;
        tile.next_keys[part] = next->at[part] == NOWHERE ? NULL : keys + after;
        tile.next_values[part] = next->at[part] == NOWHERE ? NULL : values + after;
    }
    return tile;
}

/* Have the rows of one KV head, from ``first`` on, attend to the keys of a tile. */
static void attend_tile(Work *work, const Tile *tile, int64_t stride, int first) {
    if (work->rows == 1) {
        score_one(work, tile, stride, first);
        weigh_rows(work, tile, first, 1);
        add_rows(work, tile, stride, first, 1);
        return;
    }
    for (int part = 0; part < tile->parts; part++) {
        if (work->rows <= FEW_ROWS || stride >= PAGE) announce_after(work, tile, part, stride);
        turn_keys(work, tile, part, stride);
    }
    const int end = first + work->rows;
    int row = first;
    for (; row + TOGETHER <= end; row += TOGETHER) attend_rows(work, tile, stride, row, TOGETHER);
    switch (end - row) {
    case 1: attend_rows(work, tile, stride, row, 1); break;
    case 2: attend_rows(work, tile, stride, row, 2); break;
    case 3: attend_rows(work, tile, stride, row, 3); break;
    default: break;
    }
}

static void attend(const Step *step, const float *keys, const float *values, const Rows *q, float *out,
                   const Item *item) {
    Work work;
    begin_work(&work, step, q, item);
    const int64_t stride = (int64_t)step->num_kv_heads * work.dim;
    const int span = flexpiped_span_heads(&work, item->heads);
    int32_t base = work.oldest[0] - work.oldest[0] % TILE;
    Place here = place_at(&work, item, base);
    for (; base < work.context[work.rows - 1]; base += TILE) {
        const Place next = place_at(&work, item, base + TILE);
        for (int32_t head = 0; head < item->heads; head += span > 0 ? span : 1) {
            const Tile tile = tile_at(&work, keys, values, item->head + head, base, &here, &next);
            if (span > 0)
                flexpiped_attend_span(&work, &tile, stride, head);
            else
                attend_tile(&work, &tile, stride, head * work.rows);
        }
        here = next;
    }
    end_work(&work, item, out);
}

static void write_kv(const Step *step, float *keys, float *values, const Rows *k, const Rows *v, int32_t token) {
    const size_t bytes = (size_t)step->head_dim * sizeof(float);
    const int64_t target = slot_of(step, token, step->positions[token]) * step->num_kv_heads * step->head_dim;
    for (int32_t head = 0; head < step->num_kv_heads; head++) {
        const int64_t offset = target + (int64_t)head * step->head_dim;
        memcpy(keys + offset, k->data + token * k->token_stride + head * k->head_stride, bytes);
        memcpy(values + offset, v->data + token * v->token_stride + head * v->head_stride, bytes);
    }
}

/* How many KV heads of a lone token attend together: what lies side by side is read together, unless there are so few
 * tokens that threads would have nothing to do. */
static int32_t heads_together(const Step *step, int32_t padded) {
    const int32_t group = step->num_heads / step->num_kv_heads;
    int32_t most = MAX_ROWS / group, fitting = MAX_GROUP * MAX_HEAD_DIM / (group * padded);
    if (fitting < most) most = fitting;
    const int32_t tokens = step->num_sequences;
    while (most > 1 && tokens * (step->num_kv_heads / most) < ENOUGH_ITEMS) most /= 2;
    return most < 1 ? 1 : most;
}

/* Fill ``items`` and return how many there are: tokens of one sequence, one after the other, as many as fit. */
static int32_t items_of(const Step *step, Item *items) {
    const int32_t group = step->num_heads / step->num_kv_heads;
    const int32_t padded = (step->head_dim + LANES - 1) / LANES * LANES, together = heads_together(step, padded);
    int32_t most = (MAX_FLOATS / padded < MAX_ROWS ? MAX_FLOATS / padded : MAX_ROWS) / group, items_made = 0, count;
    if (most < 1) most = 1;
    for (int32_t token = 0; token < step->num_tokens; token += count) {
        for (count = 1; count < most && token + count < step->num_tokens; count++)
            if (step->sequence_of[token + count] != step->sequence_of[token]) break;
        for (int32_t head = 0, heads; head < step->num_kv_heads; head += heads) {
            const int32_t left = step->num_kv_heads - head;
            heads = count > 1 ? 1 : left < together ? left : together;
            items[items_made++] = (Item){.token = token, .count = count, .head = head, .heads = heads};
        }
    }
    return items_made;
}

typedef struct {
    const Step *step;
    const float *keys, *values;
    const Rows *q;
    float *out;
    const Item *items;
    int64_t pieces, pieces_at_once;
} Shared;

/* The last first: they have the longest contexts, and nobody waits for one of them at the end. */
static void attend_piece(void *context, int64_t number) {
    const Shared *shared = context;
    for (int64_t i = 0; i < shared->pieces_at_once; i++) {
        const int64_t piece = shared->pieces - 1 - (number * shared->pieces_at_once + i);
        if (piece < 0) return;
        attend(shared->step, shared->keys, shared->values, shared->q, shared->out, &shared->items[piece]);
    }
}

int flexpiped_paged_attention(const Step *step, float *keys, float *values, const Rows *q, const Rows *k, const Rows *v,
                              float *out) {
    if (step->head_dim > MAX_HEAD_DIM || step->num_heads > MAX_GROUP * step->num_kv_heads ||
        step->block_tokens % BLOCK_MULTIPLE != 0)
        return -1;
    Item *items = malloc((size_t)step->num_tokens * (size_t)step->num_kv_heads * sizeof *items);
    if (items == NULL) return -2;
    int64_t work = 0;
    for (int32_t token = 0; token < step->num_tokens; token++) {
        write_kv(step, keys, values, k, v, token);
        work += step->positions[token] + 1;
    }
    Shared shared = {.step = step, .keys = keys, .values = values, .q = q, .out = out, .items = items};
    shared.pieces = items_of(step, items);
    work *= step->num_heads * step->head_dim; /* multiplications, half of them */
    shared.pieces_at_once = 1 + shared.pieces * PIECE_WORK / (work + 1);
    flexpiped_share(attend_piece, &shared, (shared.pieces + shared.pieces_at_once - 1) / shared.pieces_at_once);
    free(items);
    return 0;
}
