/* INT4 in blocks, for one instruction set; native_lanes.h includes this. The arithmetic is that of int4_blocks. */

/* Copy `width` x `depth` elements from (n0, k0) to strip[k][lane] as float32; what is missing to STRIP x `rows` is 0. */
INLINE void NAME(gather)(float *strip, const Source *s, int64_t n0, int width, int64_t k0, int depth, int rows, int bf16)
{
    const uint8_t *from = s->data + n0 * s->stride_n + k0 * s->stride_k;
    int item = bf16 ? 2 : 4;
    if (width < STRIP || depth < rows)
        memset(strip, 0, sizeof(float) * STRIP * rows);
    if (s->stride_k == item && width == STRIP && depth % 4 == 0) {
        for (int n = 0; n < STRIP; n += 4)
            for (int k = 0; k < depth; k += 4)
                transpose_four(strip + k * STRIP + n, from + n * s->stride_n + k * item, s->stride_n, bf16);
        return;
    }
    if (s->stride_n != item || width < STRIP) {
        for (int n = 0; n < width; n++)
            for (int k = 0; k < depth; k++)
                strip[k * STRIP + n] = scalar(from + n * s->stride_n + k * s->stride_k, bf16);
        return;
    }
    for (int k = 0; k < depth; k++, from += s->stride_k) {
        __builtin_prefetch(from + STRIP * item);
        __builtin_prefetch(from + STRIP * item * 2 - 1);
        for (int n = 0; n < STRIP; n += LANES) {
            Floats x = NAME(load_source)(from + n * item, bf16);
            memcpy(strip + k * STRIP + n, &x, sizeof x);
        }
    }
}

/* x rounded to an integer, ties to even, in the low bits of the result; |x| < 2^22. */
INLINE Ints NAME(rounded)(Floats x) { return (Ints)(x + ROUNDER); }
INLINE Ints NAME(clipped)(Ints bits, int low, int high)
{
    return NAME(larger)(NAME(smaller)(bits, ROUNDER_BITS + high - (Ints){0}), ROUNDER_BITS + low - (Ints){0});
}
INLINE Floats NAME(value)(Ints bits) { return (Floats)bits - ROUNDER; }

/* Fold partial[0..count), count a power of two, as _tree_sum in int4.py does. */
INLINE Floats NAME(fold)(Floats *partial, int count)
{
    while (count > 1) {
        count /= 2;
        for (int j = 0; j < count; j++)
            partial[j] += partial[j + count];
    }
    return partial[0];
}

#define TREE(t) (((t[0] + t[4]) + (t[2] + t[6])) + ((t[1] + t[5]) + (t[3] + t[7])))

/* sum u q and sum q^2 (exact in any order) of q = rint(u * divisor) clipped to each of `count` ranges [low, high], or not
   clipped where `ranges` is null. */
INLINE void NAME(fit)(const float *unit, int block, Floats divisor, const int *ranges, int count, Floats *projection,
                      Floats *energy)
{
    Floats partial[2][MAX_BLOCK / 8];
    int step = block / 8;
    energy[0] = energy[1] = (Floats){0};
    for (int j = 0; j < step; j++) {
        Floats products[2][8], squares[2][8];
        for (int i = 0; i < 8; i++) {
            Floats u = NAME(load)(unit + (j + i * step) * STRIP);
            Ints bits = NAME(rounded)(u * divisor);
            for (int r = 0; r < count; r++) {
                Floats q = NAME(value)(ranges ? NAME(clipped)(bits, ranges[2 * r], ranges[2 * r + 1]) : bits);
                products[r][i] = q * u;
                squares[r][i] = q * q;
            }
        }
        for (int r = 0; r < count; r++) {
            partial[r][j] = TREE(products[r]);
            energy[r] += TREE(squares[r]);
        }
    }
    for (int r = 0; r < count; r++)
        projection[r] = NAME(fold)(partial[r], step);
}

INLINE void NAME(keep_better)(Floats projection, Floats energy, Floats divisor, Floats *gain, Floats *best)
{
    Floats g = projection * projection / energy;
    Ints better = g > *gain;
    *gain = better ? g : *gain;
    *best = better ? divisor : *best;
}

/* The best divisor of blocks whose extreme element is 1, and in *scale the best scale for the values it rounds to. */
INLINE Floats NAME(search)(const float *unit, int block, Floats *scale)
{
    static const int both[4] = {-8, 7, -7, 8};
    Floats projection[2], energy[2], gain = NAME(all)(-1), best = {0};
    for (int half = 11; half <= 20; half++) {
        Floats divisor = NAME(all)((float)half / 2);
        if (half < 15) { /* nothing is clipped, so that the other sign's gain is the same and does not win */
            NAME(fit)(unit, block, divisor, 0, 1, projection, energy);
            NAME(keep_better)(projection[0], energy[0], divisor, &gain, &best);
        } else { /* rint(-x) is -rint(x): the other sign clips to the mirrored range */
            NAME(fit)(unit, block, divisor, both, 2, projection, energy);
            NAME(keep_better)(projection[0], energy[0], divisor, &gain, &best);
            NAME(keep_better)(projection[1], energy[1], -divisor, &gain, &best);
        }
    }
    NAME(fit)(unit, block, best, both, 1, projection, energy);
    for (int i = 0; i < REFINEMENTS; i++) {
        Floats divisor = energy[0] / projection[0], p[2], e[2];
        NAME(fit)(unit, block, divisor, both, 1, p, e);
        Floats before = gain;
        NAME(keep_better)(p[0], e[0], divisor, &gain, &best);
        projection[0] = gain > before ? p[0] : projection[0];
        energy[0] = gain > before ? e[0] : energy[0];
    }
    *scale = projection[0] / energy[0];
    return best;
}

