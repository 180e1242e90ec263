/* Paged attention in float32 for the CPU: writes the new keys and values of a step into a layer's KV cache and attends.
 *
 * A layer's cache is two arrays of shape (slots, kv_heads, head_dim); slot = KV block id * block_tokens + offset.
 * Neighbouring tokens of a prompt attend together, so that keys and values are read once for all of them. Every query
 * is summed in the same order all the same (its keys first to last, TILE at a time), whatever else is in the batch and
 * however the prompt was cut into chunks, so attention adds no batch-dependent rounding.
 */
#include "paged_attention.h"

#include "pool.h"

#include <stdlib.h>

#define BLOCK_MULTIPLE 16 /* of block_tokens; LANES divides it */
#define MAX_HEAD_DIM 256
#define MAX_GROUP 16 /* query heads per KV head */
#define MAX_ROWS 32  /* queries that attend together: tokens times query heads of a KV head */
#define MAX_FLOATS 2048 /* of these queries, where a group is not larger by itself */
#define TOGETHER 4   /* queries whose sums are in registers at a time */
#define PARTS 4      /* vectors of keys per softmax update */
#define TILE (PARTS * LANES)
#define LINE 16      /* elements of a line of the cache */
#define PAGE 1024    /* elements of a page, beyond which the processor sees nothing coming by itself */
#define FEW_ROWS 8   /* so few compute less than it takes to wait for their keys */
#define PIECE_WORK 65536 /* multiplications that one thread does at a time, at least */
#define MASKED (-1e30f)

typedef struct {
    int32_t token, count; /* of one sequence */
} Item;

/* What the queries of an item share with the loops. */
typedef struct {
    const Step *step;
    int rows;
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
    const float *next; /* the first keys of the tile that follows, NULL after the last one */
} Tile;

static inline int64_t slot_of(const Step *step, int32_t token, int32_t position) {
    const int32_t *row = step->table + (int64_t)step->rows[step->sequence_of[token]] * step->max_blocks;
    return (int64_t)row[position / step->block_tokens] * step->block_tokens + position % step->block_tokens;
}

#if LANES == 16
/* Within each group of four lanes, or of whole groups: the permutations that take a processor least. */
#define PAIR(a, b, i, j, k, l)                                                                                  \
    __builtin_shufflevector(a, b, i, j, k, l, i + 4, j + 4, k + 4, l + 4, i + 8, j + 8, k + 8, l + 8, i + 12, j + 12, \
                            k + 12, l + 12)
#define GROUPS(a, b, i, j)                                                                                         \
    __builtin_shufflevector(a, b, 4 * i, 4 * i + 1, 4 * i + 2, 4 * i + 3, 4 * j, 4 * j + 1, 4 * j + 2, 4 * j + 3,  \
                            16 + 4 * i, 17 + 4 * i, 18 + 4 * i, 19 + 4 * i, 16 + 4 * j, 17 + 4 * j, 18 + 4 * j,    \
                            19 + 4 * j)

