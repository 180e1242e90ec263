/* Matrix products of many rows, such as a prompt has: a panel of weights is turned once, then used for all rows.
 *
 * Turned, a vector holds one input's weights of neighbouring outputs, so that nothing has to be summed across lanes at
 * the end of each tile. The sums are those of ``linear.c`` all the same: what is one lane of a vector there is one pass
 * over every LANES-th input here, and the passes are added up in the order in which ``sum_of`` adds lanes.
 */
#include "panels.h"

#include "transpose.h"
#include "widening.h"

#define VECTORS (PANEL / LANES)
#define X_TOGETHER (LANES == 16 ? 8 : 4) /* rows whose sums are in registers at a time */
#define X_PIECE 256 /* rows that fit the second cache */
#define STEPS (PANEL_INPUTS / LANES)
#define PASS(steps) (((steps) * VECTORS + 1) * LANES) /* one vector more, lest all passes begin in the same cache set */

/* Lanes in the order of the passes: ``sum_of`` adds them up as a binary tree over this order does. */
#if LANES == 16
#define LEVELS 4
static const int lane_of[LANES] = {0, 8, 4, 12, 1, 9, 5, 13, 2, 10, 6, 14, 3, 11, 7, 15};
#elif LANES == 8
#define LEVELS 3
static const int lane_of[LANES] = {0, 4, 1, 5, 2, 6, 3, 7};
#else
#define LEVELS 2
static const int lane_of[LANES] = {0, 1, 2, 3};
#endif

static _Thread_local float panel[LANES * PASS(STEPS)] __attribute__((aligned(64)));

/* Rows of x and y for one panel. */
typedef struct {
    const float *x;
    float *y;
    const float *start; /* biases, or NULL */
    int64_t x_stride, y_stride, inputs;
    int adds;
} Rows;

/* Fill the panel: passes, in each of them the steps, in each of these a weight of every output. */
static void turn_weights(const Linear *linear, int64_t first, const int vectors) {
    const int64_t w_bytes = linear->inputs * (linear->kind == KIND_FLOAT32 ? 4 : 2);
    const int64_t steps = (linear->inputs + LANES - 1) / LANES;
    for (int v = 0; v < vectors; v++) {
        const char *w = (const char *)linear->weight + (first + v * LANES) * w_bytes;
        for (int64_t step = 0; step < steps; step++) {
            const int64_t k = step * LANES;
            Vec rows[LANES];
            for (int i = 0; i < LANES; i++) rows[i] = weights_at(w + i * w_bytes, k, linear->inputs - k, linear->kind);
            transpose(rows);
            for (int n = 0; n < LANES; n++)
                store(panel + n * PASS(steps) + (step * vectors + v) * LANES, rows[lane_of[n]]);
        }
    }
}

/* The products of ``rows`` rows of x with the panel. */
INLINE void block(const Rows *these, const int rows, const int vectors) {
    const int64_t steps = (these->inputs + LANES - 1) / LANES, tail = these->inputs % LANES;
    const int64_t stride = these->x_stride;
    Vec saved[LEVELS + 1][X_TOGETHER][VECTORS];
    for (int n = 0; n < LANES; n++) {
        const int64_t own = steps - (tail > 0 && lane_of[n] >= tail);
        const float *w = panel + n * PASS(steps), *x = these->x + lane_of[n];
        Vec sum[X_TOGETHER][VECTORS];
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
            for (int v = 0; v < vectors; v++) sum[r][v] = (Vec){0};
        for (int64_t step = 0; step < own; step++, x += LANES, w += vectors * LANES) {
            Vec weights[VECTORS];
#pragma GCC unroll 2
            for (int v = 0; v < vectors; v++) weights[v] = load(w + v * LANES);
#pragma GCC unroll 8
            for (int r = 0; r < rows; r++) {
                const Vec input = all(x[r * stride]);
#pragma GCC unroll 2
                for (int v = 0; v < vectors; v++) sum[r][v] += weights[v] * input;
            }
        }
        int level = 0;
        for (; n >> level & 1; level++)
#pragma GCC unroll 8
            for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
                for (int v = 0; v < vectors; v++) sum[r][v] = saved[level][r][v] + sum[r][v];
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
            for (int v = 0; v < vectors; v++) saved[level][r][v] = sum[r][v];
    }
    for (int r = 0; r < rows; r++) {
        for (int v = 0; v < vectors; v++) {
            float *to = these->y + r * these->y_stride + v * LANES;
            Vec sum = saved[LEVELS][r][v];
            if (these->start != NULL) sum = load(these->start + v * LANES) + sum;
            store(to, these->adds ? load(to) + sum : sum);
        }
    }
}

INLINE void blocks(Rows these, int64_t count, const int vectors) {
    for (; count > 0; count -= X_TOGETHER) {
        switch (count < X_TOGETHER ? count : X_TOGETHER) {
        case 1: block(&these, 1, vectors); break;
        case 2: block(&these, 2, vectors); break;
        case 3: block(&these, 3, vectors); break;
#if LANES == 16
        case 4: block(&these, 4, vectors); break;
        case 5: block(&these, 5, vectors); break;
        case 6: block(&these, 6, vectors); break;
        case 7: block(&these, 7, vectors); break;
#endif
        default: block(&these, X_TOGETHER, vectors); break;
        }
        these.x += X_TOGETHER * these.x_stride;
        these.y += X_TOGETHER * these.y_stride;
    }
}

static __attribute__((noinline)) void blocks_of_two(const Rows *these, int64_t count) { blocks(*these, count, 2); }

static __attribute__((noinline)) void blocks_of_one(const Rows *these, int64_t count) { blocks(*these, count, 1); }

int64_t flexpiped_panels(const Linear *linear, const float *x, int64_t x_stride, float *y, int64_t y_stride,
                         int64_t count, int64_t first, int64_t last, int adds) {
    const int64_t end = first + (last - first) / LANES * LANES;
    for (int64_t top = 0; top < count; top += X_PIECE) {
        const int64_t rows = count - top < X_PIECE ? count - top : X_PIECE;
        for (int64_t output = first; output < end; output += PANEL) {
            const int vectors = end - output < PANEL ? 1 : VECTORS;
            const Rows these = {.x = x + top * x_stride, .x_stride = x_stride, .inputs = linear->inputs, .adds = adds,
                                .y = y + top * y_stride + output, .y_stride = y_stride,
                                .start = linear->bias == NULL ? NULL : linear->bias + output};
            turn_weights(linear, output, vectors);
            if (vectors == VECTORS)
                blocks_of_two(&these, rows);
            else
                blocks_of_one(&these, rows);
        }
    }
    return end;
}
