// Which experts stay whole in one batch: a partition of tokens, described by its experts.
#pragma once
#include "regroup_nets.h"

namespace {

constexpr uint8_t kCut = 2;

// An expert is kept in the first batch (1) or in the other one (0), or cut (2): it costs 1 or 2. Tokens of an expert that is kept
// are bound to its batch. No token is bound to both, and no more tokens to a batch than it takes; those that nothing binds fill up.
struct Whole {
  const Nets& nets;
  Work& work;
  const int64_t experts, words;
  std::vector<uint64_t> beside, kept[2];       // of every expert those that it shares a token with; who is kept where
  std::vector<int32_t> bound[2], binders[2];   // how many experts bind a token to a batch, and their numbers, by exclusive or
  std::vector<int32_t> fresh[2], alone;        // tokens of an expert that nothing binds to a batch; that it binds alone
  int64_t taken[2];                            // tokens bound to a batch
  std::vector<uint8_t> where;
  int whole = 0;                               // experts kept

  Whole(const Nets& n, Work& w) : nets(n), work(w), experts(n.experts), words(n.words), beside(experts * words) {
    std::vector<uint64_t> mine(words);
    for (int64_t t = 0; t < n.tokens; ++t) {
      std::fill(mine.begin(), mine.end(), 0);
      for (int32_t i = n.first[t]; i < n.first[t + 1]; ++i) mine[n.list[i] / 64] |= bit(n.list[i]);
      for (int32_t i = n.first[t]; i < n.first[t + 1]; ++i)
        for (int64_t v = 0; v < words; ++v) beside[n.list[i] * words + v] |= mine[v];
    }
    for (int64_t e = 0; e < experts; ++e) beside[e * words + e / 64] &= ~bit(e);
    work.left -= int64_t(n.list.size()) * (words + 1);
    clear();
  }

  static uint64_t bit(int64_t e) { return uint64_t(1) << (e % 64); }
  int cost() const { return nets.settled + 2 * int(experts) - whole; }

  void clear() {
    for (int m = 0; m < 2; ++m) {
      kept[m].assign(words, 0), bound[m].assign(nets.tokens, 0), binders[m].assign(nets.tokens, 0);
      fresh[m].resize(experts);
      for (int64_t e = 0; e < experts; ++e) fresh[m][e] = nets.total(e);
      taken[m] = 0;
    }
    where.assign(experts, kCut), alone.assign(experts, 0);
    whole = 0;
  }

  void keep(int64_t e, int m) {
    where[e] = uint8_t(m);
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
    int64_t steps = 10 + 2 * nets.total(e);
    for (int32_t j = nets.begin[e]; j < nets.begin[e + 1]; ++j) {
      const int32_t t = nets.members[j];
      if (bound[m][t] == 1) --alone[binders[m][t]];
      bound[m][t] += by, binders[m][t] ^= int32_t(e);
      if (bound[m][t] == 1) ++alone[binders[m][t]];
      if (bound[m][t] != (by > 0)) continue;  // it was bound before, or still is
      taken[m] += by;
      for (int32_t i = nets.first[t]; i < nets.first[t + 1]; ++i) fresh[m][nets.list[i]] -= by;
      steps += nets.first[t + 1] - nets.first[t];
    }
    work.left -= steps;
  }

  // From a partition: what it does not cut is kept.
  void start(const Side& side) {
    clear();
    for (int64_t e = 0; e < experts; ++e) {
      int32_t ones = 0;
      for (int32_t j = nets.begin[e]; j < nets.begin[e + 1]; ++j) ones += side[nets.members[j]];
      if (ones == 0 || ones == nets.total(e)) keep(e, ones > 0);
    }
  }

  Side side() const {
    Side found(nets.tokens);
    int64_t left = nets.size[1] - taken[1];
    for (int64_t t = 0; t < nets.tokens; ++t) found[t] = bound[1][t] > 0 || (bound[0][t] == 0 && left-- > 0);
    return found;
  }
};

}  // namespace
