// Products whose rows do not see each other: sampling and scoring go through these, so that a row has
// the same bits in a prompt, in a chunk of it and when decoded beside others.
//
// An output is the sum of the chains of additions over segments of the inner dimension, added in order.
// The wide kernel, for many rows, takes the segments one after the other. The narrow one does several
// products at once; where their blocks are few, each segment gets a block of its own, and the last of them
// adds all, in order: to the same bits.

#define SEGMENT 256
#define STEP 16
#define WIDE 64
#define COLUMNS 64
#define PRODUCT_THREADS 128

// Numbers of a step that each of PRODUCT_THREADS threads loads, of the rows and of the weights.
#define LOADS (STEP * WIDE / PRODUCT_THREADS)

// Reads `x[row, k0 + k]` for a tile of rows and a step of the inner dimension, zero beyond the edges.
__device__ inline void fetch_rows(const float* x, word stride, unsigned rows, unsigned inner, unsigned row0,
                                  unsigned k0, float held[LOADS]) {
    for (unsigned l = 0; l < LOADS; l++) {
        unsigned i = threadIdx.x + PRODUCT_THREADS * l, k = i % STEP, row = i / STEP;
        bool inside = k0 + k < inner && row0 + row < rows;
        held[l] = inside ? x[(row0 + row) * stride + k0 + k] : 0.0f;
    }
}

// As fetch_rows, `w[column, k0 + k]`: `turned` weights are `[inner, n]` in memory, others `[n, inner]`.
template <typename T>
__device__ inline void fetch_weights(const T* w, word stride, unsigned turned, unsigned n, unsigned inner,
                                     unsigned column0, unsigned k0, float held[LOADS]) {
    for (unsigned l = 0; l < LOADS; l++) {
        unsigned i = threadIdx.x + PRODUCT_THREADS * l;
        unsigned k = k0 + (turned ? i / COLUMNS : i % STEP);
        unsigned column = column0 + (turned ? i % COLUMNS : i / STEP);
        word at = turned ? k * stride + column : column * stride + k;
        held[l] = k < inner && column < n ? widen(w[at]) : 0.0f;
    }
}

// WIDE rows at a time, each thread for 8 rows of 4 columns. The next step is asked for before this one is
// multiplied.
template <typename T>
__device__ inline void product(const float* x, word x_stride, const T* w, word w_stride, unsigned turned,
                               unsigned rows, unsigned n, unsigned inner, float scale, const float* onto,
                               float* y, word y_stride) {
    const unsigned EACH = WIDE / 8;
    __shared__ float xs[STEP][WIDE + 1];
    __shared__ float ws[STEP][COLUMNS + 1];
    unsigned row0 = blockIdx.y * WIDE, column0 = blockIdx.x * COLUMNS;
    unsigned my_row = threadIdx.x / 16, my_column = threadIdx.x % 16;
    float total[EACH][4], sum[EACH][4], next_x[LOADS], next_w[LOADS];
    for (unsigned i = 0; i < EACH; i++)
        for (unsigned j = 0; j < 4; j++) total[i][j] = sum[i][j] = 0.0f;
    fetch_rows(x, x_stride, rows, inner, row0, 0, next_x);
    fetch_weights(w, w_stride, turned, n, inner, column0, 0, next_w);
    for (unsigned k0 = 0; k0 < inner; k0 += STEP) {
        __syncthreads();
        for (unsigned l = 0; l < LOADS; l++) {
            unsigned i = threadIdx.x + PRODUCT_THREADS * l;
            xs[i % STEP][i / STEP] = next_x[l];
            if (turned) ws[i / COLUMNS][i % COLUMNS] = next_w[l];
            else ws[i % STEP][i / STEP] = next_w[l];
        }
        __syncthreads();
        if (k0 + STEP < inner) {
            fetch_rows(x, x_stride, rows, inner, row0, k0 + STEP, next_x);
            fetch_weights(w, w_stride, turned, n, inner, column0, k0 + STEP, next_w);
        }
        for (unsigned k = 0; k < STEP; k++) {
            for (unsigned i = 0; i < EACH; i++) {
                float left = xs[k][my_row + 8 * i];
                for (unsigned j = 0; j < 4; j++)
                    sum[i][j] = fmaf(left, ws[k][my_column + 16 * j], sum[i][j]);
            }
        }
        if ((k0 + STEP) % SEGMENT != 0 && k0 + STEP < inner) continue;
        for (unsigned i = 0; i < EACH; i++) {
            for (unsigned j = 0; j < 4; j++) {
                total[i][j] += sum[i][j];
                sum[i][j] = 0.0f;
            }
        }
    }
    for (unsigned i = 0; i < EACH; i++) {
        for (unsigned j = 0; j < 4; j++) {
            unsigned row = row0 + my_row + 8 * i, column = column0 + my_column + 16 * j;
            if (row >= rows || column >= n) continue;
            float value = scale * total[i][j];
            word at = row * y_stride + column;
            y[at] = onto ? onto[at] + value : value;
        }
    }
}

