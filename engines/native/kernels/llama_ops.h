/* The elementwise parts of decoders like Llama's. */
#ifndef FLEXPIPED_LLAMA_OPS_H
#define FLEXPIPED_LLAMA_OPS_H

#include "vectors.h"

/* out = weight * x / sqrt(mean(x^2) + eps), row by row; rows of ``size`` elements, so many elements apart. */
void flexpiped_rms_norm(const float *x, int64_t x_stride, const float *weight, float *out, int64_t out_stride,
                        int64_t rows, int64_t size, float eps);

/* Rotate x in place; x: (tokens, heads, dim) with the given strides in elements, cosine and sine: (tokens, dim). */
void flexpiped_rotary(float *x, const float *cosine, const float *sine, int64_t tokens, int64_t heads, int64_t dim,
                      int64_t token_stride, int64_t head_stride);

/* gate = silu(gate) * up, in place; both contiguous. */
void flexpiped_silu_mul(float *gate, const float *up, int64_t count);

#endif
