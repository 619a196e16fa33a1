// The part of an artifact's code that all its kernels share. Built for any x86-64, once for every artifact.
#include "runtime.h"

#include <cpuid.h>
#include <omp.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <mutex>
#include <stdexcept>

// The lowest instruction set that anything in the library uses, as a note that the system's loader reads: on a lesser
// processor it refuses the library ("CPU ISA level is lower than required") before a single instruction of it runs.
// The bits are those of the x86-64 psABI: 1 baseline, 2 v2, 4 v3 (AVX2), 8 v4 (AVX-512).
#define TEXT_(x) #x
#define TEXT(x) TEXT_(x)
__asm__(
    ".pushsection .note.gnu.property, \"a\"\n"
    ".p2align 3\n"
    ".long 4, 16, 5\n"
    ".asciz \"GNU\"\n"
    ".long 0xc0008002, 4, " TEXT(MOEC_ISA_NEEDED) ", 0\n"
    ".popsection\n");

namespace moec_aot {
namespace {

struct Registers {
    unsigned a = 0, b = 0, c = 0, d = 0;
    Registers(unsigned leaf, unsigned sub) {
        if (__get_cpuid_max(0, nullptr) >= leaf) __cpuid_count(leaf, sub, a, b, c, d);
    }
};
bool bit(unsigned word, int n) { return word >> n & 1; }

// The state that the operating system saves: 2 SSE, 4 AVX, 0xe0 AVX-512, 0x60000 AMX.
uint64_t saved_state() {
    if (!bit(Registers(1, 0).c, 27)) return 0;
    unsigned low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (uint64_t)high << 32 | low;
}

// Linux saves the tiles of AMX, 8 KB a thread, for processes alone that have asked.
bool tiles_granted() {
    const int request_permission = 0x1023, tile_data = 18;
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}

Level highest() {
    const uint64_t saved = saved_state();
    const Registers one(1, 0), seven(7, 0), seven_one(7, 1);
    if ((saved & 6) != 6 || !bit(one.c, 12) || !bit(one.c, 29) || !bit(seven.b, 5)) return NONE;  // FMA, F16C, AVX2
    const bool f = bit(seven.b, 16), dq = bit(seven.b, 17), bw = bit(seven.b, 30), vl = bit(seven.b, 31);
    if ((saved & 0xe6) != 0xe6 || !f || !dq || !bw || !vl) return AVX2;
    if (!bit(seven_one.a, 5)) return AVX512;
    if ((saved & 0x60000) != 0x60000 || !bit(seven.d, 22) || !bit(seven.d, 24) || !tiles_granted()) return AVX512_BF16;
    return AMX;
}

const char* const NAMES[LEVELS] = {"none", "avx2", "avx512", "avx512_bf16", "amx"};

Level wanted() {
    const char* name = getenv("MOEC_ISA");
    for (int i = NONE; name && i < LEVELS; i++)
        if (strcmp(name, NAMES[i]) == 0) return (Level)i;
    return AMX;
}

// One buffer waits for the next call: fresh pages for every call cost a visible part of a layer's time.
std::mutex lock;
struct Block {
    char* at = nullptr;
    int64_t bytes = 0;
    ~Block() { free(at); }
} kept;
const int64_t KEPT_BYTES = 256 << 20, HEADER = 64;

char* take(int64_t bytes) {
    char* found = nullptr;
    {
        std::lock_guard<std::mutex> hold(lock);
        if (kept.at && kept.bytes >= bytes) {
            found = kept.at;
            kept.at = nullptr;
        }
    }
    if (!found) {
        found = (char*)aligned_alloc(64, (bytes + HEADER + 63) / 64 * 64);
        if (!found) throw std::runtime_error("moec: no memory is left for " + std::to_string(bytes) + " bytes of a layer's rows");
        memcpy(found, &bytes, sizeof bytes);
    }
    return found + HEADER;
}

void give_back(char* memory) {
    char* block = memory - HEADER;
    int64_t bytes;
    memcpy(&bytes, block, sizeof bytes);
    if (bytes <= KEPT_BYTES) {
        std::lock_guard<std::mutex> hold(lock);
        if (!kept.at || kept.bytes < bytes) {
            char* old = kept.at;
            kept.at = block;
            kept.bytes = bytes;
            block = old;
        }
    }
    free(block);
}

void must(AOTITorchError error) {
    if (error) throw std::runtime_error("moec: torch refused a tensor");
}

}  // namespace

Level level() {
    static const Level found = highest();
    const Level most = wanted();
    return found < most ? found : most;
}

void refuse(const char* lowest) {
    throw std::runtime_error(std::string("moec: this processor has no more than '") + NAMES[level()] +
                             "' of the instruction sets, the artifact needs '" + lowest +
                             "'; compile the model again with --target cpu");
}

Memory shared_memory() { return {take, give_back}; }

int64_t threads() { return omp_get_max_threads(); }

Array array_of(AtenTensorHandle tensor) {
    void* data;
    int64_t *sizes, *strides;
    must(aoti_torch_get_data_ptr(tensor, &data));
    must(aoti_torch_get_sizes(tensor, &sizes));
    must(aoti_torch_get_strides(tensor, &strides));
    return {(char*)data, sizes, strides};
}

AtenTensorHandle empty(int64_t rows, int64_t columns, int32_t dtype, char** data) {
    AtenTensorHandle made;
    const int64_t sizes[] = {rows, columns}, strides[] = {columns, 1};
    must(aoti_torch_empty_strided(2, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, &made));
    *data = array_of(made).data;
    return made;
}

AtenTensorHandle empty_vector(int64_t size, int64_t** data) {
    AtenTensorHandle made;
    const int64_t stride = 1;
    must(aoti_torch_empty_strided(1, &size, &stride, aoti_torch_dtype_int64(), aoti_torch_device_type_cpu(), 0, &made));
    *data = (int64_t*)array_of(made).data;
    return made;
}

void check_ids(const Array& ids, int64_t experts, const char* op) {
    const auto* at = (const int64_t*)ids.data;
    for (int64_t i = 0; i < ids.sizes[0] * ids.sizes[1]; i++)
        if (at[i] < 0 || at[i] >= experts)
            throw std::runtime_error(std::string(op) + ": expert id " + std::to_string(at[i]) + " is out of range: there are " +
                                     std::to_string(experts) + " experts");
}

void check_contiguous(const Array& m, const char* what, const char* op) {
    const bool rows = m.sizes[0] < 2 || m.strides[0] == m.sizes[1], columns = m.sizes[1] < 2 || m.strides[1] == 1;
    if (!rows || !columns) throw std::runtime_error(std::string(op) + ": " + what + " must be contiguous");
}

}  // namespace moec_aot
