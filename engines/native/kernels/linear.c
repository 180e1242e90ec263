/* y = x W^T + b in float32 for the CPU, the weights as a checkpoint has them: rows of float32, bfloat16 or float16.
 *
 * Nothing is packed: weights stay the mapped pages of the checkpoint's files, and 16-bit ones are widened in registers,
 * which is exact. Each element of y is summed in the same order (LANES partial sums over pieces of K_PIECE inputs)
 * whatever else is in the batch and whichever thread does it.
 */
#include "linear.h"

#include "panels.h"
#include "pool.h"
#include "widening.h"

#define W_ROWS 4 /* weight rows and inputs of one tile: their products stay in registers */
#define K_PIECE 1024 /* inputs: a tile's weights fit the first cache */
#define X_ROWS (LANES == 16 ? 6 : 3)
#define X_MOST 6
#define X_PIECE 96   /* rows: so many, K_PIECE wide, fit the second */
#define PIECE_WORK 262144 /* multiplications of a piece, at least: some microseconds */
#define MOST_PIECES 16
#define LINE_BYTES 64         /* of the cache */
#define CACHED_BYTES (1 << 20) /* weights of so many may still be there from the step before */

/* Announce the weights from ``k`` on of the tile that follows, each line of the cache once: four rows that are read side
 * by side, a little of each at a time, are no order that the processor sees by itself. */
INLINE void announce_next(const char *w, int64_t w_bytes, int64_t k, const int kind) {
    const int size = kind == KIND_FLOAT32 ? 4 : 2;
    const int share = W_ROWS * LANES * size / LINE_BYTES, lines = share < 1 ? 1 : share;
    const int64_t row = k / LANES * lines % W_ROWS;
    for (int i = 0; i < lines; i++) __builtin_prefetch(w + (row + i) * w_bytes + k * size, 0, 1);
}

/* A tile of ``rows`` by ``columns`` outputs over one piece of the inputs. */
INLINE void tile(const char *w, int64_t w_bytes, const float *x, int64_t x_stride, float *y, int64_t y_stride,
                 const float *start, int64_t begin, int64_t end, const int rows, const int columns, const int kind,
                 const int adds, const int announces) {
    Vec sums[W_ROWS][X_MOST];
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < columns; c++) sums[r][c] = (Vec){0};
    int64_t k = begin;
    for (; k + LANES <= end; k += LANES) {
        Vec weights[W_ROWS];
        if (announces && rows == W_ROWS) announce_next(w + W_ROWS * w_bytes, w_bytes, k, kind);
        for (int r = 0; r < rows; r++) weights[r] = weights_at(w + r * w_bytes, k, LANES, kind);
        for (int c = 0; c < columns; c++) {
            Vec input = load(x + c * x_stride + k);
            KEEP(input);
            for (int r = 0; r < rows; r++) sums[r][c] += weights[r] * input;
        }
    }
    if (k < end) {
        for (int c = 0; c < columns; c++) {
            const Vec input = load_part(x + c * x_stride + k, end - k);
            for (int r = 0; r < rows; r++) sums[r][c] += weights_at(w + r * w_bytes, k, end - k, kind) * input;
        }
    }
    for (int c = 0; c < columns; c++) {
        float *to = y + c * y_stride;
        if (rows == W_ROWS) {
            Four other, sum = sums_of(sums[0][c], sums[1][c], sums[2][c], sums[3][c]);
            if (start != NULL) {
                memcpy(&other, start, sizeof other);
                sum = other + sum;
            }
            if (adds) {
                memcpy(&other, to, sizeof other);
                sum = other + sum;
            }
            memcpy(to, &sum, sizeof sum);
        } else {
            float sum = sum_of(sums[0][c]);
            if (start != NULL) sum = start[0] + sum;
            to[0] = adds ? to[0] + sum : sum;
        }
    }
}

#define TILE_OF(rows, columns) \
    tile(w, w_bytes, x, x_stride, y, y_stride, start, begin, end, rows, columns, kind, adds, announces)

INLINE void tiles_of_kind(const char *w, int64_t w_bytes, const float *x, int64_t x_stride, float *y, int64_t y_stride,
                          const float *start, int64_t begin, int64_t end, int rows, int64_t columns, const int kind,
                          const int adds, int announces) {
    for (; columns > 0; columns -= X_ROWS, x += X_ROWS * x_stride, y += X_ROWS * y_stride, announces = 0) {
        if (rows == W_ROWS) {
            switch (columns >= X_ROWS ? X_ROWS : columns) {
            case 1: TILE_OF(W_ROWS, 1); break;
            case 2: TILE_OF(W_ROWS, 2); break;
            case 3: TILE_OF(W_ROWS, 3); break;
            case 4: TILE_OF(W_ROWS, 4); break;
            case 5: TILE_OF(W_ROWS, 5); break;
            default: TILE_OF(W_ROWS, X_ROWS); break;
            }
        } else {
            const int64_t left = columns >= X_ROWS ? X_ROWS : columns;
            for (int64_t c = 0; c < left; c++)
                tile(w, w_bytes, x + c * x_stride, x_stride, y + c * y_stride, y_stride, start, begin, end, 1, 1, kind,
                     adds, 0);
        }
    }
}

static __attribute__((noinline)) void tiles_float32(
    const char *w, int64_t w_bytes, const float *x, int64_t x_stride, float *y, int64_t y_stride, const float *start,
    int64_t begin, int64_t end, int rows, int64_t columns, int adds, int announces) {
    tiles_of_kind(w, w_bytes, x, x_stride, y, y_stride, start, begin, end, rows, columns, KIND_FLOAT32, adds,
                  announces);
}

