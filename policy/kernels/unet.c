/* A denoising step of few rows as one call (see cpu_unet.py): a list of operations, each by all threads.
 *
 *     out = after(in convolved with weight + bias),   after: group norm, activation, FiLM, sum, as far as there are any
 *
 * Sequences lie [steps, batch, channels], with channels padded by zeros to a multiple of 32 and enough steps of zeros
 * before and after that a kernel may read there. A thread takes whole groups of channels, so what comes after a
 * convolution needs no other thread; threads wait for each other only between operations. */

#include "lanes.h"
#include <math.h>

enum { NONE, RELU, SILU, MISH };
enum { BLOCK = 512 }; /* channels of a job, at most */

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

typedef int16_t Halves __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

/* float16 as float32. Exponents are moved by a multiplication, which numbers below the smallest normal one come out of
 * right as well; there are no infinite weights. */
INLINE Lanes widened(const int16_t *from)
{
    Integers bits = __builtin_convertvector(*(const Halves *)from, Integers) << 13; /* bits 28 to 31 are the sign */
    return (Lanes)(bits & (int32_t)0x8fffffff) * 0x1p112f;
}

INLINE Lanes load_weight(int half, const void *weight, int64_t i)
{
    return half ? widened((const int16_t *)weight + i) : load((const float *)weight + i);
}

INLINE Lanes smaller(Lanes a, float b)
{
    Lanes limit = b - (Lanes){0};
    Integers over = a > limit;
    return (Lanes)((over & (Integers)limit) | (~over & (Integers)a));
}

/* e^x within 2e-7 of it, x in -87 to 88 and clipped there: 2^n times a polynomial of what is left of x (Cephes) */
INLINE Lanes exponential(Lanes x)
{
    x = -smaller(-smaller(x, 88.0f), 87.0f);
    Lanes shifted = x * 1.44269504f + 12582912.0f; /* rounded: beside 1.5 * 2^23 there is no room for halves */
    Lanes n = shifted - 12582912.0f;
    Lanes r = x - n * 0.693359375f + n * 2.12194440e-4f;
    Lanes p = 1.9875691500e-4f - (Lanes){0};
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return p * (Lanes)(((Integers)shifted << 23) + 0x3f800000);
}

INLINE Lanes activate(int64_t which, Lanes x)
{
    if (which == RELU) return -smaller(-x, 0.0f);
    if (which == SILU) return x / (1.0f + exponential(-x));
    if (which == MISH) { /* x tanh(softplus(x)), see activations.py */
        Lanes e = exponential(x), n = e + 0.5f * e * e;
        return x / (1.0f + 1.0f / n);
    }
    return x;
}

/* Rows of the output, vectors * 16 channels of each, from the rows of the input that tap 0 reads */
INLINE void few_rows(int rows, int vectors, int half, const Operation *o, const float *const *in, int64_t tap,
                     int64_t panel, const float *bias, float *const *out)
{
    Lanes sum[8][2];
    EACH(r, rows)
        EACH(v, vectors) sum[r][v] = load(bias + v * LANES);
    for (int64_t t = 0; t < o->taps; t++) {
        const float *at[8];
        EACH(r, rows) at[r] = in[r] + t * tap;
        for (int64_t k = 0; k < o->n_in; k++, panel += PANEL) {
            Lanes line[2];
            EACH(v, vectors) line[v] = load_weight(half, o->weight, panel + v * LANES);
            EACH(r, rows)
                EACH(v, vectors) sum[r][v] += at[r][k] * line[v];
        }
    }
    EACH(r, rows)
        EACH(v, vectors) store(out[r] + v * LANES, sum[r][v]);
}

INLINE float *row_out(const Operation *o, int64_t batch, int64_t t, int64_t b)
{
    return o->out + ((o->out_first + t * o->out_stride) * batch + b) * o->out_row;
}

INLINE void convolve(int at_once, int vectors, int half, const Operation *o, int64_t batch, int64_t first,
                     int64_t count)
{
    int64_t rows = o->steps * batch, tap = batch * o->in_row;
    for (int64_t r = 0, some; r < rows; r += some) {
        const float *in[8];
        float *out[8];
        some = rows - r >= at_once ? at_once : rows - r >= 4 ? 4 : rows - r >= 2 ? 2 : 1;
        for (int64_t i = 0; i < some; i++) {
            int64_t t = (r + i) / batch, b = (r + i) % batch;
            in[i] = o->in + ((o->in_first + t * o->in_stride) * batch + b) * o->in_row;
            out[i] = row_out(o, batch, t, b) + first;
        }
        for (int64_t n = first; n < first + count; n += vectors * LANES) {
            int64_t panel = n / PANEL * o->taps * o->n_in * PANEL + n % PANEL;
            if (some == at_once) few_rows(at_once, vectors, half, o, in, tap, panel, o->bias + n, out);
            else if (some == 4) few_rows(4, vectors, half, o, in, tap, panel, o->bias + n, out);
            else if (some == 2) few_rows(2, vectors, half, o, in, tap, panel, o->bias + n, out);
            else few_rows(1, vectors, half, o, in, tap, panel, o->bias + n, out);
            for (int64_t i = 0; i < some; i++) out[i] += vectors * LANES;
        }
    }
}

