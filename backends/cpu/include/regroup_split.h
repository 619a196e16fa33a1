// Two batches of tokens that touch few experts: how a partition is improved, and what it costs.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int64_t kCandidates = 24;  // tokens of each batch that may be exchanged: those that save most alone

using Side = std::vector<uint8_t>;

struct Random {  // splitmix64
  uint64_t state = 0;
  int64_t below(int64_t n) {
    uint64_t z = (state += 0x9e3779b97f4a7c15ull);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return int64_t((z ^ (z >> 31)) % uint64_t(n));
  }
};

struct Chosen {  // the experts of every token, each once
  int64_t experts = 0;
  std::vector<int32_t> first{0}, list;

  int64_t tokens() const { return int64_t(first.size()) - 1; }

  int cost(const int64_t* batch, int64_t size, std::vector<uint8_t>& seen) const {
    std::fill(seen.begin(), seen.end(), 0);
    int found = 0;
    for (int64_t i = 0; i < size; ++i)
      for (int32_t j = first[batch[i]]; j < first[batch[i] + 1]; ++j) found += !seen[list[j]], seen[list[j]] = 1;
    return found;
  }
};

struct Split {
  int64_t tokens, experts, size, words;
  std::vector<int32_t> first{0}, list;  // the experts of token t: list[first[t]] to list[first[t + 1]]
  std::vector<uint64_t> bits;           // and as a mask
  std::vector<int32_t> total;
  std::vector<float> distance;
  std::vector<uint64_t> keys;
  std::vector<int64_t> whole;

  Split(const Chosen& all, const std::vector<int64_t>& some, int64_t n)
      : tokens(int64_t(some.size())), experts(all.experts), size(n), words((all.experts + 63) / 64),
        bits(tokens * words), total(experts), distance(tokens), keys(tokens), whole(tokens) {
    list.reserve(all.list.size());
    for (int64_t t = 0; t < tokens; ++t) {
      for (int32_t i = all.first[some[t]]; i < all.first[some[t] + 1]; ++i) {
        const int32_t e = all.list[i];
        list.push_back(e);
        bits[t * words + e / 64] |= uint64_t(1) << (e % 64);
        ++total[e];
      }
      first.push_back(int32_t(list.size()));
    }
  }

  template <class Number, class Weights>
  Number sum(int64_t t, const Weights& weights) const {
    Number found = 0;
    for (int32_t i = first[t]; i < first[t + 1]; ++i) found += weights[list[i]];
    return found;
  }

  // The `size` tokens of the least distance, ties to the earlier ones.
  void nearest(Side& side) {
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

  void nearest_whole(Side& side) {  // the same of whole numbers, which round nothing
    constexpr int64_t kToken = 1 << 24;
    for (int64_t t = 0; t < tokens; ++t) whole[t] = whole[t] * kToken + t;
    std::nth_element(whole.begin(), whole.begin() + size, whole.end());
    std::fill(side.begin(), side.end(), 0);
    for (int64_t i = 0; i < size; ++i) side[whole[i] & (kToken - 1)] = 1;
  }

  void count(const Side& side, std::vector<int32_t>& one) const {
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

  // The tokens that are nearer to token a than to token b, as many as the first batch has.
  void begin(Side& side, int64_t a, int64_t b) {
    std::vector<int64_t> toward(experts);
    for (int32_t i = first[a]; i < first[a + 1]; ++i) --toward[list[i]];
    for (int32_t i = first[b]; i < first[b + 1]; ++i) ++toward[list[i]];
    for (int64_t t = 0; t < tokens; ++t) whole[t] = sum<int64_t>(t, toward);
    nearest_whole(side);
  }

  // The best partition that rounds from `side` meet; its cost.
  int improve(Side& side, int means, const std::vector<std::vector<float>>& powers, size_t skipped = 0) {
    Side best = side, before;
    std::vector<int32_t> one(experts);
    std::vector<float> joining(2 * experts);  // of every expert: the first batch, the other one
    std::vector<int64_t> nearer(experts);
    int least = INT32_MAX;
    const auto note = [&] {
      count(side, one);
      if (int now = cost(one); now < least) least = now, best = side;
    };
    note();
    for (int turn = 0; turn < means; ++turn) {
      before = side;
      for (int64_t e = 0; e < experts; ++e) nearer[e] = (total[e] - one[e]) * size - one[e] * (tokens - size);
      for (int64_t t = 0; t < tokens; ++t) whole[t] = sum<int64_t>(t, nearer);
      nearest_whole(side);
      if (side == before) break;
      note();
    }
    for (size_t turn = skipped; turn < powers.size(); ++turn) {
      const std::vector<float>& power = powers[turn];
      for (int64_t e = 0; e < experts; ++e)
        joining[2 * e] = power[one[e]], joining[2 * e + 1] = power[total[e] - one[e]];
      const float stays = 1 / power[1];  // a token counts among those of its own batch
      for (int64_t t = 0; t < tokens; ++t) {
        float in = 0, out = 0;
        for (int32_t i = first[t]; i < first[t + 1]; ++i) in += joining[2 * list[i]], out += joining[2 * list[i] + 1];
        distance[t] = side[t] ? stays * in - out : in - stays * out;
      }
      nearest(side);
      note();
    }
    side.swap(best);
    return least;
  }

  // Exchanges two tokens as long as that saves something; the cost.
  int exchange(Side& side, int most) {
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
        distance[t] = side[t] ? sum<float>(t, leave) : sum<float>(t, come);
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
