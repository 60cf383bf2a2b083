// Products whose rows do not see each other: sampling and scoring go through these, so that a row has
// the same bits in a prompt, in a chunk of it and when decoded beside others.
//
// An output is the sum of the chains of additions over segments of the inner dimension, added in order.
// The wide kernel takes the segments one after the other; the narrow one, for few rows, gives each
// to a block of its own, and `add_segments` adds them: to the same bits.

#define SEGMENT 256
#define STEP 16
#define WIDE 64
#define NARROW 8
#define COLUMNS 64

// Loads `w[column, k]` for a tile of columns and a step of the inner dimension, zero beyond the edges.
// `turned` weights are `[inner, n]` in memory, others `[n, inner]`; `stride` is the distance of rows.
template <typename T>
__device__ inline void load_weights(const T* w, unsigned n, unsigned end, word stride, unsigned turned,
                                    unsigned column0, unsigned k0, float tile[STEP][COLUMNS + 1]) {
    for (unsigned i = threadIdx.x; i < STEP * COLUMNS; i += blockDim.x) {
        unsigned k = turned ? i / COLUMNS : i % STEP, column = turned ? i % COLUMNS : i / STEP;
        bool inside = k0 + k < end && column0 + column < n;
        word at = turned ? (k0 + k) * stride + column0 + column : (column0 + column) * stride + k0 + k;
        tile[k][column] = inside ? widen(w[at]) : 0.0f;
    }
}

// `ROWS` rows at a time; 128 threads, each for `ROWS / 8` rows of 4 columns.
template <typename T, unsigned ROWS>
__device__ inline void product(const float* x, word x_stride, const T* w, word w_stride, unsigned turned,
                               unsigned rows, unsigned n, unsigned inner, float scale, unsigned adds,
                               float* y, word y_stride, float* segments) {
    const unsigned EACH = ROWS / 8;
    __shared__ float xs[STEP][ROWS + 1];
    __shared__ float ws[STEP][COLUMNS + 1];
    unsigned row0 = blockIdx.y * ROWS, column0 = blockIdx.x * COLUMNS;
    unsigned my_row = threadIdx.x / 16, my_column = threadIdx.x % 16;
    float total[EACH][4], sum[EACH][4];
    for (unsigned i = 0; i < EACH; i++)
        for (unsigned j = 0; j < 4; j++) total[i][j] = 0.0f;
    // Without scratch for segments, all of them are this block's; else the one of its number.
    unsigned first = segments ? blockIdx.z * SEGMENT : 0;
    unsigned last = segments ? (first + SEGMENT < inner ? first + SEGMENT : inner) : inner;
    for (unsigned start = first; start < last; start += SEGMENT) {
        unsigned end = start + SEGMENT < inner ? start + SEGMENT : inner;
        for (unsigned i = 0; i < EACH; i++)
            for (unsigned j = 0; j < 4; j++) sum[i][j] = 0.0f;
        for (unsigned k0 = start; k0 < end; k0 += STEP) {
            __syncthreads();
            for (unsigned i = threadIdx.x; i < STEP * ROWS; i += blockDim.x) {
                unsigned k = i % STEP, row = i / STEP;
                bool inside = k0 + k < end && row0 + row < rows;
                xs[k][row] = inside ? x[(row0 + row) * x_stride + k0 + k] : 0.0f;
            }
            load_weights(w, n, end, w_stride, turned, column0, k0, ws);
            __syncthreads();
            for (unsigned k = 0; k < STEP; k++) {
                for (unsigned i = 0; i < EACH; i++) {
                    float left = xs[k][my_row + 8 * i];
                    for (unsigned j = 0; j < 4; j++)
                        sum[i][j] = fmaf(left, ws[k][my_column + 16 * j], sum[i][j]);
                }
            }
        }
        for (unsigned i = 0; i < EACH; i++)
            for (unsigned j = 0; j < 4; j++) total[i][j] += sum[i][j];
    }
    for (unsigned i = 0; i < EACH; i++) {
        for (unsigned j = 0; j < 4; j++) {
            unsigned row = row0 + my_row + 8 * i, column = column0 + my_column + 16 * j;
            if (row >= rows || column >= n) continue;
            if (segments) {
                segments[((word)blockIdx.z * rows + row) * n + column] = total[i][j];
            } else {
                float value = scale * total[i][j];
                word at = row * y_stride + column;
                y[at] = adds ? y[at] + value : value;
            }
        }
    }
}

#define PRODUCT(NAME, TYPE, ROWS)                                                                          \
    KERNEL NAME(const float* x, word x_stride, const TYPE* w, word w_stride, unsigned turned, unsigned rows, \
                unsigned n, unsigned inner, float scale, unsigned adds, float* y, word y_stride,           \
                float* segments) {                                                                         \
        product<TYPE, ROWS>(x, x_stride, w, w_stride, turned, rows, n, inner, scale, adds, y, y_stride,    \
                            segments);                                                                     \
    }

PRODUCT(product_wide_f32, float, WIDE)
PRODUCT(product_wide_bf16, bf16, WIDE)
PRODUCT(product_narrow_f32, float, NARROW)
PRODUCT(product_narrow_bf16, bf16, NARROW)

// Adds `count` segments `[count, rows, n]` in order, as a wide block does.
KERNEL add_segments(const float* segments, unsigned count, unsigned rows, unsigned n, float scale,
                    unsigned adds, float* y, word y_stride) {
    word i = (word)blockIdx.x * blockDim.x + threadIdx.x, len = (word)rows * n;
    if (i >= len) return;
    float total = 0.0f;
    for (unsigned segment = 0; segment < count; segment++) total += segments[segment * len + i];
    word at = i / n * y_stride + i % n;
    float value = scale * total;
    y[at] = adds ? y[at] + value : value;
}
