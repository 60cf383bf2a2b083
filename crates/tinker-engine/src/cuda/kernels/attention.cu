// Causal grouped-query attention, forward and backward, a tile of rows against a tile of keys at a time.
//
// HEAD is the widest head that there is room for. Tiles of keys begin at multiples of KEYS of the
// position, whatever rows look at them, and sums go over keys in order: so a row has the same bits in
// a prompt, in a chunk of it and when decoded alone.

#define TILE (HEAD > 128 ? 8 : 16)
#define KEYS TILE
#define ATTENTION_THREADS 128
#define OUTPUTS ((TILE * HEAD + ATTENTION_THREADS - 1) / ATTENTION_THREADS)

// What all heads of a block have in common.
struct Heads {
    unsigned n, n_kv, size, window;
    float scale, cap;
};

// Rows of one sequence that a block of threads takes: where its keys and values begin, how far the
// blocks of a model are apart in them, and rows `row .. row + rows` at positions `first ..`.
struct Rows {
    word keys, values, stride, row, rows, first;
};

// The first key of a tile of rows at `first`, down to a whole tile of keys.
__device__ inline unsigned first_key(Heads heads, unsigned first) {
    unsigned start = heads.window && first + 1 > heads.window ? first + 1 - heads.window : 0;
    return start / KEYS * KEYS;
}

__device__ inline bool sees(Heads heads, unsigned row, unsigned key) {
    return key <= row && (!heads.window || row - key < heads.window);
}

// The score that a product of query and key becomes.
__device__ inline float score(Heads heads, float product) {
    float x = product * heads.scale;
    return heads.cap > 0.0f ? heads.cap * tanhf(x / heads.cap) : x;
}

// Loads `count` rows of one head, of `width` floats each, zero beyond them.
__device__ inline void load_rows(const float* from, word width, unsigned count, unsigned size,
                                 float tile[TILE][HEAD + 1]) {
    for (unsigned i = threadIdx.x; i < TILE * size; i += ATTENTION_THREADS) {
        unsigned row = i / size, d = i % size;
        tile[row][d] = row < count ? from[row * width + d] : 0.0f;
    }
}

__device__ inline float dot(const float* a, const float* b, unsigned size) {
    float sum = 0.0f;
    for (unsigned d = 0; d < size; d++) sum = fmaf(a[d], b[d], sum);
    return sum;
}

// `softmax(scale Q K^T) V`, keeping a running maximum and sum (Dao et al. 2022, algorithm 1), and
// the log of each row's normaliser, `[heads, log_rows]`. One block per tile of rows and head.
KERNEL attention(const float* q, const Rows* tiles, unsigned layer, unsigned n, unsigned n_kv,
                 unsigned size, unsigned window, float scale, float cap, unsigned log_rows, float* out,
                 float* logs) {
    __shared__ float qs[TILE][HEAD + 1];
    __shared__ float kv[KEYS][HEAD + 1];
    __shared__ float p[TILE][KEYS + 1];
    __shared__ float most[TILE], sum[TILE], shrink[TILE];
    Heads heads = {n, n_kv, size, window, scale, cap};
    Rows tile = tiles[blockIdx.x];
    unsigned head = blockIdx.y, kv_head = head / (n / n_kv), t = threadIdx.x;
    unsigned rows = (unsigned)tile.rows, first = (unsigned)tile.first, last = first + rows - 1;
    word width = (word)n * size, kv_width = (word)n_kv * size;
    const float* keys = (const float*)tile.keys + layer * tile.stride + kv_head * size;
    const float* values = (const float*)tile.values + layer * tile.stride + kv_head * size;
    const float* own = q + tile.row * width + head * size;
    float acc[OUTPUTS];
    for (unsigned j = 0; j < OUTPUTS; j++) acc[j] = 0.0f;
    load_rows(own, width, rows, size, qs);
    if (t < TILE) {
        most[t] = negative_infinity();
        sum[t] = 0.0f;
    }
    for (unsigned key = first_key(heads, first); key <= last; key += KEYS) {
        unsigned count = last + 1 - key < KEYS ? last + 1 - key : KEYS;
        __syncthreads();
        load_rows(keys + key * kv_width, kv_width, count, size, kv);
        __syncthreads();
        for (unsigned i = t; i < rows * KEYS; i += ATTENTION_THREADS) {
            unsigned row = i / KEYS, c = i % KEYS;
            bool seen = c < count && sees(heads, first + row, key + c);
            p[row][c] = seen ? score(heads, dot(qs[row], kv[c], size)) : negative_infinity();
        }
        __syncthreads();
        load_rows(values + key * kv_width, kv_width, count, size, kv);
        if (t < rows) {
            float now = most[t];
            for (unsigned c = 0; c < KEYS; c++) now = fmaxf(now, p[t][c]);
            shrink[t] = now == most[t] ? 1.0f : expf(most[t] - now);
            most[t] = now;
        }
        __syncthreads();
        for (unsigned i = t; i < rows * KEYS; i += ATTENTION_THREADS) {
            unsigned row = i / KEYS, c = i % KEYS;
            float x = p[row][c];
            p[row][c] = x == negative_infinity() ? 0.0f : expf(x - most[row]);
        }
        __syncthreads();
        if (t < rows) {
            float total = sum[t] * shrink[t];
            for (unsigned c = 0; c < KEYS; c++) total += p[t][c];
            sum[t] = total;
        }
#pragma unroll
        for (unsigned j = 0; j < OUTPUTS; j++) {
            unsigned i = t + j * ATTENTION_THREADS, row = i / size, d = i % size;
            if (row >= rows) continue;
            float value = acc[j] * shrink[row];
            for (unsigned c = 0; c < KEYS; c++) value = fmaf(p[row][c], kv[c][d], value);
            acc[j] = value;
        }
    }
    __syncthreads();
#pragma unroll
    for (unsigned j = 0; j < OUTPUTS; j++) {
        unsigned i = t + j * ATTENTION_THREADS, row = i / size, d = i % size;
        if (row < rows) out[(tile.row + row) * width + head * size + d] = acc[j] / sum[row];
    }
    if (t < rows) logs[(word)head * log_rows + tile.row + t] = most[t] + logf(sum[t]);
}