INLINE void transpose(Vec rows[LANES]) {
    Vec once[LANES], twice[LANES];
    for (int i = 0; i < LANES; i += 2) {
        once[i] = PAIR(rows[i], rows[i + 1], 0, 16, 1, 17);
        once[i + 1] = PAIR(rows[i], rows[i + 1], 2, 18, 3, 19);
    }
    for (int i = 0; i < LANES; i += 4) {
        for (int j = 0; j < 2; j++) {
            twice[i + 2 * j] = PAIR(once[i + j], once[i + j + 2], 0, 1, 16, 17);
            twice[i + 2 * j + 1] = PAIR(once[i + j], once[i + j + 2], 2, 3, 18, 19);
        }
    }
    for (int i = 0; i < 4; i++) {
        const Vec even_low = GROUPS(twice[i], twice[i + 4], 0, 2), odd_low = GROUPS(twice[i], twice[i + 4], 1, 3);
        const Vec even_high = GROUPS(twice[i + 8], twice[i + 12], 0, 2);
        const Vec odd_high = GROUPS(twice[i + 8], twice[i + 12], 1, 3);
        rows[i] = GROUPS(even_low, even_high, 0, 2);
        rows[i + 4] = GROUPS(odd_low, odd_high, 0, 2);
        rows[i + 8] = GROUPS(even_low, even_high, 1, 3);
        rows[i + 12] = GROUPS(odd_low, odd_high, 1, 3);
    }
}
#else
/* Exchange the lanes whose number has the bit ``far`` with those of the vector ``far`` further on. */
INLINE void exchange(Vec *a, Vec *b, const int far) {
    Ints low, high;
    for (int i = 0; i < LANES; i++) {
        low[i] = i & far ? LANES + (i ^ far) : i;
        high[i] = i & far ? LANES + i : i ^ far;
    }
    const Vec before = *a;
    *a = __builtin_shuffle(before, *b, low);
    *b = __builtin_shuffle(before, *b, high);
}

INLINE void transpose(Vec rows[LANES]) {
#pragma GCC unroll 4
    for (int far = LANES / 2; far > 0; far /= 2)
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++)
            if (!(i & far)) exchange(&rows[i], &rows[i | far], far);
}
#endif

/* Announce rows that are read soon: they lie too far apart for the processor to see by itself which come next. */
INLINE void announce(const float *rows, int64_t stride, int64_t dim) {
    for (int j = 0; j < LANES; j++)
        for (int64_t d = 0; d < dim; d += LINE) __builtin_prefetch(rows + j * stride + d, 0, 1);
}

