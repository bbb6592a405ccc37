/* Pixels cut out of frames, and made floats: one pass over memory, by all threads. */

#include <stdint.h>
#include <string.h>

enum { LANES = 16 };

static inline __attribute__((always_inline)) void scale_some(const uint8_t *restrict pixels, int64_t n,
                                                             float *restrict out)
{
    for (int64_t i = 0; i < n; i++) out[i] = pixels[i] * (1.0f / 255);
}

/* Lines of n pixels, 0 to 255, `line` after each other, -> out [lines, n], 0 to 1 */
typedef void (*Scale)(const uint8_t *pixels, int64_t line, int64_t lines, int64_t n, float *out);

#define SCALE(name, target)                                                                                            \
    target static void name(const uint8_t *pixels, int64_t line, int64_t lines, int64_t n, float *out)                 \
    {                                                                                                                  \
        for (int64_t y = 0; y < lines; y++, pixels += line, out += n) {                                                \
            scale_some(pixels, n < LANES ? n : n / LANES * LANES, out);                                                \
            if (n > LANES) scale_some(pixels + n - LANES, LANES, out + n - LANES); /* the rest, and some again */      \
        }                                                                                                              \
    }

SCALE(scale_plain, )
#if defined(__x86_64__) && !defined(PORTABLE)
SCALE(scale_avx512, __attribute__((target("arch=x86-64-v4"))))
SCALE(scale_avx2, __attribute__((target("arch=x86-64-v3"))))

static Scale fastest(void)
{
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512bw"))
        return scale_avx512;
    return __builtin_cpu_supports("avx2") ? scale_avx2 : scale_plain;
}
#else
static Scale fastest(void) { return scale_plain; }
#endif

/* Changes with the arguments of what follows (native.py). */
int abi(void) { return 1; }

/* Of frames [n, height, width, channels], for each window the frames `rows` [windows, steps] from its corner (top,
 * left) on: out [windows, steps, out_height, out_width, channels], or where `scaled` is given that, from 0 to 1 */
void crop(const uint8_t *frames, int64_t height, int64_t width, int64_t channels, const int64_t *rows,
          const int64_t *corners, int64_t windows, int64_t steps, int64_t out_height, int64_t out_width, uint8_t *out,
          float *scaled, int threads)
{
    int64_t line = width * channels, out_line = out_width * channels;
    Scale scale_lines = fastest();
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < windows * steps; i++) {
        const int64_t *corner = corners + i / steps * 2;
        const uint8_t *from = frames + (rows[i] * height + corner[0]) * line + corner[1] * channels;
        int64_t to = i * out_height * out_line;
        if (scaled) scale_lines(from, line, out_height, out_line, scaled + to);
        else
            for (int64_t y = 0; y < out_height; y++) memcpy(out + to + y * out_line, from + y * line, out_line);
    }
}

/* pixels [n], 0 to 255, -> out [n], 0 to 1 */
void scale(const uint8_t *pixels, int64_t n, float *out, int threads)
{
    Scale scale_lines = fastest();
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int part = 0; part < threads; part++) {
        int64_t from = n * part / threads, to = n * (part + 1) / threads;
        scale_lines(pixels + from, 0, 1, to - from, out + from);
    }
}
