// The products: `few` rows of x stream the weight once from memory; `many` decode a panel of it once and multiply it often.
//
//     few     a tile at a time; the sums of up to 8 rows of x stay in registers while its lines are decoded beside them
//     many    a panel of tiles x 512 bytes of columns is decoded into the first cache; blocks of 5 rows of x pass over it
//
// Each number of the result is summed by one thread, in one order: the same for every number of threads.
#pragma once
#include <cstddef>
#include <new>
#include <type_traits>

#include "scales.h"

namespace {

using lowp::kSteps;
using lowp::kTileColumns;

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
  // A line of pairs, less its rows' zero points and times their scales.
  LOWP_INLINE static void rescale(uint8_t* line, Lanes::F scale, Lanes::F zero) {
    const Word pairs = Lanes::load(line);
    const Lanes::F even = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
    const Lanes::F odd = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xFFFF0000))));
    Lanes::store(line, PairTables::pairs(_mm512_mul_ps(_mm512_sub_ps(even, zero), scale), _mm512_mul_ps(_mm512_sub_ps(odd, zero), scale)));
  }
};
#endif

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

// Columns of one tile's rows, a multiple of 32, into lines [column / 4 * steps + step], `stride` bytes apart. What comes `ahead` bytes
// later is fetched meanwhile.
template <class Of, class Unpack>
void unpack_columns(const void* opened, const uint8_t* codes_at, int64_t columns, uint8_t* lines, int64_t stride, int64_t ahead) {
  using Kept = std::conditional_t<(sizeof(Unpack) > 256), const Unpack&, const Unpack>;  // a copy of tables that fit in registers
  Kept unpack = *static_cast<const Unpack*>(opened);
  for (int64_t k = 0; k < columns; k += kTileColumns) {
    unroll<0, Unpack::bits>([&](auto line) LOWP_INLINE { Lanes::prefetch(codes_at + ahead + 64 * line.value); });
    unroll<0, 8>([&](auto q) LOWP_INLINE {
      unpack.template quad<q.value>(codes_at, [&](auto step, typename Of::Word word) LOWP_INLINE {
        Of::store(lines + (q.value * Of::steps + step.value) * stride, word);
      });
    });
    codes_at += 64 * Unpack::bits;
    lines += 8 * Of::steps * stride;
  }
}

// How a job's columns are decoded: into lines, and in registers for one and for two rows, segments of 16 columns and longer ones
// (null: by lines).
using Few = void (*)(const Job&, int64_t, int64_t);
struct Ways {
  void (*open)(const Weight&, void*);
  void (*columns)(const void*, const uint8_t*, int64_t, uint8_t*, int64_t, int64_t);
  Few registers[2][2];
};

// One weight's way into lines, its tables made once.
class UnpackColumns {
 public:
  UnpackColumns(const Ways& way, const Weight& w) : columns_(way.columns) { way.open(w, opened_); }
  void operator()(const uint8_t* codes_at, int64_t columns, uint8_t* lines, int64_t stride, int64_t ahead) const {
    columns_(opened_, codes_at, columns, lines, stride, ahead);
  }
  static constexpr std::size_t kRoom = 256 * 4 + 64;

 private:
  void (*columns_)(const void*, const uint8_t*, int64_t, uint8_t*, int64_t, int64_t);
  alignas(64) uint8_t opened_[kRoom];
};

