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
#define SPAN (HEAD / 32)

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
    const unsigned OWN = ROWS / WARPS, MINE = KEYS / 32;
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

// The backward kernels hold a tile of rows (or keys) and take INNER keys (or rows) at a time. A thread has
// PAIRS rows of the tile and one of the others where products are summed over the head, and OWN_ROWS rows
// of the tile and SPAN elements of each where they are summed over the others.
#define INNER (HEAD > 128 ? 16 : 32)
#define GROUPS (ATTENTION_THREADS / INNER)
#define PAIRS (TILE / GROUPS)
#define OWN_ROWS (TILE / WARPS)

// Products of the thread's rows of a tile with the one of the others that is its own.
__device__ inline void pair_dots(const float tile[TILE][HEAD + 1], const float others[INNER][HEAD + 1],
                                 unsigned size, float sums[PAIRS]) {
    unsigned other = threadIdx.x % INNER, group = threadIdx.x / INNER;
    for (unsigned i = 0; i < PAIRS; i++) sums[i] = 0.0f;
    for (unsigned d = 0; d < size; d++) {
        float x = others[other][d];
        for (unsigned i = 0; i < PAIRS; i++) sums[i] = fmaf(tile[group + GROUPS * i][d], x, sums[i]);
    }
}

// Adds the others by their weight for each row of the tile.
__device__ inline void add_weighted(const float weights[TILE][INNER + 1], const float others[INNER][HEAD + 1],
                                    float acc[OWN_ROWS][SPAN]) {
    unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (unsigned c = 0; c < INNER; c++) {
        for (unsigned i = 0; i < OWN_ROWS; i++) {
            float weight = weights[warp + WARPS * i][c];
            for (unsigned j = 0; j < SPAN; j++) acc[i][j] = fmaf(weight, others[c][lane + 32 * j], acc[i][j]);
        }
    }
}

// Writes the first `count` rows of `acc`, `width` floats apart.
__device__ inline void write_rows(const float acc[OWN_ROWS][SPAN], unsigned count, unsigned size, word width,
                                  float* to) {
    unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (unsigned i = 0; i < OWN_ROWS; i++) {
        for (unsigned j = 0; j < SPAN; j++) {
            unsigned row = warp + WARPS * i, d = lane + 32 * j;
            if (row < count && d < size) to[row * width + d] = acc[i][j];
        }
    }
}

// A probability, and the gradient of the product of query and key that it comes from, given that of the
// probability (Dao 2023, algorithm 2).
struct Slope {
    float p, ds;
};

__device__ inline Slope slope_of(Heads heads, float product, float dp, float log, float dot) {
    float s = score(heads, product), slope = heads.scale;
    if (heads.cap > 0.0f) slope *= 1.0f - (s / heads.cap) * (s / heads.cap);
    float p = expf(s - log);
    return {p, p * (dp - dot) * slope};
}

// The gradient of queries. One block per tile of rows and head.
KERNEL attention_backward_q(const float* q, const float* k, const float* v, const float* d_out,
                            const float* logs, const float* dots, unsigned rows, unsigned n, unsigned n_kv,
                            unsigned size, unsigned window, float scale, float cap, float* dq) {
    __shared__ float qs[TILE][HEAD + 1], os[TILE][HEAD + 1], others[INNER][HEAD + 1];
    __shared__ float ds[TILE][INNER + 1];
    Heads heads = {n, n_kv, size, window, scale, cap};
    unsigned head = blockIdx.y, kv_head = head / (n / n_kv);
    unsigned other = threadIdx.x % INNER, group = threadIdx.x / INNER;
    unsigned first = blockIdx.x * TILE, count = rows - first < TILE ? rows - first : TILE;
    word width = (word)n * size, kv_width = (word)n_kv * size;
    word at = first * width + head * size;
    float acc[OWN_ROWS][SPAN], products[PAIRS], dp[PAIRS];
    for (unsigned i = 0; i < OWN_ROWS; i++)
        for (unsigned j = 0; j < SPAN; j++) acc[i][j] = 0.0f;
    load_rows<TILE>(q + at, width, count, size, qs);
    load_rows<TILE>(d_out + at, width, count, size, os);
    for (unsigned key = first_key(heads, first, INNER); key < first + count; key += INNER) {
        unsigned keys = rows - key < INNER ? rows - key : INNER;
        word from = key * kv_width + kv_head * size;
        __syncthreads();
        load_rows<INNER>(v + from, kv_width, keys, size, others);
        __syncthreads();
        pair_dots(os, others, size, dp);
        __syncthreads();
        load_rows<INNER>(k + from, kv_width, keys, size, others);
        __syncthreads();
        pair_dots(qs, others, size, products);
        for (unsigned i = 0; i < PAIRS; i++) {
            unsigned own = group + GROUPS * i, row = first + own;
            word place = (word)head * rows + row;
            bool seen = own < count && other < keys && sees(heads, row, key + other);
            ds[own][other] = seen ? slope_of(heads, products[i], dp[i], logs[place], dots[place]).ds : 0.0f;
        }
        __syncthreads();
        add_weighted(ds, others, acc);
    }
    write_rows(acc, count, size, width, dq + at);
}

