// Kernels that are no products: embedding, norms, rotary positions, activations, sums.

// `out[row] = scale * table[tokens[row]]`; one block per row.
template <typename T>
__device__ inline void embed_rows(const T* table, const unsigned* tokens, float scale, unsigned n, float* out) {
    word from = (word)tokens[blockIdx.x] * n, to = (word)blockIdx.x * n;
    for (unsigned i = threadIdx.x; i < n; i += blockDim.x) out[to + i] = scale * widen(table[from + i]);
}
KERNEL embed_f32(const float* table, const unsigned* tokens, float scale, unsigned n, float* out) {
    embed_rows(table, tokens, scale, n, out);
}
KERNEL embed_bf16(const bf16* table, const unsigned* tokens, float scale, unsigned n, float* out) {
    embed_rows(table, tokens, scale, n, out);
}

// RMS norm of rows of `n` (Zhang and Sennrich 2019, eq. 4); keeps `1 / rms`. One block per row.
KERNEL rms_norm(const float* x, const float* weight, float eps, unsigned n, float* y, float* inverse) {
    __shared__ float scratch[ROW_THREADS];
    word at = (word)blockIdx.x * n;
    float squares = 0.0f;
    for (unsigned i = threadIdx.x; i < n; i += ROW_THREADS) squares = fmaf(x[at + i], x[at + i], squares);
    float s = 1.0f / sqrtf(block_sum(squares, scratch) / (float)n + eps);
    for (unsigned i = threadIdx.x; i < n; i += ROW_THREADS) y[at + i] = x[at + i] * s * weight[i];
    if (threadIdx.x == 0) inverse[blockIdx.x] = s;
}

// The gradient of rms_norm for its input, into `dx` or, with `adds`, onto it.
KERNEL rms_norm_backward(const float* x, const float* weight, const float* inverse, const float* dy,
                         unsigned n, unsigned adds, float* dx) {
    __shared__ float scratch[ROW_THREADS];
    word at = (word)blockIdx.x * n;
    float s = inverse[blockIdx.x], dot = 0.0f;
    for (unsigned i = threadIdx.x; i < n; i += ROW_THREADS)
        dot = fmaf(x[at + i] * dy[at + i], weight[i], dot);
    float c = block_sum(dot, scratch) * s * s * s / (float)n;
    for (unsigned i = threadIdx.x; i < n; i += ROW_THREADS) {
        float d = dy[at + i] * weight[i] * s - x[at + i] * c;
        dx[at + i] = adds ? dx[at + i] + d : d;
    }
}

// `y += x`.
KERNEL add(const float* x, word n, float* y) {
    word i = (word)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] += x[i];
}

// Adds `bias [n]` to each row of `y [rows, n]`.
KERNEL add_bias(const float* bias, word len, unsigned n, float* y) {
    word i = (word)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < len) y[i] += bias[i % n];
}

// A pair of elements that is turned by an angle.
struct Turned {
    float first, second;
};

__device__ inline Turned turn(float first, float second, float cosine, float sine) {
    return {first * cosine - second * sine, second * cosine + first * sine};
}

// Rotates the first `2 * half` elements of each of `heads` heads of a row, one half against the other
// (Su et al. 2021, as Llama lays it out); `angles` are cosines, then sines, `[rows, half]` each.
// `direction` -1 turns back, which is the gradient. One block per row.
KERNEL rope(float* x, unsigned heads, unsigned size, unsigned half, const float* angles, float direction) {
    word row = blockIdx.x, rows = gridDim.x;
    const float* cosines = angles + row * half;
    const float* sines = angles + (rows + row) * half;
    for (unsigned i = threadIdx.x; i < heads * half; i += blockDim.x) {
        unsigned head = i / half, pair = i % half;
        float* a = x + (row * heads + head) * size + pair;
        Turned turned = turn(a[0], a[half], cosines[pair], sines[pair] * direction);
        a[0] = turned.first;
        a[half] = turned.second;
    }
}

// Where a row's key and value go: the caches of its sequence, how far blocks of the model are apart in
// them, and its position.
struct Place {
    word keys, values, stride, position;
};

