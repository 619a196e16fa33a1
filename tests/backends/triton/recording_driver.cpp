// Stands in for libcuda.so.1 and libamdhip64.so: loads anything, and remembers the last launch.
#include <cstdint>
#include <cstring>

typedef unsigned u;
struct Config {
    u x, y, z, bx, by, bz, shared;
    void* stream;
    void* attributes;
    u count;
};

extern "C" {
struct Seen {
    u grid[3], block[3], shared, attributes;
    uint64_t stream;
    unsigned char bytes[512];
} seen;
int sizes[64], count = 0;

static int keep(u x, u y, u z, u bx, u by, u bz, u shared, void* stream, void** p, u attributes) {
    std::memset(&seen, 0, sizeof seen);
    seen = {{x, y, z}, {bx, by, bz}, shared, attributes, (uint64_t)stream, {}};
    int at = 0;
    for (int i = 0; i < count; at += 8, i++) std::memcpy(seen.bytes + at, p[i], sizes[i]);
    return 0;
}

// CUDA
int cuCtxGetCurrent(void** context) { return *context = (void*)1, 0; }
int cuCtxSetCurrent(void*) { return 0; }
int cuCtxGetDevice(int* device) { return *device = 0, 0; }
int cuCtxGetLimit(uint64_t* value, int) { return *value = 0, 0; }
int cuCtxSetLimit(int, uint64_t) { return 0; }
int cuDeviceGet(int* device, int) { return *device = 0, 0; }
int cuDeviceGetAttribute(int* value, int, int) { return *value = 227 * 1024, 0; }
int cuDevicePrimaryCtxRetain(void** context, int) { return *context = (void*)1, 0; }
int cuDevicePrimaryCtxRelease_v2(int) { return 0; }
int cuDriverGetVersion(int* version) { return *version = 13000, 0; }
int cuFuncGetAttribute(int* value, int, void*) { return *value = 0, 0; }
int cuFuncSetAttribute(void*, int, int) { return 0; }
int cuFuncSetCacheConfig(void*, int) { return 0; }
int cuGetErrorString(int, const char** text) { return *text = "error", 0; }
int cuModuleLoadData(void** module, const void*) { return *module = (void*)2, 0; }
int cuModuleGetFunction(void** f, void*, const char*) { return *f = (void*)3, 0; }
int cuModuleUnload(void*) { return 0; }
int cuOccupancyMaxActiveClusters(int* value, void*, void*) { return *value = 1, 0; }
int cuPointerGetAttribute(void* value, int, uint64_t pointer) { return *(uint64_t*)value = pointer, 0; }
int cuStreamIsCapturing(void*, int* is) { return *is = 0, 0; }
int cuTensorMapEncodeTiled() { return 0; }
int cuTensorMapEncodeIm2col() { return 0; }
int cuLaunchKernelEx(const Config* c, void*, void** p, void**) {
    return keep(c->x, c->y, c->z, c->bx, c->by, c->bz, c->shared, c->stream, p, c->count);
}
int cuLaunchKernel(void*, u x, u y, u z, u bx, u by, u bz, u shared, void* stream, void** p, void**) {
    return keep(x, y, z, bx, by, bz, shared, stream, p, 0);
}

// HIP
int hipDriverGetVersion(int* version) { return *version = 70000000, 0; }
const char* hipGetLastError() { return ""; }
const char* hipGetErrorString(int) { return "error"; }
int hipGetDeviceProperties(void*, int) { return 0; }
int hipModuleLoadData(void** module, const void*) { return *module = (void*)2, 0; }
int hipModuleLoadDataEx(void** module, const void*, u, void*, void**) { return *module = (void*)2, 0; }
int hipModuleUnload(void*) { return 0; }
int hipModuleGetFunction(void** f, void*, const char*) { return *f = (void*)3, 0; }
int hipFuncGetAttribute(int* value, int, void*) { return *value = 1024, 0; }
int hipPointerGetAttribute(void* value, int, void* pointer) { return *(void**)value = pointer, 0; }
int hipDrvLaunchKernelEx(const Config*, void*, void**, void**) { return 1; }
int hipModuleLaunchCooperativeKernel() { return 1; }
int hipModuleLaunchKernel(void*, u x, u y, u z, u bx, u by, u bz, u shared, void* stream, void** p, void**) {
    return keep(x, y, z, bx, by, bz, shared, stream, p, 0);
}
struct Named {
    const char* name;
    void* function;
} names[] = {
    {"hipGetLastError", (void*)hipGetLastError}, {"hipGetErrorString", (void*)hipGetErrorString},
    {"hipGetDeviceProperties", (void*)hipGetDeviceProperties}, {"hipModuleLoadDataEx", (void*)hipModuleLoadDataEx},
    {"hipModuleUnload", (void*)hipModuleUnload}, {"hipModuleGetFunction", (void*)hipModuleGetFunction},
    {"hipFuncGetAttribute", (void*)hipFuncGetAttribute}, {"hipDrvLaunchKernelEx", (void*)hipDrvLaunchKernelEx},
    {"hipModuleLaunchKernel", (void*)hipModuleLaunchKernel},
    {"hipModuleLaunchCooperativeKernel", (void*)hipModuleLaunchCooperativeKernel},
    {"hipPointerGetAttribute", (void*)hipPointerGetAttribute},
};
int hipGetProcAddress(const char* name, void** function, int, uint64_t, void*) {
    for (Named& known : names)
        if (!std::strcmp(known.name, name)) return *function = known.function, 0;
    return 1;
}
}
