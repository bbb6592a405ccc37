/* What all code on vectors shares, before and after the functions that are compiled for each instruction set (sets.h). */

#pragma once

#include <stdint.h>

enum { PANEL = 32 }; /* columns that lie together in memory, whatever the processor */

#define TARGET /* the instruction set of a function, where it is another than the compiler's */
#define INLINE TARGET static inline __attribute__((always_inline))
#define EACH_FROM(first, i, n) _Pragma("GCC unroll 32") for (int i = first; i < (n); i++) /* unrolled */
#define EACH(i, n) EACH_FROM(0, i, n)
