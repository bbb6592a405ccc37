/* What one thread does in pixels.c, for an instruction set (sets.h); the compiler takes its vectors. */

TARGET static void NAMED(scale)(const uint8_t *restrict pixels, int64_t n, float *restrict out)
{
    for (int64_t i = 0; i < n; i++) out[i] = pixels[i] * (1.0f / 255);
}

static const Kernels NAMED(kernels) = {NAMED(scale)};
