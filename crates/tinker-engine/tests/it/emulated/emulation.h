// Enough of CUDA to run kernels on a processor: threads of a block are fibers that take turns at
// `__syncthreads`, blocks run one after the other.
//
// Blocks, and threads between two meetings, go in an order that the caller chooses: a result that needs
// one of them shows a race. Memory of a block is not a number until its threads write it.
#include <cmath>
#include <csetjmp>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <link.h>
#include <ucontext.h>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __shared__ static thread_local

struct Index {
    unsigned x, y, z;
};

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

// Orders of blocks and threads; greater numbers are seeds of shuffles.
enum : uint64_t { FORWARD = 0, BACKWARD = 1 };

struct State {
    Index thread, block, threads, grid;
    void (*call)(void**);
    void** args;
    // Not to be moved, as their contexts point into themselves.
    std::deque<Fiber> fibers;
    jmp_buf scheduler;
    Fiber* current = nullptr;
    uint64_t order, random;
    std::vector<unsigned> threads_in_order;
    // What threads of a warp show each other.
    std::vector<float> shown;
};

// The only variable of a thread that is not a kernel's.
static thread_local State* state;

// SplitMix64 (Steele et al. 2014).
static uint64_t draw() {
    uint64_t z = state->random += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

static void arrange(std::vector<unsigned>& order, unsigned n) {
    order.resize(n);
    for (unsigned i = 0; i < n; i++) order[i] = state->order == BACKWARD ? n - 1 - i : i;
    if (state->order <= BACKWARD) return;
    for (unsigned i = n; i > 1; i--) std::swap(order[i - 1], order[draw() % i]);
}

// Finds this library's variables of the calling thread: the memory of blocks.
static int find_variables(dl_phdr_info* info, size_t, void* found) {
    for (int i = 0; i < info->dlpi_phnum; i++) {
        const ElfW(Phdr)& header = info->dlpi_phdr[i];
        char* start = (char*)info->dlpi_tls_data;
        if (header.p_type != PT_TLS || !start) continue;
        if ((char*)&state < start || (char*)&state >= start + header.p_memsz) continue;
        *(std::pair<char*, size_t>*)found = {start, header.p_memsz};
        return 1;
    }
    return 0;
}

// Makes the memory of a block not a number.
static void forget() {
    static thread_local std::pair<char*, size_t>* found;
    State* kept = state;
    std::pair<char*, size_t>* variables = found;
    if (!variables) {
        variables = new std::pair<char*, size_t>;
        if (!dl_iterate_phdr(find_variables, variables)) abort();
    }
    memset(variables->first, 0xff, variables->second);
    found = variables;
    state = kept;
}

// A fiber's life: one thread of a block after the other.
static void enter() {
    for (;;) {
        state->call(state->args);
        state->current->done = true;
        if (_setjmp(state->current->place) == 0) _longjmp(state->scheduler, 1);
    }
}

static void resume(unsigned thread) {
    Fiber& fiber = state->fibers[thread];
    state->thread = {thread, 0, 0};
    state->current = &fiber;
    if (_setjmp(state->scheduler) != 0) return;
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
    if (!state->current) abort();
    if (_setjmp(state->current->place) == 0) _longjmp(state->scheduler, 1);
}

enum Outcome { ALONE, TOGETHER, APART };

// Runs one block; says whether its threads met, or disagreed about how often to.
static Outcome block() {
    unsigned threads = state->threads.x;
    const std::vector<unsigned>& order = state->threads_in_order;
    if (state->fibers.size() < threads) state->fibers.resize(threads);
    for (unsigned t = 0; t < threads; t++) state->fibers[t].done = false;
    arrange(state->threads_in_order, threads);
    resume(order[0]);
    if (state->fibers[order[0]].done) {
        // It never waited, so no thread may: they need no stacks of their own.
        state->current = nullptr;
        for (unsigned i = 1; i < threads; i++) {
            state->thread = {order[i], 0, 0};
            state->call(state->args);
        }
        return ALONE;
    }
    unsigned first = 1;
    for (;;) {
        for (unsigned i = first; i < threads; i++) resume(order[i]);
        unsigned done = 0;
        for (unsigned t = 0; t < threads; t++) done += state->fibers[t].done ? 1 : 0;
        if (done == threads) return TOGETHER;
        if (done != 0) return APART;
        arrange(state->threads_in_order, threads);
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
static int launch(const Entry* entries, const char* name, const unsigned* grid, unsigned threads,
                  uint64_t order, void** args) {
    if (!state) state = new State;
    for (const Entry* entry = entries; entry->name; entry++) {
        if (strcmp(entry->name, name) != 0) continue;
        state->grid = {grid[0], grid[1], grid[2]};
        state->threads = {threads, 1, 1};
        state->call = entry->call;
        state->args = args;
        state->order = state->random = order;
        std::vector<unsigned> blocks;
        arrange(blocks, grid[0] * grid[1] * grid[2]);
        bool meets = true;
        for (unsigned i : blocks) {
            state->block = {i % grid[0], i / grid[0] % grid[1], i / grid[0] / grid[1]};
            if (meets) forget();
            Outcome outcome = block();
            if (outcome == APART) return 2;
            meets = outcome == TOGETHER;
        }
        return 0;
    }
    return 1;
}

}  // namespace emulation

#define threadIdx (emulation::state->thread)
#define blockIdx (emulation::state->block)
#define blockDim (emulation::state->threads)
#define gridDim (emulation::state->grid)

static inline void __syncthreads() { emulation::yield(); }

// All threads of the block are to come here, also those of other warps; a GPU asks for less.
static inline float __shfl_xor_sync(unsigned, float value, unsigned apart) {
    std::vector<float>& shown = emulation::state->shown;
    if (shown.size() < blockDim.x) shown.resize(blockDim.x);
    unsigned own = threadIdx.x;
    shown[own] = value;
    __syncthreads();
    value = shown[own ^ apart];
    __syncthreads();
    return value;
}

// Blocks run one after the other, and see all that was written.
static inline void __threadfence() {}
static inline unsigned atomicAdd(unsigned* at, unsigned value) {
    unsigned before = *at;
    *at += value;
    return before;
}
