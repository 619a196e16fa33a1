// K-means of two equal batches, from eight starts at once.
#pragma once
#include <numeric>

#include "regroup_nets.h"

namespace {

constexpr int kLanes = 8;
typedef int32_t Lanes __attribute__((vector_size(4 * kLanes)));  // a mask is -1 where it holds

// Lloyd's rounds: of the tokens, sorted by how much nearer they are to the mean of the first batch, as many as it has are its next
// ones. But for what is the same for all tokens, that is a sum over a token's experts, in whole numbers.
struct Means {
  const Nets& nets;
  Work& work;
  const int64_t kinds, experts;
  int64_t ours, theirs;  // sizes of the batches over their greatest common divisor
  int shift = 0;         // so that sums fit into 32 bits
  std::vector<Lanes> share, best, distance, one, weights;  // one number of every start
  Lanes least{};

  Means(const Nets& n, Work& w)
      : nets(n), work(w), kinds(n.kinds), experts(n.experts), share(kinds), best(kinds), distance(kinds), one(experts),
        weights(experts) {
    const int64_t common = std::gcd(n.size[1], n.size[0]);
    ours = n.size[1] / common, theirs = n.size[0] / common;
    int64_t most = 1;
    for (int64_t k = 0; k < kinds; ++k) most = std::max<int64_t>(most, n.first[k + 1] - n.first[k]);
    while ((n.tokens * std::max(ours, theirs) >> shift) * most >= 1 << 29) ++shift;
  }

  // From the tokens that have more in common with some random ones than with as many others: one in the first start, seven in
  // the last. Where there are many kinds of tokens, more than two have a side from the beginning then. The best partitions that
  // the rounds meet, and their costs.
  void run(Random& random, int rounds) {
    for (auto& w : weights) w = Lanes{};
    for (int lane = 0; lane < kLanes; ++lane)
      for (int i = 0; i < 2 * std::max(1, lane); ++i) {
        const int64_t kind = nets.of[random.below(nets.tokens)];
        for (int32_t j = nets.first[kind]; j < nets.first[kind + 1]; ++j) weights[nets.list[j]][lane] += i % 2 == 0 ? -1 : 1;
      }
    least = Lanes{} + INT32_MAX;
    for (int round = 0; round <= rounds; ++round) {
      nearest();
      count();
      for (int64_t e = 0; e < experts; ++e)
        for (int lane = 0; lane < kLanes; ++lane) {
          const int64_t mine = one[e][lane];
          weights[e][lane] = int32_t(((nets.total[e] - mine) * ours - mine * theirs) >> shift);
        }
    }
  }

  Shares partition(int lane) const {
    Shares found(kinds);
    for (int64_t k = 0; k < kinds; ++k) found[k] = best[k][lane];
    return found;
  }

 private:
  void count() {
    std::fill(one.begin(), one.end(), Lanes{});
    for (int64_t k = 0; k < kinds; ++k)
      for (int32_t i = nets.first[k]; i < nets.first[k + 1]; ++i) one[nets.list[i]] += share[k];
    Lanes cost = Lanes{} + nets.settled;
    for (int64_t e = 0; e < experts; ++e) cost -= (one[e] > 0) + (one[e] < nets.total[e]);
    const Lanes better = cost < least;
    bool any = false;
    for (int lane = 0; lane < kLanes; ++lane) any |= better[lane] != 0;
    if (!any) return;
    least = better ? cost : least;
    for (int64_t k = 0; k < kinds; ++k) best[k] = better ? share[k] : best[k];
  }

  // The tokens of the least sums of weights, ties to the earlier kinds. The greatest of these sums is found by halving.
  void nearest() {
    Lanes low = Lanes{} + INT32_MAX, high = Lanes{} + INT32_MIN;
    for (int64_t k = 0; k < kinds; ++k) {
      Lanes sum{};
      for (int32_t i = nets.first[k]; i < nets.first[k + 1]; ++i) sum += weights[nets.list[i]];
      distance[k] = sum;
      low = sum < low ? sum : low, high = sum > high ? sum : high;
    }
    const int32_t size = int32_t(nets.size[1]);
    int64_t halvings = 0;
    for (bool open = true; open; ++halvings) {
      const Lanes middle = low + ((high - low) >> 1);
      Lanes below{};
      for (int64_t k = 0; k < kinds; ++k) below += (distance[k] <= middle) & nets.count[k];
      high = below >= size ? middle : high, low = below > size ? low : below == size ? middle : middle + 1;
      open = false;
      for (int lane = 0; lane < kLanes; ++lane) open |= low[lane] < high[lane];
    }
    Lanes room = Lanes{} + size;
    for (int64_t k = 0; k < kinds; ++k) room -= (distance[k] < low) & nets.count[k];
    for (int64_t k = 0; k < kinds; ++k) {
      const Lanes all = Lanes{} + nets.count[k], last = (distance[k] == low) & (room < all ? room : all);
      room -= last;
      share[k] = ((distance[k] < low) & all) + last;
    }
    work.left -= 2 * int64_t(nets.list.size()) + (halvings + 4) * kinds + kLanes * experts;
  }
};

}  // namespace
