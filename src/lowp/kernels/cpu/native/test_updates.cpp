// The optimizers' steps without torch, on every instruction set of the machine that runs this, against one element after another and
// a search: the same bytes. For ARM under an emulator and for the sanitizers. Exit status 1 where a byte differs.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "update.h"

namespace lowp {
#if defined(__x86_64__)
void update_avx2(const Update& u, int64_t begin, int64_t end);
void update_avx512(const Update& u, int64_t begin, int64_t end);
#else
void update_neon(const Update& u, int64_t begin, int64_t end);
#endif
}  // namespace lowp

using namespace lowp;

namespace {

std::mt19937 random_bits(0);

int below(int n) { return static_cast<int>(random_bits() % static_cast<unsigned>(n)); }

int32_t bits_of(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

uint16_t to_brain(float x) {
  if (x != x) return 0x7FC0;
  const uint32_t bits = static_cast<uint32_t>(bits_of(x));
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

// Values in rising order, boundaries halfway, and their buckets as numerics/buckets.py makes them.
struct Map {
  std::vector<float> values, edges;
  std::vector<int32_t> words;
  int bits, shift = 0, base = 0, top = 0, first = 0;

  Map(int bits, bool negative) : bits(bits) {
    const int all = 1 << bits, half = negative ? all / 2 : all;
    for (int i = 1; i <= half; i++) values.push_back(std::pow(10.0f, -3.0f * static_cast<float>(half - i) / static_cast<float>(half)));
    for (int i = 0; negative && i < half; i++) values.push_back(-values[static_cast<std::size_t>(i)] * (i == half - 1 ? 1.0f : 0.99f));
    std::sort(values.begin(), values.end());
    if (negative) values[static_cast<std::size_t>(half) - 1] = 0;
    for (std::size_t i = 1; i < values.size(); i++) edges.push_back((values[i - 1] + values[i]) / 2);
    int32_t least = 0x7F800000, most = bits_of(1.0f);
    for (float edge : edges) least = std::min(least, bits_of(std::fabs(edge))), most = std::max(most, bits_of(std::fabs(edge)));
    std::vector<int32_t> keys;
    for (shift = 22;; shift--) {
      base = (least - 1) >> shift << shift;
      top = (((most >> shift) + 1) << shift) - 1;
      keys.clear();
      for (float edge : edges) keys.push_back(edge < 0 ? ~(bits_of(-edge) - base) : bits_of(edge) - base);
      bool apart = true;
      for (std::size_t i = 1; i < keys.size(); i++) apart = apart && keys[i - 1] >> shift != keys[i] >> shift;
      if (apart) break;
    }
    const int count = (top - base + 1) >> shift;
    first = negative ? count : 0;
    int code = 0;
    for (int bucket = -first; bucket < count; bucket++) {
      const bool starts = code < all - 1 && keys[static_cast<std::size_t>(code)] >> shift == bucket;
      const int32_t carry = starts ? (1 << shift) - (keys[static_cast<std::size_t>(code)] & ((1 << shift) - 1)) : 0;
      words.push_back((code - bucket) * (1 << shift) + carry);
      code += starts;
    }
  }

  int code(float q) const {
    if (q != q) return (1 << bits) - 1;
    return static_cast<int>(std::upper_bound(edges.begin(), edges.end(), q) - edges.begin());
  }
};

// A state: codes and scales, or floats. Its memory ends where the state does, so that the sanitizer sees what goes beyond.
struct State {
  const Map* map;
  int64_t block;
  std::vector<float> scales, floats;
  std::vector<uint8_t> codes;

  State(const Map* map, int64_t count, int64_t block, bool positive) : map(map), block(block) {
    if (!map) {
      for (int64_t i = 0; i < count; i++) floats.push_back(static_cast<float>(below(1000) - (positive ? 0 : 500)) / 700);
      return;
    }
    for (int64_t i = 0; i < (count + block - 1) / block; i++) scales.push_back(static_cast<float>(below(100)) / 50);
    for (int64_t i = 0; i < count * map->bits / 8; i++) codes.push_back(static_cast<uint8_t>(below(256)));
  }

  Moment moment() {
    if (!map) return {floats.data(), nullptr, nullptr, nullptr, 0, 0, 0, 0, 0};
    return {codes.data(), scales.data(), map->values.data(), map->words.data(), map->bits, map->shift, map->base, map->top, map->first};
  }

  float get(int64_t i) const {
    if (!map) return floats[static_cast<std::size_t>(i)];
    const auto at = static_cast<std::size_t>(map->bits == 8 ? i : i / 2);
    const int code = map->bits == 8 ? codes[at] : codes[at] >> (4 * (i & 1)) & 15;
    return map->values[static_cast<std::size_t>(code)] * scales[static_cast<std::size_t>(i / block)];
  }

  void put(int64_t start, const std::vector<float>& x) {  // one block
    if (!map) {
      std::copy(x.begin(), x.end(), floats.begin() + start);
      return;
    }
    float scale = 1.17549435e-38f;
    for (float one : x) scale = one != one || scale != scale ? NAN : std::max(scale, std::fabs(one));
    scales[static_cast<std::size_t>(start / block)] = scale;
    for (std::size_t j = 0; j < x.size(); j++) {
      const auto i = static_cast<std::size_t>(start) + j;
      const int code = map->code(x[j] / scale);
      if (map->bits == 8) codes[i] = static_cast<uint8_t>(code);
      else codes[i / 2] = static_cast<uint8_t>(i & 1 ? (codes[i / 2] & 15) | code << 4 : (codes[i / 2] & 240) | code);
    }
  }

  bool same(const State& other) const {
    bool scale = scales.size() == other.scales.size(), value = floats.size() == other.floats.size();
    for (std::size_t i = 0; scale && i < scales.size(); i++) scale = scales[i] == other.scales[i] || (scales[i] != scales[i] && other.scales[i] != other.scales[i]);
    for (std::size_t i = 0; value && i < floats.size(); i++) value = floats[i] == other.floats[i] || (floats[i] != floats[i] && other.floats[i] != other.floats[i]);
    return scale && value && codes == other.codes;
  }
};

struct Sample {
  int64_t count;
  bool brain;
  std::vector<float> p, g;
  std::vector<uint16_t> p_half, g_half;
  std::vector<State> states;

  Sample(int64_t count, int64_t block, bool brain, bool odd, const Map* first, const Map* second, int moments) : count(count), brain(brain) {
    for (int64_t i = 0; i < count; i++) {
      p.push_back(static_cast<float>(below(2001) - 1000) / 300);
      g.push_back(static_cast<float>(below(2001) - 1000) / 900 * std::pow(10.0f, static_cast<float>(-below(9))));
      if (odd && below(40) == 0) g.back() = below(3) == 0 ? NAN : below(2) ? INFINITY : -INFINITY;
      if (brain) p_half.push_back(to_brain(p.back())), g_half.push_back(to_brain(g.back()));
      if (brain) p.back() = float_of(static_cast<uint32_t>(p_half.back()) << 16), g.back() = float_of(static_cast<uint32_t>(g_half.back()) << 16);
    }
    for (int i = 0; i < moments; i++) states.emplace_back(i ? second : first, count, block, i > 0);
  }
};

// The equations of ops/update.py, one element at a time.
void expected(Sample& s, const Update& u) {
  for (int64_t start = 0; start < s.count; start += u.block) {
    const int64_t end = std::min(start + u.block, s.count);
    std::vector<float> news[3];
    for (int64_t i = start; i < end; i++) {
      const auto at = static_cast<std::size_t>(i);
      float p = s.p[at], g = s.g[at], m = s.states[0].get(i);
      if (u.scaled) g = g * u.inverse_scale;
      if (u.maximize) g = -g;
      if (u.coupled) g = g + p * u.weight_decay;
      float by;
      if (u.rule == 0) {
        float v = s.states[1].get(i), top;
        m = m + (g - m) * u.keep1;
        v = v * u.beta2 + g * g * u.keep2;
        top = v;
        if (u.amsgrad) {
          const float was = s.states[2].get(i);
          top = was != was || v != v ? NAN : std::max(was, v);
          news[2].push_back(top);
        }
        news[1].push_back(v);
        by = m / (std::sqrt(top) * u.root + u.eps) * u.rate;
      } else if (u.rule == 1) {
        m = m * u.beta1 + g * u.first;
        by = (u.nesterov ? g + m * u.beta1 : m) * u.rate;
      } else {
        const float way = m * u.beta1 + g * u.keep1;
        by = static_cast<float>((way > 0) - (way < 0)) * u.rate;
        m = m * u.beta2 + g * u.keep2;
      }
      news[0].push_back(m);
      s.p[at] = p * u.decay - by;
      if (s.brain) s.p_half[at] = to_brain(s.p[at]);
    }
    for (std::size_t k = 0; k < s.states.size(); k++) s.states[k].put(start, news[k]);
  }
}

bool same(const Sample& a, const Sample& b) {
  bool right = a.p_half == b.p_half;
  for (std::size_t i = 0; !a.brain && i < a.p.size(); i++) right = right && (a.p[i] == b.p[i] || (a.p[i] != a.p[i] && b.p[i] != b.p[i]));
  for (std::size_t k = 0; k < a.states.size(); k++) right = right && a.states[k].same(b.states[k]);
  return right;
}

int run(const char* name, UpdateBlocks blocks) {
  const Map signed8(8, true), unsigned8(8, false), signed4(4, true), unsigned4(4, false);
  const Map* pairs[][2] = {{&signed8, &unsigned8}, {&signed4, &unsigned4}, {nullptr, nullptr}, {&signed8, nullptr}, {nullptr, &unsigned4}};
  int wrong = 0, done = 0;
  for (auto& maps : pairs)
    for (int rule = 0; rule < 3; rule++)
      for (int64_t count : {2, 30, 256, 770, 4098})
        for (int way = 0; way < 16; way++) {
          const bool amsgrad = rule == 0 && way & 1;
          const int64_t block = way & 2 ? 256 : 64;
          Sample one(count, block, way & 4, way & 8, maps[0], maps[1], rule ? 1 : amsgrad ? 3 : 2), other = one;
          Update u = {};
          u.count = count, u.block = block, u.rule = rule, u.param_bf16 = u.grad_bf16 = one.brain, u.amsgrad = amsgrad;
          u.scaled = below(2), u.maximize = below(2), u.coupled = below(2), u.nesterov = below(2);
          u.inverse_scale = 0.25f, u.decay = 0.999f, u.rate = 0.01f, u.root = 1.3f, u.first = 0.9f, u.beta1 = 0.9f, u.keep1 = 0.1f;
          u.beta2 = 0.99f, u.keep2 = 0.01f, u.eps = 1e-8f, u.weight_decay = 0.1f;
          expected(other, u);
          // A parameter and a gradient at odd addresses of their kind: nothing may want more than its own size.
          const std::size_t bytes = static_cast<std::size_t>(count) * (one.brain ? 2 : 4), off = one.brain ? 2 : 4;
          std::unique_ptr<uint8_t[]> p(new uint8_t[bytes + off]), g(new uint8_t[bytes + off]);
          std::memcpy(p.get() + off, one.brain ? static_cast<void*>(one.p_half.data()) : one.p.data(), bytes);
          std::memcpy(g.get() + off, one.brain ? static_cast<void*>(one.g_half.data()) : one.g.data(), bytes);
          u.param = p.get() + off, u.grad = g.get() + off;
          for (std::size_t k = 0; k < one.states.size(); k++) u.moments[k] = one.states[k].moment();
          const int64_t all = (count + block - 1) / block, middle = all / 3;
          blocks(u, middle, all);  // in two pieces, as threads would have it
          blocks(u, 0, middle);
          std::memcpy(one.brain ? static_cast<void*>(one.p_half.data()) : one.p.data(), p.get() + off, bytes);
          done++;
          if (same(one, other)) continue;
          wrong++;
          std::printf("%s: rule %d, %d elements, way %d, %d and %d bits: other bytes\n", name, rule, static_cast<int>(count), way,
                      maps[0] ? maps[0]->bits : 32, maps[1] ? maps[1]->bits : 32);
        }
  std::printf("%s: %d steps, %d wrong\n", name, done, wrong);
  return wrong;
}

}  // namespace

int main() {
  int wrong = 0;
#if defined(__x86_64__)
  wrong += run("avx2", update_avx2);
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) wrong += run("avx512", update_avx512);
#else
  wrong += run("neon", update_neon);
#endif
  return wrong != 0;
}
