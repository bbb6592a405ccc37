/* Sixteen floats at once, on whatever vectors the processor has. */

#pragma once

#include <stdint.h>

enum { LANES = 16, PANEL = 32 };

typedef float Lanes __attribute__((vector_size(4 * LANES)));
typedef int32_t Integers __attribute__((vector_size(4 * LANES)));
typedef float LanesInMemory __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

#define INLINE static inline __attribute__((always_inline))
#define EACH_FROM(first, i, n) _Pragma("GCC unroll 32") for (int i = first; i < (n); i++) /* unrolled */
#define EACH(i, n) EACH_FROM(0, i, n)

INLINE Lanes load(const float *from) { return *(const LanesInMemory *)from; }
INLINE void store(float *to, Lanes value) { *(LanesInMemory *)to = value; }

#if defined(__x86_64__) && !defined(PORTABLE) /* defined, as WITHOUT_AVX512 below, to test here what runs elsewhere */
#define X86
#define AVX512 __attribute__((target("arch=x86-64-v4"))) /* 32 registers of 16 floats */
#define AVX2 __attribute__((target("arch=x86-64-v3")))   /* 16 registers of 8 */

INLINE int has_avx512(void)
{
#ifdef WITHOUT_AVX512
    return 0;
#else
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512cd");
#endif
}

INLINE int has_avx2(void) { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
#endif
