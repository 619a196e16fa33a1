// One layer's kernel called with arrays: everything that kernel.py does in Python for the JIT.
#pragma once
#include "calls.h"
#include "experts.h"

namespace moec_aot {

constexpr int64_t LINE = 64;
constexpr int64_t lines(int64_t bytes) { return (bytes + LINE - 1) / LINE * LINE; }

// A stacked weight or bias: expert after expert, `row` the dimension from one row (or element) to the next.
template <class T> static inline moec::Matrix stacked(const Array& a, int row) {
    return {nullptr, a.data, a.strides[0] * (int64_t)sizeof(T), a.strides[row] * (int64_t)sizeof(T)};
}
// One tensor of every expert, from `first` on; `table` has room for their addresses.
template <class T> static inline moec::Matrix listed(const Array* first, int experts, int row, const char** table) {
    for (int e = 0; e < experts; e++) table[e] = first[e].data;
    return {table, nullptr, 0, first[0].strides[row] * (int64_t)sizeof(T)};
}
// Addresses of the experts' tensors, as numbers in a tensor; their rows lie `row` bytes apart.
static inline moec::Matrix addressed(const Array& addresses, int64_t from, int64_t row) {
    return {(const char* const*)addresses.data + from, nullptr, 0, row};
}
// The same matrix, `skip` bytes further on in every expert.
static inline moec::Matrix after(moec::Matrix m, int64_t skip) {
    m.base += skip;
    return m;
}

// Runs layer L. `place` fills in where its weights lie.
template <class L, class Place> static inline void run_experts(const ExpertsArrays& in, Place&& place) {
    using Layer = moec::Layer<L>;
    moec::Call c{};
    c.tokens = in.ids.sizes[0];
    c.top_k = in.ids.sizes[1];
    c.threads = in.threads;
    const int64_t slots = c.tokens * c.top_k;
    c.x = in.x.data;
    c.x_row = in.x.strides[0] * (int64_t)sizeof(typename L::T);
    c.ids = (const int64_t*)in.ids.data;
    c.weights = in.weights.data;
    c.out = in.out;
    c.room_bytes = lines(Layer::room_bytes(slots));
    place(c);
    const int64_t a = lines(slots * Layer::A_ROW), o = lines(slots * Layer::O_ROW);
    const int64_t ints = lines((int64_t)sizeof(int32_t) * (L::E + 1 + slots));
    char* memory = in.memory.take(a + o + ints + c.threads * c.room_bytes);
    c.a = memory;
    c.o = c.a + a;
    c.ints = (int32_t*)(c.o + o);
    c.room = c.o + o + ints;
    moec::experts<L>(c);
    in.memory.give_back(memory);
}

}  // namespace moec_aot
