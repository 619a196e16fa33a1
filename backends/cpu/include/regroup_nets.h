// Tokens by expert and experts by token: of the experts whose cost depends on the batches, and of tokens that differ in them.
#pragma once
#include "regroup_split.h"

namespace {

using Shares = std::vector<int32_t>;  // of every kind: how many of its tokens are in the first batch

// An expert of one token costs 1, and one of more tokens than either batch takes costs 2, wherever they go: these are left out.
// Tokens with the same of the other experts are of one kind.
struct Nets {
  int64_t tokens, experts = 0, words = 0, kinds = 0;
  int64_t size[2];                         // of the batches: the other one, the first
  std::vector<int32_t> first{0}, list;     // the experts of a kind, numbered anew: list[first[k]] to list[first[k + 1]]
  std::vector<int32_t> begin, members;     // the kinds of expert e: members[begin[e]] to members[begin[e + 1]]
  std::vector<int32_t> total, count, of;   // tokens of an expert and of a kind; the kind of a token
  int settled = 0;                         // what the experts that are left out cost

  Nets(const Chosen& chosen, const std::vector<int64_t>& some, int64_t n)
      : tokens(int64_t(some.size())), size{tokens - n, n}, of(tokens) {
    std::vector<int32_t> all(chosen.experts), number(chosen.experts, -1);
    for (int64_t t : some)
      for (int32_t i = chosen.first[t]; i < chosen.first[t + 1]; ++i) ++all[chosen.list[i]];
    for (int64_t e = 0; e < chosen.experts; ++e) {
      if (all[e] > 1 && all[e] <= std::max(size[0], size[1])) number[e] = int32_t(experts++), total.push_back(all[e]);
      else settled += (all[e] > 0) + (all[e] > 1);
    }
    words = (experts + 63) / 64;
    sort_into_kinds(chosen, some, number);
    begin.assign(experts + 1, 0);
    for (int32_t e : list) ++begin[e + 1];
    for (int64_t e = 0; e < experts; ++e) begin[e + 1] += begin[e];
    members.resize(list.size());
    std::vector<int32_t> at(begin.begin(), begin.end() - 1);
    for (int64_t k = 0; k < kinds; ++k)
      for (int32_t i = first[k]; i < first[k + 1]; ++i) members[at[list[i]]++] = int32_t(k);
  }

  int cost(const Shares& shares) const {
    int found = settled;
    for (int64_t e = 0; e < experts; ++e) {
      int32_t one = 0;
      for (int32_t j = begin[e]; j < begin[e + 1]; ++j) one += shares[members[j]];
      found += (one > 0) + (one < total[e]);
    }
    return found;
  }

  Shares shares(const Side& side) const {
    Shares found(kinds);
    for (int64_t t = 0; t < tokens; ++t) found[of[t]] += side[t];
    return found;
  }

  Side side(Shares shares) const {  // the earlier tokens of a kind are in the first batch
    Side found(tokens);
    for (int64_t t = 0; t < tokens; ++t) found[t] = shares[of[t]]-- > 0;
    return found;
  }

 private:
  void sort_into_kinds(const Chosen& chosen, const std::vector<int64_t>& some, const std::vector<int32_t>& number) {
    int64_t slots = 16;
    while (slots < 2 * tokens) slots *= 2;
    std::vector<int32_t> table(slots, -1);
    std::vector<uint64_t> bits, mine(words);
    list.reserve(chosen.list.size()), first.reserve(tokens + 1), bits.reserve(tokens * words);
    for (int64_t t = 0; t < tokens; ++t) {
      std::fill(mine.begin(), mine.end(), 0);
      const size_t before = list.size();
      for (int32_t i = chosen.first[some[t]]; i < chosen.first[some[t] + 1]; ++i)
        if (const int32_t e = number[chosen.list[i]]; e >= 0) list.push_back(e), mine[e / 64] |= uint64_t(1) << (e % 64);
      uint64_t hash = 0;
      for (uint64_t word : mine) hash = Random{hash ^ word}.next();
      int64_t at = int64_t(hash) & (slots - 1);
      while (table[at] >= 0 && !std::equal(mine.begin(), mine.end(), bits.begin() + table[at] * words))
        at = (at + 1) & (slots - 1);
      if (table[at] < 0) {
        table[at] = int32_t(kinds++);
        bits.insert(bits.end(), mine.begin(), mine.end());
        first.push_back(int32_t(list.size())), count.push_back(0);
      } else {
        list.resize(before);
      }
      of[t] = table[at], ++count[of[t]];
    }
  }
};

}  // namespace
