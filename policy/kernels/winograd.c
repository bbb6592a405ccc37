/* Winograd convolutions (see winograd.py), on float32 with the channels last: 3 x 3 over images, 5 along time.
 *
 * A tile is a few outputs, read from inputs that overlap those of its neighbours. Tiles are taken some at a time, so
 * that all between reading an input and writing an output stays in a cache:
 *
 *     x -> read_tiles -> seen [points, tiles, K] -> products with values [points, K, C] -> write_tiles -> y
 *
 * Channels are multiples of 32. What a product reads row by row for many columns (`values`, and one side of the
 * gradient of the weights) lies in panels of 32 columns, [C / 32, rows, 32], one after the other in memory. Rows of all
 * else are a little longer than their channels (`padded`): at a distance of a power of two they would all fall in one
 * set of the cache.
 */

#include "lanes.h"

enum { PADDING = 16, MOST = 25 };

INLINE int64_t padded(int64_t channels) { return channels + PADDING; }

typedef struct {
    int axes, outputs, taps, points; /* the last three along each axis; points = outputs + taps - 1 */
} Tile;

INLINE Tile tile_of(int axes) { return axes == 2 ? (Tile){2, 3, 3, 5} : (Tile){1, 4, 5, 8}; }
INLINE int whole(Tile k, int side) { return k.axes == 2 ? side * side : side; }

typedef struct {
    int64_t height, width, channels, across, tiles; /* tiles in a row, in an image */
    int64_t image, pixel;                           /* distances */
} Shape;

/* Images [n, height, width, channels], or with one axis, sequences [width, n, channels] */
INLINE Shape shape_of(Tile k, int64_t n, int64_t height, int64_t width, int64_t channels)
{
    int64_t across = (width + k.outputs - 1) / k.outputs, down = (height + k.outputs - 1) / k.outputs;
    int64_t size = height * width * channels;
    if (k.axes == 2) return (Shape){height, width, channels, across, across * down, size, channels};
    return (Shape){1, width, channels, across, across, channels, n * channels};
}

typedef struct {
    float *at;
    int64_t row, panel; /* distances */
} Rows;                 /* channel c of row r lies at r * row + c / 32 * panel + c % 32 */

INLINE Rows in_rows(float *at, int64_t channels) { return (Rows){at, padded(channels), PANEL}; }
INLINE Rows in_panels(float *at, int64_t rows) { return (Rows){at, PANEL, rows * PANEL}; }
INLINE float *find(Rows rows, int64_t r, int64_t c)
{
    return rows.at + r * rows.row + c / PANEL * rows.panel + c % PANEL;
}

/* Where the pixels of tile `t` are, `side` along each axis, from `margin` before its outputs on. Outside of the image
 * `step` is 0 and `other` stands for the pixel. */
INLINE void find_pixels(Tile k, const float *images, Shape s, int64_t t, int margin, int side, const float *other,
                        const float **pixel, int64_t *step)
{
    int64_t image = t / s.tiles, place = t % s.tiles;
    int64_t top = k.axes == 2 ? place / s.across * k.outputs - margin : 0, left = place % s.across * k.outputs - margin;
    for (int i = 0; i < whole(k, side); i++) {
        int64_t y = top + i / side, x = left + i % side;
        step[i] = y >= 0 && y < s.height && x >= 0 && x < s.width;
        pixel[i] = step[i] ? images + image * s.image + (y * s.width + x) * s.pixel : other;
    }
}

typedef struct {
    const float *at;
    int64_t row, column;
} Matrix; /* element (i, j) lies at i * row + j * column */

/* What one thread does (winograd_kernels.h) */
typedef struct {
    void (*read)(int axes, int side, const float *images, Shape s, int margin, int64_t first, int64_t count,
                 const float *matrix, Rows out, int64_t plane);
    void (*write)(int axes, int side, float *images, Shape s, int64_t first, int64_t count, const float *matrix,
                  const float *bias, const float *in, int64_t plane);
    void (*multiply)(int64_t rows, int64_t depth, int64_t columns, Matrix a, Rows b, float *c, int64_t c_row, int more);
} Kernels;

#define KERNELS "winograd_kernels.h"
#include "sets.h"

/* Changes with the arguments of what follows (native.py). */
int abi(void) { return 2; }

/* weight, whose tap t from input i to output o lies at i * input + t * tap + o, -> values [points, n_out / 32, n_in,
 * 32]: kernel [points, taps], both along one axis */
void kernel_values(int64_t axes, const float *weight, int64_t n_in, int64_t n_out, int64_t input, int64_t tap,
                   const float *kernel, float *values, int threads)
{
    Tile k = tile_of(axes);
    Shape s = {axes == 2 ? k.taps : 1, k.taps, n_out, 1, 1, input, tap};
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int part = 0; part < threads; part++) {
        int64_t from = n_in * part / threads, to = n_in * (part + 1) / threads;
        kernels->read(axes, k.taps, weight, s, 0, from, to - from, kernel, in_panels(values + from * PANEL, n_in),
                  n_in * n_out);
    }
}

