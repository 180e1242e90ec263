/* The elementwise parts of a Llama decoder in float32 for the CPU, each one pass over memory.
 *
 * As sequences of small tensor operations they cost more than the matrix products when few tokens are decoded. Rows are
 * independent and always summed in the same order, so nothing here depends on what else is in the batch.
 */
#include "llama_ops.h"

#include "pool.h"

#define PIECE_WORK 32768 /* elements of a piece, about */

/* How many rows a piece has. */
INLINE int64_t rows_of_piece(int64_t size) { return size >= PIECE_WORK ? 1 : PIECE_WORK / (size < 1 ? 1 : size); }

typedef struct {
    const float *x, *weight;
    float *out;
    int64_t x_stride, out_stride, rows, size;
    float eps;
} Norm;

static void norm_piece(void *context, int64_t number) {
    const Norm *norm = context;
    const int64_t each = rows_of_piece(norm->size), size = norm->size;
    for (int64_t row = number * each; row < (number + 1) * each && row < norm->rows; row++) {
        const float *from = norm->x + row * norm->x_stride;
        float *to = norm->out + row * norm->out_stride;
        Vec squares[2] = {{0}, {0}};
        int64_t i = 0;
        for (; i + 2 * LANES <= size; i += 2 * LANES) {
            const Vec low = load(from + i), high = load(from + i + LANES);
            squares[0] += low * low;
            squares[1] += high * high;
        }
        for (; i < size; i += LANES) {
            const Vec rest = load_part(from + i, size - i);
            squares[0] += rest * rest;
        }
        const float scale = 1.0f / sqrtf(sum_of(squares[0] + squares[1]) / (float)size + norm->eps);
        for (i = 0; i < size; i++) to[i] = norm->weight[i] * (from[i] * scale);
    }
}

void flexpiped_rms_norm(const float *x, int64_t x_stride, const float *weight, float *out, int64_t out_stride,
                        int64_t rows, int64_t size, float eps) {
    Norm norm = {x, weight, out, x_stride, out_stride, rows, size, eps};
    flexpiped_share(norm_piece, &norm, (rows + rows_of_piece(size) - 1) / rows_of_piece(size));
}

typedef struct {
    float *x;
    const float *cosine, *sine;
    int64_t tokens, heads, dim, token_stride, head_stride;
} Rotary;

static void rotary_piece(void *context, int64_t number) {
    const Rotary *rotary = context;
    const int64_t each = rows_of_piece(rotary->heads * rotary->dim), dim = rotary->dim, half = dim / 2;
    for (int64_t token = number * each; token < (number + 1) * each && token < rotary->tokens; token++) {
        const float *c = rotary->cosine + token * dim, *s = rotary->sine + token * dim;
        for (int64_t head = 0; head < rotary->heads; head++) {
            float *low = rotary->x + token * rotary->token_stride + head * rotary->head_stride, *high = low + half;
            for (int64_t i = 0; i < half; i++) {
                const float a = low[i], b = high[i];
                low[i] = a * c[i] - b * s[i];
                high[i] = b * c[half + i] + a * s[half + i];
            }
        }
    }
}

void flexpiped_rotary(float *x, const float *cosine, const float *sine, int64_t tokens, int64_t heads, int64_t dim,
                      int64_t token_stride, int64_t head_stride) {
    Rotary rotary = {x, cosine, sine, tokens, heads, dim, token_stride, head_stride};
    const int64_t each = rows_of_piece(heads * dim);
    flexpiped_share(rotary_piece, &rotary, (tokens + each - 1) / each);
}

typedef struct {
    float *gate;
    const float *up;
    int64_t count;
} Gated;

INLINE Vec silu_mul(Vec gate, Vec up) { return gate / (1.0f + exponential(-gate)) * up; }

static void gated_piece(void *context, int64_t number) {
    const Gated *gated = context;
    const int64_t end = (number + 1) * PIECE_WORK < gated->count ? (number + 1) * PIECE_WORK : gated->count;
    int64_t i = number * PIECE_WORK;
    for (; i + LANES <= end; i += LANES) store(gated->gate + i, silu_mul(load(gated->gate + i), load(gated->up + i)));
    if (i < end) {
        const Vec rest = silu_mul(load_part(gated->gate + i, end - i), load_part(gated->up + i, end - i));
        memcpy(gated->gate + i, &rest, (size_t)(end - i) * sizeof(float));
    }
}

void flexpiped_silu_mul(float *gate, const float *up, int64_t count) {
    Gated gated = {gate, up, count};
    flexpiped_share(gated_piece, &gated, (count + PIECE_WORK - 1) / PIECE_WORK);
}
