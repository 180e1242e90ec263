/* Matrix products of many rows. */
#ifndef FLEXPIPED_PANELS_H
#define FLEXPIPED_PANELS_H

#include "linear.h"

#define PANEL (2 * LANES) /* outputs that are computed together */
#define PANEL_INPUTS 512  /* at most */

/* Whether it pays to turn the weights first: what it saves are the sums across lanes, which count where inputs are few. */
static inline int flexpiped_panels_pay(int64_t inputs, int64_t rows) { return rows >= 64 && inputs <= PANEL_INPUTS; }

/* Compute outputs ``first`` to at most ``last`` - 1 of all rows of x, to the same bits as ``flexpiped_linears``; return
 * the first output that is left: they are done in whole vectors. */
int64_t flexpiped_panels(const Linear *linear, const float *x, int64_t x_stride, float *y, int64_t y_stride,
                         int64_t count, int64_t first, int64_t last, int adds);

#endif