static __attribute__((noinline)) void tiles_bfloat16(
    const char *w, int64_t w_bytes, const float *x, int64_t x_stride, float *y, int64_t y_stride, const float *start,
    int64_t begin, int64_t end, int rows, int64_t columns, int adds, int announces) {
    tiles_of_kind(w, w_bytes, x, x_stride, y, y_stride, start, begin, end, rows, columns, KIND_BFLOAT16, adds,
                  announces);
}

static __attribute__((noinline)) void tiles_float16(
    const char *w, int64_t w_bytes, const float *x, int64_t x_stride, float *y, int64_t y_stride, const float *start,
    int64_t begin, int64_t end, int rows, int64_t columns, int adds, int announces) {
    tiles_of_kind(w, w_bytes, x, x_stride, y, y_stride, start, begin, end, rows, columns, KIND_FLOAT16, adds,
                  announces);
}

static void tiles(const Linear *linear, const float *x, int64_t x_stride, float *y, int64_t y_stride, int64_t row,
                  int rows, int64_t begin, int64_t end, int64_t columns, int adds) {
    const int64_t w_bytes = linear->inputs * (linear->kind == KIND_FLOAT32 ? 4 : 2);
    const char *w = (const char *)linear->weight + row * w_bytes;
    const float *start = linear->bias == NULL || begin > 0 ? NULL : linear->bias + row;
    const int announces = linear->outputs * w_bytes > CACHED_BYTES;
    y += row;
    if (linear->kind == KIND_FLOAT32)
        tiles_float32(w, w_bytes, x, x_stride, y, y_stride, start, begin, end, rows, columns, adds, announces);
    else if (linear->kind == KIND_BFLOAT16)
        tiles_bfloat16(w, w_bytes, x, x_stride, y, y_stride, start, begin, end, rows, columns, adds, announces);
    else
        tiles_float16(w, w_bytes, x, x_stride, y, y_stride, start, begin, end, rows, columns, adds, announces);
}

/* Outputs ``first`` to ``last`` - 1 of all rows of x. */
static void part(const Linear *linear, const float *x, int64_t x_stride, float *y, int64_t y_stride, int64_t count,
                 int64_t first, int64_t last, int adds) {
    if (flexpiped_panels_pay(linear->inputs, count))
        first = flexpiped_panels(linear, x, x_stride, y, y_stride, count, first, last, adds);
    for (int64_t top = 0; top < count; top += X_PIECE) {
        const int64_t columns = count - top < X_PIECE ? count - top : X_PIECE;
        for (int64_t begin = 0; begin < linear->inputs; begin += K_PIECE) {
            const int64_t end = linear->inputs - begin < K_PIECE ? linear->inputs : begin + K_PIECE;
            for (int64_t row = first; row < last;) {
                const int rows = last - row >= W_ROWS ? W_ROWS : 1;
                tiles(linear, x + top * x_stride, x_stride, y + top * y_stride, y_stride, row, rows, begin, end,
                      columns, adds || begin > 0);
                row += rows;
            }
        }
    }
}

typedef struct {
    const Linear *linears;
    int32_t num_linears, adds;
    const float *x;
    int64_t x_stride, count, rows, rows_of_piece; /* rows: groups of W_ROWS outputs, of all linears */
    float *const *y;
    const int64_t *y_stride;
} Shared;

/* The outputs of one piece, of one linear or of several that follow each other. */
static void outputs_of_piece(void *context, int64_t number) {
    const Shared *shared = context;
    int64_t first = number * shared->rows_of_piece, left = shared->rows_of_piece;
    for (int32_t i = 0; i < shared->num_linears && left > 0; i++) {
        const Linear *linear = &shared->linears[i];
        const int64_t own = (linear->outputs + W_ROWS - 1) / W_ROWS;
        if (first >= own) {
            first -= own;
            continue;
        }
        const int64_t taken = own - first < left ? own - first : left;
        const int64_t end = (first + taken) * W_ROWS;
        part(linear, shared->x, shared->x_stride, shared->y[i], shared->y_stride[i], shared->count, first * W_ROWS,
             end < linear->outputs ? end : linear->outputs, shared->adds);
        left -= taken;
        first = 0;
    }
}

void flexpiped_linears(const Linear *linears, int32_t num_linears, const float *x, int64_t x_stride, float *const *y,
                       const int64_t *y_stride, int64_t count, int32_t adds) {
    Shared shared = {.linears = linears, .num_linears = num_linears, .adds = adds, .x = x, .x_stride = x_stride,
                     .count = count, .y = y, .y_stride = y_stride};
    for (int32_t i = 0; i < num_linears; i++) shared.rows += (linears[i].outputs + W_ROWS - 1) / W_ROWS;
    /* Reading a weight takes as long as multiplying it ten times. */
    const int64_t worth = shared.rows * W_ROWS * linears[0].inputs * (count + 10) / PIECE_WORK;
    const int64_t pieces = worth < 1 ? 1 : worth > MOST_PIECES ? MOST_PIECES : worth;
    shared.rows_of_piece = (shared.rows + pieces - 1) / pieces;
    if (flexpiped_panels_pay(linears[0].inputs, count)) /* whole panels, save where one linear follows another */
        shared.rows_of_piece = (shared.rows_of_piece + PANEL / W_ROWS - 1) / (PANEL / W_ROWS) * (PANEL / W_ROWS);
    flexpiped_share(outputs_of_piece, &shared, (shared.rows + shared.rows_of_piece - 1) / shared.rows_of_piece);
}

/* Whether float16 weights need no conversion on this processor. */
int flexpiped_reads_float16(void) {
#if defined(__AVX512F__)
    return 1;
#else
    return 0;
#endif
}
