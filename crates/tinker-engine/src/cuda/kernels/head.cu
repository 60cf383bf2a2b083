// The output head's share of the loss: log-probabilities of targets, and the gradient of the logits.

// One block per row of `logits [rows, vocab]`: the log of the sum of exponentials, and the logit of each
// of the row's `k` targets.
KERNEL head_scores(const float* logits, unsigned vocab, const unsigned* targets, unsigned k, float* log_sum,
                   float* chosen) {
    __shared__ float scratch[ROW_THREADS];
    const float* row = logits + (word)blockIdx.x * vocab;
    float most = negative_infinity();
    for (unsigned i = threadIdx.x; i < vocab; i += ROW_THREADS) most = fmaxf(most, row[i]);
    most = block_max(most, scratch);
    float sum = 0.0f;
    for (unsigned i = threadIdx.x; i < vocab; i += ROW_THREADS) sum += expf(row[i] - most);
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0) log_sum[blockIdx.x] = most + logf(sum);
    for (unsigned i = threadIdx.x; i < k; i += ROW_THREADS)
        chosen[(word)blockIdx.x * k + i] = row[targets[(word)blockIdx.x * k + i]];
}

// Turns logits into the gradient of the loss for them. With `c_t = dL/dl_t` of each target that is
// `sum_t c_t onehot(t) - (sum_t c_t) softmax`, and back through the cap, if it is above 0.
KERNEL head_gradient(float* logits, unsigned vocab, const unsigned* targets, const float* coefficients,
                     unsigned k, const float* log_sum, float cap) {
    float* row = logits + (word)blockIdx.x * vocab;
    const unsigned* own = targets + (word)blockIdx.x * k;
    const float* c = coefficients + (word)blockIdx.x * k;
    float total = 0.0f;
    for (unsigned t = 0; t < k; t++) total += c[t];
    for (unsigned i = threadIdx.x; i < vocab; i += blockDim.x) {
        float d = -total * expf(row[i] - log_sum[blockIdx.x]);
        for (unsigned t = 0; t < k; t++)
            if (own[t] == i) d += c[t];
        if (cap > 0.0f) {
            float bent = row[i] / cap;
            d *= 1.0f - bent * bent;
        }
        row[i] = d;
    }
}