// The gradients of keys and values. One block per tile of keys and key head, which takes the query
// heads of its group, and the rows that see its keys, in order.
KERNEL attention_backward_kv(const float* q, const float* k, const float* v, const float* d_out,
                             const float* logs, const float* dots, unsigned rows, unsigned n, unsigned n_kv,
                             unsigned size, unsigned window, float scale, float cap, float* dk, float* dv) {
    __shared__ float ks[TILE][HEAD + 1], vs[TILE][HEAD + 1], others[INNER][HEAD + 1];
    __shared__ float ps[TILE][INNER + 1], ds[TILE][INNER + 1];
    Heads heads = {n, n_kv, size, window, scale, cap};
    unsigned kv_head = blockIdx.y, heads_each = n / n_kv;
    unsigned other = threadIdx.x % INNER, group = threadIdx.x / INNER;
    unsigned key = blockIdx.x * TILE, keys = rows - key < TILE ? rows - key : TILE;
    word width = (word)n * size, kv_width = (word)n_kv * size;
    word at = key * kv_width + kv_head * size;
    unsigned end = window && key + keys - 1 + window < rows ? key + keys - 1 + window : rows;
    float k_acc[OWN_ROWS][SPAN], v_acc[OWN_ROWS][SPAN], products[PAIRS], dp[PAIRS];
    for (unsigned i = 0; i < OWN_ROWS; i++)
        for (unsigned j = 0; j < SPAN; j++) k_acc[i][j] = v_acc[i][j] = 0.0f;
    load_rows<TILE>(k + at, kv_width, keys, size, ks);
    load_rows<TILE>(v + at, kv_width, keys, size, vs);
    for (unsigned head = kv_head * heads_each; head < (kv_head + 1) * heads_each; head++) {
        for (unsigned first = key; first < end; first += INNER) {
            unsigned count = rows - first < INNER ? rows - first : INNER, row = first + other;
            word from = first * width + head * size;
            __syncthreads();
            load_rows<INNER>(q + from, width, count, size, others);
            __syncthreads();
            pair_dots(ks, others, size, products);
            __syncthreads();
            load_rows<INNER>(d_out + from, width, count, size, others);
            __syncthreads();
            pair_dots(vs, others, size, dp);
            for (unsigned i = 0; i < PAIRS; i++) {
                unsigned own = group + GROUPS * i;
                word place = (word)head * rows + row;
                bool seen = own < keys && other < count && sees(heads, row, key + own);
                Slope slope = {0.0f, 0.0f};
                if (seen) slope = slope_of(heads, products[i], dp[i], logs[place], dots[place]);
                ps[own][other] = slope.p;
                ds[own][other] = slope.ds;
            }
            __syncthreads();
            add_weighted(ps, others, v_acc);
            __syncthreads();
            load_rows<INNER>(q + from, width, count, size, others);
            __syncthreads();
            add_weighted(ds, others, k_acc);
        }
    }
    write_rows(k_acc, keys, size, kv_width, dk + at);
    write_rows(v_acc, keys, size, kv_width, dv + at);
}
