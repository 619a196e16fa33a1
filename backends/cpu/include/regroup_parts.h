// Kept experts that share tokens, directly or through others, go together. Such parts can be dealt out anew.
#pragma once
#include "regroup_whole.h"

namespace {

struct Parts {
  Whole& now;
  const Nets& nets;
  std::vector<int32_t> of, mine, weight;  // the part of an expert and of a kind, or -1; tokens of a part

  explicit Parts(Whole& w) : now(w), nets(w.nets), of(w.experts, -1), mine(nets.kinds, -1) {
    std::vector<int32_t> stack;
    for (int64_t e = 0; e < now.experts; ++e) {
      if (now.where[e] == kCut || of[e] >= 0) continue;
      const int32_t part = int32_t(weight.size());
      weight.push_back(0);
      of[e] = part, stack.push_back(int32_t(e));
      while (!stack.empty()) {
        const int32_t f = stack.back();
        stack.pop_back();
        for (int32_t j = nets.begin[f]; j < nets.begin[f + 1]; ++j)
          if (int32_t& k = mine[nets.members[j]]; k < 0) k = part, weight[part] += nets.count[nets.members[j]];
        for (int64_t w = 0; w < now.words; ++w)
          for (uint64_t x = now.beside[f * now.words + w] & (now.kept[0][w] | now.kept[1][w]); x; x &= x - 1)
            if (const int64_t g = w * 64 + __builtin_ctzll(x); of[g] < 0) of[g] = part, stack.push_back(int32_t(g));
      }
    }
    now.work.left -= 200 + 2 * int64_t(nets.list.size()) + 2 * now.experts * now.words;
  }

  // Keeps one more expert where that only takes other batches for parts. Whether there was one.
  bool one_more() {
    if (weight.size() < 2) return false;  // it would have been kept without
    for (int64_t e = 0; e < now.experts; ++e)
      if (now.where[e] == kCut && fits(e)) return true;
    return false;
  }

 private:
  // Keeps e if it fits: the parts that it has tokens of become one with it.
  bool fits(int64_t e) {
    const int64_t parts = int64_t(weight.size()), line = nets.size[1] / 64 + 1;
    std::vector<uint8_t> joined(parts);
    int64_t own = 0, all = now.taken[0] + now.taken[1];
    for (int32_t j = nets.begin[e]; j < nets.begin[e + 1]; ++j) {
      const int32_t k = nets.members[j], p = mine[k];
      if (p < 0) own += nets.count[k], all += nets.count[k];
      else if (!joined[p]) joined[p] = 1, own += weight[p];
    }
    now.work.left -= 2 * (nets.begin[e + 1] - nets.begin[e]) + parts;
    if (own > std::max(nets.size[0], nets.size[1])) return false;
    // Bit n of line p: some of the first p of the other parts have n tokens, which the first batch takes.
    std::vector<uint64_t> sums((parts + 1) * line);
    sums[0] = 1;
    for (int64_t p = 0; p < parts; ++p) {
      const uint64_t* from = &sums[p * line];
      uint64_t* to = &sums[(p + 1) * line];
      std::copy(from, from + line, to);
      const int64_t far = weight[p] / 64, near = weight[p] % 64;
      for (int64_t w = line - 1; w >= far && !joined[p]; --w)
        to[w] |= from[w - far] << near | (near > 0 && w > far ? from[w - far - 1] >> (64 - near) : 0);
    }
    now.work.left -= 2 * parts * line;
    for (int m = 0; m < 2; ++m) {
      const int64_t most = nets.size[1] - (m ? own : 0);
      for (int64_t n = std::max<int64_t>(0, all - nets.size[0] - (m ? own : 0)); n <= most; ++n) {
        if (!(sums[parts * line + n / 64] >> (n % 64) & 1)) continue;
        std::vector<uint8_t> to(parts);
        for (int64_t p = parts - 1, left = n; p >= 0; --p) {
          if (joined[p]) to[p] = uint8_t(m);
          else if (!(sums[p * line + left / 64] >> (left % 64) & 1)) to[p] = 1, left -= weight[p];
        }
        const Row before = now.where;
        now.clear();
        for (int64_t f = 0; f < now.experts; ++f)
          if (before[f] != kCut) now.keep(f, to[of[f]]);
        now.keep(e, m);
        return true;
      }
    }
    return false;
  }
};

}  // namespace
