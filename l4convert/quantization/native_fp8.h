/* FP8 E4M3, for one instruction set; native_lanes.h includes this. */

/* The first `count` (at most LANES) elements from `from`, then zeros. */
INLINE Floats NAME(load_some)(const uint8_t *from, int64_t count, int bf16)
{
    uint8_t some[4 * LANES] = {0};
    if (count >= LANES)
        return NAME(load_source)(from, bf16);
    memcpy(some, from, count * (bf16 ? 2 : 4));
    return NAME(load_source)(some, bf16);
}

/* Write the first `count` (at most LANES) items of a vector. */
INLINE void NAME(store_some)(void *to, const void *vector, int64_t count, int item)
{
    if (count >= LANES)
        memcpy(to, vector, LANES * item);
    else
        memcpy(to, vector, count * item);
}

/* Largest magnitudes, as bit patterns: of every row, or (by_column) of every column. */
INLINE void NAME(magnitudes_of)(const Matrix *m, int bf16, int by_column, int32_t *out)
{
    if (by_column)
        memset(out, 0, sizeof(int32_t) * m->columns);
    for (int64_t r = 0; r < m->rows; r++) {
        Ints largest = {0};
        for (int64_t c = 0; c < m->columns; c += LANES) {
            int64_t left = m->columns - c;
            Ints bits = (Ints)NAME(load_some)(m->data + r * m->stride + c * (bf16 ? 2 : 4), left, bf16) & INT32_MAX;
            if (by_column) {
                Ints known = (Ints)NAME(load_some)((const uint8_t *)(out + c), left, 0);
                known = NAME(larger)(known, bits);
                NAME(store_some)(out + c, &known, left, 4);
            } else
                largest = NAME(larger)(largest, bits);
        }
        for (int lane = 0; lane < LANES && !by_column; lane++)
            out[r] = lane && out[r] > largest[lane] ? out[r] : largest[lane];
    }
}

TARGET static int NAME(magnitudes)(const Matrix *m, int bf16, int by_column, int32_t *out)
{
    if (bf16)
        by_column ? NAME(magnitudes_of)(m, 1, 1, out) : NAME(magnitudes_of)(m, 1, 0, out);
    else
        by_column ? NAME(magnitudes_of)(m, 0, 1, out) : NAME(magnitudes_of)(m, 0, 0, out);
    return 0;
}

/* FLOAT8E4M3FN of finite x, ties to even, beyond 448 to 448. */
INLINE Bytes NAME(e4m3)(Floats x)
{
    Ints bits = (Ints)x, magnitude = NAME(smaller)(bits & INT32_MAX, 0x43E00000 - (Ints){0}); /* 448 */
    Ints normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - ((127 - 7) << 3);
    Ints subnormal = (Ints)((Floats)magnitude + 16384.0f) - 0x46800000; /* in steps of 2^-9; 16384 has that ulp */
    Ints code = magnitude < 0x3C800000 ? subnormal : normal;            /* 2^-6, the smallest normal number */
    return __builtin_convertvector(code | ((bits >> 24) & 0x80), Bytes);
}

INLINE void NAME(fp8_of)(const Matrix *m, int bf16, int by_column, const float *scales, uint8_t *out)
{
    for (int64_t r = 0; r < m->rows; r++)
        for (int64_t c = 0; c < m->columns; c += LANES) {
            int64_t left = m->columns - c;
            Floats x = NAME(load_some)(m->data + r * m->stride + c * (bf16 ? 2 : 4), left, bf16);
            Floats scale = by_column ? NAME(load_some)((const uint8_t *)(scales + c), left, 0) : NAME(all)(scales[r]);
            Bytes codes = NAME(e4m3)(x / scale);
            NAME(store_some)(out + r * m->columns + c, &codes, left, 1);
        }
}

TARGET static int NAME(fp8)(const Matrix *m, int bf16, int by_column, const float *scales, uint8_t *out)
{
    if (bf16)
        by_column ? NAME(fp8_of)(m, 1, 1, scales, out) : NAME(fp8_of)(m, 1, 0, scales, out);
    else
        by_column ? NAME(fp8_of)(m, 0, 1, scales, out) : NAME(fp8_of)(m, 0, 0, scales, out);
    return 0;
}