/* x [n, height, width, n_in] -> y [n, height, width, n_out], or with one axis [width, n, n_in] -> [width, n, n_out],
 * which `bias` [n_out] is added to where there is one: read [points, points], write [outputs, points], `most` tiles at
 * a time. scratch: threads * all points * most * (padded(n_in) + padded(n_out)) */
void conv(int64_t axes, const float *x, int64_t n, int64_t height, int64_t width, int64_t n_in, int64_t n_out,
          float *values, const float *bias, const float *read, const float *write, float *y, int64_t most,
          float *scratch, int threads)
{
    Tile k = tile_of(axes);
    Shape in = shape_of(k, n, height, width, n_in), out = shape_of(k, n, height, width, n_out);
    int64_t tiles = n * in.tiles, blocks = (tiles + most - 1) / most, points = whole(k, k.points);
    int64_t in_plane = most * padded(n_in), out_plane = most * padded(n_out);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int part = 0; part < threads; part++) {
        float *seen = scratch + part * points * (in_plane + out_plane), *products = seen + points * in_plane;
        for (int64_t block = blocks * part / threads; block < blocks * (part + 1) / threads; block++) {
            int64_t first = block * most, count = tiles - first < most ? tiles - first : most;
            kernels->read(axes, k.points, x, in, k.taps / 2, first, count, read, in_rows(seen, n_in), in_plane);
            for (int64_t p = 0; p < points; p++) {
                Matrix a = {seen + p * in_plane, padded(n_in), 1};
                Rows b = in_panels(values + p * n_in * n_out, n_in);
                kernels->multiply(count, n_in, n_out, a, b, products + p * out_plane, padded(n_out), 0);
            }
            kernels->write(axes, k.outputs, y, out, first, count, write, bias, products, out_plane);
        }
    }
}

/* How tiles are read: pixels along each axis, from how many before the outputs on, and the matrix [points, size] */
typedef struct {
    int size, margin;
    const float *matrix;
} Side;

/* The gradient of conv's weight, tap t of which from row r to column c goes to r * weight_row + t * weight_tap + c.
 * Rows are the channels of `rows`, columns those of `columns`: one is conv's x, the other the gradient of its y, as
 * rows_are_x says.
 *
 * Matrices: read [points, points] for x, write [points, outputs] (conv's, transposed) for the gradient, kernel [taps,
 * points] (kernel_values', transposed). values: room for all points * n_rows * padded(n_columns). scratch: all points *
 * most * (padded(n_rows) + padded(n_columns)) */
void weight_gradient(int64_t axes, const float *rows, const float *columns, int64_t rows_are_x, int64_t n,
                     int64_t height, int64_t width, int64_t n_rows, int64_t n_columns, const float *read,
                     const float *write, const float *kernel, float *weight, int64_t weight_row, int64_t weight_tap,
                     float *values, int64_t most, float *scratch, int threads)
{
    Tile k = tile_of(axes);
    Shape a_shape = shape_of(k, n, height, width, n_rows), b_shape = shape_of(k, n, height, width, n_columns);
    Shape taps = {axes == 2 ? k.taps : 1, k.taps, n_columns, 1, 1, weight_row, weight_tap};
    int64_t tiles = n * a_shape.tiles, points = whole(k, k.points);
    int64_t at_once = 24, jobs = (n_rows + at_once - 1) / at_once; /* for each point */
    int64_t a_plane = most * padded(n_rows), b_plane = most * n_columns, value = padded(n_columns);
    float *a_values = scratch, *b_values = scratch + points * a_plane;
    Side x = {k.points, k.taps / 2, read}, grad = {k.outputs, 0, write};
    Side a_side = rows_are_x ? x : grad, b_side = rows_are_x ? grad : x;
#pragma omp parallel num_threads(threads)
    {
        for (int64_t first = 0; first < tiles; first += most) {
            int64_t count = tiles - first < most ? tiles - first : most;
#pragma omp for schedule(static)
            for (int part = 0; part < threads; part++) {
                int64_t from = count * part / threads, some = count * (part + 1) / threads - from;
                Rows a = in_rows(a_values + from * padded(n_rows), n_rows),
                     b = in_panels(b_values + from * PANEL, most);
                kernels->read(axes, a_side.size, rows, a_shape, a_side.margin, first + from, some, a_side.matrix, a,
                          a_plane);
                kernels->read(axes, b_side.size, columns, b_shape, b_side.margin, first + from, some, b_side.matrix, b,
                          b_plane);
            }
#pragma omp for schedule(static)
            for (int64_t job = 0; job < points * jobs; job++) {
                int64_t p = job / jobs, r = job % jobs * at_once, some = n_rows - r < at_once ? n_rows - r : at_once;
                Matrix a = {a_values + p * a_plane + r, 1, padded(n_rows)};
                Rows b = in_panels(b_values + p * b_plane, most);
                kernels->multiply(some, count, n_columns, a, b, values + (p * n_rows + r) * value, value, first > 0);
            }
        }
#pragma omp for schedule(static)
        for (int part = 0; part < threads; part++) {
            int64_t from = n_rows * part / threads, to = n_rows * (part + 1) / threads;
            kernels->write(axes, k.taps, weight, taps, from, to - from, kernel, 0, values + from * value, n_rows * value);
        }
    }
}