#define PRODUCT(NAME, TYPE)                                                                                \
    KERNEL NAME(const float* x, word x_stride, const TYPE* w, word w_stride, unsigned turned, unsigned rows, \
                unsigned n, unsigned inner, float scale, const float* onto, float* y, word y_stride) {     \
        product<TYPE>(x, x_stride, w, w_stride, turned, rows, n, inner, scale, onto, y, y_stride);         \
    }

PRODUCT(product_wide_f32, float)
PRODUCT(product_wide_bf16, bf16)

// The narrow kernel: rows and columns of a block.
#define NARROW 8
#define FEW_COLUMNS 32

// One of the products of a launch, all with the same rows; it is added to `onto`, which may be `y`. Weights
// are bf16 with bit 0 of `kind`, and `[inner, n]` in memory, else `[n, inner]`, with bit 1. A product without
// columns is none.
struct Job {
    const float* x;
    word x_stride;
    const void* w;
    word w_stride;
    unsigned kind, n, inner;
    float scale;
    const float* onto;
    float* y;
    word y_stride;
};

__device__ inline unsigned tiles_of(const Job& job) { return (job.n + FEW_COLUMNS - 1) / FEW_COLUMNS; }

// Sixteen bytes.
struct alignas(16) Quad {
    unsigned words[4];
};

// Rows of columns in the memory of a block: a multiple of 16 bytes, and odd as one, so that 16 bytes of
// neighbouring rows lie in different banks.
template <typename T>
struct Columns {
    static const unsigned STRIDE = SEGMENT + 16 / sizeof(T);
    T numbers[FEW_COLUMNS][STRIDE];
};

__device__ inline void set_zero(float* x) { *x = 0.0f; }
__device__ inline void set_zero(bf16* x) { *x = 0; }

// Loads `w[column, start + k]` for a tile of columns and a segment, zero beyond the edges.
template <typename T>
__device__ inline void load_columns(const Job& job, unsigned column0, unsigned start, Columns<T>& to) {
    const unsigned EACH = 16 / sizeof(T);
    const T* w = (const T*)job.w;
    unsigned count = job.inner - start < SEGMENT ? job.inner - start : SEGMENT;
    unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (job.kind & 2) {
        // Neighbouring threads take neighbouring columns. Beyond the inner dimension only what is read.
        unsigned end = (count + EACH - 1) / EACH * EACH;
        for (unsigned k = warp; k < end; k += PRODUCT_THREADS / 32) {
            if (k < count && column0 + lane < job.n)
                to.numbers[lane][k] = w[(start + k) * job.w_stride + column0 + lane];
            else
                set_zero(&to.numbers[lane][k]);
        }
        return;
    }
    if (count == SEGMENT && ((word)w | job.w_stride * sizeof(T)) % 16 == 0) {
        for (unsigned k = lane * EACH; k < SEGMENT; k += 32 * EACH) {
            // All are asked for before one is waited for.
            const unsigned OWN = FEW_COLUMNS / (PRODUCT_THREADS / 32);
            Quad quads[OWN];
#pragma unroll
            for (unsigned i = 0; i < OWN; i++) {
                unsigned column = column0 + warp + PRODUCT_THREADS / 32 * i;
                quads[i] = column < job.n ? *(const Quad*)&w[column * job.w_stride + start + k] : Quad{};
            }
#pragma unroll
            for (unsigned i = 0; i < OWN; i++) *(Quad*)&to.numbers[warp + PRODUCT_THREADS / 32 * i][k] = quads[i];
        }
        return;
    }
    for (unsigned c = warp; c < FEW_COLUMNS; c += PRODUCT_THREADS / 32) {
        const T* from = w + (column0 + c) * job.w_stride + start;
        for (unsigned k = lane; k < SEGMENT; k += 32) {
            if (k < count && column0 + c < job.n) to.numbers[c][k] = from[k];
            else set_zero(&to.numbers[c][k]);
        }
    }
}

// Adds the products of a segment, `OWN` rows and a column for each thread.
template <typename T, unsigned OWN>
__device__ inline void add_products(const Columns<T>& w, const float xs[NARROW][SEGMENT], unsigned count,
                                    float sum[OWN]) {
    const unsigned EACH = 16 / sizeof(T);
    unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (unsigned k = 0; k < count; k += EACH) {
        alignas(16) T numbers[EACH];
        *(Quad*)numbers = *(const Quad*)&w.numbers[lane][k];
#pragma unroll
        for (unsigned j = 0; j < EACH; j++) {
            float weight = widen(numbers[j]);
            for (unsigned i = 0; i < OWN; i++)
                sum[i] = fmaf(xs[warp + PRODUCT_THREADS / 32 * i][k + j], weight, sum[i]);
        }
    }
}

