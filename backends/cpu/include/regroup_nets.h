// Tokens by expert and experts by token, of the experts that it depends on the batches how much they cost.
#pragma once
#include "regroup_split.h"

namespace {

// An expert of one token costs 1, and one of more tokens than either batch takes costs 2, wherever they go: these are left out.
struct Nets {
  int64_t tokens, experts = 0, words;
  int64_t size[2];                      // of the batches: the other one, the first
  std::vector<int32_t> first{0}, list;  // the experts of token t, numbered anew: list[first[t]] to list[first[t + 1]]
  std::vector<int32_t> begin{0}, members;  // the tokens of expert e: members[begin[e]] to members[begin[e + 1]]
  int settled = 0;                         // what the experts that are left out cost

  explicit Nets(const Split& split) : tokens(split.tokens), size{split.tokens - split.size, split.size} {
    std::vector<int32_t> number(split.experts, -1);
    for (int64_t e = 0; e < split.experts; ++e) {
      const int32_t all = split.total[e];
      if (all > 1 && all <= std::max(size[0], size[1])) number[e] = int32_t(experts++), begin.push_back(begin.back() + all);
      else settled += (all > 0) + (all > 1);
    }
    members.resize(begin.back()), list.reserve(begin.back()), first.reserve(tokens + 1);
    std::vector<int32_t> at(begin.begin(), begin.end() - 1);
    for (int64_t t = 0; t < tokens; ++t) {
      for (int32_t i = split.first[t]; i < split.first[t + 1]; ++i)
        if (const int32_t e = number[split.list[i]]; e >= 0) list.push_back(e), members[at[e]++] = int32_t(t);
      first.push_back(int32_t(list.size()));
    }
    words = (experts + 63) / 64;
  }

  int32_t total(int64_t e) const { return begin[e + 1] - begin[e]; }
};

}  // namespace
