// Activations on their way into a product: quantized by token or by group, or split into bf16, and laid side by side by blocks.
//
//     int8, symmetric     scale = max|x| / 127                  x_q = round(x / scale)
//     int8, asymmetric    scale = (max - min) / 255, zero = -128 - round(min / scale), both ranges widened to hold 0
//     e4m3                scale = max|x| / 448                  x_q = x / scale, rounded to 4 significant bits: exact in bf16
//     bf16                x = x_0 + x_1 + x_2, each of 8 bits of the mantissa: one row for bf16, two for fp16, three for float32
//
// A NaN makes its scale NaN, and with it every result of its token (or group). Rounding is to nearest even.
#pragma once
#include "decode.h"

namespace {

using lowp::Activation;
using lowp::Job;
using lowp::Type;

constexpr float kTiny = 1.17549435e-38f, kHuge = 3.40282347e+38f;  // the smallest normal and the largest float32

inline float from_bits(int32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

inline int32_t to_bits(float value) {
  int32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  return bits;
}

// `count` numbers from column `at` on, a multiple of 16, as float32.
inline void read(const Activation& a, int64_t token, int64_t at, int64_t count, float* out) {
  const int64_t place = token * a.stride + at;
  for (int64_t i = 0; i < count; i += 16) {
    if (a.type == Type::fp32)
      Lanes::store_f(out + i, Lanes::load_f(static_cast<const float*>(a.x) + place + i));
    else if (a.type == Type::bf16)
      Lanes::store_f(out + i, Lanes::load_bf16(static_cast<const uint16_t*>(a.x) + place + i));
    else
      Lanes::store_f(out + i, Lanes::load_fp16(static_cast<const uint16_t*>(a.x) + place + i));
  }
}

struct Range {
  int32_t top = 0, bottom = 0;  // bits of max(x, 0) and of max(-x, 0): floats of one sign are ordered as integers are, NaN on top
};

// `both`: where only the larger of the two is wanted, in each.
inline void widen(Range& range, const float* x, int64_t count, bool both) {
  Lanes::I top = Lanes::spread(range.top), bottom = Lanes::spread(range.bottom);
  for (int64_t i = 0; i < count; i += 16) {
    const Lanes::F v = Lanes::load_f(x + i);
    top = Lanes::larger(top, Lanes::bits(v));
    bottom = Lanes::larger(bottom, Lanes::bits(Lanes::negated(v)));
  }
  range.top = Lanes::largest(both ? Lanes::larger(top, bottom) : top);
  range.bottom = both ? range.top : Lanes::largest(bottom);
}

struct Grid {
  float scale = 0, inverse = 0;
  int32_t zero = 0;
};

inline float stored(float scale) { return scale < kTiny ? kTiny : scale; }

constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it leaves no bit below one
inline float nearest(float v) { return (v + kMagic) - kMagic; }
inline Lanes::F nearest(Lanes::F v) { return Lanes::add(Lanes::add(v, Lanes::spread(kMagic)), Lanes::spread(-kMagic)); }

inline float clamp(float v, float low, float high) { return v > low ? (v < high ? v : high) : low; }  // NaN to low
inline Lanes::F clamp(Lanes::F v, float low, float high) {
  return Lanes::smaller(Lanes::larger(v, Lanes::spread(low)), Lanes::spread(high));
}

inline Grid grid_of(const Activation& a, Range range) {
  const float top = from_bits(range.top), bottom = from_bits(range.bottom);
  Grid grid;
  if (!a.asymmetric) {
    const bool nan = range.top > 0x7F800000 || range.bottom > 0x7F800000;
    grid.scale = a.scale && !nan ? *a.scale : stored(from_bits(range.top > range.bottom ? range.top : range.bottom) / 127.0f);
    return grid;
  }
  const float whole = top + bottom;
  const bool fits = whole <= kHuge || whole != whole;
  grid.scale = stored(fits ? whole / 255.0f : top / 255.0f + bottom / 255.0f);
  grid.inverse = 1.0f / grid.scale;
  grid.zero = static_cast<int32_t>(clamp(-128.0f + nearest(clamp(bottom / grid.scale, -1024.0f, 1024.0f)), -128.0f, 127.0f));
  return grid;
}

inline int32_t quantize(const float* x, int64_t count, const Grid& grid, bool asymmetric, int8_t* out) {
  const Lanes::F zero = Lanes::spread(static_cast<float>(grid.zero)), scale = Lanes::spread(grid.scale), inverse = Lanes::spread(grid.inverse);
  Lanes::I sum = Lanes::zero_i();
  for (int64_t i = 0; i < count; i += 16) {
    const Lanes::F v = Lanes::load_f(x + i), scaled = asymmetric ? Lanes::mul(v, inverse) : Lanes::div(v, scale);
    const Lanes::F rounded = Lanes::add(nearest(clamp(scaled, -1024.0f, 1024.0f)), zero);
    const Lanes::I code = Lanes::to_int(clamp(rounded, -128.0f, 127.0f));
    Lanes::store_bytes(out + i, code);
    sum = Lanes::add(sum, code);
  }
  return Lanes::total(sum);
}

template <int R>
inline void quantize_row(const Job& job, const Activation& a, int64_t row, int r, uint32_t* words, int64_t at_block) {
  alignas(64) float x[512];
  alignas(64) int8_t q[512];
  const int64_t k = job.w.k, length = a.group ? a.group : k, offset = job.w.offset - (Lanes::kSignedBytes && job.w.bits == 8 ? 128 : 0);
  for (int64_t from = 0; from < k; from += length) {
    Range range;
    for (int64_t at = from; at < from + length; at += 512) {
      int64_t count = from + length - at < 512 ? from + length - at : 512;
      read(a, row, at, count, x);
      widen(range, x, count, !a.asymmetric);
    }
    const Grid grid = grid_of(a, range);
    for (int64_t at = from; at < from + length; at += job.segment) {
      const int64_t s = at / job.segment, count = from + length - at < job.segment ? from + length - at : job.segment;
      const float* piece = length > 512 ? x : x + (at - from);  // a short run is there already
      if (length > 512) read(a, row, at, count, x);
      const int32_t sum = quantize(piece, count, grid, a.asymmetric, q);
      for (int64_t i = 0; i < count / 4; i++) __builtin_memcpy(&words[(at / 4 + i) * R + r], q + 4 * i, 4);
      const int64_t place = (at_block * job.segments + s) * R + r;
      if (job.xscale) job.xscale[place] = grid.scale;
      job.start[place] = static_cast<int32_t>(-offset * sum);
      job.xsum[place] = static_cast<float>(sum);
    }
    if (job.token_scale) job.token_scale[row] = grid.scale;
    if (a.asymmetric) job.shift[row] = static_cast<float>(grid.zero) * grid.scale;
  }
}

// The part `split` of a float: 8 bits of its mantissa.
inline uint16_t piece(float value, int splits, int split) {
  if (value != value) return 0x7FC0;
  for (int i = 0;; i++) {
    const uint32_t bits = static_cast<uint32_t>(to_bits(value));
    if (i == split || splits == 1) return static_cast<uint16_t>(bits >> 16);
    if ((bits & 0x7F800000u) == 0x7F800000u) return 0;  // infinity has no rest
    value -= from_bits(static_cast<int32_t>(bits & 0xFFFF0000u));
  }
}

// To the nearest e4m3, ties to even: the step is 2^(e - 3) for a number of exponent e, that of 2^-6 for smaller ones. Adding 1.5 * 2^23
// steps leaves no bit below one.
inline void round_e4m3(float* x, int64_t count, float scale) {
  for (int64_t i = 0; i < count; i++) {
    const float scaled = x[i] / scale;
    const float v = scaled > 448.0f ? 448.0f : scaled < -448.0f ? -448.0f : scaled;
    const int32_t exponent = to_bits(v) & 0x7F800000, least = 121 << 23, most = 135 << 23;  // NaN has more: it stays NaN
    const float magic = 1.5f * from_bits((exponent < least ? least : exponent > most ? most : exponent) + (20 << 23));
    x[i] = (v + magic) - magic;
  }
}

inline float float8_scale(const Job& job, const Activation& a, int64_t row, float* x) {
  if (a.scale) return *a.scale;
  Range range;
  for (int64_t at = 0; at < job.w.k; at += 512) {
    const int64_t count = job.w.k - at < 512 ? job.w.k - at : 512;
    read(a, row, at, count, x);
    widen(range, x, count, true);
  }
  return stored(from_bits(range.top) / 448.0f);
}

template <int R>
inline void split_row(const Job& job, const Activation& a, int64_t row, int r, uint32_t* words, int64_t at_block) {
  alignas(64) float x[512];
  alignas(64) uint16_t p[512];
  const int split = static_cast<int>(row % job.splits);
  const float scale = a.float8 ? float8_scale(job, a, row, x) : 1.0f;
  if (a.float8) job.token_scale[row] = scale;
  for (int64_t at = 0; at < job.w.k; at += job.segment) {
    const int64_t count = job.w.k - at < job.segment ? job.w.k - at : job.segment;
    read(a, row / job.splits, at, count, x);
    if (a.float8) round_e4m3(x, count, scale);
    float sum = 0;
    if (job.dot == Dot::fp32) {
      for (int64_t i = 0; i < count; i++) __builtin_memcpy(&words[(at + i) * R + r], x + i, 4);
      for (int64_t i = 0; i < count; i++) sum += x[i];
    } else {
      if (job.splits == 1)
        for (int64_t i = 0; i < count; i++) p[i] = static_cast<uint16_t>(static_cast<uint32_t>(to_bits(x[i])) >> 16);
      else
        for (int64_t i = 0; i < count; i++) p[i] = piece(x[i], job.splits, split);
      for (int64_t i = 0; i < count; i += 4) {
        uint32_t* word = words + (at + i) / 2 * R + r;
        word[0] = p[i] | static_cast<uint32_t>(p[i + 2]) << 16;
        word[R] = p[i + 1] | static_cast<uint32_t>(p[i + 3]) << 16;
      }
      if (job.w.zero)
        for (int64_t i = 0; i < count; i++) sum += from_bits(static_cast<int32_t>(static_cast<uint32_t>(p[i]) << 16));
    }
    job.xsum[(at_block * job.segments + at / job.segment) * R + r] = sum;
  }
}

template <int R>
void pack_block(const Job& job, const Activation& a, int64_t block) {
  uint32_t* words = job.words + block * job.block_words();
  const int64_t rows = job.tokens * job.splits;
  for (int r = 0; r < R; r++) {
    const int64_t row = block * R + r;
    if (row >= rows) {  // filled up with zeros
      for (int64_t i = 0; i < job.block_words() / R; i++) words[i * R + r] = 0;
      for (int64_t s = 0; s < job.segments; s++) {
        const int64_t place = (block * job.segments + s) * R + r;
        if (job.xscale) job.xscale[place] = 0;
        job.xsum[place] = 0;
        job.start[place] = 0;
      }
    } else if (job.dot == Dot::u8) {
      quantize_row<R>(job, a, row, r, words, block);
    } else {
      split_row<R>(job, a, row, r, words, block);
    }
  }
}

}  // namespace
