/* Compiles the file KERNELS for each instruction set that the processor may have, each time with
 *
 *     Lanes         a vector of LANES floats, as many as a register takes, of which there are REGISTERS
 *     NAMED(name)   the name of what a set has of its own; it must define `Kernels NAMED(kernels)`
 *
 * `kernels` points to those of the set in use. */

#include "lanes.h"
#include <stdlib.h>
#include <string.h>

#define Lanes NAMED(Lanes)
#define LanesInMemory NAMED(LanesInMemory)
#define Integers NAMED(Integers)
#define load NAMED(load)
#define store NAMED(store)
#define VECTORS                                                                                                        \
    typedef float Lanes __attribute__((vector_size(4 * LANES)));                                                       \
    typedef int32_t Integers __attribute__((vector_size(4 * LANES)));                                                  \
    typedef float LanesInMemory __attribute__((vector_size(4 * LANES), aligned(4), may_alias));                        \
    INLINE Lanes load(const float *from) { return *(const LanesInMemory *)from; }                                      \
    INLINE void store(float *to, Lanes value) { *(LanesInMemory *)to = value; }

/* What the compiler takes for granted: NEON on ARM, SSE2 on x86 */
#define NAMED(name) name##_any
#define LANES 4
#ifdef __aarch64__
#define REGISTERS 32
#else
#define REGISTERS 16
#endif
VECTORS
#include KERNELS
#undef NAMED
#undef LANES
#undef REGISTERS

#if defined(__x86_64__) && !defined(PORTABLE) /* defined, to compile here what is compiled elsewhere */
#define X86
#undef TARGET

#define NAMED(name) name##_avx2
#define TARGET __attribute__((target("arch=x86-64-v3")))
#define LANES 8
#define REGISTERS 16
VECTORS
#include KERNELS
#undef NAMED
#undef TARGET
#undef LANES
#undef REGISTERS

#define NAMED(name) name##_avx512
#define TARGET __attribute__((target("arch=x86-64-v4")))
#define LANES 16
#define REGISTERS 32
VECTORS
#include KERNELS
#undef NAMED
#undef TARGET
#undef LANES
#undef REGISTERS

#define TARGET
#endif

static int has_any(void) { return 1; }

#ifdef X86
static int has_avx2(void) { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

static int has_avx512(void)
{
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512cd");
}
#endif

static const struct {
    const char *name;
    int (*here)(void);
    const Kernels *kernels;
} sets[] = {
#ifdef __aarch64__
    {"neon", has_any, &kernels_any},
#else
    {"portable", has_any, &kernels_any},
#endif
#ifdef X86
    {"avx2", has_avx2, &kernels_avx2},
    {"avx512", has_avx512, &kernels_avx512},
#endif
};

static const Kernels *kernels;
static const char *in_use;

/* The last set that this processor has, up to that which $ACTION_DIFFUSION_ISA names, if it does */
__attribute__((constructor)) static void choose(void)
{
    const char *most = getenv("ACTION_DIFFUSION_ISA");
    for (size_t i = 0; i < sizeof sets / sizeof *sets; i++) {
        if (sets[i].here()) {
            kernels = sets[i].kernels;
            in_use = sets[i].name;
        }
        if (most && !strcmp(most, sets[i].name)) break;
    }
}

const char *instruction_set(void) { return in_use; }
