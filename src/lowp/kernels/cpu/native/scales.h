// Scales and zero points, as float32 whatever they are stored as: one, a run of them, those of a tile's segments.
#pragma once
#include "activation.h"

namespace {

using lowp::kTileRows;

inline float one_scale(const void* p, Type type, int64_t i) {
  const uint8_t* bytes = static_cast<const uint8_t*>(p);
  alignas(64) uint16_t half[16] = {};
  alignas(64) float wide[16];
  switch (type) {
    case Type::fp32: return static_cast<const float*>(p)[i];
    case Type::bf16: return from_bits(static_cast<int32_t>(static_cast<uint32_t>(static_cast<const uint16_t*>(p)[i]) << 16));
    case Type::fp16:
      half[0] = static_cast<const uint16_t*>(p)[i];
      Lanes::store_f(wide, Lanes::load_fp16(half));
      return wide[0];
    case Type::e8m0: return bytes[i] == 255 ? from_bits(0x7FC00000) : from_bits(bytes[i] ? bytes[i] << 23 : 0x00400000);
    case Type::e4m3: {
      const int code = bytes[i] & 127;
      if (code == 127) return from_bits(0x7FC00000);
      const float size = code < 8 ? static_cast<float>(code) * 0.001953125f : from_bits((code << 20) + (120 << 23));  // 2^-9
      return bytes[i] & 128 ? -size : size;
    }
    case Type::int8: return static_cast<const int8_t*>(p)[i];
    case Type::uint8: return bytes[i];
    case Type::int32: return static_cast<float>(static_cast<const int32_t*>(p)[i]);
  }
  return 0;
}

inline int64_t bytes_of(Type type) {
  return type == Type::fp32 || type == Type::int32 ? 4 : type == Type::bf16 || type == Type::fp16 ? 2 : 1;
}

// `count` numbers from place i on, a multiple of 16, as float32. The next `count` are fetched meanwhile: the codes between them take
// long enough for that, and without it each run would wait for memory.
inline void read_run(const void* p, Type type, int64_t i, int64_t count, float* out) {
  const uint8_t* next = static_cast<const uint8_t*>(p) + (i + count) * bytes_of(type);
  for (int64_t byte = 0; byte < count * bytes_of(type); byte += 64) Lanes::prefetch(next + byte);
  const uint8_t* bytes = static_cast<const uint8_t*>(p) + i;
  const uint16_t* halves = static_cast<const uint16_t*>(p) + i;
  if (type == Type::bf16) {
    for (int64_t r = 0; r < count; r += 16) Lanes::store_f(out + r, Lanes::load_bf16(halves + r));
  } else if (type == Type::fp16) {
    for (int64_t r = 0; r < count; r += 16) Lanes::store_f(out + r, Lanes::load_fp16(halves + r));
  } else if (type == Type::fp32) {
    for (int64_t r = 0; r < count; r += 16) Lanes::store_f(out + r, Lanes::load_f(static_cast<const float*>(p) + i + r));
  } else if (type == Type::e8m0) {
    for (int64_t r = 0; r < count; r++) {
      const int32_t code = bytes[r], bits = code == 255 ? 0x7FC00000 : code << 23;
      out[r] = from_bits(code ? bits : 0x00400000);
    }
  } else if (type == Type::e4m3) {
    for (int64_t r = 0; r < count; r += 16) Lanes::store_f(out + r, Lanes::load_e4m3(bytes + r));
  } else if (type == Type::int8) {
    for (int64_t r = 0; r < count; r += 16) Lanes::store_f(out + r, Lanes::load_int8(bytes + r));
  } else if (type == Type::uint8) {
    for (int64_t r = 0; r < count; r++) out[r] = bytes[r];
  } else {
    for (int64_t r = 0; r < count; r++) out[r] = static_cast<float>(static_cast<const int32_t*>(p)[i + r]);
  }
}

// Scales that are codes themselves: (code - zero) * scale of their block, never below the smallest normal number.
inline void read_nested(const Weight& w, int64_t row, int64_t rows, int64_t group, int64_t count, float* scale) {
  const int64_t columns = w.k / w.group / w.nest_columns;
  alignas(64) float by[16] = {}, minus[16] = {};
  int64_t left = w.nest_columns - group % w.nest_columns;  // groups until the next block
  for (int64_t g = 0; g < count; g++, left--) {
    if (left == 0) left = w.nest_columns;
    if (g == 0 || left == w.nest_columns) {
      int64_t place = row / w.nest_rows * columns + (group + g) / w.nest_columns, below = w.nest_rows - row % w.nest_rows;
      for (int64_t r = 0; r < rows; r++, below--) {
        if (below == 0) {
          below = w.nest_rows;
          place += columns;
        }
        by[r] = w.scale_scale[place];
        if (w.scale_zero) minus[r] = -w.scale_zero[place];
      }
    }
    float* to = scale + g * kTileRows;
    const Lanes::F value = Lanes::mul(Lanes::add(Lanes::load_f(to), Lanes::load_f(minus)), Lanes::load_f(by));
    Lanes::store_f(to, Lanes::larger(Lanes::spread(kTiny), value));
  }
}

// Scales (and zero points) of a tile for `count` segments from `first` on, as float32, 16 for each segment, `stride` numbers apart.
// `by` goes into each scale.
inline void read_scales(const Weight& w, int64_t tile, int64_t segment, int64_t first, int64_t count, int64_t stride, float by,
                        float* scale, float* zero) {
  const int64_t row = tile * kTileRows, rows = w.n - row < kTileRows ? w.n - row : kTileRows;
  alignas(64) float scales[512], zeros[512];
  int64_t per = count, past = 0;  // segments of a group, and those of the first that came before
  if (w.group <= 0) {
    for (int64_t r = 0; r < kTileRows; r++) {
      const int64_t place = w.group < 0 ? 0 : row + (r < rows ? r : rows - 1);
      scales[r] = one_scale(w.scale, w.scale_type, place);
      if (w.zero) zeros[r] = one_scale(w.zero, w.zero_type, place);
    }
  } else {
    per = w.group / segment;
    const int64_t group = first / per, groups = (first + count - 1) / per - group + 1;
    const int64_t place = (tile * (w.k / w.group) + group) * kTileRows;
    const bool in_place = per == 1 && stride == kTileRows && by == 1.0f;
    float *scales_at = in_place ? scale : scales, *zeros_at = in_place ? zero : zeros;
    past = first - group * per;
    read_run(w.scale, w.scale_type, place, groups * kTileRows, scales_at);
    if (w.zero) read_run(w.zero, w.zero_type, place, groups * kTileRows, zeros_at);
    if (w.scale_scale) read_nested(w, row, rows, group, groups, scales_at);
    if (in_place) return;
  }
  for (int64_t s = 0, from = 0; s < count; s++, past++) {
    if (past == per) {
      past = 0;
      from += kTileRows;
    }
    Lanes::store_f(scale + s * stride, Lanes::mul(Lanes::load_f(scales + from), Lanes::spread(by)));
    if (w.zero) Lanes::store_f(zero + s * stride, Lanes::load_f(zeros + from));
  }
}

inline float scale_factor(const Job& job) { return job.dot == Dot::u8 && !job.w.is_int ? 0.5f : 1.0f; }  // `halves`

}  // namespace
