/* The kernels for one instruction set; native.cpp includes this once for each, with

       NAME(x)  x under a name of its own
       TARGET   the function attribute that allows the instruction set
       LANES    float32 elements of a vector register

   A lane is a column of the strip, so neither LANES nor the instruction set changes a result. */

typedef float NAME(Floats) __attribute__((vector_size(4 * LANES)));
typedef int32_t NAME(Ints) __attribute__((vector_size(4 * LANES)));
typedef int16_t NAME(Shorts) __attribute__((vector_size(4 * LANES)));
typedef uint16_t NAME(Halves) __attribute__((vector_size(2 * LANES)));
typedef uint8_t NAME(Bytes) __attribute__((vector_size(LANES)));
#define Floats NAME(Floats)
#define Ints NAME(Ints)
#define Shorts NAME(Shorts)
#define Halves NAME(Halves)
#define Bytes NAME(Bytes)
#define INLINE static inline __attribute__((always_inline)) TARGET

INLINE Ints NAME(larger)(Ints a, Ints b) { return a > b ? a : b; }
INLINE Ints NAME(smaller)(Ints a, Ints b) { return a < b ? a : b; }
INLINE Floats NAME(all)(float x) { return x - (Floats){0}; }

INLINE Floats NAME(load)(const float *from)
{
    Floats x;
    memcpy(&x, from, sizeof x);
    return x;
}

INLINE Floats NAME(load_source)(const uint8_t *from, int bf16)
{
    Floats x;
    if (bf16) {
        Halves h;
        memcpy(&h, from, sizeof h);
        return (Floats)(__builtin_convertvector(h, Ints) << 16);
    }
    memcpy(&x, from, sizeof x);
    return x;
}

#include "native_search.h"

#include "native_int4.h"

#include "native_fp8.h"

#include "native_lowrank.h"

#undef INLINE
#undef Floats
#undef Ints
#undef Shorts
#undef Halves
#undef Bytes