// `rows` rows of up to four products. Blocks along x take the columns of one product after the other,
// along y NARROW rows. With scratch, those along z take segments: `[z, rows, columns of all tiles]`, and
// `counters` has a 0 for each block along x and y, which is left there.
__device__ inline void several(Job job, unsigned tile, unsigned rows, float* segments, unsigned* counters) {
    const unsigned OWN = NARROW / (PRODUCT_THREADS / 32);
    __shared__ Quad held[sizeof(Columns<float>) / sizeof(Quad)];
    __shared__ float xs[NARROW][SEGMENT];
    __shared__ unsigned is_last;
    unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    unsigned row0 = blockIdx.y * NARROW, column0 = tile * FEW_COLUMNS, column = column0 + lane;
    unsigned first = segments ? blockIdx.z * SEGMENT : 0, count = (job.inner + SEGMENT - 1) / SEGMENT;
    unsigned last = segments && first + SEGMENT < job.inner ? first + SEGMENT : job.inner;
    if (first >= job.inner) return;
    float total[OWN], sum[OWN];
    for (unsigned i = 0; i < OWN; i++) total[i] = 0.0f;
    for (unsigned start = first; start < last; start += SEGMENT) {
        unsigned length = last - start < SEGMENT ? last - start : SEGMENT;
        __syncthreads();
        if (job.kind & 1) load_columns(job, column0, start, *(Columns<bf16>*)held);
        else load_columns(job, column0, start, *(Columns<float>*)held);
        for (unsigned row = warp; row < NARROW; row += PRODUCT_THREADS / 32)
            for (unsigned k = lane; k < SEGMENT; k += 32) {
                bool inside = k < length && row0 + row < rows;
                xs[row][k] = inside ? job.x[(row0 + row) * job.x_stride + start + k] : 0.0f;
            }
        __syncthreads();
        for (unsigned i = 0; i < OWN; i++) sum[i] = 0.0f;
        // Whole warps have no rows where there are few.
        if (row0 + warp < rows) {
            if (job.kind & 1) add_products<bf16, OWN>(*(Columns<bf16>*)held, xs, length, sum);
            else add_products<float, OWN>(*(Columns<float>*)held, xs, length, sum);
        }
        for (unsigned i = 0; i < OWN; i++) total[i] += sum[i];
    }
    word width = (word)gridDim.x * FEW_COLUMNS, place = (word)blockIdx.x * FEW_COLUMNS + lane;
    if (segments && count > 1) {
        for (unsigned i = 0; i < OWN; i++) {
            unsigned row = row0 + warp + PRODUCT_THREADS / 32 * i;
            if (row < rows) segments[((word)blockIdx.z * rows + row) * width + place] = total[i];
        }
        __threadfence();
        __syncthreads();
        unsigned* counter = counters + blockIdx.y * gridDim.x + blockIdx.x;
        if (threadIdx.x == 0) {
            is_last = atomicAdd(counter, 1u) == count - 1;
            if (is_last) *counter = 0;
        }
        __syncthreads();
        if (!is_last) return;
        __threadfence();
        // What other blocks wrote, past this one's cache.
        const volatile float* written = segments;
        for (unsigned i = 0; i < OWN; i++) {
            unsigned row = row0 + warp + PRODUCT_THREADS / 32 * i;
            total[i] = 0.0f;
            if (row >= rows) continue;
            for (unsigned segment = 0; segment < count; segment++)
                total[i] += written[((word)segment * rows + row) * width + place];
        }
    }
    for (unsigned i = 0; i < OWN; i++) {
        unsigned row = row0 + warp + PRODUCT_THREADS / 32 * i;
        if (row >= rows || column >= job.n) continue;
        float value = job.scale * total[i];
        word at = row * job.y_stride + column;
        job.y[at] = job.onto ? job.onto[at] + value : value;
    }
}

#define JOB(I)                                                                                             \
    const float *x##I, word x_stride##I, const void *w##I, word w_stride##I, unsigned kind##I, unsigned n##I, \
        unsigned inner##I, float scale##I, const float *onto##I, float *y##I, word y_stride##I
#define JOB_OF(I)                                                                                          \
    { x##I, x_stride##I, w##I, w_stride##I, kind##I, n##I, inner##I, scale##I, onto##I, y##I, y_stride##I }

KERNEL products_narrow(unsigned rows, float* segments, unsigned* counters, JOB(0), JOB(1), JOB(2), JOB(3)) {
    Job job = JOB_OF(0);
    unsigned tile = blockIdx.x;
    if (tile >= tiles_of(job)) {
        tile -= tiles_of(job);
        job = Job JOB_OF(1);
        if (tile >= tiles_of(job)) {
            tile -= tiles_of(job);
            job = Job JOB_OF(2);
            if (tile >= tiles_of(job)) {
                tile -= tiles_of(job);
                job = Job JOB_OF(3);
            }
        }
    }
    several(job, tile, rows, segments, counters);
}
