// moe.regroup: which tokens of several micro-batches run together, so that batches touch few experts.
#include <cmath>

#include "regroup_best.h"

namespace {

// The search of moec/ir/regroup.py, start after start. Then the best is disturbed and improved again, a few times.
struct Effort { int starts, means, falls, kept, exchanges, kicks; };
constexpr int64_t kFew = 48, kMore = 160;
constexpr Effort kFewTokens{24, 3, 5, 8, 64, 8}, kSome{24, 4, 6, 4, 64, 16}, kMany{16, 4, 6, 3, 48, 6};
constexpr int kToTheEnd = 12, kRounds = 30;  // so many starts are improved by K-means until it changes nothing
constexpr double kLastTau = 0.35;

// Two batches of `some` tokens, of which the first `size` are the first one as it comes; 1 for those of the first one.
Side two_batches(const Chosen& chosen, const std::vector<int64_t>& some, int64_t size) {
  Split split(chosen, some, size);
  const int64_t tokens = split.tokens;
  const Effort& effort = tokens <= kFew ? kFewTokens : tokens <= kMore ? kSome : kMany;
  const double from = std::max(1.5, double(split.list.size()) / double(split.experts) / 2);
  const int32_t most = *std::max_element(split.total.begin(), split.total.end());
  std::vector<std::vector<float>> powers(effort.falls, std::vector<float>(most + 2));
  for (int i = 0; i < effort.falls; ++i) {
    const double tau = from * std::pow(kLastTau / from, double(i) / double(effort.falls - 1));
    for (int32_t n = 0; n < most + 2; ++n) powers[i][n] = float(std::exp(-double(n) / tau));
  }
  std::vector<Side> sides(effort.starts, Side(tokens));
  std::vector<std::pair<int, int>> costs;
  Random random;
  for (int s = 0; s < effort.starts; ++s) {
    if (s == 0) {
      std::fill(sides[0].begin(), sides[0].begin() + size, 1);
    } else {
      const int64_t a = random.below(tokens), b = random.below(tokens);
      split.begin(sides[s], a, b);
    }
    costs.emplace_back(split.improve(sides[s], s > 0 && s <= kToTheEnd ? kRounds : effort.means, powers), s);
  }
  std::sort(costs.begin(), costs.end());
  int least = INT32_MAX, best = 0;
  for (int i = 0; i < effort.kept; ++i)
    if (int now = split.exchange(sides[costs[i].second], effort.exchanges); now < least)
      least = now, best = costs[i].second;
  Side found = sides[best], other;
  for (int i = 0; i < effort.kicks; ++i) {  // the best so far, disturbed and improved again
    other = found;
    for (int64_t n = 0; n < std::max<int64_t>(2, tokens / 12); ++n) {
      const int64_t a = random.below(tokens), b = random.below(tokens);
      std::swap(other[a], other[b]);
    }
    split.improve(other, 0, powers, powers.size() / 2);
    if (int now = split.exchange(other, effort.exchanges); now < least) least = now, found.swap(other);
  }
  return tokens <= kTried ? Best(split, found, least).side : found;
}

using Batches = std::vector<std::vector<int64_t>>;

// The same of two batches that may be empty, tokens ascending in each.
void improve_two(const Chosen& chosen, std::vector<int64_t>& a, std::vector<int64_t>& b) {
  if (!a.empty() && !b.empty()) {
    std::vector<int64_t> all(a);
    all.insert(all.end(), b.begin(), b.end());
    const size_t size = a.size();
    const Side side = two_batches(chosen, all, int64_t(size));
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
void halve(const Chosen& chosen, Batches& batches, size_t from, size_t to) {
  if (to - from < 2) return;
  const size_t middle = from + (to - from) / 2;
  std::vector<int64_t> sides[2];
  for (size_t i = from; i < to; ++i) {
    std::vector<int64_t>& side = sides[i >= middle];
    side.insert(side.end(), batches[i].begin(), batches[i].end());
  }
  improve_two(chosen, sides[0], sides[1]);
  for (size_t i = from, at = 0; i < to; ++i) {
    if (i == middle) at = 0;
    const std::vector<int64_t>& side = sides[i >= middle];
    std::copy(side.begin() + at, side.begin() + at + batches[i].size(), batches[i].begin());
    at += batches[i].size();
  }
  if (to - from > 2) halve(chosen, batches, from, middle), halve(chosen, batches, middle, to);
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

}  // namespace

// ids: of `inputs` micro-batches, [rows[i], k] of 8 or (`wide` = 0) 4 bytes. column: where the expert e is counted, of
// `columns`; null for the expert itself. sizes: of the `batches`. least: the part of the cost that must be saved.
// there, home: the results of the op, i64[sizes[i]] and i64[rows[i]].
extern "C" __attribute__((visibility("default"))) void moec_regroup(
    const void* const* ids, const int64_t* rows, int64_t inputs, int64_t k, int64_t wide, int64_t experts,
    const int32_t* column, int64_t columns, const int64_t* sizes, int64_t batches, double least, int64_t* const* there,
    int64_t* const* home) {
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
  halve(chosen, found, 0, found.size());
  if (batches > 2)
    for (int64_t a = 0; a < batches; ++a)
      for (int64_t b = a + 1; b < batches; ++b) improve_two(chosen, found[a], found[b]);
  std::vector<uint8_t> seen(columns);
  int before = 0, after = 0;
  for (int64_t b = 0; b < batches; ++b) {
    before += chosen.cost(given[b].data(), int64_t(given[b].size()), seen);
    after += chosen.cost(found[b].data(), int64_t(found[b].size()), seen);
  }
  const Batches& taken = after < before && double(before - after) >= least * double(before) ? found : given;
  std::vector<int64_t> places(chosen.tokens());
  at = 0;
  for (int64_t b = 0; b < batches; ++b)
    for (int64_t i = 0; i < sizes[b]; ++i) places[there[b][i] = taken[b][i]] = at++;
  at = 0;
  for (int64_t i = 0; i < inputs; ++i)
    for (int64_t t = 0; t < rows[i]; ++t) home[i][t] = places[at++];
}
