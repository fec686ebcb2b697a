// The products without torch, on every instruction set of the machine that runs this, against a plain sum: for ARM under an emulator
// and for the sanitizers. Prints what ran; exit status 1 where a result is wrong. `test_products SET ...` asks for these sets.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "drive.h"

using namespace lowp;

namespace {

std::mt19937 random_bits(0);

int below(int n) { return static_cast<int>(random_bits() % static_cast<unsigned>(n)); }

void serial(int64_t begin, int64_t end, int64_t, Body body, void* context) {  // in three pieces, as threads would have it
  const int64_t step = (end - begin + 2) / 3;
  for (int64_t at = begin; at < end; at += step) body(at, at + step < end ? at + step : end, context);
}

// A weight with every code drawn at random, in the layout of planes.
struct Sample {
  int64_t n, k, group;
  int bits;
  std::vector<uint8_t> codes, planes;
  std::vector<float> scale, tiled, zero, zero_tiled;
  Weight w;

  Sample(int bits, int64_t n, int64_t k, int64_t group, bool zeros, const float* table)
      : n(n), k(k), group(group), bits(bits), codes(static_cast<std::size_t>(n * k)) {
    const int64_t tiles = (n + 15) / 16, groups = k / group;
    planes.resize(static_cast<std::size_t>(tiles * (k / 32) * 64 * bits));
    scale.resize(static_cast<std::size_t>(n * groups));
    zero.assign(scale.size(), 0);
    tiled.resize(static_cast<std::size_t>(tiles * 16 * groups));
    zero_tiled.resize(tiled.size());
    for (int64_t i = 0; i < n * k; i++) codes[static_cast<std::size_t>(i)] = static_cast<uint8_t>(below(1 << bits));
    for (int64_t row = 0; row < n; row++) {
      for (int64_t g = 0; g < groups; g++) {
        const auto from = static_cast<std::size_t>(row * groups + g), to = static_cast<std::size_t>((row / 16 * groups + g) * 16 + row % 16);
        tiled[to] = scale[from] = static_cast<float>(1 + below(100)) / 1000;
        if (zeros) zero_tiled[to] = zero[from] = static_cast<float>(below(9) - 4);
      }
      for (int64_t column = 0; column < k; column++) put(row, column);
    }
    w.codes = planes.data();
    w.n = n;
    w.k = k;
    w.bits = bits;
    w.is_int = !table;
    w.offset = table ? 0 : 1 << (bits - 1);
    w.table = table;
    w.halves = table ? 12 : 0;
    w.scale = tiled.data();
    w.zero = zeros ? zero_tiled.data() : nullptr;
    w.group = group;
  }

  void put(int64_t row, int64_t column) {
    uint8_t* tile = planes.data() + (row / 16 * (k / 32) + column / 32) * 64 * bits;
    const int code = codes[static_cast<std::size_t>(row * k + column)], quad = static_cast<int>(column % 32 / 4);
    const auto byte = 4 * (row % 16) + column % 4;
    if (bits == 8) {
      tile[64 * quad + byte] = static_cast<uint8_t>(code);
      return;
    }
    int low = 0;
    for (int width = 4; width; width /= 2) {
      if (!(bits & width)) continue;
      const int field = code >> low & ((1 << width) - 1);
      tile[64 * (quad % width) + byte] = static_cast<uint8_t>(tile[64 * (quad % width) + byte] | field << (quad / width * width));
      tile += 64 * width;
      low += width;
    }
  }

