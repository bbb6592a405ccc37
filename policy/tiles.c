/* Convolutions of 3 x 3 by fewer products (see policy/winograd.py), on float32 images that lie channels last.
 *
 * A tile is 3 x 3 outputs, read from 5 x 5 inputs that overlap those of its neighbours. Tiles are taken some at a time, so
 * that all that lies between reading an image and writing one stays in a cache:
 *
 *     x [N, H, W, K] -> read_tiles -> seen [25, tiles, K] -> 25 products with values [25, K, C] -> write_tile -> y [N, H, W, C]
 *
 * Channels are multiples of 32. What a product reads row by row for many columns (`values`, and `seen` for the gradient of the
 * weights) lies in panels of 32 columns, [C / 32, rows, 32], one after the other in memory. Rows of all else are a little
 * longer than their channels (`padded`): at a distance of a power of two they would all fall in one set of the cache.
 */

#include <stdint.h>

enum { OUTPUTS = 3, POINTS = 5, PLACES = POINTS * POINTS, LANES = 16, PANEL = 32 };

typedef float Lanes __attribute__((vector_size(4 * LANES)));
typedef float LanesInMemory __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 32")

INLINE Lanes load(const float *from) { return *(const LanesInMemory *)from; }
INLINE void store(float *to, Lanes value) { *(LanesInMemory *)to = value; }
INLINE int64_t padded(int64_t channels) { return channels + LANES; }

typedef struct {
    int64_t height, width, channels, across, tiles; /* tiles in a row, in an image */
    int64_t image, pixel;                           /* distances */
} Shape;

typedef struct {
    float *at;
    int64_t row, panel; /* distances */
} Rows; /* channel c of row r lies at r * row + c / 32 * panel + c % 32 */

INLINE Rows in_rows(float *at, int64_t channels) { return (Rows){at, padded(channels), PANEL}; }
INLINE Rows in_panels(float *at, int64_t rows) { return (Rows){at, PANEL, rows * PANEL}; }
INLINE float *find(Rows rows, int64_t r, int64_t c) { return rows.at + r * rows.row + c / PANEL * rows.panel + c % PANEL; }

INLINE Shape shape_of(int64_t height, int64_t width, int64_t channels)
{
    int64_t across = (width + OUTPUTS - 1) / OUTPUTS, down = (height + OUTPUTS - 1) / OUTPUTS;
    return (Shape){height, width, channels, across, across * down, height * width * channels, channels};
}

/* Where the side x side pixels of tile `t` begin, `margin` before its outputs; outside of the image, `step` is 0 and
 * `other` stands for the pixel. */
INLINE void find_pixels(const float *images, Shape s, int64_t t, int64_t margin, const int side, const float *other,
                        const float **pixel, int64_t *step)
{
    int64_t image = t / s.tiles, place = t % s.tiles;
    int64_t top = place / s.across * OUTPUTS - margin, left = place % s.across * OUTPUTS - margin;
    for (int i = 0; i < side * side; i++) {
        int64_t y = top + i / side, x = left + i % side;
        step[i] = y >= 0 && y < s.height && x >= 0 && x < s.width;
        pixel[i] = step[i] ? images + image * s.image + (y * s.width + x) * s.pixel : other;
    }
}

/* matrix [n_out, n_in] times parts [n_in, n], along their first axis, or along the second one of parts [n, n_in] */
INLINE void along_first(const int n_out, const int n_in, const int n, const float *matrix, const Lanes *parts, Lanes *out)
{
    UNROLL for (int a = 0; a < n_out; a++)
        UNROLL for (int j = 0; j < n; j++) {
            Lanes sum = matrix[a * n_in] * parts[j];
            UNROLL for (int i = 1; i < n_in; i++) sum += matrix[a * n_in + i] * parts[i * n + j];
            out[a * n + j] = sum;
        }
}

