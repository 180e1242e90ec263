/* Queries of one token that attend alone, several heads at a time. */
#ifndef FLEXPIPED_ATTENTION_SPANS_H
#define FLEXPIPED_ATTENTION_SPANS_H

#include "attention_work.h"

/* How many of ``heads`` neighbouring heads are read together, or 0 where they do not fill what is. */
int flexpiped_span_heads(const Work *work, int heads);

/* Have the queries of a span, from ``row`` on, attend to a tile: that of its first head. */
void flexpiped_attend_span(Work *work, const Tile *tile, int64_t stride, int row);

#endif