// A block of R rows times T tiles of a panel, over some segments: the sums (R, 16 of a panel) in `total` grow. They stay in registers
// meanwhile (`Held`) where these suffice. `Steps` of a segment are one piece of code.
template <class Of, int R, int T, int Panel, bool Held = false, int Steps = 4>
void block_times_lines(const Job& job, int64_t block, int64_t first, int64_t segments, const uint8_t* lines, const float* scales,
                       const float* zeros, float* total) {
  // Sums of their own where one would wait for itself: a product of bf16 takes 6 cycles, 2 begin in each.
  constexpr int Most = Lanes::kPanel > 1 && Of::dot == Dot::bf16 ? 16 : Lanes::kPanel > 1 ? 8 : 4;
  constexpr int Chains = R * T == 1 ? 4 : Most / (R * T) > 4 ? 4 : Most / (R * T) > 1 ? Most / (R * T) : 1;
  const bool wide = job.w.bits == 8;
  const int64_t place = (block * job.segments + first) * R, segment = job.segment;
  const uint32_t* words = job.words + block * job.block_words() + first * segment / 4 * Of::steps * R;
  const int32_t* start = job.start + place;
  const float* xsum = job.w.zero && !job.scaled ? job.xsum + place : nullptr;
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
void few_by_lines(const Job& job, const UnpackColumns& unpack, int64_t first_tile, int64_t last_tile) {
  const Weight& w = job.w;
  alignas(64) uint8_t lines[512 * 16];
  alignas(64) float scales[kMostSegments * 16], zeros[kMostSegments * 16], total[R * 16];
  const int64_t columns = job.columns, per = columns / job.segment;
  for (int64_t tile = first_tile; tile < last_tile; tile++) {
    for (float& sum : total) sum = 0;
    for (int64_t s = 0; s < job.segments; s += per) {
      const int64_t from = s * job.segment, left = job.segments - s, segments = left < per ? left : per;
      const uint8_t* codes_at = w.codes + tile * w.tile_bytes() + from / kTileColumns * 64 * w.bits;
      const int64_t count = from + columns < w.k ? columns : w.k - from;
      unpack(codes_at, count, lines, 64, kAhead);
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

// The scales of a decoded panel go into it.
template <class Of>
void rescale_panel(const Job& job, int64_t columns, uint8_t* lines, float* scales, const float* zeros) {
  if constexpr (Of::dot == Dot::bf16) {
    for (int64_t k = 0; k < columns; k += 4)
      for (int t = 0; t < Lanes::kPanel; t++) {
        const int64_t at = k / job.scaled * kPanelRows + 16 * t;
        const Lanes::F scale = Lanes::load_f(scales + at), zero = job.w.zero ? Lanes::load_f(zeros + at) : Lanes::zero_f();
        for (int step = 0; step < Of::steps; step++) Of::rescale(lines + ((k / 4 * Of::steps + step) * Lanes::kPanel + t) * 64, scale, zero);
      }
    for (int64_t r = 0; r < kPanelRows; r++) scales[r] = 1;
  }
}

// Columns [from, to) of a panel, and its scales.
template <class Of>
void open_panel(const Job& job, const UnpackColumns& unpack, int64_t panel, int64_t first, int64_t segments, uint8_t* lines, float* scales,
                float* zeros) {
  const Weight& w = job.w;
  const int64_t from = first * job.segment, past = from + segments * job.segment, to = past < w.k ? past : w.k;
  const int64_t size = job.scaled ? job.scaled : job.segment, count = job.scaled ? (to - from) / size : segments;
  for (int t = 0; t < Lanes::kPanel; t++) {
    const int64_t tile = panel * Lanes::kPanel + t < w.tiles() ? panel * Lanes::kPanel + t : w.tiles() - 1;  // the last again
    const uint8_t* codes_at = w.codes + tile * w.tile_bytes() + from / kTileColumns * 64 * w.bits;
    unpack(codes_at, to - from, lines + 64 * t, 64 * Lanes::kPanel, (to - from) / kTileColumns * 64 * w.bits);
#ifdef __ARM_FEATURE_MATMUL_INT8
    if (job.dot == Dot::u8) pair_lines(lines, (to - from) / 4);
#endif
    read_scales(w, tile, size, from / size, count, kPanelRows, scale_factor(job), scales + 16 * t, zeros + 16 * t);
  }
  if (job.scaled) rescale_panel<Of>(job, to - from, lines, scales, zeros);
}

template <class Of>
void many_rows(const Job& job, const UnpackColumns& unpack, int64_t first_panel, int64_t last_panel, void* scratch) {
  constexpr int64_t block_numbers = lowp::kBlock * kPanelRows;
  const int64_t per = job.columns / job.segment, rows = job.tokens * job.splits;
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
        open_panel<Of>(job, unpack, panel, s, segments, lines, scales, zeros);
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

template <class Unpack>
void open_unpack(const Weight& w, void* to) {
  static_assert(sizeof(Unpack) <= UnpackColumns::kRoom);
  new (to) Unpack(w);
}

template <class Of, class ToLines, class InRegisters = ToLines>
Ways ways() {
  if constexpr (Of::dot == Dot::fp32)
    return {open_unpack<ToLines>, unpack_columns<Of, ToLines>, {}};
  else
    return {open_unpack<ToLines>, unpack_columns<Of, ToLines>,
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
  const UnpackColumns unpack(way, job.w);
  switch (job.block) {
    case 1: return few_by_lines<Of, 1>(job, unpack, first, last);
    case 2: return few_by_lines<Of, 2>(job, unpack, first, last);
    case 4: return few_by_lines<Of, 4>(job, unpack, first, last);
    default: return few_by_lines<Of, 8>(job, unpack, first, last);
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
  const UnpackColumns unpack(ways_of(job), job.w);
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
