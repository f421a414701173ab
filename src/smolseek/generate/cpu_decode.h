/* Shared by the C files of a decoding step: the structs that cpu_decode.py packs, the memory of intermediate results,
   and the functions of cpu_linear.c. */

#include "quantized.h"

#include <math.h>
#include <sched.h>
#include <stdatomic.h>
#ifdef _OPENMP
#include <omp.h>
#else /* a compiler without OpenMP: one thread */
static inline int omp_get_thread_num(void) { return 0; }
static inline int omp_get_num_threads(void) { return 1; }
#endif

#define CHUNK 64 /* cached tokens that one thread attends to at a time */
#define MAX_BATCH 512

typedef struct {
    const void *data;
    int64_t format; /* of quantized.h */
} Matrix;

typedef struct {
    const float *input_norm, *post_norm;
    Matrix q_a, q, k, v, o; /* k is kv_a_proj_with_mqa under MLA; q_a has no data without a query rank */
    const float *q_a_bias, *q_a_norm, *k_bias, *k_norm, *o_bias;
    Matrix key_up, value_up; /* MLA: W_UK of each head transposed [H, L, N]; kv_b_proj [H, N + V, L] */
    const float *router, *router_bias;
    Matrix up, down; /* routed experts [E, 2F or F, D] and [E, D, F] */
    const float *up_bias, *down_bias;
    Matrix gate_shared, up_shared, down_shared; /* shared experts, or the layer's dense MLP */
    int64_t shared;                             /* number of neurons of the shared experts or the dense MLP */
    Matrix cache;                               /* [cached tokens of all sequences, cached] */
} Layer;

typedef struct {
    int64_t layers, vocab, D, H, G, mla, q_rank, L, N, R, V, interleave, E, K, F, gated;
    int64_t groups, top_groups, normalise, cached, widest; /* widest: the largest `shared` of all layers */
    float eps, latent_eps, factor, scale;
    Matrix embedding, head;
    const float *norm, *cos, *sin; /* cos, sin: [longest sequence, R/2] */
    const Layer *layer;
} Model;

/* The sequences of a step. The cache of a sequence is in chunks of CHUNK tokens, which may be anywhere in the cache: token
   t of sequence b is at first[b * most + t / CHUNK] + t % CHUNK. */
typedef struct {
    int64_t B, most;
    const int64_t *ids, *positions, *first; /* [B], [B], [B, most] */
} Batch;

typedef struct {
    atomic_int arrived, round;
} Barrier;

/* Wait until all threads have arrived. OpenMP's own barrier spins for a long time. On a busy machine the spinning
   threads take the core from the thread for which they wait. This barrier therefore soon yields its core. */
static inline void wait_for_all(Barrier *barrier, int all) {
    if (all == 1) return;
    int now = atomic_load(&barrier->round);
    if (atomic_fetch_add(&barrier->arrived, 1) == all - 1) {
        atomic_store(&barrier->arrived, 0);
        atomic_fetch_add(&barrier->round, 1);
        return;
    }
    for (int spins = 0; atomic_load_explicit(&barrier->round, memory_order_acquire) == now; spins++)
        if (spins > 4000) sched_yield();
}

/* Request a cache line from memory before it is read, into the second-level cache. With the hint that the line is read
   only once (prefetchnta), a decoding step takes 1.5 times as long on an Intel Xeon with AMX. */
INLINE void request(const void *address) { __builtin_prefetch(address, 0, 2); }

/* Thread `me` of `all` threads computes the outputs lo <= o < hi of `total` outputs. lo and hi are multiples of four,
   except at the end. */
INLINE void share(int64_t total, int me, int all, int64_t *lo, int64_t *hi) {
    int64_t part = (total / all + 3) / 4 * 4;
    *lo = part * me < total ? part * me : total;
    *hi = me == all - 1 || part * (me + 1) > total ? total : part * (me + 1);
}

/* The part of a matrix, a stack or a cache that starts at number i. In a quantised format i is the start of a row. */
INLINE Matrix from(Matrix w, int64_t i) {
    return (Matrix){(const char *)w.data + format_bytes(i, w.format), w.format};
}

/* y[b][o] = w[o] . x[b] for n inputs x[b] and the outputs lo <= o < hi. A row w[o] has `cols` numbers, and the next row
   starts `stride` numbers later. */
void linear_outputs(Matrix w, int64_t stride, int64_t cols, const float *const *x, float *const *y, int64_t n, int64_t lo,
                    int64_t hi);

/* y = x w^T + bias for B inputs. Each thread computes its share of the outputs. */
void linear(Matrix w, const float *bias, int64_t out, int64_t in, const float *x, float *y, int64_t B, int me, int all);

/* y = row number `row` of w. */
void load_row(Matrix w, int64_t cols, int64_t row, float *y);

/* RMSNorm: y = x / rms(x) * w. */
static inline void normalise(const float *x, const float *w, float eps, int64_t size, float *y) {
    vec acc = {0};
    int64_t i = 0;
    for (; i + 16 <= size; i += 16) {
        vec v = load(x, i, 0);
        acc += v * v;
    }
    float s = sum(acc);
    for (; i < size; i++) s += x[i] * x[i];
    float r = 1.0f / sqrtf(s / size + eps);
    for (i = 0; i < size; i++) y[i] = x[i] * r * w[i];
}

/* The memory of intermediate results. */
typedef struct {
    float *x, *h, *q_a, *q, *k, *row, *query, *part, *head, *heads, *up, *shared, *out, *weights, *scratch;
    int64_t *experts, floats;
    Barrier *barrier;
} Work;

static inline int64_t part_size(const Model *m) { return m->H * (2 + (m->mla ? m->L : m->R)); }

/* Compute the share of thread `me` in a layer's attention, x += attention(norm(x)); `all` is the number of threads. */
void attention(const Model *m, const Layer *l, const Work *w, const Batch *batch, int me, int all);
