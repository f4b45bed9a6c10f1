/* Quantization kernels; native.py binds them with ctypes and says what they compute.

   Results equal those of the NumPy definitions bit for bit, whatever the machine: only whole numbers, and IEEE 754
   float32 operations of one rounding each (compile with -ffp-contract=off), with sums in a fixed order. */

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if !defined(__GNUC__) || defined(__FAST_MATH__) || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "needs the vector extensions of GCC or Clang, IEEE arithmetic and a little-endian machine"
#endif

constexpr int STRIP = 32; /* columns worked on together: a strip of a block stays in a core's first-level cache */
constexpr int MAX_BLOCK = 128;
constexpr float UNIT = 8192.0f; /* steps of an element while a scale is searched */
constexpr float SMALLER = 1.0f / 4096; /* keeps sums of large weights finite */
constexpr int INFINITY_BITS = 0x7F800000;
constexpr int NEGLIGIBLE_BITS = (127 - 100) << 23; /* 2^-100 */

/* 1.5 * 2^23: adding it rounds a float32 to an integer, in the low bits of the sum. */
constexpr float ROUNDER = 12582912.0f;

/* n x k elements, bfloat16 or float32, contiguous along n or along k; strides in bytes. */
struct Source {
    const uint8_t *data;
    int64_t n, k, stride_n, stride_k;
};

/* rows x columns elements, bfloat16 or float32, each row contiguous; the stride of rows in bytes. */
struct Matrix {
    const uint8_t *data;
    int64_t rows, columns, stride;
};

/* left [rows][ranks] and right [ranks][columns], and room for ranks times PACKED_COLUMNS. */
struct Lowrank {
    const double *left, *right;
    int64_t rows, columns, ranks;
    double *packed;
};

static inline __attribute__((always_inline)) float scalar(const uint8_t *from, int bf16)
{
    float x;
    if (bf16) {
        uint16_t h;
        memcpy(&h, from, sizeof h);
        uint32_t bits = (uint32_t)h << 16;
        memcpy(&x, &bits, sizeof x);
    } else
        memcpy(&x, from, sizeof x);
    return x;
}

typedef float Four __attribute__((vector_size(16)));
typedef int32_t FourInts __attribute__((vector_size(16)));
typedef uint16_t FourHalves __attribute__((vector_size(8)));

static inline __attribute__((always_inline)) Four load_four(const uint8_t *from, int bf16)
{
    Four x;
    if (bf16) {
        FourHalves h;
        memcpy(&h, from, sizeof h);
        return (Four)(__builtin_convertvector(h, FourInts) << 16);
    }
    memcpy(&x, from, sizeof x);
    return x;
}

#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (FourInts){__VA_ARGS__})
#endif

/* to[k][n] = from[n][k] for four n and four k. */
static inline __attribute__((always_inline)) void transpose_four(float *to, const uint8_t *from, int64_t stride_n,
                                                                 int bf16)
{
    Four a = load_four(from, bf16), b = load_four(from + stride_n, bf16);
    Four c = load_four(from + 2 * stride_n, bf16), d = load_four(from + 3 * stride_n, bf16);
    Four ab = SHUFFLE(a, b, 0, 4, 1, 5), cd = SHUFFLE(c, d, 0, 4, 1, 5);
    Four AB = SHUFFLE(a, b, 2, 6, 3, 7), CD = SHUFFLE(c, d, 2, 6, 3, 7);
    Four columns[4] = {SHUFFLE(ab, cd, 0, 1, 4, 5), SHUFFLE(ab, cd, 2, 3, 6, 7), SHUFFLE(AB, CD, 0, 1, 4, 5),
                       SHUFFLE(AB, CD, 2, 3, 6, 7)};
    for (int k = 0; k < 4; k++)
        memcpy(to + k * STRIP, &columns[k], sizeof(Four));
}

/* DOT and PRODUCT are what native_search.h says, in one instruction where there is one. */
#if defined(__x86_64__)
#define NAME(x) x##_sse2
#define TARGET
#define LANES 4
#define DOT(a, b) ((Ints)_mm_madd_epi16((__m128i)(a), (__m128i)(b)))
#include "native_lanes.h"
#undef NAME
#undef TARGET
#undef LANES
#undef DOT
#undef PRODUCT
#undef FUSED

