/* The elementwise parts of a Llama decoder in float32 for the CPU, each one pass over memory.
 *
 * As sequences of small tensor operations they cost more than the matrix products when few tokens are decoded. Rows are
 * independent and always summed in the same order, so nothing here depends on what else is in the batch.
 */
#include "llama_ops.h"

#define PARALLEL_WORK 65536 /* elements from which threads pay off */

void flexpiped_rms_norm(const float *x, int64_t x_stride, const float *weight, float *out, int64_t out_stride,
                        int64_t rows, int64_t size, float eps) {
#pragma omp parallel for if (rows * size > PARALLEL_WORK)
    for (int64_t row = 0; row < rows; row++) {
        const float *from = x + row * x_stride;
        float *to = out + row * out_stride;
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
        const float scale = 1.0f / sqrtf(sum_of(squares[0] + squares[1]) / (float)size + eps);
        for (i = 0; i < size; i++) to[i] = weight[i] * (from[i] * scale);
    }
}

void flexpiped_rotary(float *x, const float *cosine, const float *sine, int64_t tokens, int64_t heads, int64_t dim,
                      int64_t token_stride, int64_t head_stride) {
    const int64_t half = dim / 2;
#pragma omp parallel for if (tokens * heads * dim > PARALLEL_WORK)
    for (int64_t token = 0; token < tokens; token++) {
        const float *c = cosine + token * dim, *s = sine + token * dim;
        for (int64_t head = 0; head < heads; head++) {
            float *low = x + token * token_stride + head * head_stride, *high = low + half;
            for (int64_t i = 0; i < half; i++) {
                const float a = low[i], b = high[i];
                low[i] = a * c[i] - b * s[i];
                high[i] = b * c[half + i] + a * s[half + i];
            }
        }
    }
}

INLINE Vec silu_mul(Vec gate, Vec up) { return gate / (1.0f + exponential(-gate)) * up; }

void flexpiped_silu_mul(float *gate, const float *up, int64_t count) {
    const int64_t whole = count / LANES * LANES;
#pragma omp parallel for if (count > PARALLEL_WORK)
    for (int64_t i = 0; i < whole; i += LANES) store(gate + i, silu_mul(load(gate + i), load(up + i)));
    if (whole < count) {
        const Vec rest = silu_mul(load_part(gate + whole, count - whole), load_part(up + whole, count - whole));
        memcpy(gate + whole, &rest, (size_t)(count - whole) * sizeof(float));
    }
}