INLINE void along_second(const int n_out, const int n_in, const int n, const float *matrix, const Lanes *parts, Lanes *out)
{
    UNROLL for (int a = 0; a < n; a++)
        UNROLL for (int b = 0; b < n_out; b++) {
            Lanes sum = matrix[b * n_in] * parts[a * n_in];
            UNROLL for (int i = 1; i < n_in; i++) sum += matrix[b * n_in + i] * parts[a * n_in + i];
            out[a * n_out + b] = sum;
        }
}

/* The values of tiles first, first + 1, … at all points, from row 0 of `out` on, for each point `plane` after the last:
 * matrix [5, side] */
INLINE void read_tiles(const int side, const float *images, Shape s, int64_t margin, int64_t first, int64_t count,
                       const float *matrix, Rows out, int64_t plane)
{
    static const float zeros[LANES];
    for (int64_t t = 0; t < count; t++) {
        const float *pixel[PLACES];
        int64_t step[PLACES];
        find_pixels(images, s, first + t, margin, side, zeros, pixel, step);
        for (int64_t c = 0; c < s.channels; c += LANES) {
            Lanes seen[PLACES], half[PLACES], values[PLACES];
            UNROLL for (int i = 0; i < side * side; i++) seen[i] = load(pixel[i] + c * step[i]);
            along_first(POINTS, side, side, matrix, seen, half);
            along_second(POINTS, side, POINTS, matrix, half, values);
            float *at = find(out, t, c);
            UNROLL for (int p = 0; p < PLACES; p++) store(at + p * plane, values[p]);
        }
    }
}

/* The outputs of tiles first, first + 1, … from their values at all points: matrix [3, 5] */
INLINE void write_tiles(float *images, Shape s, int64_t first, int64_t count, const float *matrix, const float *in,
                        int64_t plane)
{
    float nowhere[LANES];
    for (int64_t t = 0; t < count; t++) {
        const float *pixel[OUTPUTS * OUTPUTS];
        int64_t step[OUTPUTS * OUTPUTS];
        find_pixels(images, s, first + t, 0, OUTPUTS, nowhere, pixel, step);
        for (int64_t c = 0; c < s.channels; c += LANES) {
            Lanes values[PLACES], half[OUTPUTS * POINTS], outputs[OUTPUTS * OUTPUTS];
            UNROLL for (int p = 0; p < PLACES; p++) values[p] = load(in + p * plane + t * padded(s.channels) + c);
            along_first(OUTPUTS, POINTS, POINTS, matrix, values, half);
            along_second(OUTPUTS, POINTS, OUTPUTS, matrix, half, outputs);
            UNROLL for (int i = 0; i < OUTPUTS * OUTPUTS; i++) store((float *)pixel[i] + c * step[i], outputs[i]);
        }
    }
}

typedef struct {
    const float *at;
    int64_t row, column;
} Matrix; /* element (i, j) lies at i * row + j * column */

/* c = a b, or c += a b where `more`: a [rows, depth], b [depth, vectors * 16] of a panel, c [rows, vectors * 16] */
INLINE void few_rows(const int rows, const int vectors, int64_t depth, Matrix a, const float *b, float *c, int64_t c_row,
                     int more)
{
    Lanes sum[12][2];
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int v = 0; v < vectors; v++) sum[r][v] = more ? load(c + r * c_row + v * LANES) : (Lanes){0};
    for (int64_t k = 0; k < depth; k++) {
        Lanes line[2];
        UNROLL for (int v = 0; v < vectors; v++) line[v] = load(b + k * PANEL + v * LANES);
        UNROLL for (int r = 0; r < rows; r++)
            UNROLL for (int v = 0; v < vectors; v++) sum[r][v] += a.at[r * a.row + k * a.column] * line[v];
    }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int v = 0; v < vectors; v++) store(c + r * c_row + v * LANES, sum[r][v]);
}