/* Quantize LANES blocks of a strip in place: the low four bits of each element become its value. Returns the largest
   magnitudes, as bit patterns. */
INLINE Ints NAME(blocks)(float *strip, int block, int lse, float *scales)
{
    Ints magnitude = {0}, top = INT32_MIN - (Ints){0};
    for (int k = 0; k < block; k++) {
        Ints bits = (Ints)NAME(load)(strip + k * STRIP);
        magnitude = NAME(larger)(magnitude, bits & INT32_MAX);
        top = NAME(larger)(top, bits);
    }
    Ints dead = magnitude < NEGLIGIBLE_BITS;
    Floats one = NAME(all)(1), scale = dead ? one : (Floats)magnitude / 7.0f, divisor = scale;
    if (lse) {
        Floats extreme = dead ? one : (Floats)(top == magnitude ? magnitude : magnitude | INT32_MIN);
        for (int k = 0; k < block; k++) {
            Floats unit = NAME(load)(strip + k * STRIP) / extreme;
            memcpy(strip + k * STRIP, &unit, sizeof unit);
        }
        divisor = NAME(search)(strip, block, &scale);
        divisor = dead ? (Floats){0} : divisor;
        scale = dead ? one : scale * extreme;
    }
    for (int k = 0; k < block; k++) {
        Floats x = NAME(load)(strip + k * STRIP);
        Ints bits = lse ? NAME(clipped)(NAME(rounded)(x * divisor), -8, 7) : NAME(rounded)(x / divisor);
        memcpy(strip + k * STRIP, &bits, sizeof bits);
    }
    memcpy(scales, &scale, sizeof scale);
    return magnitude;
}

/* out[lane][k / 2]: eight values of a lane make a 32-bit word, the first in the low nibble. */
INLINE void NAME(emit_packed)(const int32_t *codes, int block, int width, uint8_t *out, int64_t stride)
{
    int32_t words[MAX_BLOCK / 8 * STRIP];
    for (int w = 0; w < block / 8; w++)
        for (int n = 0; n < STRIP; n += LANES) {
            Ints word = {0}, bits;
            for (int i = 0; i < 8; i++) {
                memcpy(&bits, codes + (8 * w + i) * STRIP + n, sizeof bits);
                word |= (bits & 15) << (4 * i);
            }
            memcpy(words + w * STRIP + n, &word, sizeof word);
        }
    for (int n = 0; n < width; n++, out += stride)
        for (int w = 0; w < block / 8; w++)
            memcpy(out + 4 * w, words + w * STRIP + n, 4);
}

/* out[k][lane], a byte each, the upper nibble clear. */
INLINE void NAME(emit_bytes)(const int32_t *codes, int depth, int width, uint8_t *out, int64_t stride)
{
    uint8_t row[STRIP];
    for (int k = 0; k < depth; k++, out += stride) {
        for (int n = 0; n < STRIP; n += LANES) {
            Ints bits;
            memcpy(&bits, codes + k * STRIP + n, sizeof bits);
            Bytes bytes = __builtin_convertvector(bits & 15, Bytes);
            memcpy(row + n, &bytes, sizeof bytes);
        }
        memcpy(out, row, width);
    }
}

INLINE int NAME(int4_of)(const Source *s, int bf16, int block, int lse, int packed, uint8_t *out, float *scales)
{
    float strip[MAX_BLOCK * STRIP], row[STRIP];
    Ints largest = {0};
    int64_t count = (s->k + block - 1) / block, strips = (s->n + STRIP - 1) / STRIP;
    int along_k = s->stride_k == (bf16 ? 2 : 4); /* in the order of the source's memory */
    for (int64_t i = 0; i < count * strips; i++) {
        int64_t b = along_k ? i % count : i / strips, n = (along_k ? i / count : i % strips) * STRIP;
        int depth = (int)(s->k - b * block < block ? s->k - b * block : block);
        int width = (int)(s->n - n < STRIP ? s->n - n : STRIP);
        NAME(gather)(strip, s, n, width, b * block, depth, block, bf16);
        for (int lane = 0; lane < STRIP; lane += LANES)
            largest = NAME(larger)(largest, NAME(blocks)(strip + lane, block, lse, row + lane));
        memcpy(scales + b * s->n + n, row, sizeof(float) * width);
        if (packed)
            NAME(emit_packed)((int32_t *)strip, block, width, out + n * count * block / 2 + b * block / 2,
                              count * block / 2);
        else
            NAME(emit_bytes)((int32_t *)strip, depth, width, out + b * block * s->n + n, s->n);
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
#undef TREE
