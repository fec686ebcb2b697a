// The products: `few` rows of x stream the weight once from memory; `many` decode a panel of it once and multiply it often.
//
//     few     a tile at a time; the sums of up to 8 rows of x stay in registers while its lines are decoded beside them
//     many    a panel of tiles x 512 bytes of columns is decoded into the first cache; blocks of 5 rows of x pass over it
//
// Each number of the result is summed by one thread, in one order: the same for every number of threads.
#pragma once
#include <cstddef>

#include "activation.h"

namespace {

using lowp::kColumns;
using lowp::kSteps;
using lowp::kTileColumns;
using lowp::kTileRows;

struct OfBytes {
  static constexpr Dot dot = Dot::u8;
  static constexpr int steps = 1;
  using Sum = Lanes::I;
  using Word = Lanes::W;
  static Sum start(int32_t v) { return Lanes::spread(v); }
  static Sum zero() { return Lanes::zero_i(); }
  static Word spread(uint32_t x) { return Lanes::spread_word(x); }
  LOWP_INLINE static Sum add(Sum sum, Word w, Word x, bool wide) { return Lanes::dot(sum, w, x, wide); }
  static Lanes::F value(Sum sum) { return Lanes::to_float(sum); }
  static Word load(const uint8_t* p) { return Lanes::load(p); }
  static void store(uint8_t* p, Word w) { Lanes::store(p, w); }
};

struct OfFloats {
  static constexpr Dot dot = Dot::fp32;
  static constexpr int steps = 4;
  using Sum = Lanes::F;
  using Word = Lanes::F;
  static Sum start(int32_t) { return Lanes::zero_f(); }
  static Sum zero() { return Lanes::zero_f(); }
  static Word spread(uint32_t x) { return Lanes::spread(from_bits(static_cast<int32_t>(x))); }
  LOWP_INLINE static Sum add(Sum sum, Word w, Word x, bool) { return Lanes::fma(w, x, sum); }
  static Lanes::F value(Sum sum) { return sum; }
  static Word load(const uint8_t* p) { return Lanes::load_f(reinterpret_cast<const float*>(p)); }
  static void store(uint8_t* p, Word w) { Lanes::store_f(reinterpret_cast<float*>(p), w); }
};

#ifdef __AVX512BF16__
struct OfPairs {
  static constexpr Dot dot = Dot::bf16;
  static constexpr int steps = 2;
  using Sum = Lanes::F;
  using Word = Lanes::W;
  static Sum start(int32_t) { return Lanes::zero_f(); }
  static Sum zero() { return Lanes::zero_f(); }
  static Word spread(uint32_t x) { return Lanes::spread_word(x); }
  LOWP_INLINE static Sum add(Sum sum, Word w, Word x, bool) { return PairTables::dot(sum, w, x); }
  static Lanes::F value(Sum sum) { return sum; }
  static Word load(const uint8_t* p) { return Lanes::load(p); }
  static void store(uint8_t* p, Word w) { Lanes::store(p, w); }
};
#endif

// -- scales -----------------------------------------------------------------------------------------------------------

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

// -- results ----------------------------------------------------------------------------------------------------------

// 16 numbers that are added to a tile's results, of which `count` are there.
inline Lanes::F read_bias(const Job& job, int64_t row, int64_t count) {
  alignas(64) float values[16] = {};
  if (count == kTileRows && job.bias_type == Type::fp32) return Lanes::load_f(static_cast<const float*>(job.bias) + row);
  if (count == kTileRows && job.bias_type == Type::bf16) return Lanes::load_bf16(static_cast<const uint16_t*>(job.bias) + row);
  for (int64_t r = 0; r < count; r++) values[r] = one_scale(job.bias, job.bias_type, row + r);
  return Lanes::load_f(values);
}

// One token's 16 results of a tile: the parts of its splits added, the token's scale, what its zero point is due, bias.
inline void write_tile(const Job& job, int64_t tile, int64_t token, const float* sums, int64_t stride) {
  const int64_t row = tile * kTileRows, count = job.w.n - row < kTileRows ? job.w.n - row : kTileRows;
  Lanes::F v = Lanes::load_f(sums);
  for (int s = 1; s < job.splits; s++) v = Lanes::add(v, Lanes::load_f(sums + s * stride));
  if (job.token_scale) v = Lanes::mul(v, Lanes::spread(job.token_scale[token]));
  if (job.shift) v = Lanes::fnma(Lanes::load_f(job.w.row_sum + row), Lanes::spread(job.shift[token]), v);
  if (job.bias) v = Lanes::add(v, read_bias(job, row, count));
  const int size = job.out_type == Type::fp32 ? 4 : 2;
  uint8_t* to = static_cast<uint8_t*>(job.out) + (token * job.out_stride + row) * size;
  alignas(64) uint8_t whole[64];
  uint8_t* at = count == kTileRows ? to : whole;
  if (job.out_type == Type::fp32)
    Lanes::store_f(reinterpret_cast<float*>(at), v);
  else if (job.out_type == Type::bf16)
    Lanes::store_bf16(at, v);
  else
    Lanes::store_fp16(at, v);
  if (at == whole) __builtin_memcpy(to, whole, static_cast<std::size_t>(count * size));
}

// -- decoded lines ----------------------------------------------------------------------------------------------------

// Columns of one tile's rows, a multiple of 32, into lines [column / 4 * steps + step], `stride` bytes apart.
template <class Of, class Unpack>
void unpack_columns(const Weight& w, const uint8_t* codes_at, int64_t columns, uint8_t* lines, int64_t stride) {
  const Unpack unpack(w);
  for (int64_t k = 0; k < columns; k += kTileColumns) {
    unroll<0, 8>([&](auto q) LOWP_INLINE {
      unpack.template quad<q.value>(codes_at, [&](auto step, typename Of::Word word) LOWP_INLINE {
        Of::store(lines + (q.value * Of::steps + step.value) * stride, word);
      });
    });
    codes_at += 64 * Unpack::bits;
    lines += 8 * Of::steps * stride;
  }
}

using UnpackColumns = void (*)(const Weight&, const uint8_t*, int64_t, uint8_t*, int64_t);

inline int64_t columns_at_once(const Job& job) {
  return kColumns[static_cast<int>(job.dot)] / job.segment * job.segment;
}

// A block of R rows times T tiles of a panel, over some segments: the sums (R, 16 of a panel) in `total` grow. They stay in registers
// meanwhile (`Held`) where these suffice. `Steps` of a segment are one piece of code.
template <class Of, int R, int T, int Panel, bool Held = false, int Steps = 4>
void block_times_lines(const Job& job, int64_t block, int64_t first, int64_t segments, const uint8_t* lines, const float* scales,
                       const float* zeros, float* total) {
  constexpr int Chains = R * T == 1 ? 4 : R * T == 2 ? 2 : 1;  // sums of their own where one would wait for itself
  const bool wide = job.w.bits == 8;
  const int64_t place = (block * job.segments + first) * R, segment = job.segment;
  const uint32_t* words = job.words + block * job.block_words() + first * segment / 4 * Of::steps * R;
  const int32_t* start = job.start + place;
  const float* xsum = job.w.zero ? job.xsum + place : nullptr;
  const float* xscale = job.xscale ? job.xscale + place : nullptr;
  Lanes::F held[R][T];
  if constexpr (Held)
    unroll<0, R>([&](auto r) LOWP_INLINE {
      unroll<0, T>([&](auto t) LOWP_INLINE { held[r.value][t.value] = Lanes::load_f(total + (r.value * Panel + t.value) * 16); });
    });
  int64_t left = job.w.k - first * segment;
  for (int64_t s = 0; s < segments; s++, left -= segment) {
    typename Of::Sum sums[R][T][Chains];
    unroll<0, R>([&](auto r) LOWP_INLINE {
      unroll<0, T>([&](auto t) LOWP_INLINE {
        sums[r.value][t.value][0] = Of::start(start[s * R + r.value]);
        unroll<1, Chains>([&](auto c) LOWP_INLINE { sums[r.value][t.value][c.value] = Of::zero(); });
      });
    });
    const uint8_t* past = lines + (left < segment ? left : segment) / 4 * Of::steps * Panel * 64;
    do {
      unroll<0, Steps>([&](auto u) LOWP_INLINE {
        typename Of::Word w[T];
        unroll<0, T>([&](auto t) LOWP_INLINE { w[t.value] = Of::load(lines + (u.value * Panel + t.value) * 64); });
        unroll<0, R>([&](auto r) LOWP_INLINE {
          const typename Of::Word x = Of::spread(words[u.value * R + r.value]);
          unroll<0, T>([&](auto t) LOWP_INLINE {
            auto& sum = sums[r.value][t.value][u.value % Chains];
            sum = Of::add(sum, w[t.value], x, wide);
          });
        });
      });
      lines += Steps * Panel * 64;
      words += Steps * R;
    } while (lines < past);
    unroll<0, T>([&](auto t) LOWP_INLINE {
      const Lanes::F scale = Lanes::load_f(scales + (s * Panel + t.value) * 16);
      Lanes::F values[R];
      unroll<0, R>([&](auto r) LOWP_INLINE {
        typename Of::Sum sum = sums[r.value][t.value][0];
        unroll<1, Chains>([&](auto c) LOWP_INLINE { sum = Lanes::add(sum, sums[r.value][t.value][c.value]); });
        values[r.value] = Of::value(sum);
      });
      if (xsum) {
        const Lanes::F zero = Lanes::load_f(zeros + (s * Panel + t.value) * 16);
        unroll<0, R>([&](auto r) LOWP_INLINE {
          values[r.value] = Lanes::fnma(zero, Lanes::spread(xsum[s * R + r.value]), values[r.value]);
        });
      }
      if (xscale)
        unroll<0, R>([&](auto r) LOWP_INLINE { values[r.value] = Lanes::mul(values[r.value], Lanes::spread(xscale[s * R + r.value])); });
      unroll<0, R>([&](auto r) LOWP_INLINE {
        float* to = total + (r.value * Panel + t.value) * 16;
        if constexpr (Held)
          held[r.value][t.value] = Lanes::fma(values[r.value], scale, held[r.value][t.value]);
        else
          Lanes::store_f(to, Lanes::fma(values[r.value], scale, Lanes::load_f(to)));
      });
    });
    if constexpr (!Held) asm volatile("" ::: "memory");  // else GCC keeps the sums on the stack as well
  }
  if constexpr (Held)
    unroll<0, R>([&](auto r) LOWP_INLINE {
      unroll<0, T>([&](auto t) LOWP_INLINE { Lanes::store_f(total + (r.value * Panel + t.value) * 16, held[r.value][t.value]); });
    });
}

// A block times a panel. Where segments are short, half of the tiles at a time: then the sums over segments fit in registers beside
// those of a segment (2 x 10 and 3), and reading and writing them would cost more than reading the words of x twice.
template <class Of, int R>
void block_times_panel(const Job& job, int64_t block, int64_t first, int64_t segments, const uint8_t* lines, const float* scales,
                       const float* zeros, float* total) {
  constexpr int Panel = Lanes::kPanel, Half = Panel / 2;
  if constexpr (Half > 0 && Of::dot == Dot::u8)
    if (job.segment <= 64) {
      const auto half = job.segment == 16 ? block_times_lines<Of, R, Half, Panel, true, 4> : block_times_lines<Of, R, Half, Panel, true, 8>;
      for (int t = 0; t < Panel; t += Half)
        half(job, block, first, segments, lines + 64 * t, scales + 16 * t, zeros + 16 * t, total + 16 * t);
      return;
    }
  block_times_lines<Of, R, Panel, Panel>(job, block, first, segments, lines, scales, zeros, total);
}

#ifdef __ARM_FEATURE_MATMUL_INT8
}  // namespace
#include "matrices_neon.h"
namespace {
#endif

// -- few rows ---------------------------------------------------------------------------------------------------------

constexpr int64_t kMostSegments = 32;   // of 16 columns in 512
constexpr int64_t kAhead = 8192;        // bytes that the weight is fetched ahead of its use

template <class Of, int R>
void few_by_lines(const Job& job, UnpackColumns unpack, int64_t first_tile, int64_t last_tile) {
  const Weight& w = job.w;
  alignas(64) uint8_t lines[512 * 16];
  alignas(64) float scales[kMostSegments * 16], zeros[kMostSegments * 16], total[R * 16];
  const int64_t columns = columns_at_once(job), per = columns / job.segment;
  for (int64_t tile = first_tile; tile < last_tile; tile++) {
    for (float& sum : total) sum = 0;
    for (int64_t s = 0; s < job.segments; s += per) {
      const int64_t from = s * job.segment, left = job.segments - s, segments = left < per ? left : per;
      const uint8_t* codes_at = w.codes + tile * w.tile_bytes() + from / kTileColumns * 64 * w.bits;
      const int64_t count = from + columns < w.k ? columns : w.k - from;
      for (int64_t i = 0; i < count / kTileColumns * 64 * w.bits; i += 64) Lanes::prefetch(codes_at + kAhead + i);
      unpack(w, codes_at, count, lines, 64);
      read_scales(w, tile, job.segment, s, segments, 16, scale_factor(job), scales, zeros);
      block_times_lines<Of, R, 1, 1>(job, 0, s, segments, lines, scales, zeros, total);
    }
    for (int64_t t = 0; t < job.tokens; t++) write_tile(job, tile, t, total + t * job.splits * 16, 16);
  }
}

// One or two rows, decoded in registers: nothing but the weight goes through memory. `Parts` segments are side by side in a tile of
// 32 columns: 2 where they have 16, else 1.
template <class Of, class Unpack, int R, int Parts>
void few_in_registers(const Job& job, int64_t first_tile, int64_t last_tile) {
  // Sums beside one another: a dot product takes 4 cycles or more, and where codes are narrow many fall due before the next line.
  constexpr int Chains = R * Parts == 1 && (Of::dot != Dot::u8 || Unpack::bits < 3) ? 4 : 2;
  constexpr int tile_words = 8 * Of::steps * R;  // of x for 32 columns
  const Weight& w = job.w;
  const Unpack unpack(w);
  const float* xscale = job.xscale;
  const float* xsum = w.zero ? job.xsum : nullptr;
  const int64_t segment = job.segment, segments = job.segments, columns = w.k;
  alignas(64) float scales[kMostSegments * 16], zeros[kMostSegments * 16], out[R * 16];
  for (int64_t tile = first_tile; tile < last_tile; tile++) {
    const uint8_t* codes_at = w.codes + tile * w.tile_bytes();
    const uint32_t* words = job.words;
    Lanes::F total[R];
    unroll<0, R>([&](auto r) LOWP_INLINE { total[r.value] = Lanes::zero_f(); });
    for (int64_t first = 0; first < segments; first += kMostSegments) {
      const int64_t count = segments - first < kMostSegments ? segments - first : kMostSegments;
      read_scales(w, tile, segment, first, count, 16, scale_factor(job), scales, zeros);
      const int32_t* start = job.start + first * R;
      int64_t left = columns - first * segment;
      for (int64_t s = 0; s < count; s += Parts, start += Parts * R, left -= Parts * segment) {
        typename Of::Sum sums[Parts][R][Chains];
        unroll<0, Parts * R>([&](auto i) LOWP_INLINE {
          auto& row = sums[i.value / R][i.value % R];
          unroll<1, Chains>([&](auto c) LOWP_INLINE { row[c.value] = Of::zero(); });
          row[0] = Of::start(start[i.value]);
        });
        const uint8_t* past = codes_at + (left < segment ? left : segment) / kTileColumns * 64 * Unpack::bits;
        do {
          unroll<0, Unpack::bits>([&](auto line) LOWP_INLINE { Lanes::prefetch(codes_at + kAhead + 64 * line.value); });
          unroll<0, 8>([&](auto q) LOWP_INLINE {
            unpack.template quad<q.value>(codes_at, [&](auto step, typename Of::Word word) LOWP_INLINE {
              constexpr int at = q.value * Of::steps + step.value;
              unroll<0, R>([&](auto r) LOWP_INLINE {
                auto& sum = sums[q.value * Parts / 8][r.value][at % Chains];
                sum = Of::add(sum, word, Of::spread(words[at * R + r.value]), Unpack::bits == 8);
              });
            });
          });
          codes_at += 64 * Unpack::bits;
          words += tile_words;
        } while (codes_at < past);
        unroll<0, Parts * R>([&](auto i) LOWP_INLINE {
          constexpr int part = i.value / R, r = i.value % R;
          typename Of::Sum sum = sums[part][r][0];
          unroll<1, Chains>([&](auto c) LOWP_INLINE { sum = Lanes::add(sum, sums[part][r][c.value]); });
          Lanes::F value = Of::value(sum);
          const int64_t place = (first + s) * R + i.value, at = 16 * (s + part);
          if (xsum) value = Lanes::fnma(Lanes::load_f(zeros + at), Lanes::spread(xsum[place]), value);
          if (xscale) value = Lanes::mul(value, Lanes::spread(xscale[place]));
          total[r] = Lanes::fma(value, Lanes::load_f(scales + at), total[r]);
        });
      }
    }
    unroll<0, R>([&](auto r) LOWP_INLINE { Lanes::store_f(out + 16 * r.value, total[r.value]); });
    for (int64_t t = 0; t < job.tokens; t++) write_tile(job, tile, t, out + t * job.splits * 16, 16);
  }
}

// -- many rows --------------------------------------------------------------------------------------------------------

// Blocks of rows that a decoded panel serves, whose sums stay in the second cache: 600 rows, in 1, 2 or 3 of which a token is whole.
constexpr int64_t kBlocksAtOnce = 120;
constexpr int64_t kPanelRows = Lanes::kPanel * kTileRows;
constexpr int64_t kLineBytes = 512 * kPanelRows;

inline int64_t scratch_bytes(const Job& job) {
  const int64_t blocks = job.blocks() < kBlocksAtOnce ? job.blocks() : kBlocksAtOnce;
  return kLineBytes + 2 * kMostSegments * kPanelRows * 4 + blocks * lowp::kBlock * kPanelRows * 4;
}

// Columns [from, to) of a panel, and its scales.
inline void open_panel(const Job& job, UnpackColumns unpack, int64_t panel, int64_t first, int64_t segments, uint8_t* lines,
                       float* scales, float* zeros) {
  const Weight& w = job.w;
  const int64_t from = first * job.segment, past = from + segments * job.segment, to = past < w.k ? past : w.k;
  for (int t = 0; t < Lanes::kPanel; t++) {
    const int64_t tile = panel * Lanes::kPanel + t < w.tiles() ? panel * Lanes::kPanel + t : w.tiles() - 1;  // the last again
    const uint8_t* codes_at = w.codes + tile * w.tile_bytes() + from / kTileColumns * 64 * w.bits;
    unpack(w, codes_at, to - from, lines + 64 * t, 64 * Lanes::kPanel);
#ifdef __ARM_FEATURE_MATMUL_INT8
    if (job.dot == Dot::u8) pair_lines(lines, (to - from) / 4);
#endif
    read_scales(w, tile, job.segment, first, segments, kPanelRows, scale_factor(job), scales + 16 * t, zeros + 16 * t);
  }
}

template <class Of>
void many_rows(const Job& job, UnpackColumns unpack, int64_t first_panel, int64_t last_panel, void* scratch) {
  constexpr int64_t block_numbers = lowp::kBlock * kPanelRows;
  const int64_t per = columns_at_once(job) / job.segment, rows = job.tokens * job.splits;
  uint8_t* lines = static_cast<uint8_t*>(scratch);
  float* scales = reinterpret_cast<float*>(lines + kLineBytes);
  float* zeros = scales + kMostSegments * kPanelRows;
  float* totals = zeros + kMostSegments * kPanelRows;
  for (int64_t panel = first_panel; panel < last_panel; panel++) {
    for (int64_t block0 = 0; block0 < job.blocks(); block0 += kBlocksAtOnce) {
      const int64_t blocks = job.blocks() - block0 < kBlocksAtOnce ? job.blocks() - block0 : kBlocksAtOnce;
      for (int64_t i = 0; i < blocks * block_numbers; i++) totals[i] = 0;
      for (int64_t s = 0; s < job.segments; s += per) {
        const int64_t segments = job.segments - s < per ? job.segments - s : per;
        open_panel(job, unpack, panel, s, segments, lines, scales, zeros);
        for (int64_t b = 0; b < blocks; b++)
          block_times_panel<Of, lowp::kBlock>(job, block0 + b, s, segments, lines, scales, zeros, totals + b * block_numbers);
      }
      const int64_t row0 = block0 * lowp::kBlock, past = row0 + blocks * lowp::kBlock;
      const int64_t first_token = (row0 + job.splits - 1) / job.splits;
      for (int64_t token = first_token; token * job.splits < past && token * job.splits < rows; token++)
        for (int t = 0; t < Lanes::kPanel && panel * Lanes::kPanel + t < job.w.tiles(); t++)
          write_tile(job, panel * Lanes::kPanel + t, token, totals + (token * job.splits - row0) * kPanelRows + 16 * t, kPanelRows);
    }
  }
}

// -- which one --------------------------------------------------------------------------------------------------------

using Few = void (*)(const Job&, int64_t, int64_t);

// How a job's columns are decoded: into lines, and in registers for one and for two rows, segments of 16 columns and longer ones
// (null: by lines).
struct Ways {
  UnpackColumns columns;
  Few registers[2][2];
};

template <class Of, class ToLines, class InRegisters = ToLines>
Ways ways() {
  if constexpr (Of::dot == Dot::fp32)
    return {unpack_columns<Of, ToLines>, {}};
  else
    return {unpack_columns<Of, ToLines>,
            {{few_in_registers<Of, InRegisters, 1, 1>, few_in_registers<Of, InRegisters, 1, 2>},
             {few_in_registers<Of, InRegisters, 2, 1>, few_in_registers<Of, InRegisters, 2, 2>}}};
}

template <int Bits>
Ways ways_of(const Job& job) {
  const bool is_int = job.w.is_int;
  if (job.dot == Dot::u8) {
    if constexpr (Bits == 4)
      if (!is_int) return ways<OfBytes, UnpackHalves>();
    return ways<OfBytes, UnpackU8<Bits>>();
  }
#ifdef __AVX512BF16__
  if (job.dot == Dot::bf16) {
    if constexpr (Bits == 8)
      if (!is_int) return ways<OfPairs, UnpackFloat8>();
    if constexpr (Bits >= 7) return ways<OfPairs, UnpackConverted<Bits>, UnpackTwoPairs<Bits>>();
    if constexpr (Bits < 7) return ways<OfPairs, UnpackPairs<Bits>>();
  }
#endif
  return is_int ? ways<OfFloats, UnpackInts<Bits>>() : ways<OfFloats, UnpackTable<Bits>>();
}

inline Ways ways_of(const Job& job) {
  static constexpr Ways (*by_bits[])(const Job&) = {ways_of<1>, ways_of<2>, ways_of<3>, ways_of<4>,
                                                    ways_of<5>, ways_of<6>, ways_of<7>, ways_of<8>};
  return by_bits[job.w.bits - 1](job);
}

template <class Of>
void few_of(const Job& job, int64_t first, int64_t last) {
  const Ways way = ways_of(job);
  const Few fused = job.block > 2 ? nullptr : way.registers[job.block - 1][job.segment < kTileColumns];
  if (fused) return fused(job, first, last);
  switch (job.block) {
    case 1: return few_by_lines<Of, 1>(job, way.columns, first, last);
    case 2: return few_by_lines<Of, 2>(job, way.columns, first, last);
    case 4: return few_by_lines<Of, 4>(job, way.columns, first, last);
    default: return few_by_lines<Of, 8>(job, way.columns, first, last);
  }
}

void run_few(const Job& job, int64_t first, int64_t last) {
  if (job.dot == Dot::u8) return few_of<OfBytes>(job, first, last);
#ifdef __AVX512BF16__
  if (job.dot == Dot::bf16) return few_of<OfPairs>(job, first, last);
#endif
  few_of<OfFloats>(job, first, last);
}

void run_many(const Job& job, int64_t first, int64_t last, void* scratch) {
  const UnpackColumns unpack = ways_of(job).columns;
  if (job.dot == Dot::u8) return many_rows<OfBytes>(job, unpack, first, last, scratch);
#ifdef __AVX512BF16__
  if (job.dot == Dot::bf16) return many_rows<OfPairs>(job, unpack, first, last, scratch);
#endif
  many_rows<OfFloats>(job, unpack, first, last, scratch);
}

void run_pack(const Job& job, const Activation& a, int64_t block) {
  switch (job.block) {
    case 1: return pack_block<1>(job, a, block);
    case 2: return pack_block<2>(job, a, block);
    case 4: return pack_block<4>(job, a, block);
    case 8: return pack_block<8>(job, a, block);
    default: return pack_block<lowp::kBlock>(job, a, block);
  }
}

}  // namespace