// `dots[head, row] = dO . O`. One thread per row and head.
KERNEL attention_dots(const float* d_out, const float* out, unsigned rows, unsigned n, unsigned size,
                      float* dots) {
    word i = (word)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= (word)rows * n) return;
    word at = (i % rows * n + i / rows) * size;
    dots[i] = dot(d_out + at, out + at, size);
}

// Probabilities, and gradients of the products of queries and keys, of a tile: `qs` rows at
// `row0 ..` of the sequence against `ks` keys at `key0 ..` (Dao 2023, algorithm 2).
__device__ inline void score_gradients(Heads heads, float qs[TILE][HEAD + 1], float ks[KEYS][HEAD + 1],
                                       float vs[KEYS][HEAD + 1], float ds_out[TILE][HEAD + 1],
                                       unsigned row0, unsigned key0, unsigned length, const float* logs,
                                       const float* dots, float p[TILE][KEYS + 1], float ds[TILE][KEYS + 1]) {
    for (unsigned i = threadIdx.x; i < TILE * KEYS; i += ATTENTION_THREADS) {
        unsigned r = i / KEYS, c = i % KEYS, row = row0 + r, key = key0 + c;
        p[r][c] = 0.0f;
        ds[r][c] = 0.0f;
        if (row >= length || key >= length || !sees(heads, row, key)) continue;
        float s = score(heads, dot(qs[r], ks[c], heads.size));
        float slope = heads.scale;
        if (heads.cap > 0.0f) slope *= 1.0f - (s / heads.cap) * (s / heads.cap);
        p[r][c] = expf(s - logs[row]);
        ds[r][c] = p[r][c] * (dot(ds_out[r], vs[c], heads.size) - dots[row]) * slope;
    }
}

// The gradient of queries. One block per tile of rows and head.
KERNEL attention_backward_q(const float* q, const float* k, const float* v, const float* d_out,
                            const float* logs, const float* dots, unsigned rows, unsigned n, unsigned n_kv,
                            unsigned size, unsigned window, float scale, float cap, float* dq) {
    __shared__ float qs[TILE][HEAD + 1], ks[KEYS][HEAD + 1], vs[KEYS][HEAD + 1], os[TILE][HEAD + 1];
    __shared__ float p[TILE][KEYS + 1], ds[TILE][KEYS + 1];
    Heads heads = {n, n_kv, size, window, scale, cap};
    unsigned head = blockIdx.y, kv_head = head / (n / n_kv), t = threadIdx.x;
    unsigned first = blockIdx.x * TILE, count = rows - first < TILE ? rows - first : TILE;
    word width = (word)n * size, kv_width = (word)n_kv * size;
    word at = first * width + head * size;
    float acc[OUTPUTS];
    for (unsigned j = 0; j < OUTPUTS; j++) acc[j] = 0.0f;
    load_rows(q + at, width, count, size, qs);
    load_rows(d_out + at, width, count, size, os);
    for (unsigned key = first_key(heads, first); key < first + count; key += KEYS) {
        unsigned keys = rows - key < KEYS ? rows - key : KEYS;
        __syncthreads();
        load_rows(k + key * kv_width + kv_head * size, kv_width, keys, size, ks);
        load_rows(v + key * kv_width + kv_head * size, kv_width, keys, size, vs);
        __syncthreads();
        score_gradients(heads, qs, ks, vs, os, first, key, rows, logs + (word)head * rows,
                        dots + (word)head * rows, p, ds);
        __syncthreads();
#pragma unroll
        for (unsigned j = 0; j < OUTPUTS; j++) {
            unsigned i = t + j * ATTENTION_THREADS, row = i / size, d = i % size;
            if (row >= count) continue;
            float value = acc[j];
            for (unsigned c = 0; c < KEYS; c++) value = fmaf(ds[row][c], ks[c][d], value);
            acc[j] = value;
        }
    }
#pragma unroll
    for (unsigned j = 0; j < OUTPUTS; j++) {
        unsigned i = t + j * ATTENTION_THREADS, row = i / size, d = i % size;
        if (row < count) dq[at + row * width + d] = acc[j];
    }
}

