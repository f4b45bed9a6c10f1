/* Low-rank updates, for one instruction set; native_lanes.h includes this.

   A product of two float32 numbers is exact in float64, so FUSED gives what a product and a sum give. */

#ifndef FUSED
#define FUSED(a, b, c) ((a) * (b) + (c))
#endif
#define WIDE (LANES / 4) /* vectors of a strip, such that the sums of four rows stay in registers */
#define COLUMNS (WIDE * LANES / 2)

typedef double NAME(Doubles) __attribute__((vector_size(4 * LANES)));
#define Doubles NAME(Doubles)

/* The sums of `height` rows of a strip; `right` is packed, `ranks` rows of COLUMNS. */
INLINE void NAME(lowrank_block)(double *strip, const double *left, int64_t ranks, const double *right, int height)
{
    Doubles sums[4][WIDE] = {{{0}}}; /* those of `height` rows */
    for (int64_t k = 0; k < ranks; k++) {
        Doubles row[WIDE];
#pragma GCC unroll 4
        for (int j = 0; j < WIDE; j++) /* one by one: a copy of all of them would go through memory */
            memcpy(&row[j], right + COLUMNS * k + j * (LANES / 2), sizeof row[j]);
#pragma GCC unroll 4
        for (int i = 0; i < height; i++) {
            Doubles x = left[i * ranks + k] - (Doubles){0};
#pragma GCC unroll 4
            for (int j = 0; j < WIDE; j++)
                sums[i][j] = FUSED(x, row[j], sums[i][j]);
        }
    }
    memcpy(strip, sums, sizeof sums[0] * height);
}

/* total[rows][columns] += scale * left[rows][ranks] * right[ranks][columns], sums in the order of the ranks. */
TARGET static int NAME(lowrank)(const Lowrank *u, double scale, float *total, int64_t stride)
{
    for (int64_t c = 0; c < u->columns; c += COLUMNS) {
        int64_t width = u->columns - c < COLUMNS ? u->columns - c : COLUMNS;
        for (int64_t k = 0; k < u->ranks; k++) /* the rows of `right` may lie a power of two apart */
            for (int j = 0; j < COLUMNS; j++)
                u->packed[COLUMNS * k + j] = j < width ? u->right[k * u->columns + c + j] : 0.0;
        for (int64_t r = 0; r < u->rows; r += 4) {
            int height = u->rows - r < 4 ? (int)(u->rows - r) : 4;
            double strip[4 * COLUMNS];
            if (height == 4)
                NAME(lowrank_block)(strip, u->left + r * u->ranks, u->ranks, u->packed, 4);
            else
                for (int i = 0; i < height; i++)
                    NAME(lowrank_block)(strip + i * COLUMNS, u->left + (r + i) * u->ranks, u->ranks, u->packed, 1);
            for (int i = 0; i < height; i++)
                for (int64_t j = 0; j < width; j++) {
                    float *to = total + (r + i) * stride + c + j;
                    *to = (float)((double)*to + scale * strip[i * COLUMNS + j]);
                }
        }
    }
    return 0;
}

#undef Doubles
#undef WIDE
#undef COLUMNS
