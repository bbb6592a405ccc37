/* What one thread does in winograd.c, for the vectors of an instruction set (sets.h). */

#define product NAMED(product)
#define across NAMED(across)
#define read_tiles NAMED(read_tiles)
#define write_tiles NAMED(write_tiles)
#define few_rows NAMED(few_rows)

INLINE Lanes product(int n, const float *numbers, const Lanes *lanes)
{
    Lanes sum = numbers[0] * lanes[0];
    EACH_FROM(1, i, n) sum += numbers[i] * lanes[i];
    return sum;
}

/* Line `line` of a tile of `n_in` lines, times matrix [n_out, n_in] across lines where there are two axes: into `out`
 * [n_out, n_in] as a column. Then few values are needed at a time. */
INLINE void across(Tile k, int n_out, int n_in, const float *matrix, int line, const Lanes *values, Lanes *out)
{
    if (k.axes == 1) out[line] = values[0];
    else EACH(a, n_out) out[a * n_in + line] = product(n_in, matrix + a * n_in, values);
}

/* The values of tiles first, first + 1, … at all points, from row 0 of `out` on, for each point `plane` after the last:
 * matrix [points, side] */
INLINE void read_tiles(Tile k, int side, const float *images, Shape s, int margin, int64_t first, int64_t count,
                       const float *matrix, Rows out, int64_t plane)
{
    static const float zeros[LANES];
    for (int64_t t = 0; t < count; t++) {
        const float *pixel[MOST];
        int64_t step[MOST];
        find_pixels(k, images, s, first + t, margin, side, zeros, pixel, step);
        for (int64_t c = 0; c < s.channels; c += LANES) {
            Lanes half[MOST];
            float *at = find(out, t, c);
            EACH(x, side) {
                Lanes seen[MOST];
                EACH(y, whole(k, side) / side) seen[y] = load(pixel[y * side + x] + c * step[y * side + x]);
                across(k, k.points, side, matrix, x, seen, half);
            }
            EACH(p, whole(k, k.points))
                store(at + p * plane, product(side, matrix + p % k.points * side, half + p / k.points * side));
        }
    }
}

/* `side` outputs along each axis of tiles first, first + 1, … from their values at all points: matrix [side, points] */
INLINE void write_tiles(Tile k, int side, float *images, Shape s, int64_t first, int64_t count, const float *matrix,
                        const float *bias, const float *in, int64_t plane)
{
    float nowhere[LANES];
    for (int64_t t = 0; t < count; t++) {
        const float *pixel[MOST];
        int64_t step[MOST];
        find_pixels(k, images, s, first + t, 0, side, nowhere, pixel, step);
        for (int64_t c = 0; c < s.channels; c += LANES) {
            Lanes half[MOST], added = bias ? load(bias + c) : (Lanes){0};
            const float *from = in + t * padded(s.channels) + c;
            EACH(x, k.points) {
                Lanes values[MOST];
                EACH(y, whole(k, k.points) / k.points) values[y] = load(from + (y * k.points + x) * plane);
                across(k, side, k.points, matrix, x, values, half);
            }
            EACH(i, whole(k, side))
                store((float *)pixel[i] + c * step[i],
                      product(k.points, matrix + i % side * k.points, half + i / side * k.points) + added);
        }
    }
}

/* c = a b, or c += a b where `more`: a [rows, depth], b [depth, vectors * LANES] of a panel, c [rows, vectors * LANES] */
INLINE void few_rows(int rows, int vectors, int64_t depth, Matrix a, const float *b, float *c, int64_t c_row, int more)
{
    Lanes sum[12][4];
    EACH(r, rows)
        EACH(v, vectors) sum[r][v] = more ? load(c + r * c_row + v * LANES) : (Lanes){0};
    for (int64_t k = 0; k < depth; k++) {
        Lanes line[4];
        EACH(v, vectors) line[v] = load(b + k * PANEL + v * LANES);
        EACH(r, rows)
            EACH(v, vectors) sum[r][v] += a.at[r * a.row + k * a.column] * line[v];
    }
    EACH(r, rows)
        EACH(v, vectors) store(c + r * c_row + v * LANES, sum[r][v]);
}

/* The same for any number of rows and columns, by as many sums at once as there are registers */
TARGET static void NAMED(multiply)(int64_t rows, int64_t depth, int64_t columns, Matrix a, Rows b, float *c, int64_t c_row,
                            int more)
{
    const int vectors = LANES == 4 && REGISTERS == 32 ? 4 : 2;
    const int at_once = LANES == 16 ? 12 : LANES == 8 || REGISTERS == 32 ? 6 : 4;
    for (int64_t n = 0; n < columns; n += vectors * LANES) {
        int64_t r = 0;
#define ROWS(count)                                                                                                    \
    for (; r + count <= rows; r += count) {                                                                            \
        Matrix part = {a.at + r * a.row, a.row, a.column};                                                             \
        few_rows(count, vectors, depth, part, find(b, 0, n), c + r * c_row + n, c_row, more);                          \
    }
        ROWS(at_once) ROWS(4) ROWS(1)
#undef ROWS
    }
}

#define READ(axes, side) read_tiles(tile_of(axes), side, images, s, margin, first, count, matrix, out, plane)
#define WRITE(axes, side) write_tiles(tile_of(axes), side, images, s, first, count, matrix, bias, in, plane)

TARGET static void NAMED(read)(int axes, int side, const float *images, Shape s, int margin, int64_t first,
                               int64_t count, const float *matrix, Rows out, int64_t plane)
{
    if (axes == 2) side == 5 ? READ(2, 5) : READ(2, 3);
    else side == 8 ? READ(1, 8) : side == 5 ? READ(1, 5) : READ(1, 4);
}

TARGET static void NAMED(write)(int axes, int side, float *images, Shape s, int64_t first, int64_t count,
                                const float *matrix, const float *bias, const float *in, int64_t plane)
{
    if (axes == 2) WRITE(2, 3);
    else side == 5 ? WRITE(1, 5) : WRITE(1, 4);
}

static const Kernels NAMED(kernels) = {NAMED(read), NAMED(write), NAMED(multiply)};