  double value(int64_t row, int64_t column) const {
    const int code = codes[static_cast<std::size_t>(row * k + column)];
    const auto place = static_cast<std::size_t>(row * (k / group) + column / group);
    return ((w.is_int ? code - w.offset : static_cast<double>(w.table[code])) - zero[place]) * scale[place];
  }
};

// How x is multiplied, and its type: whole numbers that every way holds exactly. `by_32` has a scale for 32 columns, `shifted` a zero
// point (255 between the smallest and the largest number: a scale of 1), `e4m3` multiples of 8 up to 112 (a scale of a quarter).
enum class Way { fp32, bf16, fp16, by_token, by_32, shifted, e4m3 };
constexpr Way kWays[] = {Way::fp32, Way::bf16, Way::fp16, Way::by_token, Way::by_32, Way::shifted, Way::e4m3};

uint16_t to_half(float v, bool brain) {  // of a whole number up to 256
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  if (brain) return static_cast<uint16_t>(bits >> 16);
  return static_cast<uint16_t>((bits >> 16 & 0x8000) | (v == 0 ? 0 : ((bits >> 23 & 255) - 112) << 10 | (bits >> 13 & 1023)));
}

float from_half(uint16_t v, bool brain) {
  if (!brain) return element_value(v, 5, 10, 15, 1, 16, true);
  const uint32_t bits = static_cast<uint32_t>(v) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

// ||y - expected|| / ||expected||. Rows of x lie apart with NaN between them, and x ends with its last number: reading past a row shows,
// reading past the end is what the sanitizers see.
double error_of(Sample& s, int64_t tokens, Way way) {
  const bool half = way == Way::bf16 || way == Way::fp16, brain = way == Way::bf16;
  const int64_t stride = s.k + below(5);
  const auto size = static_cast<std::size_t>((tokens - 1) * stride + s.k), results = static_cast<std::size_t>(tokens * s.n);
  std::vector<float> x(size, NAN), y(results, NAN), row(static_cast<std::size_t>(s.k));
  std::vector<uint16_t> x_half(half ? size : 0, 0x7FFF), y_half(half ? results : 0, 0x7FFF);
  for (int64_t m = 0; m < tokens; m++)
    for (int64_t k = 0; k < s.k; k++) {
      const auto at = static_cast<std::size_t>(m * stride + k);
      x[at] = way == Way::shifted ? (k == 0 ? 227.0f : k == 1 ? -28.0f : static_cast<float>(below(256) - 28))
            : way == Way::e4m3  ? (k % 32 ? static_cast<float>(8 * (below(15) - 7)) : 112.0f)
                                  : (k % 32 ? static_cast<float>(below(255) - 127) : 127.0f);
      if (half) x_half[at] = to_half(x[at], brain);
    }
  std::vector<float> sums(static_cast<std::size_t>((s.n + 15) / 16 * 16), 0);
  for (int64_t n = 0; n < s.n; n++)
    for (int64_t k = 0; k < s.k; k++) sums[static_cast<std::size_t>(n)] += static_cast<float>(s.value(n, k));
  s.w.row_sum = sums.data();
  Activation a;
  a.x = half ? static_cast<const void*>(x_half.data()) : x.data();
  a.type = half ? (brain ? Type::bf16 : Type::fp16) : Type::fp32;
  a.tokens = tokens;
  a.stride = stride;
  a.quantized = way == Way::by_token || way == Way::by_32 || way == Way::shifted;
  a.asymmetric = way == Way::shifted;
  a.float8 = way == Way::e4m3;
  a.group = way == Way::by_32 ? 32 : 0;
  linear(s.w, a, {half ? static_cast<void*>(y_half.data()) : y.data(), a.type, s.n, nullptr, Type::fp32}, serial);
  double noise = 0, signal = 0;
  for (int64_t n = 0; n < s.n; n++) {
    decode_row(s.w, n, row.data());
    for (int64_t k = 0; k < s.k; k++) noise += std::fabs(row[static_cast<std::size_t>(k)] - s.value(n, k)) > 1e-5;
    for (int64_t m = 0; m < tokens; m++) {
      const auto at = static_cast<std::size_t>(m * s.n + n);
      double sum = 0;
      for (int64_t k = 0; k < s.k; k++) sum += static_cast<double>(x[static_cast<std::size_t>(m * stride + k)]) * s.value(n, k);
      const double off = (half ? from_half(y_half[at], brain) : y[at]) - sum;
      noise += off * off;
      signal += sum * sum;
    }
  }
  return std::sqrt(noise / signal);
}

int run(const char* name) {
  static float e2m1[16];
  for (int i = 0; i < 16; i++) e2m1[i] = element_value(i, 2, 1, 1, 0, 4, true);
  int wrong = 0, done = 0;
  double worst = 0;
  for (int bits = 1; bits <= 9; bits++)
    for (int64_t group : {16, 32, 64, 96, 256})
      for (int64_t tokens : {1, 2, 3, 8, 9, 23, 70})
        for (Way way : kWays) {
          const bool table = bits == 9;
          if (tokens == 70 && (way != Way::bf16 || group > 16)) continue;  // scales that go into the decoded panel
          if (way == Way::fp16 && bits > 6 && !table) continue;  // beyond what fp16 holds
          Sample s(table ? 4 : bits, 1 + below(70), group * (group == 16 ? 2 : 1) * (1 + below(3)), group, !table && below(2), table ? e2m1 : nullptr);
          const double error = error_of(s, tokens, way), allowed = way == Way::bf16 ? 4e-3 : way == Way::fp16 ? 5e-4 : 1e-5;
          done++;
          worst = error / allowed > worst ? error / allowed : worst;
          if (!(error < allowed)) {
            wrong++;
            std::printf("%s: bits %d group %d tokens %d way %d: relative error %g\n", name, bits, static_cast<int>(group),
                        static_cast<int>(tokens), static_cast<int>(way), error);
          }
        }
  std::printf("%s: %d products, %d wrong, at most %.2f of the error allowed\n", name, done, wrong, worst);
  return wrong;
}

}  // namespace

int main(int count, char** names) {
  const char* all[] = {"avx2", "avxvnni", "avx512vnni", "avx512bf16", "neon", "neondot", "neoni8mm"};
  int wrong = 0, ran = 0;
  for (const char* name : all) {
    bool asked = count == 1;
    for (int i = 1; i < count; i++) asked = asked || !std::strcmp(name, names[i]);
    if (!asked) continue;
    const char* used = use(name);
    if (!used && count > 1) std::printf("%s: this machine has it not\n", name);
    wrong += !used && count > 1;
    if (!used) continue;
    wrong += run(name);
    ran++;
  }
  return wrong || !ran;
}
