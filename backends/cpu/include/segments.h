// Slots sorted by expert, cut into the segments that tasks take; and how threads take tasks.
#pragma once
#include <stdint.h>

#include <atomic>

namespace moec {

// Slots in the order of their experts, stable; slots of no expert are left out. offsets: [experts + 1].
static inline void sort_slots(const int64_t* ids, int64_t slots, int experts, int32_t* offsets, int32_t* order) {
    for (int e = 0; e <= experts; e++) offsets[e] = 0;
    for (int64_t s = 0; s < slots; s++)
        if (ids[s] >= 0 && ids[s] < experts) offsets[ids[s] + 1]++;
    for (int e = 0; e < experts; e++) offsets[e + 1] += offsets[e];
    for (int64_t s = 0; s < slots; s++)
        if (ids[s] >= 0 && ids[s] < experts) order[offsets[ids[s]]++] = (int32_t)s;
    for (int e = experts; e > 0; e--) offsets[e] = offsets[e - 1];
    offsets[0] = 0;
}

struct Segment {
    int expert, start, rows;
};

// The rows of the i-th task's expert: experts with many rows have several segments.
struct Segments {
    const int32_t* offsets;
    int most, count;  // rows of a segment, segments

    Segments(const int32_t* o, int experts, int most_) : offsets(o), most(most_), count(0) {
        for (int i = 0; i < experts; i++) count += pieces(i);
    }
    int pieces(int e) const { return (offsets[e + 1] - offsets[e] + most - 1) / most; }

    // Where the j-th of n pieces begins: after whole tiles of the widest kernel, or the last of each piece is half empty.
    static int whole(int rows, int j, int n) {
        const int at = (int)((int64_t)rows * j / n);
        return j < n ? (at + 16) / 32 * 32 : at;
    }

    // A cursor only moves forward: tasks are taken in order.
    struct Cursor {
        int expert = 0, before = 0;
    };
    Segment at(int i, Cursor& k) const {
        while (i >= k.before + pieces(k.expert)) k.before += pieces(k.expert++);
        int rows = offsets[k.expert + 1] - offsets[k.expert], n = pieces(k.expert), j = i - k.before;
        int start = whole(rows, j, n), stop = whole(rows, j + 1, n);
        return {k.expert, offsets[k.expert] + start, stop - start};
    }
};

// Tasks are taken one at a time by whoever is free; `run` also learns which one the thread takes after it, or -1.
template <class Do> static inline void share(std::atomic<int>& counter, int total, Do&& run) {
    int task = counter.fetch_add(1, std::memory_order_relaxed);
    while (task < total) {
        const int after = counter.fetch_add(1, std::memory_order_relaxed);
        run(task, after < total ? after : -1);
        task = after;
    }
}

}  // namespace moec
