// What tokens chose, what may be spent, and a partition of tokens.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

namespace {

using Side = std::vector<uint8_t>;  // of every token: 1 in the first batch, 0 in the other one

struct Work {  // what may still be done, in steps of a nanosecond or two: counted, so that it is the same everywhere
  int64_t left = 0;
  bool over() const { return left <= 0; }
};

struct Random {  // splitmix64
  uint64_t state = 0;
  uint64_t next() {
    uint64_t z = (state += 0x9e3779b97f4a7c15ull);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
  }
  int64_t below(int64_t n) { return int64_t(next() % uint64_t(n)); }
};

struct Chosen {  // the experts of every token, each once
  int64_t experts = 0;
  std::vector<int32_t> first{0}, list;

  int64_t tokens() const { return int64_t(first.size()) - 1; }

  int cost(const int64_t* batch, int64_t size, std::vector<uint8_t>& seen) const {
    std::fill(seen.begin(), seen.end(), 0);
    int found = 0;
    for (int64_t i = 0; i < size; ++i)
      for (int32_t j = first[batch[i]]; j < first[batch[i] + 1]; ++j) found += !seen[list[j]], seen[list[j]] = 1;
    return found;
  }
};

}  // namespace
