/* INT4 in blocks, for one instruction set; native_lanes.h includes this. The arithmetic is that of int4_blocks. */

/* Copy `width` x `depth` elements from (n0, k0) to strip[k][lane] as float32; what is missing to STRIP x `rows` is 0. */
INLINE void NAME(gather)(float *strip, const Source *s, int64_t n0, int width, int64_t k0, int depth, int rows, int bf16)
{
    const uint8_t *from = s->data + n0 * s->stride_n + k0 * s->stride_k;
    int item = bf16 ? 2 : 4;
    if (width < STRIP || depth < rows)
        memset(strip, 0, sizeof(float) * STRIP * rows);
    if (s->stride_k == item) {
        int fours = depth % 4 ? 0 : width & ~3;
        for (int n = 0; n < width; n++) /* the next block of the row, wherever it lies in its cache lines */
            for (int k = depth; k <= 2 * depth; k += 64 / item)
                __builtin_prefetch(from + n * s->stride_n + k * item);
        for (int n = 0; n < fours; n += 4)
            for (int k = 0; k < depth; k += 4)
                transpose_four(strip + k * STRIP + n, from + n * s->stride_n + k * item, s->stride_n, bf16);
        for (int n = fours; n < width; n++)
            for (int k = 0; k < depth; k++)
                strip[k * STRIP + n] = scalar(from + n * s->stride_n + k * item, bf16);
        return;
    }
    uint8_t some[4 * STRIP] = {0};
    for (int k = 0; k < depth; k++, from += s->stride_k) {
        const uint8_t *row = width < STRIP ? (const uint8_t *)memcpy(some, from, width * item) : from;
        __builtin_prefetch(from + STRIP * item);
        __builtin_prefetch(from + STRIP * item * 2 - 1);
        for (int n = 0; n < STRIP; n += LANES) {
            Floats x = NAME(load_source)(row + n * item, bf16);
            memcpy(strip + k * STRIP + n, &x, sizeof x);
        }
    }
}

/* x rounded to an integer, ties to even, in the low bits of the result; |x| < 2^22. */
INLINE Ints NAME(rounded)(Floats x) { return (Ints)(x + ROUNDER); }

/* Quantize LANES blocks of a strip into pairs[k / 2][lane] of values (native_search.h says how a pair is kept). Returns
   the largest magnitudes, as bit patterns. */
INLINE Ints NAME(blocks)(const float *strip, int block, int lse, int32_t *pairs, float *scales)
{
    Ints magnitude = {0}, top = INT32_MIN - (Ints){0};
    for (int k = 0; k < block; k++) {
        Ints bits = (Ints)NAME(load)(strip + k * STRIP);
        magnitude = NAME(larger)(magnitude, bits & INT32_MAX);
        top = NAME(larger)(top, bits);
    }
    Ints dead = magnitude < NEGLIGIBLE_BITS;
    Floats one = NAME(all)(1), scale = (Floats)magnitude / 7.0f;
    Ints extreme = top == magnitude ? magnitude : magnitude | INT32_MIN;
    Floats unit = dead ? one : lse ? -UNIT / (Floats)extreme : scale;
    for (int k = 0; k < block; k += 2) {
        Floats even = NAME(load)(strip + k * STRIP), odd = NAME(load)(strip + (k + 1) * STRIP);
        even = lse ? even * unit : even / unit;
        odd = lse ? odd * unit : odd / unit;
        NAME(store_pair)(pairs + k / 2 * STRIP, NAME(rounded)(even), NAME(rounded)(odd));
    }
    if (lse)
        scale = NAME(best_scale)(strip, pairs, block, NAME(search)(pairs, block));
    scale = dead ? one : scale;
    memcpy(scales, &scale, sizeof scale);
    return magnitude;
}

/* out[lane][k / 2]: eight values of a lane make a 32-bit word, the first in the low nibble. */
INLINE void NAME(emit_packed)(const int32_t *pairs, int block, int width, uint8_t *out, int64_t stride)
{
    int32_t words[MAX_BLOCK / 8 * STRIP];
    for (int w = 0; w < block / 8; w++)
        for (int n = 0; n < STRIP; n += LANES) {
            Ints word = {0};
            for (int i = 0; i < 4; i++) {
                Ints pair = NAME(load_pair)(pairs + (4 * w + i) * STRIP + n) & 0x000F000F;
                word |= ((pair | pair >> 12) & 0xFF) << (8 * i);
            }
            memcpy(words + w * STRIP + n, &word, sizeof word);
        }
    for (int n = 0; n < width; n++, out += stride)
        for (int w = 0; w < block / 8; w++)
            memcpy(out + 4 * w, words + w * STRIP + n, 4);
}

/* out[k][lane], a byte each, the upper nibble clear. */
INLINE void NAME(emit_bytes)(const int32_t *pairs, int depth, int width, uint8_t *out, int64_t stride)
{
    uint8_t row[STRIP];
    for (int k = 0; k < depth; k++, out += stride) {
        for (int n = 0; n < STRIP; n += LANES) {
            Ints pair = NAME(load_pair)(pairs + k / 2 * STRIP + n);
            Bytes bytes = __builtin_convertvector((k % 2 ? pair >> 16 : pair) & 15, Bytes);
            memcpy(row + n, &bytes, sizeof bytes);
        }
        memcpy(out, row, width);
    }
}

INLINE int NAME(int4_of)(const Source *s, int bf16, int block, int lse, int packed, uint8_t *out, float *scales)
{
    float strip[MAX_BLOCK * STRIP], row[STRIP];
    int32_t pairs[MAX_BLOCK / 2 * STRIP];
    Ints largest = {0};
    int64_t count = (s->k + block - 1) / block, strips = (s->n + STRIP - 1) / STRIP;
    int along_k = s->stride_k == (bf16 ? 2 : 4); /* in the order of the source's memory */
    for (int64_t i = 0; i < count * strips; i++) {
        int64_t b = along_k ? i % count : i / strips, n = (along_k ? i / count : i % strips) * STRIP;
        int depth = (int)(s->k - b * block < block ? s->k - b * block : block);
        int width = (int)(s->n - n < STRIP ? s->n - n : STRIP);
        NAME(gather)(strip, s, n, width, b * block, depth, block, bf16);
        for (int lane = 0; lane < STRIP; lane += LANES)
            largest = NAME(larger)(largest, NAME(blocks)(strip + lane, block, lse, pairs + lane, row + lane));
        memcpy(scales + b * s->n + n, row, sizeof(float) * width);
        if (packed)
            NAME(emit_packed)(pairs, block, width, out + n * count * block / 2 + b * block / 2,
                              count * block / 2);
        else
            NAME(emit_bytes)(pairs, depth, width, out + b * block * s->n + n, s->n);
    }
    int broken = 0;
    for (int lane = 0; lane < LANES; lane++)
        broken |= largest[lane] >= INFINITY_BITS;
    return broken;
}

/* One copy for each scheme, so that block sizes and types are constants in the loops. */
#define INT4(type, size)                                                                                               \
    if (bf16 == type && block == size)                                                                                 \
        return lse ? NAME(int4_of)(s, type, size, 1, packed, out, scales)                                              \
                   : NAME(int4_of)(s, type, size, 0, packed, out, scales)

TARGET static int NAME(int4)(const Source *s, int bf16, int block, int lse, int packed, uint8_t *out, float *scales)
{
    INT4(1, 32);
    INT4(1, 64);
    INT4(1, 128);
    INT4(0, 32);
    INT4(0, 64);
    INT4(0, 128);
    return -1;
}
#undef INT4
