/* A denoising step of few rows as one call (see cpu_unet.py): a list of operations, each by all threads.
 *
 *     out = after(in convolved with weight + bias),   after: group norm, activation, FiLM, sum, as far as there are any
 *
 * Sequences lie [steps, batch, channels], with channels padded by zeros to a multiple of 32 and enough steps of zeros
 * before and after that a kernel may read there. A thread takes whole groups of channels, so what comes after a
 * convolution needs no other thread; threads wait for each other only between operations. */

#include "lanes.h"
#include <math.h>
#ifdef __x86_64__
#include <immintrin.h>
#endif

enum { NONE, RELU, SILU, MISH };
enum { BLOCK = 512, MOST_ROWS = 256 }; /* at most: channels of a job, rows that take a weight together */
enum { SOME = 32 };                     /* inputs, whose weights stay in a cache while all rows take them */

typedef struct {
    const float *in, *bias, *gamma, *beta, *add;
    const void *weight; /* [n_out / 32, taps, n_in, 32], float32 or, if `half`, float16 */
    float *out;
    int64_t in_row, out_row, add_row; /* distances between rows; a row is one step of one sequence */
    int64_t in_first, in_stride;   /* the step that tap 0 reads for the first output, and how much later for the next */
    int64_t out_first, out_stride; /* the step of the first output, and of the next; `add` is read there too */
    int64_t steps, taps, n_in, n_out; /* numbers of channels are padded */
    int64_t block, group;             /* channels of a job, multiples of `group`; of a group, 0: no norm */
    int64_t channels;                 /* n_out without padding */
    int64_t film; /* where its scales begin in a row of the modulation, the shifts follow; -1: none */
    int64_t activation, half;
    float eps;
} Operation;

INLINE float *row_out(const Operation *o, int64_t batch, int64_t t, int64_t b)
{
    return o->out + ((o->out_first + t * o->out_stride) * batch + b) * o->out_row;
}

/* The channels first, first + 1, … of a block, by one thread (unet_kernels.h) */
typedef struct {
    void (*job)(const Operation *o, int64_t batch, int64_t first, const float *film, int64_t film_row);
} Kernels;

#define KERNELS "unet_kernels.h"
#include "sets.h"

/* Changes with the arguments of what follows and their layout (native.py). */
int abi(void) { return 2; }

/* The operations, one after the other, for `batch` sequences; film [batch, film_row] */
void run(const Operation *operations, int64_t n, int64_t batch, const float *film, int64_t film_row, int threads)
{
#pragma omp parallel num_threads(threads)
    for (int64_t i = 0; i < n; i++) {
        const Operation *o = operations + i;
#pragma omp for schedule(static)
        for (int64_t first = 0; first < o->n_out; first += o->block) kernels->job(o, batch, first, film, film_row);
    }
}
