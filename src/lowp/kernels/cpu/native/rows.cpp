// Single rows of a weight as float32, for embeddings; and which instruction set this machine has. Compiled for any machine.
#include <cstdlib>
#include <cstring>

#include "contract.h"

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace lowp {

// The value of a code of a small float: sign, exponent, mantissa. specials: 0 none, 1 ieee, 2 fn, 3 fnuz (numerics/element.py).
float element_value(int code, int ebits, int mbits, int bias, int specials, int bits, bool is_signed) {
  const int top = (1 << ebits) - 1, exponent = (code >> mbits) & top, mantissa = code & ((1 << mbits) - 1);
  const bool negative = is_signed && (code >> (bits - 1)) & 1;
  float size;
  const bool nan = (specials == 1 && exponent == top && mantissa) ||
                   (specials == 2 && exponent == top && mantissa == (1 << mbits) - 1) || (specials == 3 && code == 1 << (bits - 1));
  if (nan)
    size = __builtin_nanf("");
  else if (specials == 1 && exponent == top)
    size = __builtin_inff();
  else
    size = static_cast<float>(exponent ? (1 << mbits) + mantissa : mantissa) * __builtin_ldexpf(1.0f, (exponent ? exponent : 1) - bias - mbits);
  return negative ? -size : size;
}

namespace {

float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

float number(const void* p, Type type, int64_t i) {
  switch (type) {
    case Type::fp32: return static_cast<const float*>(p)[i];
    case Type::bf16: return from_bits(static_cast<uint32_t>(static_cast<const uint16_t*>(p)[i]) << 16);
    case Type::fp16: {
      const int code = static_cast<const uint16_t*>(p)[i];
      return element_value(code, 5, 10, 15, 1, 16, true);
    }
    case Type::e8m0: {
      const int code = static_cast<const uint8_t*>(p)[i];
      return code == 255 ? __builtin_nanf("") : __builtin_ldexpf(1.0f, code - 127);
    }
    case Type::e4m3: return element_value(static_cast<const uint8_t*>(p)[i], 4, 3, 7, 2, 8, true);
    case Type::int8: return static_cast<const int8_t*>(p)[i];
    case Type::uint8: return static_cast<const uint8_t*>(p)[i];
    case Type::int32: return static_cast<float>(static_cast<const int32_t*>(p)[i]);
  }
  return 0;
}

int code_at(const uint8_t* tile, int bits, int row, int column) {
  const int quad = column / 4, byte = 4 * row + column % 4;
  if (bits == 8) return tile[64 * quad + byte];
  int code = 0, low = 0;
  for (int width = 4; width; width /= 2) {
    if (!(bits & width)) continue;
    code |= (tile[64 * (quad % width) + byte] >> (quad / width * width) & ((1 << width) - 1)) << low;
    tile += 64 * width;
    low += width;
  }
  return code;
}

}  // namespace

void decode_row(const Weight& w, int64_t row, float* out) {
  const int64_t tile = row / kTileRows, groups = w.group > 0 ? w.k / w.group : 1;
  const uint8_t* codes = w.codes + tile * w.tile_bytes();
  const int64_t length = w.group > 0 ? w.group : w.k;
  for (int64_t group = 0; group < groups; group++) {
    const int64_t place = w.group > 0 ? (tile * groups + group) * kTileRows + row % kTileRows : w.group < 0 ? 0 : row;
    float scale = number(w.scale, w.scale_type, place);
    if (w.scale_scale) {
      const int64_t outer = row / w.nest_rows * (groups / w.nest_columns) + group / w.nest_columns;
      scale = (scale - (w.scale_zero ? w.scale_zero[outer] : 0.0f)) * w.scale_scale[outer];
      scale = scale < 1.17549435e-38f ? 1.17549435e-38f : scale;
    }
    const float zero = w.zero ? number(w.zero, w.zero_type, place) : 0.0f;
    for (int64_t k = group * length; k < (group + 1) * length; k++) {
      const int code = code_at(codes + k / kTileColumns * 64 * w.bits, w.bits, static_cast<int>(row % kTileRows), static_cast<int>(k % kTileColumns));
      const float value = w.is_int ? static_cast<float>(code - w.offset) : w.table[code];
      out[k] = (value - zero) * scale;
    }
  }
}

namespace {

// The best first; those that this machine lacks are null.
const Kernels* const* available() {
  static const Kernels* found[6] = {};
  static const bool once = [] {
    int n = 0;
#if defined(__x86_64__)
    __builtin_cpu_init();
    unsigned a = 0, b = 0, c = 0, d = 0;
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __get_cpuid(1, &a, &b, &c, &d) && (c >> 29 & 1);
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni");
    const bool leaf7 = __get_cpuid_count(7, 1, &a, &b, &c, &d);
    if (avx512 && leaf7 && (a >> 5 & 1)) found[n++] = &kAvx512Bf16;
    if (avx512) found[n++] = &kAvx512Vnni;
    if (avx2 && leaf7 && (a >> 4 & 1)) found[n++] = &kAvxVnni;
    if (avx2) found[n++] = &kAvx2;
#elif defined(__aarch64__)
#if defined(__linux__)
    const bool dot = getauxval(AT_HWCAP) & (1UL << 20);                            // HWCAP_ASIMDDP
    if (dot && getauxval(AT_HWCAP2) & (1UL << 13)) found[n++] = &kNeonI8mm;  // HWCAP2_I8MM
    if (dot) found[n++] = &kNeonDot;
#elif defined(__APPLE__)
    found[n++] = &kNeonDot;  // every Apple chip with macOS has it
#endif
    found[n++] = &kNeon;
#endif
    return true;
  }();
  static_cast<void>(once);
  return found;
}

}  // namespace

const Kernels* pick_kernels(const char* wanted) {
  for (const Kernels* const* one = available(); *one; one++)
    if (!*wanted || !std::strcmp(wanted, (*one)->name)) return *one;
  return nullptr;
}

}  // namespace lowp
