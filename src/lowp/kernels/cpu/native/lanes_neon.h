// Sixteen lanes of 32 bits in four registers: NEON of AArch64, with the dot product instructions where it is compiled for them
// (and for many rows the matrix instructions, matrices_neon.h).
// There a product takes signed bytes on both sides: codes of 7 bits and fewer are, those of 8 bits are moved down by 128.
#pragma once
#include <arm_neon.h>

#include <cstdint>

#include "contract.h"

namespace {

struct Lanes {
  struct W {
    uint8x16_t v[4];
  };
  struct I {
    int32x4_t v[4];
  };
  struct F {
    float32x4_t v[4];
  };
  static constexpr bool kSignedBytes = true;
  static constexpr int kPanel = 1;

  template <class T, class Function>
  static T each(Function f) {
    return T{{f(0), f(1), f(2), f(3)}};
  }
  static W load(const void* p) {
    return each<W>([=](int i) { return vld1q_u8(static_cast<const uint8_t*>(p) + 16 * i); });
  }
  static void store(void* p, W v) {
    for (int i = 0; i < 4; i++) vst1q_u8(static_cast<uint8_t*>(p) + 16 * i, v.v[i]);
  }
  static W bytes(int v) {
    return each<W>([=](int) { return vdupq_n_u8(static_cast<uint8_t>(v)); });
  }
  static W table16(const int8_t* t) {
    return each<W>([=](int) { return vreinterpretq_u8_s8(vld1q_s8(t)); });
  }
  template <int N>
  static W shift(W v) {
    return each<W>([=](int i) {
      if constexpr (N > 0) return vreinterpretq_u8_u16(vshrq_n_u16(vreinterpretq_u16_u8(v.v[i]), N));
      if constexpr (N < 0) return vreinterpretq_u8_u16(vshlq_n_u16(vreinterpretq_u16_u8(v.v[i]), -N));
      return v.v[i];
    });
  }
  static W mask(W v, W m) {
    return each<W>([=](int i) { return vandq_u8(v.v[i], m.v[i]); });
  }
  static W merge(W into, W v, W m) {
    return each<W>([=](int i) { return vbslq_u8(m.v[i], v.v[i], into.v[i]); });  // `into` has no bits there: one instruction
  }
  static W look_up(W table, W index) {
    return each<W>([=](int i) { return vqtbl1q_u8(table.v[i], index.v[i]); });
  }
  static W subtract_bytes(W v, W by) {
    return each<W>([=](int i) { return vsubq_u8(v.v[i], by.v[i]); });
  }

  static I zero_i() { return spread(int32_t{0}); }
  static F zero_f() { return spread(0.0f); }
  static I spread(int32_t v) {
    return each<I>([=](int) { return vdupq_n_s32(v); });
  }
  static F spread(float v) {
    return each<F>([=](int) { return vdupq_n_f32(v); });
  }
  static I add(I a, I b) {
    return each<I>([=](int i) { return vaddq_s32(a.v[i], b.v[i]); });
  }
  static F add(F a, F b) {
    return each<F>([=](int i) { return vaddq_f32(a.v[i], b.v[i]); });
  }
  static F mul(F a, F b) {
    return each<F>([=](int i) { return vmulq_f32(a.v[i], b.v[i]); });
  }
  static F fma(F a, F b, F c) {
    return each<F>([=](int i) { return vfmaq_f32(c.v[i], a.v[i], b.v[i]); });
  }
  static F fnma(F a, F b, F c) {
    return each<F>([=](int i) { return vfmsq_f32(c.v[i], a.v[i], b.v[i]); });
  }
  static F div(F a, F b) {
    return each<F>([=](int i) { return vdivq_f32(a.v[i], b.v[i]); });
  }
  static F larger(F a, F b) {  // b where one is NaN
    return each<F>([=](int i) { return vbslq_f32(vcgtq_f32(a.v[i], b.v[i]), a.v[i], b.v[i]); });
  }
  static F smaller(F a, F b) {
    return each<F>([=](int i) { return vbslq_f32(vcltq_f32(a.v[i], b.v[i]), a.v[i], b.v[i]); });
  }
  static F negated(F v) {
    return each<F>([=](int i) { return vnegq_f32(v.v[i]); });
  }
  static I bits(F v) {
    return each<I>([=](int i) { return vreinterpretq_s32_f32(v.v[i]); });
  }
  static I larger(I a, I b) {
    return each<I>([=](int i) { return vmaxq_s32(a.v[i], b.v[i]); });
  }
  static int32_t largest(I v) { return vmaxvq_s32(vmaxq_s32(vmaxq_s32(v.v[0], v.v[1]), vmaxq_s32(v.v[2], v.v[3]))); }
  static int32_t total(I v) { return vaddvq_s32(vaddq_s32(vaddq_s32(v.v[0], v.v[1]), vaddq_s32(v.v[2], v.v[3]))); }
  static I to_int(F v) {
    return each<I>([=](int i) { return vcvtq_s32_f32(v.v[i]); });
  }
  static void store_bytes(int8_t* p, I v) {
    const int16x8_t low = vcombine_s16(vmovn_s32(v.v[0]), vmovn_s32(v.v[1])), high = vcombine_s16(vmovn_s32(v.v[2]), vmovn_s32(v.v[3]));
    vst1q_s8(p, vcombine_s8(vmovn_s16(low), vmovn_s16(high)));
  }
  static F to_float(I v) {
    return each<F>([=](int i) { return vcvtq_f32_s32(v.v[i]); });
  }
  static int32x4_t dot(int32x4_t sum, int8x16_t w, int8x16_t x) {
#ifdef __ARM_FEATURE_DOTPROD
    return vdotq_s32(sum, w, x);
#else
    int32x4_t low = vpaddlq_s16(vmull_s8(vget_low_s8(w), vget_low_s8(x)));
    int32x4_t high = vpaddlq_s16(vmull_s8(vget_high_s8(w), vget_high_s8(x)));
    return vaddq_s32(sum, vpaddq_s32(low, high));
#endif
  }
  static W spread_word(uint32_t x) {
    return each<W>([=](int) { return vreinterpretq_u8_u32(vdupq_n_u32(x)); });
  }
  static I dot(I sum, W w, W x, bool) {
    return each<I>([=](int i) { return dot(sum.v[i], vreinterpretq_s8_u8(w.v[i]), vreinterpretq_s8_u8(x.v[i])); });
  }

