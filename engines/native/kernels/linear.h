/* Matrix products with weights as a checkpoint has them. */
#ifndef FLEXPIPED_LINEAR_H
#define FLEXPIPED_LINEAR_H

#include "vectors.h"

enum { KIND_FLOAT32 = 0, KIND_BFLOAT16 = 1, KIND_FLOAT16 = 2 };

typedef struct {
    const void *weight; /* (outputs, inputs), contiguous */
    const float *bias;  /* (outputs), or NULL */
    int64_t outputs, inputs;
    int32_t kind;
} Linear;

/* Every linear's product with the same x: (count, inputs) to its own y: (count, outputs), with strides in elements.
 * With ``adds`` it is added to what is there. */
void flexpiped_linears(const Linear *linears, int32_t num_linears, const float *x, int64_t x_stride, float *const *y,
                       const int64_t *y_stride, int64_t count, int32_t adds);

#endif
