/* Weights as a checkpoint has them, in 32 or 16 bits, as vectors of float32. */
#ifndef FLEXPIPED_WIDENING_H
#define FLEXPIPED_WIDENING_H

#include "linear.h"

INLINE Vec widened(const uint16_t *from, int kind) {
#if defined(__AVX512F__)
    const __m256i raw = _mm256_loadu_si256((const __m256i *)from);
    if (kind == KIND_FLOAT16) return (Vec)_mm512_cvtph_ps(raw);
    return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16);
#else
    typedef uint16_t Shorts __attribute__((vector_size(LANES * 2)));
    Shorts raw;
    memcpy(&raw, from, sizeof raw);
    (void)kind; /* float16 is converted before it comes here */
    return (Vec)(__builtin_convertvector(raw, Ints) << 16);
#endif
}

/* ``count`` weights of a row from number ``k`` on, the lanes beyond them zero. */
INLINE Vec weights_at(const char *row, int64_t k, int64_t count, int kind) {
    if (kind == KIND_FLOAT32) return load_part((const float *)row + k, count);
    const uint16_t *from = (const uint16_t *)row + k;
    uint16_t part[LANES] = {0};
    if (count >= LANES) return widened(from, kind);
    memcpy(part, from, (size_t)count * 2);
    return widened(part, kind);
}

#endif
