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

// ||y - expected|| / ||expected||. Whole numbers with 127 among them: int8 by token holds them exactly.
double error_of(const Sample& s, int64_t tokens, bool quantized) {
  std::vector<float> x(static_cast<std::size_t>(tokens * s.k)), y(static_cast<std::size_t>(tokens * s.n), NAN), row(static_cast<std::size_t>(s.k));
  for (int64_t i = 0; i < tokens * s.k; i++) x[static_cast<std::size_t>(i)] = i % s.k ? static_cast<float>(below(255) - 127) : 127.0f;
  Activation a;
  a.x = x.data();
  a.tokens = tokens;
  a.stride = s.k;
  a.quantized = quantized;
  linear(s.w, a, {y.data(), Type::fp32, s.n, nullptr, Type::fp32}, serial);
  double noise = 0, signal = 0;
  for (int64_t n = 0; n < s.n; n++) {
    decode_row(s.w, n, row.data());
    for (int64_t k = 0; k < s.k; k++) noise += std::fabs(row[static_cast<std::size_t>(k)] - s.value(n, k)) > 1e-5;
    for (int64_t m = 0; m < tokens; m++) {
      double sum = 0;
      for (int64_t k = 0; k < s.k; k++) sum += static_cast<double>(x[static_cast<std::size_t>(m * s.k + k)]) * s.value(n, k);
      const double off = y[static_cast<std::size_t>(m * s.n + n)] - sum;
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
      for (int64_t tokens : {1, 2, 3, 8, 9, 23})
        for (bool quantized : {false, true}) {
          const bool table = bits == 9;
          const Sample s(table ? 4 : bits, 1 + below(70), group * (group == 16 ? 2 : 1) * (1 + below(3)), group, !table && below(2), table ? e2m1 : nullptr);
          const double error = error_of(s, tokens, quantized);
          done++;
          worst = error > worst ? error : worst;
          if (!(error < 1e-5)) {
            wrong++;
            std::printf("%s: bits %d group %d tokens %d int8 %d: relative error %g\n", name, bits, static_cast<int>(group),
                        static_cast<int>(tokens), quantized, error);
          }
        }
  std::printf("%s: %d products, %d wrong, largest relative error %.1e\n", name, done, wrong, worst);
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