/* The same for any number of rows and columns; at_once rows and vectors are as many sums as there are registers. */
INLINE void product(const int at_once, const int vectors, int64_t rows, int64_t depth, int64_t columns, Matrix a, Rows b,
                    float *c, int64_t c_row, int more)
{
    for (int64_t n = 0; n < columns; n += vectors * LANES) {
        int64_t r = 0;
#define ROWS(count)                                                                                                    \
    for (; r + count <= rows; r += count) {                                                                            \
        Matrix part = {a.at + r * a.row, a.row, a.column};                                                             \
        few_rows(count, vectors, depth, part, find(b, 0, n), c + r * c_row + n, c_row, more);                           \
    }
        ROWS(at_once) ROWS(4) ROWS(1)
#undef ROWS
    }
}

/* What one thread does, once for each kind of processor */
typedef struct {
    void (*read)(int side, const float *images, Shape s, int64_t margin, int64_t first, int64_t count,
                 const float *matrix, Rows out, int64_t plane);
    void (*write)(float *images, Shape s, int64_t first, int64_t count, const float *matrix, const float *in,
                  int64_t plane);
    void (*product)(int64_t rows, int64_t depth, int64_t columns, Matrix a, Rows b, float *c, int64_t c_row, int more);
} Kernels;

#define KERNELS(name, target, at_once, vectors)                                                                        \
    target static void read_##name(int side, const float *images, Shape s, int64_t margin, int64_t first,              \
                                   int64_t count, const float *matrix, Rows out, int64_t plane)                      \
    {                                                                                                                  \
        if (side == POINTS) read_tiles(POINTS, images, s, margin, first, count, matrix, out, plane);                   \
        else read_tiles(OUTPUTS, images, s, margin, first, count, matrix, out, plane);                                 \
    }                                                                                                                  \
    target static void write_##name(float *images, Shape s, int64_t first, int64_t count, const float *matrix,         \
                                    const float *in, int64_t plane)                                                    \
    {                                                                                                                  \
        write_tiles(images, s, first, count, matrix, in, plane);                                                       \
    }                                                                                                                  \
    target static void product_##name(int64_t rows, int64_t depth, int64_t columns, Matrix a, Rows b, float *c,        \
                                      int64_t c_row, int more)                                                         \
    {                                                                                                                  \
        product(at_once, vectors, rows, depth, columns, a, b, c, c_row, more);                                         \
    }                                                                                                                  \
    static const Kernels name = {read_##name, write_##name, product_##name};

#ifdef __x86_64__
KERNELS(avx512, __attribute__((target("arch=x86-64-v4"))), 12, 2) /* 24 of 32 registers of 16 */
KERNELS(avx2, __attribute__((target("arch=x86-64-v3"))), 6, 1)    /* 12 of 16 registers of 8 */

static const Kernels *kernels(void)
{
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd"))
        return &avx512;
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? &avx2 : 0;
}
#else
KERNELS(other, , 4, 1)

static const Kernels *kernels(void) { return &other; }
#endif

/* Whether the functions below run on this processor. */
int has_kernels(void) { return kernels() != 0; }

/* weight, whose tap t from input i to output o lies at i * input + t * tap + o, -> values [25, n_out / 32, n_in, 32] at all
 * points: kernel [5, 3] */
void kernel_values(const float *weight, int64_t n_in, int64_t n_out, int64_t input, int64_t tap, const float *kernel,
                   float *values, int threads)
{
    const Kernels *use = kernels();
    Shape s = shape_of(OUTPUTS, OUTPUTS, n_out);
    s.image = input, s.pixel = tap;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int part = 0; part < threads; part++) {
        int64_t from = n_in * part / threads, to = n_in * (part + 1) / threads;
        use->read(OUTPUTS, weight, s, 0, from, to - from, kernel, in_panels(values + from * PANEL, n_in), n_in * n_out);
    }
}