// The gradients of keys and values. One block per tile of keys and key head, which takes the query
// heads of its group, and the tiles of rows that see its keys, in order.
KERNEL attention_backward_kv(const float* q, const float* k, const float* v, const float* d_out,
                             const float* logs, const float* dots, unsigned rows, unsigned n, unsigned n_kv,
                             unsigned size, unsigned window, float scale, float cap, float* dk, float* dv) {
    __shared__ float qs[TILE][HEAD + 1], ks[KEYS][HEAD + 1], vs[KEYS][HEAD + 1], os[TILE][HEAD + 1];
    __shared__ float p[TILE][KEYS + 1], ds[TILE][KEYS + 1];
    Heads heads = {n, n_kv, size, window, scale, cap};
    unsigned kv_head = blockIdx.y, group = n / n_kv, t = threadIdx.x;
    unsigned key = blockIdx.x * KEYS, keys = rows - key < KEYS ? rows - key : KEYS;
    word width = (word)n * size, kv_width = (word)n_kv * size;
    word at = key * kv_width + kv_head * size;
    unsigned end = window && key + keys - 1 + window < rows ? key + keys - 1 + window : rows;
    float k_acc[OUTPUTS], v_acc[OUTPUTS];
    for (unsigned j = 0; j < OUTPUTS; j++) k_acc[j] = v_acc[j] = 0.0f;
    load_rows(k + at, kv_width, keys, size, ks);
    load_rows(v + at, kv_width, keys, size, vs);
    for (unsigned head = kv_head * group; head < (kv_head + 1) * group; head++) {
        for (unsigned first = key; first < end; first += TILE) {
            unsigned count = rows - first < TILE ? rows - first : TILE;
            word from = first * width + head * size;
            __syncthreads();
            load_rows(q + from, width, count, size, qs);
            load_rows(d_out + from, width, count, size, os);
            __syncthreads();
            score_gradients(heads, qs, ks, vs, os, first, key, rows, logs + (word)head * rows,
                            dots + (word)head * rows, p, ds);
            __syncthreads();
#pragma unroll
            for (unsigned j = 0; j < OUTPUTS; j++) {
                unsigned i = t + j * ATTENTION_THREADS, c = i / size, d = i % size;
                if (c >= keys) continue;
                float of_k = k_acc[j], of_v = v_acc[j];
                for (unsigned r = 0; r < TILE; r++) {
                    of_k = fmaf(ds[r][c], qs[r][d], of_k);
                    of_v = fmaf(p[r][c], os[r][d], of_v);
                }
                k_acc[j] = of_k;
                v_acc[j] = of_v;
            }
        }
    }
#pragma unroll
    for (unsigned j = 0; j < OUTPUTS; j++) {
        unsigned i = t + j * ATTENTION_THREADS, c = i / size, d = i % size;
        if (c >= keys) continue;
        dk[at + c * kv_width + d] = k_acc[j];
        dv[at + c * kv_width + d] = v_acc[j];
    }
}

// Where a row's key and value go: the caches of its sequence, how far blocks of the model are apart in
// them, and its position.
struct Place {
    word keys, values, stride, position;
};

// Writes rows of keys and values into the caches of their sequences. One block per row.
KERNEL store_keys_values(const float* k, const float* v, const Place* places, unsigned layer, unsigned width) {
    Place place = places[blockIdx.x];
    word from = (word)blockIdx.x * width, to = layer * place.stride + place.position * width;
    for (unsigned i = threadIdx.x; i < width; i += blockDim.x) {
        ((float*)place.keys)[to + i] = k[from + i];
        ((float*)place.values)[to + i] = v[from + i];
    }
}
