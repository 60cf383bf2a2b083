// Enough of CUDA to run kernels on a processor: threads of a block are fibers that take turns at
// `__syncthreads`, blocks run one after the other.
#include <cmath>
#include <csetjmp>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <utility>
#include <vector>
#include <ucontext.h>

#define __global__
#define __device__
#define __shared__ static thread_local

struct Index {
    unsigned x, y, z;
};
static thread_local Index threadIdx, blockIdx, blockDim, gridDim;

static inline float __int_as_float(int bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}
static inline int __float_as_int(float x) {
    int bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

namespace emulation {

const size_t STACK = 32 << 10;

struct Fiber {
    ucontext_t context;
    jmp_buf place;
    bool started = false, done = false;
    std::vector<char> stack;
};

struct Body {
    void (*call)(void**);
    void** args;
};

static thread_local Body body;
// Not to be moved, as their contexts point into themselves.
static thread_local std::deque<Fiber> fibers;
static thread_local jmp_buf scheduler;
static thread_local Fiber* current;

// A fiber's life: one thread of a block after the other.
static void enter() {
    for (;;) {
        body.call(body.args);
        current->done = true;
        if (_setjmp(current->place) == 0) _longjmp(scheduler, 1);
    }
}

static void resume(Fiber& fiber, unsigned thread) {
    threadIdx = {thread, 0, 0};
    current = &fiber;
    if (_setjmp(scheduler) != 0) return;
    if (fiber.started) _longjmp(fiber.place, 1);
    fiber.started = true;
    getcontext(&fiber.context);
    fiber.stack.resize(STACK);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = STACK;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
    setcontext(&fiber.context);
}

static void yield() {
    if (!current) abort();
    if (_setjmp(current->place) == 0) _longjmp(scheduler, 1);
}

// Runs one block; returns false if threads disagree about how often to meet.
static bool block(unsigned threads) {
    if (fibers.size() < threads) fibers.resize(threads);
    for (unsigned t = 0; t < threads; t++) fibers[t].done = false;
    resume(fibers[0], 0);
    if (fibers[0].done) {
        // It never waited, so no thread may: they need no stacks of their own.
        current = nullptr;
        for (unsigned t = 1; t < threads; t++) {
            threadIdx = {t, 0, 0};
            body.call(body.args);
        }
        return true;
    }
    unsigned first = 1;
    for (;;) {
        for (unsigned t = first; t < threads; t++) resume(fibers[t], t);
        unsigned done = 0;
        for (unsigned t = 0; t < threads; t++) done += fibers[t].done ? 1 : 0;
        if (done == threads) return true;
        if (done != 0) return false;
        first = 0;
    }
}

template <typename... A, size_t... I>
static void apply(void (*kernel)(A...), void** args, std::index_sequence<I...>) {
    kernel(*(A*)args[I]...);
}
template <typename... A>
static void apply(void (*kernel)(A...), void** args) {
    apply(kernel, args, std::index_sequence_for<A...>());
}
template <auto kernel>
static void bridge(void** args) {
    apply(kernel, args);
}

struct Entry {
    const char* name;
    void (*call)(void**);
};

// 0, or 1 if there is no such kernel, 2 if its threads did not meet.
static int launch(const Entry* entries, const char* name, const unsigned* grid, unsigned threads, void** args) {
    for (const Entry* entry = entries; entry->name; entry++) {
        if (strcmp(entry->name, name) != 0) continue;
        gridDim = {grid[0], grid[1], grid[2]};
        blockDim = {threads, 1, 1};
        body = {entry->call, args};
        for (unsigned z = 0; z < grid[2]; z++)
            for (unsigned y = 0; y < grid[1]; y++)
                for (unsigned x = 0; x < grid[0]; x++) {
                    blockIdx = {x, y, z};
                    if (!block(threads)) return 2;
                }
        return 0;
    }
    return 1;
}

}  // namespace emulation

static inline void __syncthreads() { emulation::yield(); }
