// Two batches of given sizes that touch few experts: the search of moec/ir/regroup.py, start after start.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

struct Effort { int starts, means, falls, kept, exchanges; };
constexpr int64_t kFew = 48;
constexpr Effort kSmall{32, 3, 5, 8, 64}, kLarge{16, 4, 6, 2, 40};
constexpr double kLastTau = 0.35;
constexpr int64_t kCandidates = 24;

struct Random {  // splitmix64
  uint64_t state = 0;
  int64_t below(int64_t n) {
    uint64_t z = (state += 0x9e3779b97f4a7c15ull);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return int64_t((z ^ (z >> 31)) % uint64_t(n));
  }
};

struct Split {
  int64_t tokens, experts, size, words;
  std::vector<int32_t> first, list;  // the experts of token t: list[first[t]] to list[first[t + 1]]
  std::vector<uint64_t> bits;        // and as a mask
  std::vector<int32_t> total;
  std::vector<float> distance;
  std::vector<uint64_t> keys;

  Split(const float* chosen, int64_t t_count, int64_t e_count, int64_t n)
      : tokens(t_count), experts(e_count), size(n), words((e_count + 63) / 64), bits(t_count * words),
        total(e_count), distance(t_count), keys(t_count) {
    for (int64_t t = 0; t < tokens; ++t) {
      first.push_back(int32_t(list.size()));
      for (int64_t e = 0; e < experts; ++e)
        if (chosen[t * experts + e] != 0) {
          list.push_back(int32_t(e));
          bits[t * words + e / 64] |= uint64_t(1) << (e % 64);
          ++total[e];
        }
    }
    first.push_back(int32_t(list.size()));
  }

  template <class Weights>
  float sum(int64_t t, const Weights& weights) const {
    float found = 0;
    for (int32_t i = first[t]; i < first[t + 1]; ++i) found += weights[list[i]];
    return found;
  }

  void nearest(std::vector<uint8_t>& side) {
    for (int64_t t = 0; t < tokens; ++t) {  // the distance, so that it sorts as a whole number, before the token
      uint32_t word;
      std::memcpy(&word, &distance[t], 4);
      word ^= (word >> 31) ? ~uint32_t(0) : uint32_t(1) << 31;
      keys[t] = uint64_t(word) << 32 | uint64_t(t);
    }
    std::nth_element(keys.begin(), keys.begin() + size, keys.end());
    std::fill(side.begin(), side.end(), 0);
    for (int64_t i = 0; i < size; ++i) side[uint32_t(keys[i])] = 1;
  }

  void count(const std::vector<uint8_t>& side, std::vector<int32_t>& one) const {
    std::fill(one.begin(), one.end(), 0);
    for (int64_t t = 0; t < tokens; ++t)
      if (side[t])
        for (int32_t i = first[t]; i < first[t + 1]; ++i) ++one[list[i]];
  }

  int cost(const std::vector<int32_t>& one) const {
    int found = 0;
    for (int64_t e = 0; e < experts; ++e) found += (one[e] > 0) + (total[e] > one[e]);
    return found;
  }

  // The best partition that rounds from `side` meet; its cost.
  int improve(std::vector<uint8_t>& side, const Effort& effort, const std::vector<std::vector<float>>& powers) {
    std::vector<uint8_t> best = side;
    std::vector<int32_t> one(experts);
    std::vector<float> joining(2 * experts);  // of every expert: the first batch, the other one
    int least = INT32_MAX;
    for (int turn = 0;; ++turn) {
      count(side, one);
      if (int now = cost(one); now < least) least = now, best = side;
      if (turn == effort.means + effort.falls) break;
      if (turn < effort.means) {
        const float rest = 1 / float(tokens - size), mine = 1 / float(size);
        for (int64_t e = 0; e < experts; ++e) joining[e] = float(total[e] - one[e]) * rest - float(one[e]) * mine;
        for (int64_t t = 0; t < tokens; ++t) distance[t] = sum(t, joining);
      } else {
        const std::vector<float>& power = powers[turn - effort.means];
        for (int64_t e = 0; e < experts; ++e)
          joining[2 * e] = power[one[e]], joining[2 * e + 1] = power[total[e] - one[e]];
        const float stays = 1 / power[1];  // a token counts among those of its own batch
        for (int64_t t = 0; t < tokens; ++t) {
          float in = 0, out = 0;
          for (int32_t i = first[t]; i < first[t + 1]; ++i)
            in += joining[2 * list[i]], out += joining[2 * list[i] + 1];
          distance[t] = side[t] ? stays * in - out : in - stays * out;
        }
      }
      nearest(side);
    }
    side.swap(best);
    return least;
  }

