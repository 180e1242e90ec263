/* Vectors as wide as this processor's registers, and what of float32 arithmetic the kernels share.
 *
 * Compiled without -ffast-math: sums keep the order in which they are written, so that a result does not depend on
 * which copy of a loop has computed it.
 */
#ifndef FLEXPIPED_VECTORS_H
#define FLEXPIPED_VECTORS_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#include <immintrin.h>
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif

typedef float Vec __attribute__((vector_size(LANES * 4)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));
typedef float Four __attribute__((vector_size(16)));
#define INLINE static inline __attribute__((always_inline))

INLINE Vec load(const float *from) {
    Vec v;
    memcpy(&v, from, sizeof v);
    return v;
}

/* Keeps the compiler from reading v from memory once more for each of its uses. */
#if defined(__AVX512F__)
#define KEEP(v) __asm__("" : "+v"(v))
#elif defined(__x86_64__)
#define KEEP(v) __asm__("" : "+x"(v))
#else
#define KEEP(v) (void)(v)
#endif

INLINE void store(float *to, Vec v) { memcpy(to, &v, sizeof v); }

INLINE Vec all(float x) { return x - (Vec){0}; }

/* The first ``count`` elements, the others zero. */
INLINE Vec load_part(const float *from, int64_t count) {
    Vec v = {0};
    if (count >= LANES) return load(from);
    memcpy(&v, from, (size_t)count * 4);
    return v;
}

/* Lane by lane: where ``which`` is set a, else b. */
INLINE Vec chosen(Ints which, Vec a, Vec b) { return (Vec)((which & (Ints)a) | (~which & (Ints)b)); }

/* Where a > b (a < b) a, else b: so processors have it, and compilers see it in no other words. */
#if defined(__AVX512F__)
INLINE Vec larger(Vec a, Vec b) { return (Vec)_mm512_max_ps((__m512)a, (__m512)b); }
INLINE Vec smaller(Vec a, Vec b) { return (Vec)_mm512_min_ps((__m512)a, (__m512)b); }
#else
INLINE Vec larger(Vec a, Vec b) { return chosen(a > b, a, b); }
INLINE Vec smaller(Vec a, Vec b) { return chosen(a < b, a, b); }
#endif

/* Four lanes whose sum is that of all lanes. */
INLINE Four folded(Vec v) {
#if LANES == 16
    typedef float Eight __attribute__((vector_size(32)));
    const Eight half = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
                       __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
    return __builtin_shufflevector(half, half, 0, 1, 2, 3) + __builtin_shufflevector(half, half, 4, 5, 6, 7);
#elif LANES == 8
    return __builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7);
#else
    return v;
#endif
}

INLINE float sum_of(Vec v) {
    const Four f = folded(v);
    return (f[0] + f[1]) + (f[2] + f[3]);
}

/* The sums of four vectors, each in the order of ``sum_of``. */
INLINE Four sums_of(Vec a, Vec b, Vec c, Vec d) {
    const Four p = folded(a), q = folded(b), r = folded(c), s = folded(d);
    const Four pq_low = __builtin_shufflevector(p, q, 0, 4, 2, 6), pq_high = __builtin_shufflevector(p, q, 1, 5, 3, 7);
    const Four rs_low = __builtin_shufflevector(r, s, 0, 4, 2, 6), rs_high = __builtin_shufflevector(r, s, 1, 5, 3, 7);
    const Four pq = pq_low + pq_high, rs = rs_low + rs_high; /* p0+p1, q0+q1, p2+p3, q2+q3 */
    return __builtin_shufflevector(pq, rs, 0, 1, 4, 5) + __builtin_shufflevector(pq, rs, 2, 3, 6, 7);
}

INLINE float peak_of(Vec v) {
#if LANES == 16
    v = larger(v, __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
    Four most = __builtin_shufflevector(larger(v, __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15,
                                                                          8, 9, 10, 11)), v, 0, 1, 2, 3);
    const float low = most[0] > most[1] ? most[0] : most[1], high = most[2] > most[3] ? most[2] : most[3];
    return low > high ? low : high;
#else
#pragma GCC unroll 4
    for (int far = LANES / 2; far > 0; far /= 2) {
        Ints from;
        for (int i = 0; i < LANES; i++) from[i] = i ^ far;
        v = larger(v, __builtin_shuffle(v, from));
    }
    return v[0];
#endif
}

/* e^x to within 2 units in the last place; below -87 and above 88 what it is there. */
INLINE Vec exponential(Vec x) {
    x = larger(x, all(-87.0f));
    x = smaller(all(88.0f), x);
    const Vec magic = all(12582912.0f); /* 1.5 * 2^23: adding it rounds to a whole number */
    const Vec n = (x * 1.44269504f + magic) - magic;
    const Vec r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    Vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const Ints power = (__builtin_convertvector(n, Ints) + 127) << 23;
    return p * (Vec)power;
}

#endif
