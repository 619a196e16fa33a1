// moe.regroup: which tokens of several micro-batches run together, so that batches touch few experts.
#pragma once
#include "regroup_best.h"
#include "regroup_means.h"
#include "regroup_search.h"

namespace {

constexpr int kRounds = 4, kGroups = 12;  // K-means goes so many rounds, from so many times kLanes starts at most
constexpr int kPart = 8;                  // and takes about this part of the steps
constexpr int kSearched = 12;             // what the search begins with: the best of them
constexpr int64_t kLeast = 50000;         // steps of every plan
constexpr int64_t kRowsOfAnExpert = 64;   // GEMM rows that take as long as reading an expert's weights

// Two batches of `some` tokens, of which the first `size` are the first one as it comes; 1 for those of the first one.
// K-means from many starts, then the search from the best of what that found; again as long as there are steps left.
Side two_batches(const Chosen& chosen, const std::vector<int64_t>& some, int64_t size, int64_t steps) {
  const Nets nets(chosen, some, size);
  Side given(nets.tokens);
  std::fill(given.begin(), given.begin() + size, 1);
  Shares best = nets.shares(given);
  int least = nets.cost(best);
  const int before = least, bound = nets.settled + int(nets.experts);
  if (least == bound) return given;
  const bool few = nets.tokens <= kTried;
  Work work{few ? steps / 4 : steps};
  Random random;
  Means means(nets, work);
  Search search(nets, work, random);
  const int64_t part = work.left / kPart;
  bool once = false;
  while ((!once || !work.over()) && least > bound) {
    std::vector<Shares> begun;
    std::vector<std::pair<int, size_t>> order;
    const int64_t until = work.left - part;
    for (int group = 0; group < kGroups && (group == 0 || work.left > until); ++group) {
      means.run(random, kRounds);
      for (int lane = 0; lane < kLanes; ++lane)
        order.emplace_back(means.least[lane], begun.size()), begun.push_back(means.partition(lane));
    }
    std::sort(order.begin(), order.end());
    if (order[0].first < least) least = order[0].first, best = begun[order[0].second];
    for (size_t i = 0; i < std::min<size_t>(kSearched, order.size()) && (i == 0 || !work.over()); ++i)
      search.run(begun[order[i].second], best, least);
    once = true;
  }
  const Side found = least < before ? nets.side(best) : given;
  return few && least > bound ? Best(nets, found, least).side : found;
}

using Batches = std::vector<std::vector<int64_t>>;

// The same of two batches that may be empty, tokens ascending in each; `steps` for every token.
void improve_two(const Chosen& chosen, std::vector<int64_t>& a, std::vector<int64_t>& b, double steps) {
  if (!a.empty() && !b.empty()) {
    std::vector<int64_t> all(a);
    all.insert(all.end(), b.begin(), b.end());
    const size_t size = a.size();
    const Side side = two_batches(chosen, all, int64_t(size), int64_t(steps * double(all.size())));
    size_t kept = 0;
    for (size_t i = 0; i < size; ++i) kept += side[i];
    // The batch that kept most of its tokens keeps its place.
    const bool turned = 2 * size == all.size() && (2 * kept < size || (2 * kept == size && !side[0]));
    a.clear(), b.clear();
    for (size_t i = 0; i < all.size(); ++i) ((side[i] != 0) != turned ? a : b).push_back(all[i]);
  }
  std::sort(a.begin(), a.end()), std::sort(b.begin(), b.end());
}

// Halves of halves of batches[from] to batches[to], until each is one batch.
void halve(const Chosen& chosen, Batches& batches, size_t from, size_t to, double steps) {
  if (to - from < 2) return;
  const size_t middle = from + (to - from) / 2;
  std::vector<int64_t> sides[2];
  for (size_t i = from; i < to; ++i) {
    std::vector<int64_t>& side = sides[i >= middle];
    side.insert(side.end(), batches[i].begin(), batches[i].end());
  }
  improve_two(chosen, sides[0], sides[1], steps);
  for (size_t i = from, at = 0; i < to; ++i) {
    if (i == middle) at = 0;
    const std::vector<int64_t>& side = sides[i >= middle];
    std::copy(side.begin() + at, side.begin() + at + batches[i].size(), batches[i].begin());
    at += batches[i].size();
  }
  if (to - from > 2) halve(chosen, batches, from, middle, steps), halve(chosen, batches, middle, to, steps);
}

template <class Id>
void read(const Id* ids, int64_t rows, int64_t k, int64_t experts, const int32_t* column, Chosen& chosen) {
  std::vector<int64_t> seen(chosen.experts, -1);
  for (int64_t t = 0; t < rows; ++t) {
    for (int64_t i = 0; i < k; ++i) {
      const int64_t id = int64_t(ids[t * k + i]);
      if (id < 0 || id >= experts) continue;
      const int32_t c = column == nullptr ? int32_t(id) : column[id];
      if (seen[c] != t) chosen.list.push_back(c), seen[c] = t;
    }
    chosen.first.push_back(int32_t(chosen.list.size()));
  }
}

// ids: of `inputs` micro-batches, [rows[i], k] of 8 or (`wide` = 0) 4 bytes. column: where the expert e is counted, of
// `columns`; null for the expert itself. sizes: of the `batches`. least: the part of the cost that must be saved.
// price: steps that may be taken for every expert that is touched. there, home: the results of the op, i64[sizes[i]] and
// i64[rows[i]].
void plan(
    const void* const* ids, const int64_t* rows, int64_t inputs, int64_t k, int64_t wide, int64_t experts,
    const int32_t* column, int64_t columns, const int64_t* sizes, int64_t batches, double least, int64_t price,
    int64_t* const* there, int64_t* const* home) {
  Chosen chosen;
  chosen.experts = columns;
  for (int64_t i = 0; i < inputs; ++i) {
    if (wide) read(static_cast<const int64_t*>(ids[i]), rows[i], k, experts, column, chosen);
    else read(static_cast<const int32_t*>(ids[i]), rows[i], k, experts, column, chosen);
  }
  Batches given(batches), found;
  int64_t at = 0;
  for (int64_t b = 0; b < batches; ++b)
    for (int64_t i = 0; i < sizes[b]; ++i) given[b].push_back(at++);
  found = given;
  std::vector<uint8_t> seen(columns);
  const auto touched = [&](const Batches& dealt) {
    int all = 0;
    for (const auto& batch : dealt) all += chosen.cost(batch.data(), int64_t(batch.size()), seen);
    return all;
  };
  const int before = touched(given);
  const int64_t pins = int64_t(chosen.list.size());
  const int64_t weighs = std::min(before * experts / std::max<int64_t>(1, columns), pins) + pins / kRowsOfAnExpert;
  int64_t passes = 0;  // how often a token is dealt: in every halving, and with every other batch
  for (int64_t b = 1; b < batches; b *= 2) ++passes;
  if (batches > 2) passes += batches - 1;
  const double steps = double(std::max(kLeast, price * weighs)) / double(std::max<int64_t>(1, passes * chosen.tokens()));
  halve(chosen, found, 0, found.size(), steps);
  if (batches > 2)
    for (int64_t a = 0; a < batches; ++a)
      for (int64_t b = a + 1; b < batches; ++b) improve_two(chosen, found[a], found[b], steps);
  const int after = touched(found);
  const Batches& taken = after < before && double(before - after) >= least * double(before) ? found : given;
  std::vector<int64_t> places(chosen.tokens());
  at = 0;
  for (int64_t b = 0; b < batches; ++b)
    for (int64_t i = 0; i < sizes[b]; ++i) places[there[b][i] = taken[b][i]] = at++;
  at = 0;
  for (int64_t i = 0; i < inputs; ++i)
    for (int64_t t = 0; t < rows[i]; ++t) home[i][t] = places[at++];
}

}  // namespace