/* x [n, height, width, n_in] -> y [n, height, width, n_out]: read [5, 5], write [3, 5], `most` tiles at a time;
 * scratch: threads * 25 * most * (padded(n_in) + padded(n_out)) */
void conv(const float *x, int64_t n, int64_t height, int64_t width, int64_t n_in, int64_t n_out, float *values,
          const float *read, const float *write, float *y, int64_t most, float *scratch, int threads)
{
    const Kernels *use = kernels();
    Shape in = shape_of(height, width, n_in), out = shape_of(height, width, n_out);
    int64_t tiles = n * in.tiles, blocks = (tiles + most - 1) / most;
    int64_t in_plane = most * padded(n_in), out_plane = most * padded(n_out);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int part = 0; part < threads; part++) {
        float *seen = scratch + part * PLACES * (in_plane + out_plane), *products = seen + PLACES * in_plane;
        for (int64_t block = blocks * part / threads; block < blocks * (part + 1) / threads; block++) {
            int64_t first = block * most, count = tiles - first < most ? tiles - first : most;
            use->read(POINTS, x, in, 1, first, count, read, in_rows(seen, n_in), in_plane);
            for (int64_t p = 0; p < PLACES; p++) {
                Matrix a = {seen + p * in_plane, padded(n_in), 1};
                use->product(count, n_in, n_out, a, in_panels(values + p * n_in * n_out, n_in), products + p * out_plane,
                             padded(n_out), 0);
            }
            use->write(y, out, first, count, write, products, out_plane);
        }
    }
}

/* x [n, height, width, n_in], grad [n, height, width, n_out] -> weight [n_out, 3, 3, n_in], the gradient of conv's.
 *
 * read [5, 5], write [5, 3] (conv's, transposed), kernel [3, 5] (kernel_values', transposed); values: room for
 * 25 * n_out * padded(n_in); scratch: as conv's for one thread */
void weight_gradient(const float *x, const float *grad, int64_t n, int64_t height, int64_t width, int64_t n_in,
                     int64_t n_out, const float *read, const float *write, const float *kernel, float *weight,
                     float *values, int64_t most, float *scratch, int threads)
{
    const Kernels *use = kernels();
    Shape in = shape_of(height, width, n_in), out = shape_of(height, width, n_out), taps = shape_of(OUTPUTS, OUTPUTS, n_in);
    int64_t tiles = n * in.tiles, at_once = 24, jobs = (n_out + at_once - 1) / at_once;
    int64_t in_plane = most * n_in, out_plane = most * padded(n_out), row = padded(n_in);
    float *seen = scratch, *parts = scratch + PLACES * in_plane;
#pragma omp parallel num_threads(threads)
    {
        for (int64_t first = 0; first < tiles; first += most) {
            int64_t count = tiles - first < most ? tiles - first : most;
#pragma omp for schedule(static)
            for (int part = 0; part < threads; part++) {
                int64_t from = count * part / threads, some = count * (part + 1) / threads - from;
                use->read(POINTS, x, in, 1, first + from, some, read, in_panels(seen + from * PANEL, most), in_plane);
                use->read(OUTPUTS, grad, out, 0, first + from, some, write,
                          in_rows(parts + from * padded(n_out), n_out), out_plane);
            }
#pragma omp for schedule(static)
            for (int64_t job = 0; job < PLACES * jobs; job++) {
                int64_t p = job / jobs, o = job % jobs * at_once, rows = n_out - o < at_once ? n_out - o : at_once;
                Matrix a = {parts + p * out_plane + o, 1, padded(n_out)};
                use->product(rows, count, n_in, a, in_panels(seen + p * in_plane, most), values + (p * n_out + o) * row,
                             row, first > 0);
            }
        }
#pragma omp for schedule(static)
        for (int part = 0; part < threads; part++) {
            int64_t from = n_out * part / threads, to = n_out * (part + 1) / threads;
            use->write(weight, taps, from, to - from, kernel, values + from * row, n_out * row);
        }
    }
}
