/* Pixels cut out of frames, and made floats: one pass over memory, by all threads. */

#include "../../policy/kernels/lanes.h"
#include <string.h>

typedef struct {
    void (*scale)(const uint8_t *pixels, int64_t n, float *out); /* 0 to 255 -> 0 to 1 */
} Kernels; /* pixels_kernels.h */

#define KERNELS "../../datasets/batches/pixels_kernels.h"
#include "../../policy/kernels/sets.h"

/* Changes with the arguments of what follows (native.py). */
int abi(void) { return 3; }

/* Of frames [n, height, width, channels], for each window the frames `rows` [windows, steps] from its corner (top,
 * left) on: out [windows, steps, out_height, out_width, channels] */
void crop(const uint8_t *frames, int64_t height, int64_t width, int64_t channels, const int64_t *rows,
          const int64_t *corners, int64_t windows, int64_t steps, int64_t out_height, int64_t out_width, uint8_t *out,
          int threads)
{
    int64_t line = width * channels, out_line = out_width * channels;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < windows * steps; i++) {
        const int64_t *corner = corners + i / steps * 2;
        const uint8_t *from = frames + (rows[i] * height + corner[0]) * line + corner[1] * channels;
        uint8_t *to = out + i * out_height * out_line;
        for (int64_t y = 0; y < out_height; y++) memcpy(to + y * out_line, from + y * line, out_line);
    }
}

/* pixels [n], 0 to 255, -> out [n], 0 to 1 */
void scale(const uint8_t *pixels, int64_t n, float *out, int threads)
{
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int part = 0; part < threads; part++) {
        int64_t from = n * part / threads, to = n * (part + 1) / threads;
        kernels->scale(pixels + from, to - from, out + from);
    }
}
