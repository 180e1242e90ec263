/* Turns a square of as many vectors as a vector has lanes: lane j of vector i becomes lane i of vector j. */
#ifndef FLEXPIPED_TRANSPOSE_H
#define FLEXPIPED_TRANSPOSE_H

#include "vectors.h"

#if LANES == 16
/* Within each group of four lanes, or of whole groups: the permutations that take a processor least. */
#define PAIR(a, b, i, j, k, l)                                                                                  \
    __builtin_shufflevector(a, b, i, j, k, l, i + 4, j + 4, k + 4, l + 4, i + 8, j + 8, k + 8, l + 8, i + 12, j + 12, \
                            k + 12, l + 12)
#define GROUPS(a, b, i, j)                                                                                         \
    __builtin_shufflevector(a, b, 4 * i, 4 * i + 1, 4 * i + 2, 4 * i + 3, 4 * j, 4 * j + 1, 4 * j + 2, 4 * j + 3,  \
                            16 + 4 * i, 17 + 4 * i, 18 + 4 * i, 19 + 4 * i, 16 + 4 * j, 17 + 4 * j, 18 + 4 * j,    \
                            19 + 4 * j)

INLINE void transpose(Vec rows[LANES]) {
    Vec once[LANES], twice[LANES];
    for (int i = 0; i < LANES; i += 2) {
        once[i] = PAIR(rows[i], rows[i + 1], 0, 16, 1, 17);
        once[i + 1] = PAIR(rows[i], rows[i + 1], 2, 18, 3, 19);
    }
    for (int i = 0; i < LANES; i += 4) {
        for (int j = 0; j < 2; j++) {
            twice[i + 2 * j] = PAIR(once[i + j], once[i + j + 2], 0, 1, 16, 17);
            twice[i + 2 * j + 1] = PAIR(once[i + j], once[i + j + 2], 2, 3, 18, 19);
        }
    }
    for (int i = 0; i < 4; i++) {
        const Vec even_low = GROUPS(twice[i], twice[i + 4], 0, 2), odd_low = GROUPS(twice[i], twice[i + 4], 1, 3);
        const Vec even_high = GROUPS(twice[i + 8], twice[i + 12], 0, 2);
        const Vec odd_high = GROUPS(twice[i + 8], twice[i + 12], 1, 3);
        rows[i] = GROUPS(even_low, even_high, 0, 2);
        rows[i + 4] = GROUPS(odd_low, odd_high, 0, 2);
        rows[i + 8] = GROUPS(even_low, even_high, 1, 3);
        rows[i + 12] = GROUPS(odd_low, odd_high, 1, 3);
    }
}
#else
/* Exchange the lanes whose number has the bit ``far`` with those of the vector ``far`` further on. */
INLINE void exchange(Vec *a, Vec *b, const int far) {
    Ints low, high;
    for (int i = 0; i < LANES; i++) {
        low[i] = i & far ? LANES + (i ^ far) : i;
        high[i] = i & far ? LANES + i : i ^ far;
    }
    const Vec before = *a;
    *a = __builtin_shuffle(before, *b, low);
    *b = __builtin_shuffle(before, *b, high);
}

INLINE void transpose(Vec rows[LANES]) {
#pragma GCC unroll 4
    for (int far = LANES / 2; far > 0; far /= 2)
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++)
            if (!(i & far)) exchange(&rows[i], &rows[i | far], far);
}
#endif

/* The sum of each vector in a lane of its own, added up as a binary tree does: first neighbouring lanes. */
#if LANES == 16
INLINE Vec sums_of_all(Vec rows[LANES]) {
    for (int i = 0; i < LANES / 2; i++)
        rows[i] = PAIR(rows[2 * i], rows[2 * i + 1], 0, 2, 16, 18) + PAIR(rows[2 * i], rows[2 * i + 1], 1, 3, 17, 19);
    for (int i = 0; i < LANES / 4; i++)
        rows[i] = PAIR(rows[2 * i], rows[2 * i + 1], 0, 2, 16, 18) + PAIR(rows[2 * i], rows[2 * i + 1], 1, 3, 17, 19);
    for (int i = 0; i < 2; i++)
        rows[i] = GROUPS(rows[2 * i], rows[2 * i + 1], 0, 2) + GROUPS(rows[2 * i], rows[2 * i + 1], 1, 3);
    return GROUPS(rows[0], rows[1], 0, 2) + GROUPS(rows[0], rows[1], 1, 3);
}
#else
INLINE Vec sums_of_all(Vec rows[LANES]) {
    Ints even, odd;
    for (int i = 0; i < LANES; i++) {
        even[i] = 2 * i;
        odd[i] = 2 * i + 1;
    }
#pragma GCC unroll 4
    for (int left = LANES / 2; left > 0; left /= 2)
#pragma GCC unroll 8
        for (int i = 0; i < left; i++)
            rows[i] = __builtin_shuffle(rows[2 * i], rows[2 * i + 1], even) +
                      __builtin_shuffle(rows[2 * i], rows[2 * i + 1], odd);
    return rows[0];
}
#endif

#endif
