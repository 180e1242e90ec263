/* A whole decoder like Llama's in float32 for the CPU, in one call: what its modules would do in forty.
 *
 * When few tokens are decoded, the modules' own Python takes longer than the computation. All parts are those that the
 * modules use one by one, so every token gets the same bits whatever else is in the batch.
 */
#include <time.h>

#include "linear.h"
#include "llama_ops.h"
#include "paged_attention.h"

#define MLP_ROWS 128 /* tokens that go through the MLP together: what is between its matrices stays in the cache */

typedef struct {
    Linear query, key, value, output, gate, up, down;
    const float *attention_norm, *mlp_norm;
    const float *query_norm, *key_norm; /* of each head, or NULL */
    float norm_epsilon, scale;
    int32_t num_heads, num_kv_heads, head_dim, window;
} Decoder;

/* Seconds spent since they were last set to zero. */
typedef struct {
    double products, attention, elementwise;
} Seconds;

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + (double)time.tv_nsec * 1e-9;
}

/* Add the time since ``*since`` to a sum, and begin anew. */
static void spent(double *sum, double *since) {
    const double here = now();
    *sum += here - *since;
    *since = here;
}

static void project(const Linear *linears, int32_t count, const float *x, float *const *y, int64_t y_stride,
                    int64_t tokens, int adds) {
    const int64_t strides[3] = {y_stride, y_stride, y_stride};
    flexpiped_linears(linears, count, x, linears[0].inputs, y, strides, tokens, adds);
}

/* How many floats ``flexpiped_decoder`` needs for so many tokens. */
int64_t flexpiped_decoder_scratch(const Decoder *decoder, int64_t tokens) {
    const int64_t hidden = decoder->query.inputs, width = decoder->query.outputs + 2 * decoder->key.outputs;
    return tokens * (hidden + width + decoder->query.outputs) + 2 * MLP_ROWS * decoder->gate.outputs;
}

static int attend(const Decoder *decoder, const Step *step, float *keys, float *values, const float *cosine,
                  const float *sine, float *hidden, float *normed, float *projected, float *attended,
                  Seconds *seconds) {
    const int64_t tokens = step->num_tokens, dim = decoder->head_dim, size = decoder->query.inputs;
    const int64_t q_size = decoder->query.outputs, kv_size = decoder->key.outputs, width = q_size + 2 * kv_size;
    const Linear linears[3] = {decoder->query, decoder->key, decoder->value};
    float *q = projected, *k = projected + q_size, *v = projected + q_size + kv_size;
    float *const to[3] = {q, k, v};
    Step own = *step;
    own.num_heads = decoder->num_heads;
    own.num_kv_heads = decoder->num_kv_heads;
    own.head_dim = decoder->head_dim;
    own.window = decoder->window;
    own.scale = decoder->scale;
    own.softcap = 0.0f;
    double since = now();
    flexpiped_rms_norm(hidden, size, decoder->attention_norm, normed, size, tokens, size, decoder->norm_epsilon);
    spent(&seconds->elementwise, &since);
    project(linears, 3, normed, to, width, tokens, 0);
    spent(&seconds->products, &since);
    if (decoder->query_norm != NULL) {
        for (int64_t head = 0; head < decoder->num_heads; head++)
            flexpiped_rms_norm(q + head * dim, width, decoder->query_norm, q + head * dim, width, tokens, dim,
                               decoder->norm_epsilon);
        for (int64_t head = 0; head < decoder->num_kv_heads; head++)
            flexpiped_rms_norm(k + head * dim, width, decoder->key_norm, k + head * dim, width, tokens, dim,
                               decoder->norm_epsilon);
    }
    /* Keys follow queries, head after head: one call rotates both. */
    flexpiped_rotary(q, cosine, sine, tokens, decoder->num_heads + decoder->num_kv_heads, dim, width, dim);
    spent(&seconds->elementwise, &since);
    const Rows q_rows = {q, width, dim}, k_rows = {k, width, dim}, v_rows = {v, width, dim};
    const int status = flexpiped_paged_attention(&own, keys, values, &q_rows, &k_rows, &v_rows, attended);
    spent(&seconds->attention, &since);
    if (status != 0) return status;
    project(&decoder->output, 1, attended, &hidden, size, tokens, 1);
    spent(&seconds->products, &since);
    return 0;
}

static void mlp(const Decoder *decoder, float *hidden, float *normed, float *inner, int64_t tokens, Seconds *seconds) {
    const int64_t size = decoder->query.inputs, inner_size = decoder->gate.outputs;
    const Linear linears[2] = {decoder->gate, decoder->up};
    float *const to[2] = {inner, inner + MLP_ROWS * inner_size};
    double since = now();
    for (int64_t first = 0; first < tokens; first += MLP_ROWS) {
        const int64_t count = tokens - first < MLP_ROWS ? tokens - first : MLP_ROWS;
        float *rows = hidden + first * size;
        flexpiped_rms_norm(rows, size, decoder->mlp_norm, normed, size, count, size, decoder->norm_epsilon);
        spent(&seconds->elementwise, &since);
        project(linears, 2, normed, to, inner_size, count, 0);
        spent(&seconds->products, &since);
        flexpiped_silu_mul(to[0], to[1], count * inner_size);
        spent(&seconds->elementwise, &since);
        project(&decoder->down, 1, to[0], &rows, size, count, 1);
        spent(&seconds->products, &since);
    }
}

/* Run a step's tokens through a decoder. hidden: (tokens, size), contiguous, changed in place; cosine and sine:
 * (tokens, head_dim). Returns what ``flexpiped_paged_attention`` does. */
int flexpiped_decoder(const Decoder *decoder, const Step *step, float *keys, float *values, const float *cosine,
                      const float *sine, float *hidden, float *scratch, Seconds *seconds) {
    const int64_t tokens = step->num_tokens, size = decoder->query.inputs;
    float *projected = scratch + tokens * size;
    float *attended = projected + tokens * (decoder->query.outputs + 2 * decoder->key.outputs);
    float *inner = attended + tokens * decoder->query.outputs;
    const int status =
        attend(decoder, step, keys, values, cosine, sine, hidden, scratch, projected, attended, seconds);
    if (status == 0) mlp(decoder, hidden, scratch, inner, tokens, seconds);
    return status;
}
