// Which experts stay whole in one batch: a partition of tokens, described by its experts.
#pragma once
#include "regroup_means.h"

namespace {

constexpr int32_t kCut = 2, kNone = 3;

struct Row {  // a number of every expert, kLanes at once; the last ones may be of none
  std::vector<Lanes> lanes;
  void assign(int64_t blocks, int32_t value) { lanes.assign(blocks, Lanes{} + value); }
  int32_t& operator[](int64_t e) { return reinterpret_cast<int32_t*>(lanes.data())[e]; }
  int32_t operator[](int64_t e) const { return reinterpret_cast<const int32_t*>(lanes.data())[e]; }
};

// An expert is kept in the first batch (1) or in the other one (0), or cut (2): it costs 1 or 2. Tokens of an expert that is kept
// are bound to its batch. No token is bound to both, and no more tokens to a batch than it takes; those that nothing binds fill up.
struct Whole {
  const Nets& nets;
  Work& work;
  const int64_t experts, words, blocks;
  std::vector<uint64_t> beside, kept[2];      // of every expert those that it shares a token with; who is kept where
  std::vector<int32_t> bound[2], binders[2];  // how many experts bind a kind to a batch, and their numbers, by exclusive or
  Row fresh[2], against[2], alone;  // tokens of an expert that nothing binds to a batch; kept ones beside it; tokens it binds alone
  Row where, total;
  int64_t taken[2];                           // tokens bound to a batch
  int whole = 0;                              // experts kept

  Whole(const Nets& n, Work& w)
      : nets(n), work(w), experts(n.experts), words(n.words), blocks((n.experts + kLanes - 1) / kLanes),
        beside(experts * words) {
    std::vector<uint64_t> mine(words);
    for (int64_t k = 0; k < n.kinds; ++k) {
      std::fill(mine.begin(), mine.end(), 0);
      for (int32_t i = n.first[k]; i < n.first[k + 1]; ++i) mine[n.list[i] / 64] |= bit(n.list[i]);
      for (int32_t i = n.first[k]; i < n.first[k + 1]; ++i)
        for (int64_t v = 0; v < words; ++v) beside[n.list[i] * words + v] |= mine[v];
    }
    for (int64_t e = 0; e < experts; ++e) beside[e * words + e / 64] &= ~bit(e);
    total.assign(blocks, 0);
    for (int64_t e = 0; e < experts; ++e) total[e] = n.total[e];
    work.left -= int64_t(n.list.size()) * (words + 1);
    clear();
  }

  static uint64_t bit(int64_t e) { return uint64_t(1) << (e % 64); }
  int cost() const { return nets.settled + 2 * int(experts) - whole; }

  void clear() {
    for (int m = 0; m < 2; ++m) {
      kept[m].assign(words, 0), bound[m].assign(nets.kinds, 0), binders[m].assign(nets.kinds, 0);
      fresh[m] = total, against[m].assign(blocks, 0);
      taken[m] = 0;
    }
    where.assign(blocks, kNone), alone.assign(blocks, 0);
    for (int64_t e = 0; e < experts; ++e) where[e] = kCut;
    whole = 0;
    work.left -= nets.kinds + experts;
  }

  void keep(int64_t e, int m) {
    where[e] = m;
    change(e, m, 1);
  }

  void cut(int64_t e) {
    const int m = where[e];
    where[e] = kCut;
    change(e, m, -1);
  }

  void change(int64_t e, int m, int by) {
    kept[m][e / 64] ^= bit(e);
    whole += by;
    constexpr Lanes bits{1, 2, 4, 8, 16, 32, 64, 128};
    for (int64_t b = 0; b < blocks; ++b) {
      const int32_t here = int32_t(beside[e * words + b / 8] >> (b % 8 * 8) & 255);
      against[m].lanes[b] -= (((Lanes{} + here) & bits) != 0) * by;
    }
    int64_t steps = 10 + blocks + 2 * (nets.begin[e + 1] - nets.begin[e]);
    for (int32_t j = nets.begin[e]; j < nets.begin[e + 1]; ++j) {
      const int32_t k = nets.members[j], count = nets.count[k];
      if (bound[m][k] == 1) alone[binders[m][k]] -= count;
      bound[m][k] += by, binders[m][k] ^= int32_t(e);
      if (bound[m][k] == 1) alone[binders[m][k]] += count;
      if (bound[m][k] != (by > 0)) continue;  // it was bound before, or still is
      taken[m] += by * count;
      for (int32_t i = nets.first[k]; i < nets.first[k + 1]; ++i) fresh[m][nets.list[i]] -= by * count;
      steps += nets.first[k + 1] - nets.first[k];
    }
    work.left -= steps;
  }

  // From a partition: what it does not cut is kept.
  void start(const Shares& shares) {
    clear();
    for (int64_t e = 0; e < experts; ++e) {
      int32_t ones = 0;
      for (int32_t j = nets.begin[e]; j < nets.begin[e + 1]; ++j) ones += shares[nets.members[j]];
      if (ones == 0 || ones == nets.total[e]) keep(e, ones > 0);
    }
  }

  Shares shares() const {
    Shares found(nets.kinds);
    int64_t left = nets.size[1] - taken[1];
    for (int64_t k = 0; k < nets.kinds; ++k) {
      if (bound[0][k] > 0) continue;
      found[k] = bound[1][k] > 0 ? nets.count[k] : int32_t(std::min<int64_t>(left, nets.count[k]));
      if (bound[1][k] == 0) left -= found[k];
    }
    return found;
  }
};

}  // namespace
