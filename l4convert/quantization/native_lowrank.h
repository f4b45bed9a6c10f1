/* Products of low-rank factors, for one instruction set; native_lanes.h includes this. */

/* Two vectors of columns of `height` rows of a product; `right` is packed, `ranks` rows of 2 * LANES. */
INLINE void NAME(product_block)(Floats *sums, const float *left, int64_t ranks, const float *right, int height)
{
    for (int64_t k = 0; k < ranks; k++) {
        Floats a = NAME(load)(right + 2 * LANES * k), b = NAME(load)(right + 2 * LANES * k + LANES);
        for (int i = 0; i < height; i++) {
            Floats x = NAME(all)(left[i * ranks + k]);
            sums[2 * i] = sums[2 * i] + x * a;
            sums[2 * i + 1] = sums[2 * i + 1] + x * b;
        }
    }
}

/* total[rows][columns] += left[rows][ranks] * right[ranks][columns], sums in the order of the ranks. */
TARGET static int NAME(product)(float *total, const float *left, const float *right, int64_t rows, int64_t columns,
                                int64_t ranks)
{
    float packed[MAX_RANKS * 2 * LANES]; /* a strip of `right`, whose rows may lie a power of two apart */
    for (int64_t c = 0; c < columns; c += 2 * LANES) {
        int64_t width = columns - c < 2 * LANES ? columns - c : 2 * LANES;
        memset(packed, 0, sizeof(float) * ranks * 2 * LANES);
        for (int64_t k = 0; k < ranks; k++)
            memcpy(packed + k * 2 * LANES, right + k * columns + c, sizeof(float) * width);
        for (int64_t r = 0; r < rows; r += 4) {
            int height = rows - r < 4 ? (int)(rows - r) : 4;
            float strip[4][2 * LANES] = {{0}};
            for (int i = 0; i < height; i++)
                memcpy(strip[i], total + (r + i) * columns + c, sizeof(float) * width);
            Floats sums[8];
            memcpy(sums, strip, sizeof sums);
            if (height == 4)
                NAME(product_block)(sums, left + r * ranks, ranks, packed, 4);
            else
                NAME(product_block)(sums, left + r * ranks, ranks, packed, height);
            memcpy(strip, sums, sizeof sums);
            for (int i = 0; i < height; i++)
                memcpy(total + (r + i) * columns + c, strip[i], sizeof(float) * width);
        }
    }
    return 0;
}
