/* What one thread does in unet.c, for the vectors of an instruction set (sets.h). */

#define Halves NAMED(Halves)
#define widened NAMED(widened)
#define load_weight NAMED(load_weight)
#define smaller NAMED(smaller)
#define exponential NAMED(exponential)
#define activate NAMED(activate)
#define few_rows NAMED(few_rows)
#define convolve NAMED(convolve)
#define normalise NAMED(normalise)
#define finish NAMED(finish)

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

/* Rows of the output, vectors * LANES channels of each, from the rows of the input that tap 0 reads */
INLINE void few_rows(int rows, int vectors, int half, const Operation *o, const float *const *in, int64_t tap,
                     int64_t panel, const float *bias, float *const *out)
{
    Lanes sum[8][4];
    EACH(r, rows)
        EACH(v, vectors) sum[r][v] = load(bias + v * LANES);
    for (int64_t t = 0; t < o->taps; t++) {
        const float *at[8];
        EACH(r, rows) at[r] = in[r] + t * tap;
        for (int64_t k = 0; k < o->n_in; k++, panel += PANEL) {
            Lanes line[4];
            EACH(v, vectors) line[v] = load_weight(half, o->weight, panel + v * LANES);
            EACH(r, rows)
                EACH(v, vectors) sum[r][v] += at[r][k] * line[v];
        }
    }
    EACH(r, rows)
        EACH(v, vectors) store(out[r] + v * LANES, sum[r][v]);
}

INLINE void convolve(int half, const Operation *o, int64_t batch, int64_t first, int64_t count)
{
    const int vectors = LANES == 4 && REGISTERS == 32 ? 4 : 2;
    const int at_once = LANES == 16 ? 8 : LANES == 8 || REGISTERS == 32 ? 6 : 4;
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

TARGET static void NAMED(job)(const Operation *o, int64_t batch, int64_t first, const float *film, int64_t film_row)
{
    int64_t count = o->n_out - first < o->block ? o->n_out - first : o->block;
    if (o->half) convolve(1, o, batch, first, count);
    else convolve(0, o, batch, first, count);
    if (o->group || o->activation || o->film >= 0 || o->add)
        for (int64_t b = 0; b < batch; b++) finish(o, batch, b, first, count, film + b * film_row);
}

static const Kernels NAMED(kernels) = {NAMED(job)};