  template <int J>
  static I byte(W v) {
    return each<I>([=](int i) {
      uint32x4_t lane = vreinterpretq_u32_u8(v.v[i]);
      if constexpr (J > 0) lane = vshrq_n_u32(lane, 8 * J);
      return vreinterpretq_s32_u32(vandq_u32(lane, vdupq_n_u32(255)));
    });
  }
  template <int J>
  static I signed_byte(W v) {
    return each<I>([=](int i) {
      int32x4_t lane = vreinterpretq_s32_u8(v.v[i]);
      if constexpr (J < 3) lane = vshlq_n_s32(lane, 24 - 8 * J);
      return vshrq_n_s32(lane, 24);
    });
  }
  static F look_up16(const float* t, I i) { return look_up256(t, i); }
  static F look_up256(const float* t, I index) {
    alignas(16) int32_t at[16];
    alignas(16) float found[16];
    for (int i = 0; i < 4; i++) vst1q_s32(at + 4 * i, index.v[i]);
    for (int i = 0; i < 16; i++) found[i] = t[at[i]];
    return load_f(found);
  }

  static F load_f(const float* p) {
    return each<F>([=](int i) { return vld1q_f32(p + 4 * i); });
  }
  static void store_f(float* p, F v) {
    for (int i = 0; i < 4; i++) vst1q_f32(p + 4 * i, v.v[i]);
  }
  static F load_bf16(const void* p) {
    const uint16_t* q = static_cast<const uint16_t*>(p);
    return each<F>([=](int i) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(q + 4 * i), 16)); });
  }
  static F load_fp16(const void* p) {
    const uint16_t* q = static_cast<const uint16_t*>(p);
    return each<F>([=](int i) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(q + 4 * i))); });
  }
  static F load_e4m3(const void* p) {  // by way of fp16, which has a bit of exponent more: 2^8 times too small
    const uint8_t* bytes = static_cast<const uint8_t*>(p);
    uint16_t half[16];
    for (int i = 0; i < 16; i++) {
      const int size = bytes[i] & 127, sign = (bytes[i] & 128) << 8;
      half[i] = static_cast<uint16_t>(sign | (size == 127 ? 0x7E00 : size << 7));
    }
    return mul(load_fp16(half), spread(256.0f));
  }
  static F load_int8(const void* p) {
    const int8_t* bytes = static_cast<const int8_t*>(p);
    return each<F>([=](int i) {
      const float v[4] = {float(bytes[4 * i]), float(bytes[4 * i + 1]), float(bytes[4 * i + 2]), float(bytes[4 * i + 3])};
      return vld1q_f32(v);
    });
  }
  static void store_fp16(void* p, F v) {
    uint16_t* q = static_cast<uint16_t*>(p);
    for (int i = 0; i < 4; i++) vst1_u16(q + 4 * i, vreinterpret_u16_f16(vcvt_f16_f32(v.v[i])));
  }
  static void store_bf16(void* p, F v) {
    uint16_t* q = static_cast<uint16_t*>(p);
    for (int i = 0; i < 4; i++) {
      uint32x4_t bits = vreinterpretq_u32_f32(v.v[i]), odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
      uint32x4_t up = vshrq_n_u32(vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7FFF))), 16);
      vst1_u16(q + 4 * i, vmovn_u32(vbslq_u32(vceqq_f32(v.v[i], v.v[i]), up, vdupq_n_u32(0x7FC0))));
    }
  }
  // Always inlined: GCC takes a function that only prefetches for one without effect, and drops the call.
  __attribute__((always_inline)) static void prefetch(const void* p) { __builtin_prefetch(p); }
};

}  // namespace