#define NAME(x) x##_avx2
#define TARGET __attribute__((target("avx2,fma")))
#define LANES 8
#define DOT(a, b) ((Ints)_mm256_madd_epi16((__m256i)(a), (__m256i)(b)))
#define PRODUCT(a, b) ((Ints)_mm256_mulhrs_epi16((__m256i)(a), (__m256i)(b)))
#define FUSED(a, b, c) ((Doubles)_mm256_fmadd_pd((__m256d)(a), (__m256d)(b), (__m256d)(c)))
#include "native_lanes.h"
#undef NAME
#undef TARGET
#undef LANES
#undef DOT
#undef PRODUCT
#undef FUSED

#define NAME(x) x##_avx512
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq")))
#define LANES 16
#define DOT(a, b) ((Ints)_mm512_madd_epi16((__m512i)(a), (__m512i)(b)))
#define PRODUCT(a, b) ((Ints)_mm512_mulhrs_epi16((__m512i)(a), (__m512i)(b)))
#define FUSED(a, b, c) ((Doubles)_mm512_fmadd_pd((__m512d)(a), (__m512d)(b), (__m512d)(c)))
#include "native_lanes.h"
#undef NAME
#undef TARGET
#undef LANES
#undef DOT
#undef PRODUCT
#undef FUSED

#define SELECT(f, ...)                                                                                                 \
    (level >= 2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&                          \
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")                                  \
         ? f##_avx512(__VA_ARGS__)                                                                                     \
     : level >= 1 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? f##_avx2(__VA_ARGS__)           \
                                                                                     : f##_sse2(__VA_ARGS__))
#else
#define NAME(x) x##_any
#define TARGET
#define LANES 4
#if defined(__aarch64__)
static inline int32x4_t neon_dot(int16x8_t a, int16x8_t b)
{
    return vpaddq_s32(vmull_s16(vget_low_s16(a), vget_low_s16(b)), vmull_high_s16(a, b));
}
#define DOT(a, b) ((Ints)neon_dot((int16x8_t)(a), (int16x8_t)(b)))
#define PRODUCT(a, b) ((Ints)vqrdmulhq_s16((int16x8_t)(a), (int16x8_t)(b)))
#endif
#include "native_lanes.h"
#define SELECT(f, ...) ((void)level, f##_any(__VA_ARGS__))
#endif

#define EXPORT extern "C" __attribute__((visibility("default")))

/* `level` is the highest instruction set to use: 0, 1 or 2. Results do not depend on it. */

/* Returns 1 where a source element is NaN or infinite (what was written is then worthless), -1 for an unknown scheme. */
EXPORT int l4_int4(const uint8_t *data, int64_t n, int64_t k, int64_t stride_n, int64_t stride_k, int bf16, int block,
                   int lse, int packed, int level, uint8_t *out, float *scales)
{
    Source source = {data, n, k, stride_n, stride_k};
    return SELECT(int4, &source, bf16, block, lse, packed, out, scales);
}

EXPORT int l4_magnitudes(const uint8_t *data, int64_t rows, int64_t columns, int64_t stride, int bf16, int by_column,
                         int level, int32_t *out)
{
    Matrix matrix = {data, rows, columns, stride};
    return SELECT(magnitudes, &matrix, bf16, by_column, out);
}

EXPORT int l4_fp8(const uint8_t *data, int64_t rows, int64_t columns, int64_t stride, int bf16, int by_column, int level,
                  const float *scales, uint8_t *out)
{
    Matrix matrix = {data, rows, columns, stride};
    return SELECT(fp8, &matrix, bf16, by_column, scales, out);
}

EXPORT void l4_lowrank(float *total, int64_t stride, const double *left, const double *right, int64_t rows,
                       int64_t columns, int64_t ranks, double scale, double *packed, int level)
{
    Lowrank update = {left, right, rows, columns, ranks, packed};
    (void)SELECT(lowrank, &update, scale, total, stride);
}

/* Groups of 64 codes, two a byte: slot s of a group takes code order[s]. Bytes are unpacked first: a look-up each. */
EXPORT void l4_reorder(const uint8_t *from, uint8_t *to, int64_t groups, const uint8_t *order)
{
    for (int64_t g = 0; g < groups; g++, from += 32, to += 32) {
        uint8_t codes[64];
        for (int i = 0; i < 32; i++) {
            codes[2 * i] = from[i] & 15;
            codes[2 * i + 1] = from[i] >> 4;
        }
        for (int i = 0; i < 32; i++)
            to[i] = codes[order[2 * i]] | codes[order[2 * i + 1]] << 4;
    }
}

/* Counts changes of this interface and of the results; native.py refuses a library of another count. */
EXPORT int l4_interface(void) { return 4; }
