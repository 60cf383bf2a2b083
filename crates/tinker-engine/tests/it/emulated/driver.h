// What the engine calls of NVIDIA's driver, over emulated kernels: as strict as its documentation is about
// contexts, addresses and names.
#include <cstdio>
#include <map>
#include <mutex>

#pragma GCC visibility push(default)
extern "C" {

typedef unsigned long long Address;
enum { OK = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, INVALID_CONTEXT = 201, NOT_FOUND = 500 };

static std::mutex lock;
static std::map<Address, size_t> taken;
static int contexts;
static thread_local void* current;

// Whether a range is in memory that was taken.
static bool is_taken(Address at, size_t bytes) {
    std::lock_guard<std::mutex> guard(lock);
    auto after = taken.upper_bound(at);
    if (after == taken.begin()) return false;
    --after;
    return at + bytes <= after->first + after->second;
}

int cuInit(unsigned flags) { return flags ? INVALID_VALUE : OK; }
int cuDeviceGetCount(int* count) { return *count = 1, OK; }
int cuDeviceGet(int* device, int number) { return *device = 0, number ? INVALID_VALUE : OK; }
int cuDeviceGetName(char* name, int len, int) { return snprintf(name, (size_t)len, "stand-in"), OK; }
// The architecture is 9.0.
int cuDeviceGetAttribute(int* value, int which, int) {
    if (which != 75 && which != 76) return INVALID_VALUE;
    return *value = which == 75 ? 9 : 0, OK;
}
int cuDevicePrimaryCtxRetain(void** context, int) { return contexts++, *context = &contexts, OK; }
int cuDevicePrimaryCtxRelease_v2(int) { return contexts-- > 0 ? OK : INVALID_CONTEXT; }
int cuCtxSetCurrent(void* context) { return current = context, OK; }
int cuGetErrorName(int, const char** name) { return *name = "STAND_IN", OK; }
int cuGetErrorString(int, const char** text) { return *text = "the stand-in refuses", OK; }

int cuMemGetInfo_v2(size_t* free, size_t* total) {
    if (!current) return INVALID_CONTEXT;
    return *free = *total = (size_t)1 << 30, OK;
}
int cuMemAlloc_v2(Address* address, size_t bytes) {
    if (!current) return INVALID_CONTEXT;
    if (!bytes) return INVALID_VALUE;
    void* memory = aligned_alloc(256, (bytes + 255) / 256 * 256);
    if (!memory) return OUT_OF_MEMORY;
    memset(memory, 0xff, bytes);
    std::lock_guard<std::mutex> guard(lock);
    return taken[*address = (Address)memory] = bytes, OK;
}
int cuMemFree_v2(Address address) {
    if (!current) return INVALID_CONTEXT;
    std::lock_guard<std::mutex> guard(lock);
    if (!taken.erase(address)) return INVALID_VALUE;
    return free((void*)address), OK;
}
int cuMemcpyHtoD_v2(Address to, const void* from, size_t bytes) {
    if (!current) return INVALID_CONTEXT;
    return is_taken(to, bytes) ? memcpy((void*)to, from, bytes), OK : INVALID_VALUE;
}
int cuMemcpyDtoH_v2(void* to, Address from, size_t bytes) {
    if (!current) return INVALID_CONTEXT;
    return is_taken(from, bytes) ? memcpy(to, (void*)from, bytes), OK : INVALID_VALUE;
}
int cuMemcpyDtoDAsync_v2(Address to, Address from, size_t bytes, void*) {
    if (!current) return INVALID_CONTEXT;
    if (!is_taken(to, bytes) || !is_taken(from, bytes)) return INVALID_VALUE;
    return memcpy((void*)to, (void*)from, bytes), OK;
}
int cuMemsetD8Async(Address at, unsigned char value, size_t bytes, void*) {
    if (!current) return INVALID_CONTEXT;
    return is_taken(at, bytes) ? memset((void*)at, value, bytes), OK : INVALID_VALUE;
}

int cuModuleLoadData(void** module, const void* image) {
    if (!current) return INVALID_CONTEXT;
    // Machine code is an ELF file.
    return *module = &lock, memcmp(image, "\x7f" "ELF", 4) ? INVALID_VALUE : OK;
}
int cuModuleUnload(void* module) { return module == &lock && current ? OK : INVALID_VALUE; }
int cuModuleGetFunction(void** function, void*, const char* name) {
    for (const emulation::Entry* entry = ENTRIES; entry->name; entry++)
        if (strcmp(entry->name, name) == 0) return *function = (void*)entry, OK;
    return NOT_FOUND;
}
int cuLaunchKernel(void* function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned y_threads,
                   unsigned z_threads, unsigned shared, void*, void** args, void** extra) {
    if (!current) return INVALID_CONTEXT;
    bool fits = x && y && z && y <= 65535 && z <= 65535 && threads && threads <= 1024;
    if (!fits || y_threads != 1 || z_threads != 1 || shared || extra) return INVALID_VALUE;
    const unsigned grid[3] = {x, y, z};
    const char* name = ((const emulation::Entry*)function)->name;
    return emulation::launch(ENTRIES, name, grid, threads, emulation::BACKWARD, args) ? INVALID_VALUE : OK;
}

// What is left, for the test: allocations, and contexts that were not given back.
int stand_in_left() { return (int)taken.size() + contexts; }

}
#pragma GCC visibility pop
