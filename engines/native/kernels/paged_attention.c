/* Paged attention in float32 for the CPU: writes the new keys and values of a step into a layer's KV cache and attends.
 *
 * A layer's cache is two arrays of shape (slots, kv_heads, head_dim); slot = KV block id * block_tokens + offset.
 * Every query is summed in the same order (its KV blocks first to last, TILE keys at a time) whatever else is in the
 * batch and however the prompt was cut into chunks, so attention adds no batch-dependent rounding.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#define TILE 16        /* keys per softmax update; block_tokens is a multiple of it */
#define MAX_HEAD_DIM 256
#define MAX_GROUP 16   /* query heads per KV head handled together */
#define MASKED (-1e30f) /* not -INFINITY: -ffast-math may assume finite numbers */

typedef struct {
    int32_t num_tokens, num_sequences, max_blocks, block_tokens;
    int32_t num_heads, num_kv_heads, head_dim;
    int32_t window;             /* a token attends to so many, itself included; 0: to all before it */
    float scale, softcap;       /* scores go through softcap * tanh(score / softcap); 0: they do not */
    const int32_t *table;       /* (rows, max_blocks): KV block ids of each sequence */
    const int32_t *rows;        /* (num_sequences): row of the sequence in the table */
    const int32_t *sequence_of; /* (num_tokens): which sequence a token belongs to */
    const int32_t *positions;   /* (num_tokens) */
} Step;

typedef struct {
    const float *data;
    int64_t token_stride, head_stride; /* in elements; head_dim is contiguous */
} Rows;

static inline int64_t slot_of(const Step *step, int32_t token, int32_t position) {
    const int32_t *row = step->table + (int64_t)step->rows[step->sequence_of[token]] * step->max_blocks;
    return (int64_t)row[position / step->block_tokens] * step->block_tokens + position % step->block_tokens;
}

static __attribute__((noinline)) void cap(float *score, int begin, int count, float softcap) {
    for (int j = begin; j < count; j++) score[j] = softcap * tanhf(score[j] / softcap);
}

static inline __attribute__((always_inline)) void attend(
    const Step *step, const float *keys, const float *values, const Rows *q, float *out, int32_t token, int32_t kv_head,
    const int dim, const int plain) {
    const int group = step->num_heads / step->num_kv_heads;
    const int64_t slot_stride = (int64_t)step->num_kv_heads * dim;
    const int32_t context = step->positions[token] + 1;
    const int32_t oldest = !plain && step->window > 0 && step->window < context ? context - step->window : 0;
    const int32_t *row = step->table + (int64_t)step->rows[step->sequence_of[token]] * step->max_blocks;
    float accumulated[MAX_GROUP][MAX_HEAD_DIM] __attribute__((aligned(64)));
    float peak[MAX_GROUP], total[MAX_GROUP];

    for (int g = 0; g < group; g++) {
        peak[g] = MASKED;
        total[g] = 0.0f;
        for (int d = 0; d < dim; d++) accumulated[g][d] = 0.0f;
    }
    for (int32_t base = oldest - oldest % TILE; base < context; base += TILE) {
        const int64_t slot = (int64_t)row[base / step->block_tokens] * step->block_tokens + base % step->block_tokens;
        const float *k = keys + slot * slot_stride + (int64_t)kv_head * dim;
        const float *v = values + slot * slot_stride + (int64_t)kv_head * dim;
        const int32_t begin = !plain && oldest > base ? oldest - base : 0;
        const int32_t count = context - base < TILE ? context - base : TILE;
        for (int g = 0; g < group; g++) {
            const float *query = q->data + token * q->token_stride + (kv_head * group + g) * q->head_stride;
            float score[TILE] __attribute__((aligned(64)));
            float highest = peak[g];
            for (int j = 0; j < TILE; j++) score[j] = MASKED;
            for (int j = begin; j < count; j++) {
                const float *key = k + j * slot_stride;
                float sum = 0.0f;
                for (int d = 0; d < dim; d++) sum += query[d] * key[d];
                score[j] = sum * step->scale;
            }
            if (!plain && step->softcap > 0.0f) cap(score, begin, count, step->softcap);
            for (int j = 0; j < TILE; j++) highest = score[j] > highest ? score[j] : highest;
            const float shrink = expf(peak[g] - highest);
            float added = 0.0f;
            for (int j = 0; j < TILE; j++) score[j] = expf(score[j] - highest);
            for (int j = 0; j < begin; j++) score[j] = 0.0f;
            for (int j = count; j < TILE; j++) score[j] = 0.0f;
            for (int j = 0; j < TILE; j++) added += score[j];
            total[g] = total[g] * shrink + added;
            peak[g] = highest;
            for (int d = 0; d < dim; d++) accumulated[g][d] *= shrink;
            for (int j = begin; j < count; j++) {
                const float *value = v + j * slot_stride;
                const float weight = score[j];
                for (int d = 0; d < dim; d++) accumulated[g][d] += weight * value[d];
            }
        }
    }
    for (int g = 0; g < group; g++) {
        float *target = out + ((int64_t)token * step->num_heads + kv_head * group + g) * dim;
        const float inverse = 1.0f / total[g];
        for (int d = 0; d < dim; d++) target[d] = accumulated[g][d] * inverse;
    }
}

/* Constants let the compiler unroll: head_dim, and that there is neither window nor cap (plain). With one of these, a
 * constant head_dim would save 6 % of the time, for a compiler that takes half as long again. */
#define ATTEND(dim, plain) attend(step, keys, values, q, out, token, kv_head, dim, plain)

static void attend_any(const Step *step, const float *keys, const float *values, const Rows *q, float *out,
                       int32_t token, int32_t kv_head) {
    if (step->window > 0 || step->softcap > 0.0f) {
        ATTEND(step->head_dim, 0);
        return;
    }
    switch (step->head_dim) {
    case 16: ATTEND(16, 1); break;
    case 32: ATTEND(32, 1); break;
    case 64: ATTEND(64, 1); break;
    case 96: ATTEND(96, 1); break;
    case 128: ATTEND(128, 1); break;
    default: ATTEND(step->head_dim, 1); break;
    }
}

/* out: (num_tokens, num_heads, head_dim), contiguous. Returns 0, or -1 when the shape is not supported. */
int flexpiped_paged_attention(const Step *step, float *keys, float *values, const Rows *q, const Rows *k, const Rows *v,
                              float *out) {
    if (step->head_dim > MAX_HEAD_DIM || step->num_heads > MAX_GROUP * step->num_kv_heads ||
        step->block_tokens % TILE != 0)
        return -1;
    const size_t bytes = (size_t)step->head_dim * sizeof(float);
    int64_t work = 0;
    for (int32_t token = 0; token < step->num_tokens; token++) {
        const int64_t target = slot_of(step, token, step->positions[token]) * step->num_kv_heads * step->head_dim;
        for (int32_t head = 0; head < step->num_kv_heads; head++) {
            const int64_t offset = target + (int64_t)head * step->head_dim;
            memcpy(keys + offset, k->data + token * k->token_stride + head * k->head_stride, bytes);
            memcpy(values + offset, v->data + token * v->token_stride + head * v->head_stride, bytes);
        }
        work += step->positions[token] + 1;
    }
    const int32_t items = step->num_tokens * step->num_kv_heads;
#pragma omp parallel for schedule(dynamic, 4) if (work * step->num_heads > 2048)
    for (int32_t item = 0; item < items; item++)
        attend_any(step, keys, values, q, out, item / step->num_kv_heads, item % step->num_kv_heads);
    return 0;
}
