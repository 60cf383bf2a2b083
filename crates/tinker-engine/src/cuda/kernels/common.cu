// What all kernels share: numbers of 16 bits, and sums over a block in a fixed order.
//
// Every kernel is `extern "C"`, takes plain pointers and numbers, and writes each output from one
// thread, so that no result depends on the order in which blocks run. Products are added by `fmaf`
// where it matters; the compiler may not contract others.

#define KERNEL extern "C" __global__ void

typedef unsigned short bf16;
typedef unsigned long long word;

// Threads of a block that works on one row.
#define ROW_THREADS 128

__device__ inline float negative_infinity() { return __int_as_float((int)0xff800000u); }

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(bf16 x) { return __int_as_float((int)((unsigned)x << 16)); }

// Rounds to the nearest bf16, ties to even. Infinities stay; NaN is kept a NaN.
__device__ inline bf16 narrow(float x) {
    unsigned bits = (unsigned)__float_as_int(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (bf16)((bits >> 16) | 0x40u);
    return (bf16)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// The sum of `value` over a block of ROW_THREADS threads, to all of them, by halves.
__device__ inline float block_sum(float value, float* scratch) {
    unsigned t = threadIdx.x;
    __syncthreads();
    scratch[t] = value;
    for (unsigned half = ROW_THREADS / 2; half > 0; half /= 2) {
        __syncthreads();
        if (t < half) scratch[t] += scratch[t + half];
    }
    __syncthreads();
    return scratch[0];
}

// As block_sum, the largest; a NaN counts for nothing here and shows in the sum of exponentials.
__device__ inline float block_max(float value, float* scratch) {
    unsigned t = threadIdx.x;
    __syncthreads();
    scratch[t] = value;
    for (unsigned half = ROW_THREADS / 2; half > 0; half /= 2) {
        __syncthreads();
        if (t < half) scratch[t] = fmaxf(scratch[t], scratch[t + half]);
    }
    __syncthreads();
    return scratch[0];
}

// The largest `value` of a warp, to all of its threads; all of the block are to come here.
__device__ inline float warp_max(float value) {
    for (unsigned apart = 16; apart > 0; apart /= 2)
        value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, apart));
    return value;
}
