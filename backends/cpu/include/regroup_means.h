// K-means of two equal batches, from eight pairs of tokens at once.
#pragma once
#include <numeric>

#include "regroup_split.h"

namespace {

constexpr int kLanes = 8;
typedef int32_t Lanes __attribute__((vector_size(4 * kLanes)));  // one number of every start; a mask is -1 where it holds

// Lloyd's rounds: of the tokens, sorted by how much nearer they are to the mean of the first batch, as many as it has are its next
// ones. But for what is the same for all tokens, that is a sum over a token's experts, in whole numbers.
struct Means {
  const Split& split;
  Work& work;
  const int64_t tokens, experts;
  int64_t ours, theirs;  // sizes of the batches over their greatest common divisor
  int shift = 0;         // so that sums fit into 32 bits
  std::vector<Lanes> side, best, distance, one, weights;
  Lanes least{};

  Means(const Split& s, Work& w)
      : split(s), work(w), tokens(s.tokens), experts(s.experts), side(tokens), best(tokens), distance(tokens), one(experts),
        weights(experts) {
    const int64_t common = std::gcd(split.size, tokens - split.size);
    ours = split.size / common, theirs = (tokens - split.size) / common;
    int64_t most = 1;
    for (int64_t t = 0; t < tokens; ++t) most = std::max<int64_t>(most, split.first[t + 1] - split.first[t]);
    while ((tokens * std::max(ours, theirs) >> shift) * most >= 1 << 29) ++shift;
  }

  // From the tokens nearer to the first of two than to the second. The best partitions that the rounds meet, and their costs.
  void run(const int64_t (&pairs)[kLanes][2], int rounds) {
    for (auto& w : weights) w = Lanes{};
    for (int lane = 0; lane < kLanes; ++lane)
      for (int which = 0; which < 2; ++which)
        for (int32_t i = split.first[pairs[lane][which]]; i < split.first[pairs[lane][which] + 1]; ++i)
          weights[split.list[i]][lane] += which == 0 ? -1 : 1;
    least = Lanes{} + INT32_MAX;
    for (int round = 0; round <= rounds; ++round) {
      nearest();
      count();
      for (int64_t e = 0; e < experts; ++e)
        for (int lane = 0; lane < kLanes; ++lane) {
          const int64_t mine = one[e][lane];
          weights[e][lane] = int32_t(((split.total[e] - mine) * ours - mine * theirs) >> shift);
        }
    }
  }

  void count() {
    std::fill(one.begin(), one.end(), Lanes{});
    for (int64_t t = 0; t < tokens; ++t)
      for (int32_t i = split.first[t]; i < split.first[t + 1]; ++i) one[split.list[i]] -= side[t];
    Lanes cost{};
    for (int64_t e = 0; e < experts; ++e) cost -= (one[e] > 0) + (one[e] < split.total[e]);
    const Lanes better = cost < least;
    bool any = false;
    for (int lane = 0; lane < kLanes; ++lane) any |= better[lane] != 0;
    if (!any) return;
    least = better ? cost : least;
    for (int64_t t = 0; t < tokens; ++t) best[t] = better ? side[t] : best[t];
  }

  // The tokens of the least sums of weights, ties to the earlier ones. The greatest of these sums is found by halving.
  void nearest() {
    Lanes low = Lanes{} + INT32_MAX, high = Lanes{} + INT32_MIN;
    for (int64_t t = 0; t < tokens; ++t) {
      Lanes sum{};
      for (int32_t i = split.first[t]; i < split.first[t + 1]; ++i) sum += weights[split.list[i]];
      distance[t] = sum;
      low = sum < low ? sum : low, high = sum > high ? sum : high;
    }
    const int32_t size = int32_t(split.size);
    int64_t halvings = 0;
    for (bool open = true; open; ++halvings) {
      const Lanes middle = low + ((high - low) >> 1);
      Lanes below{};
      for (int64_t t = 0; t < tokens; ++t) below -= distance[t] <= middle;
      const Lanes enough = below >= size;
      high = enough ? middle : high, low = enough ? low : middle + 1;
      open = false;
      for (int lane = 0; lane < kLanes; ++lane) open |= low[lane] < high[lane];
    }
    Lanes room = Lanes{} + size;
    for (int64_t t = 0; t < tokens; ++t) room += distance[t] < low;
    for (int64_t t = 0; t < tokens; ++t) {
      const Lanes last = (distance[t] == low) & (room > 0);
      room += last;
      side[t] = (distance[t] < low) | last;
    }
    work.left -= 2 * int64_t(split.list.size()) + (halvings + 4) * tokens + kLanes * experts;
  }

  Side partition(int lane) const {
    Side found(tokens);
    for (int64_t t = 0; t < tokens; ++t) found[t] = best[t][lane] != 0;
    return found;
  }
};

}  // namespace
