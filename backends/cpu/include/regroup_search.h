// Tabu search (Glover 1989) over the experts that are kept whole.
#pragma once
#include "regroup_parts.h"

namespace {

constexpr int kTurns = 100, kRest = 5;       // turns of a search; what was cut rests for five to ten of them
constexpr int kAgainst = 4096, kOver = 64;   // what an expert that has to be cut, and a token too many, weigh beside a token taken
constexpr int kPackEvery = 32;

// The price of keeping every expert, of which the cheapest is kept; what stands against it is cut and rests.
struct Search {
  Whole now;
  Random& random;
  std::vector<int32_t> rests;  // until which turn

  Search(const Nets& nets, Work& work, Random& r) : now(nets, work), random(r) {}

  // From `side`. The best partition is put into `best` where it costs less than `least`.
  void run(const Side& side, Side& best, int& least) {
    now.start(side);
    rests.assign(now.experts, 0);
    note(true, best, least);
    for (int turn = 1; turn <= kTurns && !now.work.over(); ++turn) {
      const uint32_t salt = uint32_t(random.next());
      const auto [next, to] = cheapest(turn, salt);
      if (next < 0) continue;
      for (int64_t w = 0; w < now.words; ++w)
        for (uint64_t x = now.beside[next * now.words + w] & now.kept[1 - to][w]; x; x &= x - 1)
          cut(w * 64 + __builtin_ctzll(x), turn);
      now.keep(next, to);
      while (now.taken[to] > now.nets.size[to]) cut(binds_most(next, to, salt), turn);
      note(turn % kPackEvery == 0, best, least);
    }
  }

 private:
  static int64_t tie(int64_t n, uint32_t salt) {  // 0 to 15
    return int64_t(((uint32_t(n) * 2654435761u ^ salt) * 2246822519u) >> 28);
  }

  void cut(int64_t e, int turn) {
    now.cut(e);
    rests[e] = turn + kRest + int32_t(random.below(kRest + 1));
  }

  void note(bool pack, Side& best, int& least) {
    if (!pack && now.cost() >= least) return;
    while (Parts(now).one_more()) {
    }
    if (now.cost() < least) least = now.cost(), best = now.side();
  }

  std::pair<int64_t, int> cheapest(int turn, uint32_t salt) const {
    const Nets& nets = now.nets;
    int64_t next = -1, least = INT64_MAX;
    int to = 0;
    for (int64_t e = 0; e < now.experts; ++e) {
      if (now.where[e] != kCut || rests[e] > turn) continue;
      for (int m = 0; m < 2; ++m) {
        if (nets.total(e) > nets.size[m]) continue;
        int64_t against = 0;
        for (int64_t w = 0; w < now.words; ++w)
          against += __builtin_popcountll(now.beside[e * now.words + w] & now.kept[1 - m][w]);
        const int64_t over = now.taken[m] + now.fresh[m][e] - nets.size[m];
        const int64_t price = against * kAgainst + (over > 0 ? kAgainst + over * kOver : 0) + now.fresh[m][e];
        if (const int64_t tied = price * 16 + tie(2 * e + m + 1, salt); tied < least) least = tied, next = e, to = m;
      }
    }
    now.work.left -= 40 + (2 * now.words + 3) * now.experts;
    return {next, to};
  }

  // Of the experts in a batch the one that binds most tokens alone; `but` only where there is no other.
  int64_t binds_most(int64_t but, int m, uint32_t salt) const {
    int64_t most = -1, found = but;
    for (int64_t e = 0; e < now.experts; ++e) {
      if (now.where[e] != m || e == but) continue;
      if (const int64_t tied = now.alone[e] * 16 + tie(e + 1, salt); tied > most) most = tied, found = e;
    }
    now.work.left -= now.experts;
    return found;
  }
};

}  // namespace
