// Tabu search (Glover 1989) over the experts that are kept whole.
#pragma once
#include "regroup_parts.h"

namespace {

constexpr int kTurns = 100, kRest = 5;       // turns of a search; what was cut rests for five to ten of them
constexpr int kAgainst = 4096, kOver = 64;   // what an expert that has to be cut, and a token too many, weigh beside a token taken
constexpr int kPackEvery = 32, kNear = 3;    // after so many turns parts are dealt out anew, where the cost is so near to the least

// The price of keeping every expert, of which the cheapest is kept; what stands against it is cut and rests.
struct Search {
  Whole now;
  Random& random;
  Row rests;  // until which turn

  Search(const Nets& nets, Work& work, Random& r) : now(nets, work), random(r) {}

  // From `shares`. The best partition is put into `best` where it costs less than `least`.
  void run(const Shares& shares, Shares& best, int& least) {
    now.start(shares);
    rests.assign(now.blocks, 0);
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
  typedef uint32_t Numbers __attribute__((vector_size(4 * kLanes)));

  static Lanes tie(Lanes n, uint32_t salt) {  // 0 to 15
    return Lanes(((Numbers(n) * 2654435761u ^ salt) * 2246822519u) >> 28);
  }

  void cut(int64_t e, int turn) {
    now.cut(e);
    rests[e] = turn + kRest + int32_t(random.below(kRest + 1));
  }

  void note(bool pack, Shares& best, int& least) {
    if (now.cost() >= least + (pack ? kNear : 0)) return;
    while (Parts(now).one_more()) {
    }
    if (now.cost() < least) least = now.cost(), best = now.shares();
  }

  // The number at the least value; the first of equal ones.
  static int32_t first_least(Lanes least, Lanes at) {
    int found = 0;
    for (int lane = 1; lane < kLanes; ++lane)
      if (least[lane] < least[found] || (least[lane] == least[found] && at[lane] < at[found])) found = lane;
    return at[found];
  }

  std::pair<int64_t, int> cheapest(int turn, uint32_t salt) const {
    Lanes least = Lanes{} + INT32_MAX, at = Lanes{} - 2, number{0, 2, 4, 6, 8, 10, 12, 14};
    const int32_t most[2] = {int32_t(now.nets.size[0]), int32_t(now.nets.size[1])};
    const int32_t room[2] = {most[0] - int32_t(now.taken[0]), most[1] - int32_t(now.taken[1])};
    for (int64_t b = 0; b < now.blocks; ++b, number += 2 * kLanes) {
      const Lanes free = (now.where.lanes[b] == kCut) & (rests.lanes[b] <= turn);
      for (int m = 0; m < 2; ++m) {
        const Lanes fresh = now.fresh[m].lanes[b], over = fresh - room[m];
        const Lanes price = now.against[1 - m].lanes[b] * kAgainst + ((over > 0) & (kAgainst + over * kOver)) + fresh;
        const Lanes tied = price * 16 + tie(number + m, salt);
        const Lanes less = free & (now.total.lanes[b] <= most[m]) & (tied < least);
        least = less ? tied : least, at = less ? number + m : at;
      }
    }
    now.work.left -= 40 + 5 * now.blocks;
    const int32_t found = first_least(least, at);
    return {found >> 1, found & 1};
  }

  // Of the experts in a batch the one that binds most tokens alone; `but` only where there is no other.
  int64_t binds_most(int64_t but, int m, uint32_t salt) const {
    Lanes least = Lanes{} + INT32_MAX, at = Lanes{} + int32_t(but), number{0, 1, 2, 3, 4, 5, 6, 7};
    for (int64_t b = 0; b < now.blocks; ++b, number += kLanes) {
      const Lanes tied = now.alone.lanes[b] * -16 - tie(number, salt);
      const Lanes less = (now.where.lanes[b] == m) & (number != int32_t(but)) & (tied < least);
      least = less ? tied : least, at = less ? number : at;
    }
    now.work.left -= 10 + 2 * now.blocks;
    return first_least(least, at);
  }
};

}  // namespace
