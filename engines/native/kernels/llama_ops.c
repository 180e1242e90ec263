/* The elementwise parts of a Llama decoder in float32 for the CPU, each one pass over memory.
 *
 * As sequences of small tensor operations they cost more than the matrix products when few tokens are decoded. Rows are
 * independent and always summed in the same order, so nothing here depends on what else is in the batch.
 */
#include <math.h>
#include <stdint.h>

#define PARALLEL_WORK 65536 /* elements from which threads pay off */

/* out = weight * x / sqrt(mean(x^2) + eps), row by row; x and out: (rows, size), contiguous. */
void flexpiped_rms_norm(const float *x, const float *weight, float *out, int64_t rows, int64_t size, float eps) {
#pragma omp parallel for if (rows * size > PARALLEL_WORK)
    for (int64_t row = 0; row < rows; row++) {
        const float *from = x + row * size;
        float *to = out + row * size;
        float squares = 0.0f;
        for (int64_t i = 0; i < size; i++) squares += from[i] * from[i];
        const float scale = 1.0f / sqrtf(squares / (float)size + eps);
        for (int64_t i = 0; i < size; i++) to[i] = weight[i] * (from[i] * scale);
    }
}

/* Rotate x in place; x: (tokens, heads, dim) with the given strides in elements, cos and sin: (tokens, dim). */
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

/* gate = silu(gate) * up, in place; both contiguous. */
void flexpiped_silu_mul(float *gate, const float *up, int64_t count) {
#pragma omp parallel for if (count > PARALLEL_WORK)
    for (int64_t i = 0; i < count; i++) gate[i] = gate[i] / (1.0f + expf(-gate[i])) * up[i];
}
