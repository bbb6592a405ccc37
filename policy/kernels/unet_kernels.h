/* What one thread does in unet.c, for the vectors of an instruction set (sets.h). */

#define widened NAMED(widened)
#define smaller NAMED(smaller)
#define exponential NAMED(exponential)
#define activate NAMED(activate)
#define few_rows NAMED(few_rows)
#define convolve NAMED(convolve)
#define normalise NAMED(normalise)
#define finish NAMED(finish)

/* float16 as float32 */
INLINE Lanes widened(const int16_t *from)
{
#if LANES == 16
    return (Lanes)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from));
#elif LANES == 8
    return (Lanes)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from));
#else
    /* Exponents are moved by a multiplication, which numbers below the smallest normal one come out of right as well;
     * there are no infinite weights. */
    Integers bits = {from[0], from[1], from[2], from[3]}; /* bits 28 to 31 will be the sign */
    return (Lanes)(bits << 13 & (int32_t)0x8fffffff) * 0x1p112f;
#endif
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

/* Some rows of the output, vectors * LANES channels of each from `to` on: to what is there, or to `bias`, is added what
 * `depth` inputs from `from` on give by panel [depth, 32]. */
INLINE void few_rows(int rows, int vectors, int64_t depth, const float *const *in, int64_t from, const float *panel,
                     const float *bias, float *const *out, int64_t to)
{
    Lanes sum[8][4];
    const float *at[8];
    EACH(r, rows) {
        at[r] = in[r] + from;
        EACH(v, vectors) sum[r][v] = load((bias ? bias : out[r] + to) + v * LANES);
    }
    for (int64_t k = 0; k < depth; k++) {
        Lanes line[4];
        EACH(v, vectors) line[v] = load(panel + k * PANEL + v * LANES);
        EACH(r, rows)
            EACH(v, vectors) sum[r][v] += at[r][k] * line[v];
    }
    EACH(r, rows)
        EACH(v, vectors) store(out[r] + to + v * LANES, sum[r][v]);
}

/* Rows first_row, …, at most MOST_ROWS. Weights come from far, once: all of them take some of a panel, 4 KB as float32, before the next are read. With AVX-512,
 * which goes over them half as often, it is as fast to take all of a tap. */
INLINE void convolve(const Operation *o, int64_t batch, int64_t first, int64_t count, int64_t first_row, int64_t rows)
{
    const int at_once = LANES == 16 ? 8 : 4, vectors = LANES == 4 && REGISTERS == 32 ? 4 : 2;
    int64_t some = LANES == 16 && !o->half ? o->n_in : SOME;
    const float *in[MOST_ROWS];
    float *out[MOST_ROWS], floats[SOME * PANEL];
    for (int64_t r = 0; r < rows; r++) {
        int64_t t = (first_row + r) / batch, b = (first_row + r) % batch;
        in[r] = o->in + ((o->in_first + t * o->in_stride) * batch + b) * o->in_row;
        out[r] = row_out(o, batch, t, b);
    }
    for (int64_t n = first; n < first + count; n += PANEL)
        for (int64_t t = 0; t < o->taps; t++)
            for (int64_t k = 0; k < o->n_in; k += some) {
                int64_t from = t * batch * o->in_row + k, depth = o->n_in - k < some ? o->n_in - k : some;
                int64_t start = ((n / PANEL * o->taps + t) * o->n_in + k) * PANEL;
                if (o->half)
                    for (int64_t i = 0; i < depth * PANEL; i += LANES)
                        store(floats + i, widened((const int16_t *)o->weight + start + i));
                const float *panel = o->half ? floats : (const float *)o->weight + start;
                for (int64_t v = 0; v < PANEL; v += vectors * LANES) {
                    const float *bias = t + k ? 0 : o->bias + n + v;
                    int64_t r = 0;
#define ROWS(count)                                                                                                    \
    for (; r + count <= rows; r += count)                                                                              \
        few_rows(count, vectors, depth, in + r, from, panel + v, bias, out + r, n + v);
                    ROWS(at_once) ROWS(4) ROWS(2) ROWS(1)
#undef ROWS
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
    int64_t rows = o->steps * batch;
    for (int64_t r = 0; r < rows; r += MOST_ROWS)
        convolve(o, batch, first, count, r, rows - r < MOST_ROWS ? rows - r : MOST_ROWS);
    if (o->group || o->activation || o->film >= 0 || o->add)
        for (int64_t b = 0; b < batch; b++) finish(o, batch, b, first, count, film + b * film_row);
}

static const Kernels NAMED(kernels) = {NAMED(job)};