/* What the values of channels first … are multiplied with and shifted by, so that those of each group have mean 0 and
 * variance 1 before gamma and beta */
INLINE void normalise(const Operation *o, int64_t batch, int64_t b, int64_t first, int64_t count, float *scale,
                      float *offset)
{
    float mean[BLOCK], n = o->steps * o->group;
    for (int64_t c = 0; c < count; c += LANES) {
        Lanes sum = {0};
        for (int64_t t = 0; t < o->steps; t++) sum += load(row_out(o, batch, t, b) + first + c);
        store(mean + c, sum);
    }
    for (int64_t g = 0; g < count; g += o->group) {
        float sum = 0;
        int64_t end = g + o->group < count ? g + o->group : count;
        for (int64_t c = g; c < end; c++) sum += mean[c];
        for (int64_t c = g; c < end; c++) mean[c] = sum / n;
    }
    for (int64_t c = 0; c < count; c += LANES) {
        Lanes sum = {0}, middle = load(mean + c);
        for (int64_t t = 0; t < o->steps; t++) {
            Lanes apart = load(row_out(o, batch, t, b) + first + c) - middle;
            sum += apart * apart;
        }
        store(scale + c, sum);
    }
    for (int64_t g = 0; g < count; g += o->group) {
        float sum = 0;
        int64_t end = g + o->group < count ? g + o->group : count;
        for (int64_t c = g; c < end; c++) sum += scale[c];
        for (int64_t c = g; c < end; c++) {
            scale[c] = o->gamma[first + c] / sqrtf(sum / n + o->eps);
            offset[c] = o->beta[first + c] - mean[c] * scale[c];
        }
    }
}

INLINE void finish(const Operation *o, int64_t batch, int64_t b, int64_t first, int64_t count, const float *film)
{
    float scale[BLOCK], offset[BLOCK], film_scale[BLOCK], film_shift[BLOCK];
    if (o->group) normalise(o, batch, b, first, count, scale, offset);
    if (o->film >= 0)
        for (int64_t c = 0; c < count; c++) {
            int64_t at = o->film + first + c, real = first + c < o->channels;
            film_scale[c] = real ? film[at] : 0;
            film_shift[c] = real ? film[at + o->channels] : 0;
        }
    for (int64_t t = 0; t < o->steps; t++) {
        float *out = row_out(o, batch, t, b) + first;
        const float *add = o->add ? o->add + ((o->out_first + t * o->out_stride) * batch + b) * o->add_row + first : 0;
        for (int64_t c = 0; c < count; c += LANES) {
            Lanes y = load(out + c);
            if (o->group) y = y * load(scale + c) + load(offset + c);
            y = activate(o->activation, y);
            if (o->film >= 0) y = y * load(film_scale + c) + load(film_shift + c);
            if (add) y += load(add + c);
            store(out + c, y);
        }
    }
}

#define JOB(name, target, at_once, vectors)                                                                            \
    target static void name(const Operation *o, int64_t batch, int64_t first, const float *film, int64_t film_row)     \
    {                                                                                                                  \
        int64_t count = o->n_out - first < o->block ? o->n_out - first : o->block;                                     \
        if (o->half) convolve(at_once, vectors, 1, o, batch, first, count);                                            \
        else convolve(at_once, vectors, 0, o, batch, first, count);                                                    \
        if (o->group || o->activation || o->film >= 0 || o->add)                                                       \
            for (int64_t b = 0; b < batch; b++) finish(o, batch, b, first, count, film + b * film_row);                \
    }

typedef void (*Job)(const Operation *o, int64_t batch, int64_t first, const float *film, int64_t film_row);

#ifdef X86
JOB(avx512, AVX512, 8, 2)
JOB(avx2, AVX2, 6, 1)

static Job job(void) { return has_avx512() ? avx512 : has_avx2() ? avx2 : 0; }
#else
JOB(other, , 4, 1)

static Job job(void) { return other; }
#endif

/* Changes with the arguments of what follows and their layout (native.py). */
int abi(void) { return 1; }

/* Whether `run` runs on this processor. */
int has_kernels(void) { return job() != 0; }

/* The operations, one after the other, for `batch` sequences; film [batch, film_row] */
void run(const Operation *operations, int64_t n, int64_t batch, const float *film, int64_t film_row, int threads)
{
    Job use = job();
#pragma omp parallel num_threads(threads)
    for (int64_t i = 0; i < n; i++) {
        const Operation *o = operations + i;
#pragma omp for schedule(static)
        for (int64_t first = 0; first < o->n_out; first += o->block) use(o, batch, first, film, film_row);
    }
}
