/* Work shared among threads, none of which is waited for before it has begun. */
#ifndef FLEXPIPED_POOL_H
#define FLEXPIPED_POOL_H

#include <stdint.h>

typedef void (*Piece)(void *context, int64_t piece);

/* Have up to so many threads at work, the caller included. After a fork, not before. */
void flexpiped_set_threads(int32_t threads);

/* Call ``piece`` once for each number below ``pieces``, in any order and on several threads; return when all is done. */
void flexpiped_share(Piece piece, void *context, int64_t pieces);

#endif
