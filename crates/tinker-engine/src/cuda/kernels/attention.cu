// Causal grouped-query attention, forward and backward, a tile of rows against a tile of keys at a time.
//
// HEAD is the widest head that there is room for. Tiles of keys begin at multiples of KEYS of the
// position, whatever rows look at them; sums go over the keys of a chunk in order, and over chunks in
// order. So a row has the same bits in a prompt, in a part of it and when decoded alone, and whether
// one block of threads takes all chunks or each gets its own.

#define TILE (HEAD > 128 ? 8 : 16)
#define FEW 4
#define KEYS (HEAD > 128 ? 32 : 64)
#define CHUNK 256
#define ATTENTION_THREADS 128
#define WARPS (ATTENTION_THREADS / 32)
#define OUTPUTS ((TILE * HEAD + ATTENTION_THREADS - 1) / ATTENTION_THREADS)

// What all heads of a block have in common.
struct Heads {
    unsigned n, n_kv, size, window;
    float scale, cap;
};

// Tokens of one sequence that a block of threads takes: where its keys and values begin, how far the
// blocks of a model are apart in them, and rows `row .. row + tokens` at positions `first ..`.
struct Rows {
    word keys, values, stride, row, tokens, first;
};

// The first key of a tile of rows at `first`, down to a whole tile of `keys`.
__device__ inline unsigned first_key(Heads heads, unsigned first, unsigned keys) {
    unsigned start = heads.window && first + 1 > heads.window ? first + 1 - heads.window : 0;
    return start / keys * keys;
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
template <unsigned ROWS>
__device__ inline void load_rows(const float* from, word width, unsigned count, unsigned size,
                                 float tile[ROWS][HEAD + 1]) {
    for (unsigned row = threadIdx.x / 32; row < ROWS; row += WARPS)
        for (unsigned d = threadIdx.x % 32; d < size; d += 32)
            tile[row][d] = row < count ? from[row * width + d] : 0.0f;
}

__device__ inline float dot(const float* a, const float* b, unsigned size) {
    float sum = 0.0f;
    for (unsigned d = 0; d < size; d++) sum = fmaf(a[d], b[d], sum);
    return sum;
}

// What a row has seen so far: its largest score, and the sum of exponentials beside it.
struct Seen {
    float most, sum;
};

// Adds what a chunk has seen, of which there is something; `keep` and `take` become the factors of what
// was summed before and in the chunk.
__device__ inline void join(Seen chunk, Seen* all, float* keep, float* take) {
    float most = fmaxf(all->most, chunk.most);
    *keep = expf(all->most - most);
    *take = expf(chunk.most - most);
    all->sum = all->sum * *keep + chunk.sum * *take;
    all->most = most;
}

// `softmax(scale Q K^T) V`, keeping a running maximum and sum (Dao et al. 2022, algorithm 1), and
// the log of each row's normaliser, `[heads, all_rows]`. One block per tile of tokens and key head, or part
// of its query heads; a row of it is a token and a query head. Where there is room for `partial`,
// `[chunks, all_rows, heads, 2 + size]`, a block takes the chunk of its number and leaves the rest to
// attention_join. Warps keep their rows to themselves.
template <unsigned ROWS>
__device__ inline void attend(const float* q, const Rows* tiles, word keys_at, word values_at, unsigned layer,
                              Heads heads, unsigned all_rows, float* partial, float* out, float* logs) {
    const unsigned OWN = ROWS / WARPS, MINE = KEYS / 32, SPAN = HEAD / 32;
    __shared__ float qs[ROWS][HEAD + 1];
    __shared__ float kv[KEYS][HEAD + 1];
    __shared__ float ps[ROWS][KEYS + 1];
    Rows tile = tiles[blockIdx.x];
    unsigned n = heads.n, size = heads.size, group = n / heads.n_kv, parts = gridDim.y / heads.n_kv;
    unsigned kv_head = blockIdx.y / parts, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    unsigned tokens = (unsigned)tile.tokens, first = (unsigned)tile.first;
    unsigned begin = blockIdx.y % parts * ROWS, end = tokens * group;
    unsigned key = first_key(heads, first, KEYS), keys_end = first + tokens;
    if (partial) {
        unsigned chunk = blockIdx.z * CHUNK;
        if (key < chunk) key = chunk;
        if (keys_end > chunk + CHUNK) keys_end = chunk + CHUNK;
    }
    if (begin >= end || key >= keys_end) return;
    word kv_width = (word)heads.n_kv * size;
    const float* keys = (const float*)(keys_at + tile.keys) + layer * tile.stride + kv_head * size;
    const float* values = (const float*)(values_at + tile.values) + layer * tile.stride + kv_head * size;
    unsigned position[OWN];
    word at[OWN];
    bool is_row[OWN];
    float acc[OWN][SPAN], total[OWN][SPAN];
    Seen seen[OWN], all[OWN];
    for (unsigned i = 0; i < OWN; i++) {
        unsigned row = begin + warp + WARPS * i;
        is_row[i] = row < end;
        position[i] = first + row / group;
        at[i] = (tile.row + row / group) * n + kv_head * group + row % group;
        all[i].most = seen[i].most = negative_infinity();
        all[i].sum = seen[i].sum = 0.0f;
        for (unsigned j = 0; j < SPAN; j++) acc[i][j] = total[i][j] = 0.0f;
        for (unsigned d = lane; d < size; d += 32)
            qs[warp + WARPS * i][d] = is_row[i] ? q[at[i] * size + d] : 0.0f;
    }
    for (; key < keys_end; key += KEYS) {
        unsigned count = keys_end - key < KEYS ? keys_end - key : KEYS;
        __syncthreads();
        load_rows<KEYS>(keys + key * kv_width, kv_width, count, size, kv);
        __syncthreads();
        float s[OWN][MINE], shrink[OWN];
        for (unsigned i = 0; i < OWN; i++)
            for (unsigned j = 0; j < MINE; j++) s[i][j] = 0.0f;
        for (unsigned d = 0; d < size; d++)
            for (unsigned i = 0; i < OWN; i++)
                for (unsigned j = 0; j < MINE; j++)
                    s[i][j] = fmaf(qs[warp + WARPS * i][d], kv[lane + 32 * j][d], s[i][j]);
        for (unsigned i = 0; i < OWN; i++) {
            float now = seen[i].most;
            for (unsigned j = 0; j < MINE; j++) {
                unsigned c = lane + 32 * j;
                bool is_seen = is_row[i] && c < count && sees(heads, position[i], key + c);
                s[i][j] = is_seen ? score(heads, s[i][j]) : negative_infinity();
                now = fmaxf(now, s[i][j]);
            }
            now = warp_max(now);
            shrink[i] = now == seen[i].most ? 1.0f : expf(seen[i].most - now);
            seen[i].most = now;
            for (unsigned j = 0; j < MINE; j++)
                ps[warp + WARPS * i][lane + 32 * j] = s[i][j] == negative_infinity() ? 0.0f : expf(s[i][j] - now);
        }
        __syncthreads();
        load_rows<KEYS>(values + key * kv_width, kv_width, count, size, kv);
        __syncthreads();
        for (unsigned i = 0; i < OWN; i++) {
            seen[i].sum *= shrink[i];
            for (unsigned j = 0; j < SPAN; j++) acc[i][j] *= shrink[i];
        }
        for (unsigned c = 0; c < KEYS; c++) {
            for (unsigned i = 0; i < OWN; i++) {
                float p = ps[warp + WARPS * i][c];
                seen[i].sum += p;
                for (unsigned j = 0; j < SPAN; j++) acc[i][j] = fmaf(p, kv[c][lane + 32 * j], acc[i][j]);
            }
        }
        if (partial || ((key + KEYS) % CHUNK != 0 && key + KEYS < keys_end)) continue;
        for (unsigned i = 0; i < OWN; i++) {
            if (seen[i].most != negative_infinity()) {
                float keep, take;
                join(seen[i], &all[i], &keep, &take);
                for (unsigned j = 0; j < SPAN; j++) total[i][j] = total[i][j] * keep + acc[i][j] * take;
            }
            seen[i].most = negative_infinity();
            seen[i].sum = 0.0f;
            for (unsigned j = 0; j < SPAN; j++) acc[i][j] = 0.0f;
        }
    }
    for (unsigned i = 0; i < OWN; i++) {
        if (!is_row[i]) continue;
        float* own = partial + ((word)blockIdx.z * all_rows * n + at[i]) * (size + 2);
        for (unsigned j = 0; j < SPAN; j++) {
            unsigned d = lane + 32 * j;
            if (d >= size) continue;
            if (partial) own[2 + d] = acc[i][j];
            else out[at[i] * size + d] = total[i][j] / all[i].sum;
        }
        if (lane != 0) continue;
        if (partial) {
            own[0] = seen[i].most;
            own[1] = seen[i].sum;
        } else {
            logs[at[i] % n * all_rows + at[i] / n] = all[i].most + logf(all[i].sum);
        }
    }
}

#define ATTENTION(NAME, ROWS)                                                                              \
    KERNEL NAME(const float* q, const Rows* tiles, word keys, word values, unsigned layer, unsigned n,     \
                unsigned n_kv, unsigned size, unsigned window, float scale, float cap, unsigned all_rows,  \
                float* partial, float* out, float* logs) {                                                 \
        Heads heads = {n, n_kv, size, window, scale, cap};                                                 \
        attend<ROWS>(q, tiles, keys, values, layer, heads, all_rows, partial, out, logs);                  \
    }

ATTENTION(attention_wide, TILE)
ATTENTION(attention_narrow, FEW)

// Puts the chunks of each row together, as a block does that takes all of them. One block per tile and
// query head.
KERNEL attention_join(const float* partial, const Rows* tiles, unsigned n, unsigned size, unsigned window,
                      unsigned all_rows, float* out, float* logs) {
    Heads heads = {n, n, size, window, 0.0f, 0.0f};
    Rows tile = tiles[blockIdx.x];
    unsigned head = blockIdx.y, first = (unsigned)tile.first, last = first + (unsigned)tile.tokens - 1;
    for (unsigned token = 0; token < tile.tokens; token++) {
        word row = tile.row + token;
        for (unsigned d = threadIdx.x; d < size; d += ATTENTION_THREADS) {
            Seen all = {negative_infinity(), 0.0f};
            float total = 0.0f;
            for (unsigned chunk = first_key(heads, first, CHUNK) / CHUNK; chunk <= last / CHUNK; chunk++) {
                const float* own = partial + (((word)chunk * all_rows + row) * n + head) * (size + 2);
                Seen seen = {own[0], own[1]};
                if (seen.most == negative_infinity()) continue;
                float keep, take;
                join(seen, &all, &keep, &take);
                total = total * keep + own[2 + d] * take;
            }
            out[(row * n + head) * size + d] = total / all.sum;
            if (d == 0) logs[(word)head * all_rows + row] = all.most + logf(all.sum);
        }
    }
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
__device__ inline void score_gradients(Heads heads, float qs[TILE][HEAD + 1], float ks[TILE][HEAD + 1],
                                       float vs[TILE][HEAD + 1], float ds_out[TILE][HEAD + 1],
                                       unsigned row0, unsigned key0, unsigned length, const float* logs,
                                       const float* dots, float p[TILE][TILE + 1], float ds[TILE][TILE + 1]) {
    for (unsigned i = threadIdx.x; i < TILE * TILE; i += ATTENTION_THREADS) {
        unsigned r = i / TILE, c = i % TILE, row = row0 + r, key = key0 + c;
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
    __shared__ float qs[TILE][HEAD + 1], ks[TILE][HEAD + 1], vs[TILE][HEAD + 1], os[TILE][HEAD + 1];
    __shared__ float p[TILE][TILE + 1], ds[TILE][TILE + 1];
    Heads heads = {n, n_kv, size, window, scale, cap};
    unsigned head = blockIdx.y, kv_head = head / (n / n_kv), t = threadIdx.x;
    unsigned first = blockIdx.x * TILE, count = rows - first < TILE ? rows - first : TILE;
    word width = (word)n * size, kv_width = (word)n_kv * size;
    word at = first * width + head * size;
    float acc[OUTPUTS];
    for (unsigned j = 0; j < OUTPUTS; j++) acc[j] = 0.0f;
    load_rows<TILE>(q + at, width, count, size, qs);
    load_rows<TILE>(d_out + at, width, count, size, os);
    for (unsigned key = first_key(heads, first, TILE); key < first + count; key += TILE) {
        unsigned keys = rows - key < TILE ? rows - key : TILE;
        __syncthreads();
        load_rows<TILE>(k + key * kv_width + kv_head * size, kv_width, keys, size, ks);
        load_rows<TILE>(v + key * kv_width + kv_head * size, kv_width, keys, size, vs);
        __syncthreads();
        score_gradients(heads, qs, ks, vs, os, first, key, rows, logs + (word)head * rows,
                        dots + (word)head * rows, p, ds);
        __syncthreads();
#pragma unroll
        for (unsigned j = 0; j < OUTPUTS; j++) {
            unsigned i = t + j * ATTENTION_THREADS, row = i / size, d = i % size;
            if (row >= count) continue;
            float value = acc[j];
            for (unsigned c = 0; c < TILE; c++) value = fmaf(ds[row][c], ks[c][d], value);
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
    __shared__ float qs[TILE][HEAD + 1], ks[TILE][HEAD + 1], vs[TILE][HEAD + 1], os[TILE][HEAD + 1];
    __shared__ float p[TILE][TILE + 1], ds[TILE][TILE + 1];
    Heads heads = {n, n_kv, size, window, scale, cap};
    unsigned kv_head = blockIdx.y, group = n / n_kv, t = threadIdx.x;
    unsigned key = blockIdx.x * TILE, keys = rows - key < TILE ? rows - key : TILE;
    word width = (word)n * size, kv_width = (word)n_kv * size;
    word at = key * kv_width + kv_head * size;
    unsigned end = window && key + keys - 1 + window < rows ? key + keys - 1 + window : rows;
    float k_acc[OUTPUTS], v_acc[OUTPUTS];
    for (unsigned j = 0; j < OUTPUTS; j++) k_acc[j] = v_acc[j] = 0.0f;
    load_rows<TILE>(k + at, kv_width, keys, size, ks);
    load_rows<TILE>(v + at, kv_width, keys, size, vs);
    for (unsigned head = kv_head * group; head < (kv_head + 1) * group; head++) {
        for (unsigned first = key; first < end; first += TILE) {
            unsigned count = rows - first < TILE ? rows - first : TILE;
            word from = first * width + head * size;
            __syncthreads();
            load_rows<TILE>(q + from, width, count, size, qs);
            load_rows<TILE>(d_out + from, width, count, size, os);
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
