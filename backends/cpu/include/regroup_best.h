// Of few tokens: the best two batches there are.
#pragma once
#include "regroup_nets.h"

namespace {

constexpr int64_t kTried = 24, kSteps = 4000;  // of up to so many tokens it is looked for, for so many steps

// Branch and bound: the best there is, unless that takes too many steps; never worse than what it begins with.
struct Best {
  const Nets& nets;
  const int64_t words, tokens;
  Side now, side;
  int least;  // cost, but for that of the experts that are left out
  int64_t steps = 0;
  std::vector<uint64_t> bits;     // the experts of a token
  std::vector<uint64_t> touched;  // by depth: the experts of both batches so far

  Best(const Nets& n, const Side& start, int cost)
      : nets(n), words(n.words), tokens(n.tokens), now(tokens, 2), side(start), least(cost - n.settled), bits(tokens * words),
        touched(2 * (tokens + 1) * words) {
    for (int64_t t = 0; t < tokens; ++t)
      for (int32_t i = n.first[n.of[t]]; i < n.first[n.of[t] + 1]; ++i)
        bits[t * words + n.list[i] / 64] |= uint64_t(1) << (n.list[i] % 64);
    look(0, n.size[1], n.size[0]);
  }

  // Tokens that have no batch have 2. `room` are the places left in the first batch and in the other one.
  void look(int64_t depth, int64_t room, int64_t other_room) {
    if (++steps > kSteps) return;
    uint64_t* one = &touched[2 * depth * words];
    uint64_t* other = one + words;
    int bound = 0;
    std::vector<uint64_t> left(words), counted(words);
    for (int64_t t = 0; t < tokens; ++t)
      if (now[t] == 2)
        for (int64_t w = 0; w < words; ++w) left[w] |= bits[t * words + w];
    for (int64_t w = 0; w < words; ++w)
      bound += __builtin_popcountll(one[w]) + __builtin_popcountll(other[w]) +
               __builtin_popcountll(left[w] & ~(one[w] | other[w]));
    int64_t next = -1, most = -1;
    bool first = true;
    for (int64_t t = 0; t < tokens; ++t) {
      if (now[t] != 2) continue;
      // An expert of one batch alone costs once more where the token goes to the other; counted once over all tokens.
      int to_one = 0, to_other = 0, more_one = 0, more_other = 0;
      for (int64_t w = 0; w < words; ++w) {
        const uint64_t mine = bits[t * words + w];
        const uint64_t in_one = mine & one[w] & ~other[w], in_other = mine & other[w] & ~one[w];
        to_one += __builtin_popcountll(in_other), to_other += __builtin_popcountll(in_one);
        more_one += __builtin_popcountll(in_other & ~counted[w]);
        more_other += __builtin_popcountll(in_one & ~counted[w]);
      }
      if (const int more = std::min(more_one, more_other); more > 0) {
        bound += more;
        for (int64_t w = 0; w < words; ++w) counted[w] |= bits[t * words + w] & (one[w] ^ other[w]);
      }
      const int64_t weight = 1000 * std::min(to_one, to_other) + 10 * std::abs(to_one - to_other) +
                             (nets.first[nets.of[t] + 1] - nets.first[nets.of[t]]);
      if (weight > most) most = weight, next = t, first = to_one <= to_other;
    }
    if (bound >= least) return;
    if (next < 0) {
      least = bound, side = now;
      return;
    }
    const bool same = depth == 0 && room == other_room;  // the batches may change names
    for (int turn = 0; turn < (same ? 1 : 2); ++turn) {
      const bool to_one = (turn == 0) == first;
      if ((to_one ? room : other_room) == 0) continue;
      uint64_t* then = one + 2 * words;
      std::copy(one, one + 2 * words, then);
      for (int64_t w = 0; w < words; ++w) then[(to_one ? 0 : words) + w] |= bits[next * words + w];
      now[next] = to_one;
      look(depth + 1, room - to_one, other_room - !to_one);
      now[next] = 2;
    }
  }
};

}  // namespace