// Rotates queries as rope does, and writes rotated keys, and values, into the caches of their sequences;
// `half` is 0 where nothing is rotated. One block per row.
KERNEL place_rows(float* q, const float* k, const float* v, const Place* places, unsigned layer, unsigned n,
                  unsigned n_kv, unsigned size, unsigned half, const float* angles) {
    word row = blockIdx.x, rows = gridDim.x;
    Place place = places[row];
    const float* cosines = angles + row * half;
    const float* sines = angles + (rows + row) * half;
    unsigned width = n_kv * size;
    word to = layer * place.stride + place.position * width;
    float *keys = (float*)place.keys + to, *values = (float*)place.values + to;
    k += row * width;
    v += row * width;
    for (unsigned i = threadIdx.x; i < n * half; i += blockDim.x) {
        unsigned pair = i % half;
        float* a = q + (row * n + i / half) * size + pair;
        Turned turned = turn(a[0], a[half], cosines[pair], sines[pair]);
        a[0] = turned.first;
        a[half] = turned.second;
    }
    for (unsigned i = threadIdx.x; i < width; i += blockDim.x) {
        unsigned d = i % size, pair = half && d >= half ? d - half : d;
        values[i] = v[i];
        if (d >= 2 * half) {
            keys[i] = k[i];
            continue;
        }
        const float* a = k + i - d + pair;
        Turned turned = turn(a[0], a[half], cosines[pair], sines[pair]);
        keys[i] = d < half ? turned.first : turned.second;
    }
}

// `silu(gate) * up` (Shazeer 2020, eq. 6).
KERNEL swiglu(const float* gate, const float* up, word n, float* out) {
    word i = (word)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) out[i] = gate[i] / (1.0f + expf(-gate[i])) * up[i];
}

// Turns `gate` and `up` into their gradients, given that of swiglu's output.
KERNEL swiglu_backward(const float* dy, word n, float* gate, float* up) {
    word i = (word)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    float g = gate[i], u = up[i], s = 1.0f / (1.0f + expf(-g));
    gate[i] = dy[i] * u * s * (1.0f + g * (1.0f - s));
    up[i] = dy[i] * g * s;
}

// The approximation of GELU by a hyperbolic tangent is `x sigmoid(2 z)`, where
// `2 z = sqrt(8 / pi) (x + 0.044715 x^3)`.
#define GELU_ROOT 1.595769f
#define GELU_CUBIC 0.044715f

// `gelu(gate) * up`.
KERNEL geglu(const float* gate, const float* up, word n, float* out) {
    word i = (word)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    float g = gate[i], z = GELU_ROOT * (g + GELU_CUBIC * g * g * g);
    out[i] = g / (1.0f + expf(-z)) * up[i];
}

// Turns `gate` and `up` into their gradients, given that of geglu's output.
KERNEL geglu_backward(const float* dy, word n, float* gate, float* up) {
    word i = (word)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    float g = gate[i], u = up[i];
    float s = 1.0f / (1.0f + expf(-GELU_ROOT * (g + GELU_CUBIC * g * g * g)));
    float slope = GELU_ROOT * (1.0f + 3.0f * GELU_CUBIC * g * g);
    gate[i] = dy[i] * u * s * (1.0f + g * (1.0f - s) * slope);
    up[i] = dy[i] * g * s;
}

// `x = cap * tanh(x / cap)`.
KERNEL softcap(float cap, word n, float* x) {
    word i = (word)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) x[i] = cap * tanhf(x[i] / cap);
}

// Writes a float as the sum of three bf16 numbers, `parts [3, n]`, largest first: together they have
// the 24 bits of the float, so products with bf16 weights are as exact as those of floats.
KERNEL split(const float* x, word n, bf16* parts) {
    word i = (word)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    float rest = x[i];
    for (unsigned part = 0; part < 3; part++) {
        bf16 rounded = narrow(rest);
        parts[part * n + i] = rounded;
        rest -= widen(rounded);
    }
}

// `sums[block] = sum x^2` over the block's `chunk` numbers, in double precision.
KERNEL sum_of_squares(const float* x, word n, word chunk, double* sums) {
    __shared__ double scratch[ROW_THREADS];
    word start = (word)blockIdx.x * chunk, end = start + chunk < n ? start + chunk : n;
    double sum = 0.0;
    for (word i = start + threadIdx.x; i < end; i += ROW_THREADS) sum += (double)x[i] * (double)x[i];
    scratch[threadIdx.x] = sum;
    for (unsigned half = ROW_THREADS / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) scratch[threadIdx.x] += scratch[threadIdx.x + half];
    }
    if (threadIdx.x == 0) sums[blockIdx.x] = scratch[0];
}