  // Exchanges two tokens as long as that saves something; the cost.
  int exchange(std::vector<uint8_t>& side, int most) {
    std::vector<int32_t> one(experts), leave(experts), come(experts), a, b;
    std::vector<uint64_t> alone_one(words), alone_other(words);
    count(side, one);
    for (int turn = 0; turn < most; ++turn) {
      std::fill(alone_one.begin(), alone_one.end(), 0);
      std::fill(alone_other.begin(), alone_other.end(), 0);
      for (int64_t e = 0; e < experts; ++e) {
        const int32_t other = total[e] - one[e];
        leave[e] = (one[e] == 1) - (other == 0);  // what leaving one batch saves, less what it costs in the other
        come[e] = (other == 1) - (one[e] == 0);
        alone_one[e / 64] |= uint64_t(one[e] == 1) << (e % 64);
        alone_other[e / 64] |= uint64_t(other == 1) << (e % 64);
      }
      a.clear(), b.clear();
      for (int64_t t = 0; t < tokens; ++t) {
        distance[t] = side[t] ? sum(t, leave) : sum(t, come);
        (side[t] ? a : b).push_back(int32_t(t));
      }
      largest(a), largest(b);
      float most_saved = 0;
      int32_t from = -1, to = -1;
      for (int32_t i : a)
        for (int32_t j : b) {
          float saved = distance[i] + distance[j];
          if (saved <= most_saved) continue;
          for (int64_t w = 0; w < words; ++w) {  // an expert of both stays in both batches, so it saves nothing
            const uint64_t both = bits[i * words + w] & bits[j * words + w];
            saved -= float(__builtin_popcountll(both & alone_one[w]) + __builtin_popcountll(both & alone_other[w]));
          }
          if (saved > most_saved) most_saved = saved, from = i, to = j;
        }
      if (from < 0) break;
      side[from] = 0, side[to] = 1;
      for (int32_t i = first[from]; i < first[from + 1]; ++i) --one[list[i]];
      for (int32_t i = first[to]; i < first[to + 1]; ++i) ++one[list[i]];
    }
    return cost(one);
  }

  void largest(std::vector<int32_t>& among) const {
    if (int64_t(among.size()) <= kCandidates) return;
    std::nth_element(among.begin(), among.begin() + kCandidates, among.end(), [&](int32_t x, int32_t y) {
      return distance[x] != distance[y] ? distance[x] > distance[y] : x < y;
    });
    among.resize(kCandidates);
  }
};

}  // namespace

// chosen: f32[tokens, experts] of zeros and ones. side: u8[tokens], 1 for the `size` tokens of the first batch, which
// begins with the first `size` tokens.
extern "C" __attribute__((visibility("default"))) void moec_split(
    const float* chosen, int64_t tokens, int64_t experts, int64_t size, uint8_t* side) {
  Split split(chosen, tokens, experts, size);
  const Effort& effort = tokens <= kFew ? kSmall : kLarge;
  const double mean = double(split.list.size()) / double(experts);
  const double from = std::max(1.5, mean / 2);
  const int32_t most = *std::max_element(split.total.begin(), split.total.end());
  std::vector<std::vector<float>> powers(effort.falls, std::vector<float>(most + 2));
  for (int i = 0; i < effort.falls; ++i) {
    const double tau = from * std::pow(kLastTau / from, double(i) / double(effort.falls - 1));
    for (int32_t n = 0; n < most + 2; ++n) powers[i][n] = float(std::exp(-double(n) / tau));
  }
  std::vector<std::vector<uint8_t>> sides(effort.starts, std::vector<uint8_t>(tokens));
  std::vector<std::pair<int, int>> costs;
  std::vector<float> toward(experts);
  Random random;
  for (int s = 0; s < effort.starts; ++s) {
    if (s == 0) {
      std::fill(sides[0].begin(), sides[0].begin() + size, 1);
    } else {
      const int64_t a = random.below(tokens), b = random.below(tokens);
      for (int64_t e = 0; e < experts; ++e) toward[e] = chosen[a * experts + e] - chosen[b * experts + e];
      for (int64_t t = 0; t < tokens; ++t) split.distance[t] = split.sum(t, toward);
      split.nearest(sides[s]);
    }
    costs.emplace_back(split.improve(sides[s], effort, powers), s);
  }
  std::sort(costs.begin(), costs.end());
  int least = INT32_MAX;
  for (int i = 0; i < effort.kept; ++i) {
    std::vector<uint8_t>& found = sides[costs[i].second];
    if (int now = split.exchange(found, effort.exchanges); now < least)
      least = now, std::copy(found.begin(), found.end(), side);
  }
}
