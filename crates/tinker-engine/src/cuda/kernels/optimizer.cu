// AdamW (Loshchilov and Hutter 2019, algorithm 2, in the order PyTorch computes it).

struct Step {
    float clip, keep, rate, rest1, beta2, rest2, root2, eps;
};

__device__ inline void adamw_one(Step s, float w, float g, float m, float v, float* out) {
    g = g * s.clip;
    m = m + (g - m) * s.rest1;
    v = s.beta2 * v + s.rest2 * g * g;
    out[0] = w * s.keep - s.rate * m / (sqrtf(v) / s.root2 + s.eps);
    out[1] = m;
    out[2] = v;
}

__device__ inline bool is_finite(float x) { return (__float_as_int(x) & 0x7f800000) != 0x7f800000; }

// Takes a step of `n` weights into `after [3, n]`: weights and moments. `bad[block]` says whether one
// of the block's is not finite.
KERNEL adamw(const float* w, const float* g, const float* m, const float* v, word n, float clip, float keep,
             float rate, float rest1, float beta2, float rest2, float root2, float eps, float* after,
             unsigned* bad) {
    __shared__ unsigned overflowed;
    if (threadIdx.x == 0) overflowed = 0;
    __syncthreads();
    word i = (word)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) {
        Step step = {clip, keep, rate, rest1, beta2, rest2, root2, eps};
        float out[3];
        adamw_one(step, w[i], g[i], m[i], v[i], out);
        for (unsigned part = 0; part < 3; part++) {
            after[part * n + i] = out[part];
            if (!is_finite(out[part])) overflowed = 1;
        }
    }
    __syncthreads();
    if (threadIdx.x == 0) bad[blockIdx.x] = overflowed;
}
