// What tokens chose, all of them and those of two batches.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

namespace {

using Side = std::vector<uint8_t>;

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

struct Split {
  int64_t tokens, experts, size, words;
  std::vector<int32_t> first{0}, list;  // the experts of token t: list[first[t]] to list[first[t + 1]]
  std::vector<uint64_t> bits;           // and as a mask
  std::vector<int32_t> total;

  Split(const Chosen& all, const std::vector<int64_t>& some, int64_t n)
      : tokens(int64_t(some.size())), experts(all.experts), size(n), words((all.experts + 63) / 64),
        bits(tokens * words), total(experts) {
    list.reserve(all.list.size());
    for (int64_t t = 0; t < tokens; ++t) {
      for (int32_t i = all.first[some[t]]; i < all.first[some[t] + 1]; ++i) {
        const int32_t e = all.list[i];
        list.push_back(e);
        bits[t * words + e / 64] |= uint64_t(1) << (e % 64);
        ++total[e];
      }
      first.push_back(int32_t(list.size()));
    }
  }

  int cost(const Side& side) const {
    std::vector<int32_t> one(experts);
    for (int64_t t = 0; t < tokens; ++t)
      for (int32_t i = first[t]; i < first[t + 1] && side[t]; ++i) ++one[list[i]];
    int found = 0;
    for (int64_t e = 0; e < experts; ++e) found += (one[e] > 0) + (total[e] > one[e]);
    return found;
  }
};

}  // namespace
