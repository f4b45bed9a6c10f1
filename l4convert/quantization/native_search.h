/* The search of "lse" for INT4 scales, for one instruction set; native_lanes.h includes this.

   It is that of _least_error in int4.py in whole numbers, exact in any order of summation: an element u is n / 8192 with
   |n| <= 8192, a divisor is quarters / 4, and

       q = floor(u * divisor + 1/2) = (n * quarters + 2^14) >> 15,  |n * quarters| <= 8192 * 40 < 2^19.

   |sum q n| <= 128 * 8 * 8192 = 2^23 and sum q^2 <= 128 * 8 * 8 = 2^13 fit int32, and float32 after that.

   Elements, and then their values, are kept in pairs: an Ints lane holds k in its lower and k + 1 in its upper 16 bits,
   for even k. */

INLINE Ints NAME(even)(Ints pair) { return pair << 16 >> 16; }
INLINE Ints NAME(odd)(Ints pair) { return pair >> 16; }

INLINE Ints NAME(load_pair)(const int32_t *from)
{
    Ints x;
    memcpy(&x, from, sizeof x);
    return x;
}

INLINE void NAME(store_pair)(int32_t *to, Ints even, Ints odd)
{
    Ints x = (even & 0xFFFF) | odd << 16;
    memcpy(to, &x, sizeof x);
}

/* DOT: the sum of the products of both elements. PRODUCT: both products, as (a * b + 2^14) >> 15. */
#ifndef DOT
#define DOT(a, b) (NAME(even)(a) * NAME(even)(b) + NAME(odd)(a) * NAME(odd)(b))
#endif
#ifndef PRODUCT
INLINE Ints NAME(product)(Ints a, Ints b)
{
    Ints even = (DOT(a & 0xFFFF, b) + (1 << 14)) >> 15, odd = (DOT(a & ~0xFFFF, b) + (1 << 14)) >> 15;
    return (even & 0xFFFF) | odd << 16;
}
#define PRODUCT(a, b) NAME(product)(a, b)
#endif

/* The nearest values of the grid to a pair of elements times quarters / 4, for divisors of at most `most` / 4. What
   these cannot take beyond the grid is not clipped: up to 7.5 the upper end holds, and up to 8.5 the lower. */
INLINE Ints NAME(nearest)(Ints pair, Ints quarters, int most)
{
    Shorts q = (Shorts)PRODUCT(pair, quarters), low = -8 - (Shorts){0}, high = 7 - (Shorts){0};
    if (most >= 30)
        q = q < high ? q : high;
    if (most > 34)
        q = q > low ? q : low;
    return (Ints)q;
}

/* Replace LANES blocks of elements by the values of the best divisor. Returns sum q^2. */
INLINE Floats NAME(search)(int32_t *pairs, int block)
{
    int first = block == 32 ? 26 : 28, last = block == 32 ? 36 : block == 64 ? 38 : 40;
    Floats best_square = NAME(all)(-1), best_energy = NAME(all)(1);
    Ints best = {0};
    for (int quarters = first; quarters <= last; quarters++) {
        Ints multiplier = quarters * 0x10001 - (Ints){0}, p = {0}, e = {0};
        for (int k = 0; k < block; k += 2) {
            Ints n = NAME(load_pair)(pairs + k / 2 * STRIP), q = NAME(nearest)(n, multiplier, quarters);
            p += DOT(q, n);
            e += DOT(q, q);
        }
        Floats projection = __builtin_convertvector(p, Floats), energy = __builtin_convertvector(e, Floats);
        Floats square = projection * projection;
        Ints better = square * best_energy > best_square * energy;
        best_square = better ? square : best_square;
        best_energy = better ? energy : best_energy;
        best = better ? multiplier : best;
    }
    for (int k = 0; k < block; k += 2) {
        Ints q = NAME(nearest)(NAME(load_pair)(pairs + k / 2 * STRIP), best, last);
        memcpy(pairs + k / 2 * STRIP, &q, sizeof q);
    }
    return best_energy;
}

/* sum w q / sum q^2 of LANES blocks, in the order of _best_scales in int4.py. */
INLINE Floats NAME(best_scale)(const float *strip, const int32_t *pairs, int block, Floats energy)
{
    Floats even = {0}, odd = {0};
    for (int k = 0; k < block; k += 2) {
        Ints q = NAME(load_pair)(pairs + k / 2 * STRIP);
        even += NAME(load)(strip + k * STRIP) * SMALLER * __builtin_convertvector(NAME(even)(q), Floats);
        odd += NAME(load)(strip + (k + 1) * STRIP) * SMALLER * __builtin_convertvector(NAME(odd)(q), Floats);
    }
    return (even + odd) / (energy * SMALLER);
}
