// What the engine calls of cuBLAS, by its documentation: matrices are column by column in memory.
#include <cmath>
#include <cstdint>
#include <cstring>

enum { OK = 0, NOT_INITIALIZED = 1, INVALID_VALUE = 7, NOT_SUPPORTED = 15 };
enum { PLAIN = 0, TURNED = 1, F32 = 0, BF16 = 14, COMPUTE_F32 = 68 };
// Sums in float, and no numbers of fewer bits for those of float.
static const int EXACT = 16;

static int handles, mode;

static float number(const void* at, int kind, size_t i) {
    if (kind == F32) return ((const float*)at)[i];
    uint32_t bits = (uint32_t)((const uint16_t*)at)[i] << 16;
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

#pragma GCC visibility push(default)
extern "C" {

int cublasCreate_v2(void** handle) { return handles++, mode = 0, *handle = &handles, OK; }
int cublasDestroy_v2(void* handle) { return handle == &handles ? OK : NOT_INITIALIZED; }
int cublasSetMathMode(void* handle, int wanted) {
    return mode = wanted, handle == &handles ? OK : NOT_INITIALIZED;
}

// `C [m, n] = alpha op(A) [m, k] op(B) [k, n] + beta C`.
int cublasGemmEx(void* handle, int of_a, int of_b, int m, int n, int k, const void* alpha, const void* a,
                 int a_kind, int lda, const void* b, int b_kind, int ldb, const void* beta, void* c, int c_kind,
                 int ldc, int compute, int) {
    if (handle != &handles) return NOT_INITIALIZED;
    bool known = (a_kind == F32 || a_kind == BF16) && b_kind == a_kind && c_kind == F32;
    if (!known || compute != COMPUTE_F32 || mode != EXACT) return NOT_SUPPORTED;
    if (lda < (of_a == PLAIN ? m : k) || ldb < (of_b == PLAIN ? k : n) || ldc < m) return INVALID_VALUE;
    float scale = *(const float*)alpha, keep = *(const float*)beta;
    for (int j = 0; j < n; j++) {
        for (int i = 0; i < m; i++) {
            float sum = 0.0f;
            for (int l = 0; l < k; l++) {
                size_t at_a = of_a == PLAIN ? i + (size_t)l * lda : l + (size_t)i * lda;
                size_t at_b = of_b == PLAIN ? l + (size_t)j * ldb : j + (size_t)l * ldb;
                sum = fmaf(number(a, a_kind, at_a), number(b, b_kind, at_b), sum);
            }
            float* out = (float*)c + i + (size_t)j * ldc;
            *out = scale * sum + (keep == 0.0f ? 0.0f : keep * *out);
        }
    }
    return OK;
}

}