/* The keys that come after those of a part, and its values. */
INLINE void announce_after(const Work *work, const Tile *tile, int part, int64_t stride) {
    const float *next = part + 1 < tile->parts ? tile->keys[part + 1] : tile->next;
    if (next != NULL) announce(next, stride, work->dim);
    announce(tile->values[part], stride, work->dim);
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

static __attribute__((noinline)) Vec capped(Vec score, float softcap) {
    for (int i = 0; i < LANES; i++) score[i] = softcap * tanhf(score[i] / softcap);
    return score;
}

/* Weigh the tile's keys for one query; ``weights`` has its products with them. */
static void weigh(Work *work, const Tile *tile, int row) {
    const Step *step = work->step;
    float *weights = work->weights + row * TILE;
    const int32_t first = work->oldest[row] - tile->base, last = work->context[row] - tile->base;
    Vec score[PARTS], highest = all(MASKED);
    Ints counts[PARTS], lane;
    for (int i = 0; i < LANES; i++) lane[i] = i;
    for (int part = 0; part < tile->parts; part++) {
        score[part] = load(weights + part * LANES) * step->scale;
        if (step->softcap > 0.0f) score[part] = capped(score[part], step->softcap);
        counts[part] = (lane >= first - part * LANES) & (lane < last - part * LANES);
        score[part] = chosen(counts[part], score[part], all(MASKED));
        highest = larger(highest, score[part]);
    }
    const float peak = peak_of(highest);
    if (peak > work->peak[row]) {
        const Vec shrink = exponential(all(work->peak[row] - peak));
        work->peak[row] = peak;
        work->total[row] *= shrink;
        float *sum = work->sum + row * work->padded;
        for (int64_t d = 0; d < work->padded; d += LANES) store(sum + d, load(sum + d) * shrink);
    }
    for (int part = 0; part < tile->parts; part++) {
        const Vec weight = chosen(counts[part], exponential(score[part] - work->peak[row]), (Vec){0});
        work->total[row] += weight;
        store(weights + part * LANES, weight);
    }
}

INLINE void score_rows(Work *work, const Tile *tile, int row, const int rows) {
    const float *query = work->query + row * work->padded;
    for (int part = 0; part < tile->parts; part++) {
        const float *keys = work->keys + part * LANES * work->padded;
        Vec sum[TOGETHER][4]; /* four sums each, so that few queries do not wait for their own additions */
        for (int r = 0; r < rows; r++)
            for (int i = 0; i < 4; i++) sum[r][i] = (Vec){0};
        for (int64_t d = 0; d < work->padded; d += 4) {
            for (int i = 0; i < 4; i++) {
                Vec key = load(keys + (d + i) * LANES);
                KEEP(key);
                for (int r = 0; r < rows; r++) sum[r][i] += key * query[r * work->padded + d + i];
            }
        }
        for (int r = 0; r < rows; r++)
            store(work->weights + (row + r) * TILE + part * LANES, (sum[r][0] + sum[r][1]) + (sum[r][2] + sum[r][3]));
    }
}

/* The same for one query alone, whose keys nobody else needs: they stay in registers, and are used up as they are read,
 * so that it does not matter which of them drive each other out of the cache. */
static void score_one(Work *work, const Tile *tile, int64_t stride) {
    static const float nothing[MAX_HEAD_DIM];
    for (int part = 0; part < tile->parts; part++) {
        const int begin = tile->begin - part * LANES, end = tile->end - part * LANES;
        const float *from[LANES];
        for (int j = 0; j < LANES; j++) from[j] = j >= begin && j < end ? tile->keys[part] + j * stride : nothing;
        announce_after(work, tile, part, stride);
        Vec sum[4] = {{0}, {0}, {0}, {0}};
        for (int64_t d = 0; d < work->padded; d += LANES) {
            const int64_t left = work->dim - d;
            Vec keys[LANES];
            for (int j = 0; j < LANES; j++) keys[j] = left < LANES ? load_part(from[j] + d, left) : load(from[j] + d);
            transpose(keys);
            for (int j = 0; j < LANES; j++) sum[j % 4] += keys[j] * work->query[d + j];
        }
        store(work->weights + part * LANES, (sum[0] + sum[1]) + (sum[2] + sum[3]));
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
    for (int r = 0; r < rows; r++) weigh(work, tile, row + r);
    add_rows(work, tile, stride, row, rows);
}

static void begin_work(Work *work, const Step *step, const Rows *q, const Item *item, int32_t kv_head) {
    const int group = step->num_heads / step->num_kv_heads;
    work->step = step;
    work->rows = item->count * group;
    work->dim = step->head_dim;
    work->padded = (work->dim + LANES - 1) / LANES * LANES;
    for (int row = 0; row < work->rows; row++) {
        const int32_t token = item->token + row / group, head = kv_head * group + row % group;
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

static void end_work(const Work *work, const Item *item, int32_t kv_head, float *out) {
    const Step *step = work->step;
    const int group = step->num_heads / step->num_kv_heads;
    for (int row = 0; row < work->rows; row++) {
        const int64_t token = item->token + row / group, head = kv_head * group + row % group;
        float *to = out + (token * step->num_heads + head) * work->dim;
        const float inverse = 1.0f / sum_of(work->total[row]);
        const float *sum = work->sum + row * work->padded;
        for (int64_t d = 0; d < work->dim; d++) to[d] = sum[d] * inverse;
    }
}

/* Where the keys or values from ``position`` on begin. */
INLINE int64_t offset_at(const Work *work, const Item *item, int32_t kv_head, int32_t position) {
    return (slot_of(work->step, item->token, position) * work->step->num_kv_heads + kv_head) * work->dim;
}

/* Find the keys from position ``base`` on that any query of the item attends to. */
static Tile tile_at(const Work *work, const Item *item, const float *keys, const float *values, int32_t kv_head,
                    int32_t base) {
    const int32_t oldest = work->oldest[0], context = work->context[work->rows - 1];
    Tile tile = {.base = base};
    tile.begin = oldest > base ? oldest - base : 0;
    tile.end = context - base < TILE ? context - base : TILE;
    tile.parts = (tile.end + LANES - 1) / LANES;
    for (int part = 0; part < tile.parts; part++) {
        const int64_t offset = offset_at(work, item, kv_head, base + part * LANES);
        tile.keys[part] = keys + offset;
        tile.values[part] = values + offset;
    }
    if (context - base > TILE) tile.next = keys + offset_at(work, item, kv_head, base + TILE);
    return tile;
}

static void attend(const Step *step, const float *keys, const float *values, const Rows *q, float *out,
                   const Item *item, int32_t kv_head) {
    Work work;
    begin_work(&work, step, q, item, kv_head);
    const int64_t stride = (int64_t)step->num_kv_heads * work.dim;
    for (int32_t base = work.oldest[0] - work.oldest[0] % TILE; base < work.context[work.rows - 1]; base += TILE) {
        const Tile tile = tile_at(&work, item, keys, values, kv_head, base);
        if (work.rows == 1) {
            score_one(&work, &tile, stride);
            weigh(&work, &tile, 0);
            add_rows(&work, &tile, stride, 0, 1);
            continue;
        }
        for (int part = 0; part < tile.parts; part++) {
            if (work.rows <= FEW_ROWS || stride >= PAGE) announce_after(&work, &tile, part, stride);
            turn_keys(&work, &tile, part, stride);
        }
        int row = 0;
        for (; row + TOGETHER <= work.rows; row += TOGETHER) attend_rows(&work, &tile, stride, row, TOGETHER);
        for (; row < work.rows; row++) attend_rows(&work, &tile, stride, row, 1);
    }
    end_work(&work, item, kv_head, out);
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

/* Fill ``items`` and return how many there are: tokens of one sequence, one after the other, as many as fit. */
static int32_t items_of(const Step *step, Item *items) {
    const int32_t group = step->num_heads / step->num_kv_heads;
    const int32_t padded = (step->head_dim + LANES - 1) / LANES * LANES;
    int32_t most = (MAX_FLOATS / padded < MAX_ROWS ? MAX_FLOATS / padded : MAX_ROWS) / group, count = 0;
    if (most < 1) most = 1;
    for (int32_t token = 0; token < step->num_tokens; token++) {
        Item *last = &items[count - 1];
        if (count > 0 && last->count < most && step->sequence_of[token] == step->sequence_of[last->token])
            last->count++;
        else
            items[count++] = (Item){token, 1};
    }
    return count;
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
    const int32_t heads = shared->step->num_kv_heads;
    for (int64_t i = 0; i < shared->pieces_at_once; i++) {
        const int64_t piece = shared->pieces - 1 - (number * shared->pieces_at_once + i);
        if (piece < 0) return;
        attend(shared->step, shared->keys, shared->values, shared->q, shared->out, &shared->items[piece / heads],
               (int32_t)(piece % heads));
    }
}

int flexpiped_paged_attention(const Step *step, float *keys, float *values, const Rows *q, const Rows *k, const Rows *v,
                              float *out) {
    if (step->head_dim > MAX_HEAD_DIM || step->num_heads > MAX_GROUP * step->num_kv_heads ||
        step->block_tokens % BLOCK_MULTIPLE != 0)
        return -1;
    Item *items = malloc((size_t)step->num_tokens * sizeof *items);
    if (items == NULL) return -2;
    const int32_t count = items_of(step, items);
    int64_t work = 0;
    for (int32_t token = 0; token < step->num_tokens; token++) {
        write_kv(step, keys, values, k, v, token);
        work += step->positions[token] + 1;
    }
    Shared shared = {.step = step, .keys = keys, .values = values, .q = q, .out = out, .items = items};
    shared.pieces = (int64_t)count * step->num_kv_heads;
    work *= step->num_heads * step->head_dim; /* multiplications, half of them */
    shared.pieces_at_once = 1 + shared.pieces * PIECE_WORK / (work + 1);
    flexpiped_share(attend_piece, &shared, (shared.pieces + shared.pieces_at_once - 1) / shared.pieces_at_once);
    free(items);
    return 0;
}
