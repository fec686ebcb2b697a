// From planes of bits to what a product multiplies: bytes of codes, float32 numbers, or pairs of bf16.
//
// A tile of 16 rows x 32 columns is 8 quads of 4 columns. A plane of w bits holds it in w lines of 64 bytes, byte 4 r + c of a line
// standing for row r and column c of 8 / w quads: line l holds quads l, l + w, l + 2w ... from its lowest bits up. So one shift
// and one mask bring a quad to bytes, in the order that the dot product instructions want (4 columns of a row side by side).
//
// Every `Unpack...` has quad<Q>(tile, f), which calls f(step, register) for each step of the quad Q.
#pragma once
#include <utility>

#include "contract.h"

#define LOWP_INLINE __attribute__((always_inline))

namespace {

using lowp::Dot;
using lowp::Weight;

template <int N>
struct Int {
  static constexpr int value = N;
};

template <class Function, int... N>
LOWP_INLINE inline void unroll([[maybe_unused]] Function f, std::integer_sequence<int, N...>) {
  (f(Int<N>{}), ...);
}
template <int First, int Last, class Function>
LOWP_INLINE inline void unroll(Function f) {
  unroll([&](auto n) LOWP_INLINE { f(Int<First + n.value>{}); }, std::make_integer_sequence<int, Last - First>{});
}

constexpr int plane2(int bits) { return bits & 4 ? 256 : 0; }
constexpr int plane1(int bits) { return plane2(bits) + (bits & 2 ? 128 : 0); }

// The raw codes of a quad, a byte each.
template <int Bits, int Q>
LOWP_INLINE inline Lanes::W codes(const uint8_t* tile) {
  if constexpr (Bits == 8) return Lanes::load(tile + 64 * Q);
  constexpr int low2 = Bits & 4, low1 = Bits & 6;
  Lanes::W out;
  if constexpr (Bits & 4) out = Lanes::mask(Lanes::shift<4 * (Q / 4)>(Lanes::load(tile + 64 * (Q % 4))), Lanes::bytes(15));
  if constexpr (Bits & 2) {
    Lanes::W v = Lanes::shift<2 * (Q / 2) - low2>(Lanes::load(tile + plane2(Bits) + 64 * (Q % 2)));
    if constexpr (Bits & 4)
      out = Lanes::merge(out, v, Lanes::bytes(3 << low2));
    else
      out = Lanes::mask(v, Lanes::bytes(3));
  }
  if constexpr (Bits & 1) {
    Lanes::W v = Lanes::shift<Q - low1>(Lanes::load(tile + plane1(Bits)));
    if constexpr (Bits > 1)
      out = Lanes::merge(out, v, Lanes::bytes(1 << low1));
    else
      out = Lanes::mask(v, Lanes::bytes(1));
  }
  return out;
}

// Codes for products of bytes; where the signs of bytes count, codes of 8 bits are moved down by 128.
template <int Bits>
struct UnpackU8 {
  static constexpr int bits = Bits;
  explicit UnpackU8(const Weight&) {}
  template <int Q, class Function>
  LOWP_INLINE void quad(const uint8_t* tile, Function f) const {
    Lanes::W v = codes<Bits, Q>(tile);
    if constexpr (Bits == 8 && Lanes::kSignedBytes) v = Lanes::subtract_bytes(v, Lanes::bytes(128));
    f(Int<0>{}, v);
  }
};

// Four bits whose values are halves of integers (e2m1): bytes 2 * value + halves.
struct UnpackHalves {
  static constexpr int bits = 4;
  Lanes::W table;
  explicit UnpackHalves(const Weight& w) {
    int8_t t[16];
    for (int i = 0; i < 16; i++) t[i] = static_cast<int8_t>(2 * w.table[i] + static_cast<float>(w.halves));
    table = Lanes::table16(t);
  }
  template <int Q, class Function>
  LOWP_INLINE void quad(const uint8_t* tile, Function f) const {
    f(Int<0>{}, Lanes::look_up(table, codes<4, Q>(tile)));
  }
};

// Integers as float32, a column for each step.
template <int Bits>
struct UnpackInts {
  static constexpr int bits = Bits;
  Lanes::W offset;
  explicit UnpackInts(const Weight& w) : offset(Lanes::bytes(w.offset)), is_signed(w.offset != 0) {}
  bool is_signed;
  template <int Q, class Function>
  LOWP_INLINE void quad(const uint8_t* tile, Function f) const {
    Lanes::W v = codes<Bits, Q>(tile);
    if (Bits == 8 && !is_signed) {
      unroll<0, 4>([&](auto j) LOWP_INLINE { f(j, Lanes::to_float(Lanes::byte<j.value>(v))); });
    } else {
      v = Lanes::subtract_bytes(v, offset);
      unroll<0, 4>([&](auto j) LOWP_INLINE { f(j, Lanes::to_float(Lanes::signed_byte<j.value>(v))); });
    }
  }
};

// Any element as float32, by its table.
template <int Bits>
struct UnpackTable {
  static constexpr int bits = Bits;
  alignas(64) float table[Bits <= 4 ? 16 : 1 << Bits] = {};
  explicit UnpackTable(const Weight& w) {
    for (int i = 0; i < 1 << Bits; i++) table[i] = w.table[i];
  }
  template <int Q, class Function>
  LOWP_INLINE void quad(const uint8_t* tile, Function f) const {
    Lanes::W v = codes<Bits, Q>(tile);
    unroll<0, 4>([&](auto j) LOWP_INLINE {
      auto index = Lanes::byte<j.value>(v);
      f(j, Bits <= 4 ? Lanes::look_up16(table, index) : Lanes::look_up256(table, index));
    });
  }
};

#ifdef __AVX512BF16__

inline uint16_t to_bf16(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  if (value != value) return 0x7FC0;
  return static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

// Words of 16 bits whose lowest bits are a code of column H or, in the upper half of a lane, H + 2 of the quad Q. What stands above
// the code is left: tables repeat.
template <int Bits, int Q, int H>
LOWP_INLINE inline __m512i indices(const uint8_t* tile) {
  const uint8_t* p2 = tile + plane2(Bits);
  const uint8_t* p1 = tile + plane1(Bits);
  if constexpr (Bits == 8) return Lanes::shift<8 * H>(Lanes::load(tile + 64 * Q));
  __m512i at4{}, at2{}, at1{};
  if constexpr (Bits & 4) at4 = Lanes::shift<4 * (Q / 4) + 8 * H>(Lanes::load(tile + 64 * (Q % 4)));
  constexpr int low2 = Bits & 4, low1 = Bits & 6;
  if constexpr (Bits & 2) at2 = Lanes::shift<2 * (Q / 2) + 8 * H - low2>(Lanes::load(p2 + 64 * (Q % 2)));
  if constexpr (Bits & 1) at1 = Lanes::shift<Q + 8 * H - low1>(Lanes::load(p1));
  if constexpr (Bits == 1) return at1;
  if constexpr (Bits == 2) return at2;
  if constexpr (Bits == 3) return Lanes::choose(Lanes::halves(3), at2, at1);
  if constexpr (Bits == 4) return at4;
  if constexpr (Bits == 5) return Lanes::choose(Lanes::halves(15), at4, at1);
  __m512i low = Lanes::choose(Lanes::halves(15), at4, at2);
  return Bits == 6 ? low : Lanes::choose(Lanes::halves(63), low, at1);
}

// Elements of at most 6 bits as pairs of bf16.
template <int Bits>
struct UnpackPairs {
  static constexpr int bits = Bits;
  __m512i low, high;
  explicit UnpackPairs(const Weight& w) {
    uint16_t t[64];
    for (int i = 0; i < 64; i++) {
      int code = i & ((1 << Bits) - 1);
      t[i] = to_bf16(w.is_int ? static_cast<float>(code - w.offset) : w.table[code]);
    }
    low = PairTables::load(t);
    high = PairTables::load(t + 32);
  }
  template <int Q, class Function>
  LOWP_INLINE void quad(const uint8_t* tile, Function f) const {
    unroll<0, 2>([&](auto h) LOWP_INLINE {
      __m512i index = indices<Bits, Q, h.value>(tile);
      f(h, Bits <= 5 ? PairTables::look_up32(low, index) : PairTables::look_up64(low, high, index));
    });
  }
};

// Integers of 7 and 8 bits as two pairs of bf16, 16 * high - offset and low: both are exact, and the product adds them.
template <int Bits>
struct UnpackTwoPairs {
  static constexpr int bits = Bits;
  __m512i low, high;
  explicit UnpackTwoPairs(const Weight& w) {
    uint16_t t[64];
    for (int i = 0; i < 32; i++) {
      t[i] = to_bf16(static_cast<float>(i & 15));
      t[32 + i] = to_bf16(static_cast<float>(16 * (i & ((1 << (Bits - 4)) - 1)) - w.offset));
    }
    low = PairTables::load(t);
    high = PairTables::load(t + 32);
  }
  template <int Q, class Function>
  LOWP_INLINE void quad(const uint8_t* tile, Function f) const {
    unroll<0, 2>([&](auto h) LOWP_INLINE {
      if constexpr (Bits == 8) {
        __m512i line = Lanes::load(tile + 64 * Q);
        f(h, PairTables::look_up32(low, Lanes::shift<8 * h.value>(line)));
        f(h, PairTables::look_up32(high, Lanes::shift<8 * h.value + 4>(line)));
      } else {
        f(h, PairTables::look_up32(low, indices<4, Q, h.value>(tile)));
        f(h, PairTables::look_up32(high, indices<3, Q, h.value>(tile + 256)));
      }
    });
  }
};

// The same in one pair, for panels that are decoded once and multiplied often.
template <int Bits>
struct UnpackConverted {
  static constexpr int bits = Bits;
  __m512 bias;
  explicit UnpackConverted(const Weight& w) : bias(_mm512_set1_ps(8388608.0f + static_cast<float>(w.offset))) {}
  // A code below the point of a float32 of 2^23: subtracting that, and the offset, leaves its value, of which bf16 holds all.
  template <int C>
  LOWP_INLINE __m512i column(__m512i v) const {
    const __m512i exponent = _mm512_set1_epi32(0x4B000000), byte = _mm512_set1_epi32(255);
    return _mm512_castps_si512(_mm512_sub_ps(_mm512_castsi512_ps(Lanes::merge(exponent, _mm512_srli_epi32(v, 8 * C), byte)), bias));
  }
  template <int Q, class Function>
  LOWP_INLINE void quad(const uint8_t* tile, Function f) const {
    const __m512i v = codes<Bits, Q>(tile);
    unroll<0, 2>([&](auto h) LOWP_INLINE {
      const __m512i even = column<h.value>(v), odd = column<h.value + 2>(v);
      f(h, Lanes::merge(_mm512_srli_epi32(even, 16), odd, _mm512_set1_epi32(static_cast<int>(0xFFFF0000))));
    });
  }
};

// Floats of 8 bits as pairs of bf16: 128 magnitudes, and the sign.
struct UnpackFloat8 {
  static constexpr int bits = 8;
  __m512i t0, t1, t2, t3;
  explicit UnpackFloat8(const Weight& w) {
    uint16_t t[128];
    for (int i = 0; i < 128; i++) t[i] = to_bf16(w.table[i]);
    t0 = PairTables::load(t);
    t1 = PairTables::load(t + 32);
    t2 = PairTables::load(t + 64);
    t3 = PairTables::load(t + 96);
  }
  template <int Q, class Function>
  LOWP_INLINE void quad(const uint8_t* tile, Function f) const {
    __m512i line = Lanes::load(tile + 64 * Q);
    unroll<0, 2>([&](auto h) LOWP_INLINE {
      __m512i index = Lanes::shift<8 * h.value>(line);
      __m512i magnitude = PairTables::by_bit6(index, PairTables::look_up64(t0, t1, index), PairTables::look_up64(t2, t3, index));
      f(h, PairTables::with_sign(magnitude, Lanes::shift<8 * h.value - 8>(line)));
    });
  }
};

#endif

}  // namespace
