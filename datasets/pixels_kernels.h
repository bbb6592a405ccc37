/* What one thread does in pixels.c, for an instruction set (sets.h); the compiler takes its vectors. */

#define scale_some NAMED(scale_some)

INLINE void scale_some(const uint8_t *restrict pixels, int64_t n, float *restrict out)
{
    for (int64_t i = 0; i < n; i++) out[i] = pixels[i] * (1.0f / 255);
}

TARGET static void NAMED(scale_lines)(const uint8_t *pixels, int64_t line, int64_t lines, int64_t n, float *out)
{
    for (int64_t y = 0; y < lines; y++, pixels += line, out += n) {
        scale_some(pixels, n < SOME ? n : n / SOME * SOME, out);
        if (n > SOME) scale_some(pixels + n - SOME, SOME, out + n - SOME); /* the rest, and some again */
    }
}

static const Kernels NAMED(kernels) = {NAMED(scale_lines)};
