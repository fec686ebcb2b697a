// Sixteen lanes of 32 bits in two registers: AVX2 with FMA and F16C, and AVX-VNNI where it is compiled for that.
#pragma once
#include <immintrin.h>

#include <cstdint>

#include "contract.h"

namespace {

struct Lanes {
  struct W {
    __m256i a, b;
  };
  using I = W;
  struct F {
    __m256 a, b;
  };
  static constexpr bool kSignedBytes = false;
  static constexpr int kPanel = 1;

  static W load(const void* p) {
    const __m256i* q = static_cast<const __m256i*>(p);
    return {_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)};
  }
  static void store(void* p, W v) {
    __m256i* q = static_cast<__m256i*>(p);
    _mm256_storeu_si256(q, v.a);
    _mm256_storeu_si256(q + 1, v.b);
  }
  static W both(__m256i v) { return {v, v}; }
  static W bytes(int v) { return both(_mm256_set1_epi8(static_cast<char>(v))); }
  static W table16(const int8_t* t) { return both(_mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(t)))); }
  template <int N>
  static W shift(W v) {
    if constexpr (N > 0) return {_mm256_srli_epi16(v.a, N), _mm256_srli_epi16(v.b, N)};
    if constexpr (N < 0) return {_mm256_slli_epi16(v.a, -N), _mm256_slli_epi16(v.b, -N)};
    return v;
  }
  static W mask(W v, W m) { return {_mm256_and_si256(v.a, m.a), _mm256_and_si256(v.b, m.b)}; }
  static W merge(W into, W v, W m) {
    W kept = mask(v, m);
    return {_mm256_or_si256(into.a, kept.a), _mm256_or_si256(into.b, kept.b)};
  }
  static W look_up(W table, W index) { return {_mm256_shuffle_epi8(table.a, index.a), _mm256_shuffle_epi8(table.b, index.b)}; }
  static W subtract_bytes(W v, W by) { return {_mm256_sub_epi8(v.a, by.a), _mm256_sub_epi8(v.b, by.b)}; }

  static I zero_i() { return both(_mm256_setzero_si256()); }
  static F zero_f() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  static I spread(int32_t v) { return both(_mm256_set1_epi32(v)); }
  static F spread(float v) { return {_mm256_set1_ps(v), _mm256_set1_ps(v)}; }
  static I add(I a, I b) { return {_mm256_add_epi32(a.a, b.a), _mm256_add_epi32(a.b, b.b)}; }
  static F add(F a, F b) { return {_mm256_add_ps(a.a, b.a), _mm256_add_ps(a.b, b.b)}; }
  static F mul(F a, F b) { return {_mm256_mul_ps(a.a, b.a), _mm256_mul_ps(a.b, b.b)}; }
  static F fma(F a, F b, F c) { return {_mm256_fmadd_ps(a.a, b.a, c.a), _mm256_fmadd_ps(a.b, b.b, c.b)}; }
  static F fnma(F a, F b, F c) { return {_mm256_fnmadd_ps(a.a, b.a, c.a), _mm256_fnmadd_ps(a.b, b.b, c.b)}; }
  static F div(F a, F b) { return {_mm256_div_ps(a.a, b.a), _mm256_div_ps(a.b, b.b)}; }
  static F larger(F a, F b) { return {_mm256_max_ps(a.a, b.a), _mm256_max_ps(a.b, b.b)}; }  // b where one is NaN
  static F smaller(F a, F b) { return {_mm256_min_ps(a.a, b.a), _mm256_min_ps(a.b, b.b)}; }
  static F negated(F v) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_xor_ps(v.a, sign), _mm256_xor_ps(v.b, sign)};
  }
  static I bits(F v) { return {_mm256_castps_si256(v.a), _mm256_castps_si256(v.b)}; }
  static I larger(I a, I b) { return {_mm256_max_epi32(a.a, b.a), _mm256_max_epi32(a.b, b.b)}; }
  static int32_t largest(I v) {
    const __m256i four = _mm256_max_epi32(v.a, v.b);
    __m128i most = _mm_max_epi32(_mm256_castsi256_si128(four), _mm256_extracti128_si256(four, 1));
    most = _mm_max_epi32(most, _mm_shuffle_epi32(most, 0x4E));
    return _mm_cvtsi128_si32(_mm_max_epi32(most, _mm_shuffle_epi32(most, 0xB1)));
  }
  static int32_t total(I v) {
    const __m256i four = _mm256_add_epi32(v.a, v.b);
    __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(four), _mm256_extracti128_si256(four, 1));
    sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4E));
    return _mm_cvtsi128_si32(_mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xB1)));
  }
  static I to_int(F v) { return {_mm256_cvttps_epi32(v.a), _mm256_cvttps_epi32(v.b)}; }
  static void store_bytes(int8_t* p, I v) {
    const __m256i halves = _mm256_permute4x64_epi64(_mm256_packs_epi32(v.a, v.b), 0xD8);
    const __m128i codes = _mm_packs_epi16(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), codes);
  }
  static F to_float(I v) { return {_mm256_cvtepi32_ps(v.a), _mm256_cvtepi32_ps(v.b)}; }

  // Without VNNI two products meet in 16 bits: 2 * 127 * 128 fit, so bytes of 8 bits go in nibbles.
  static __m256i dot(__m256i sum, __m256i w, __m256i x, [[maybe_unused]] bool wide) {
#ifdef __AVXVNNI__
    return _mm256_dpbusd_avx_epi32(sum, w, x);
#else
    const __m256i ones = _mm256_set1_epi16(1);
    if (!wide) return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), ones));
    const __m256i nibble = _mm256_set1_epi8(15);
    __m256i low = _mm256_maddubs_epi16(_mm256_and_si256(w, nibble), x);
    __m256i high = _mm256_maddubs_epi16(_mm256_and_si256(_mm256_srli_epi16(w, 4), nibble), x);
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(low, ones));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(high, _mm256_set1_epi16(16)));
#endif
  }
  static W spread_word(uint32_t x) { return both(_mm256_set1_epi32(static_cast<int>(x))); }
  static I dot(I sum, W w, W x, bool wide) { return {dot(sum.a, w.a, x.a, wide), dot(sum.b, w.b, x.b, wide)}; }

  template <int J>
  static __m256i byte(__m256i v) {
    if constexpr (J == 0) return _mm256_and_si256(v, _mm256_set1_epi32(255));
    if constexpr (J == 3) return _mm256_srli_epi32(v, 24);
    return _mm256_and_si256(_mm256_srli_epi32(v, 8 * J), _mm256_set1_epi32(255));
  }
  template <int J>
  static I byte(W v) {
    return {byte<J>(v.a), byte<J>(v.b)};
  }
  template <int J>
  static __m256i signed_byte(__m256i v) {
    return _mm256_srai_epi32(J == 3 ? v : _mm256_slli_epi32(v, 24 - 8 * J), 24);
  }
  template <int J>
  static I signed_byte(W v) {
    return {signed_byte<J>(v.a), signed_byte<J>(v.b)};
  }
  static __m256 look_up16(const float* t, __m256i i) {
    __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(t), i), high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(t + 8), i);
    return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(i, 28)));
  }
  static F look_up16(const float* t, I i) { return {look_up16(t, i.a), look_up16(t, i.b)}; }
  static F look_up256(const float* t, I i) { return {_mm256_i32gather_ps(t, i.a, 4), _mm256_i32gather_ps(t, i.b, 4)}; }

  static F load_f(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static void store_f(float* p, F v) {
    _mm256_storeu_ps(p, v.a);
    _mm256_storeu_ps(p + 8, v.b);
  }
  static __m128i half(const void* p, int i) { return _mm_loadu_si128(static_cast<const __m128i*>(p) + i); }
  static __m256 widen(__m128i v) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16)); }
  static F load_bf16(const void* p) { return {widen(half(p, 0)), widen(half(p, 1))}; }
  static F load_fp16(const void* p) { return {_mm256_cvtph_ps(half(p, 0)), _mm256_cvtph_ps(half(p, 1))}; }
  // e4m3 by way of fp16, which has a bit of exponent more: 2^8 times too small.
  static __m256i halves_of_e4m3(const void* p) {
    const __m256i v = _mm256_cvtepi8_epi16(_mm_loadu_si128(static_cast<const __m128i*>(p))), size = _mm256_set1_epi16(127);
    const __m256i sign = _mm256_and_si256(v, _mm256_set1_epi16(INT16_MIN)), code = _mm256_and_si256(v, size);
    const __m256i nan = _mm256_and_si256(_mm256_cmpeq_epi16(code, size), _mm256_set1_epi16(0x7E00));
    return _mm256_or_si256(_mm256_or_si256(sign, nan), _mm256_slli_epi16(code, 7));
  }
  static F load_e4m3(const void* p) {
    const __m256i v = halves_of_e4m3(p);
    return mul({_mm256_cvtph_ps(_mm256_castsi256_si128(v)), _mm256_cvtph_ps(_mm256_extracti128_si256(v, 1))}, spread(256.0f));
  }
  static F load_int8(const void* p) {
    const __m128i v = half(p, 0);
    return to_float({_mm256_cvtepi8_epi32(v), _mm256_cvtepi8_epi32(_mm_srli_si128(v, 8))});
  }
  static void store_fp16(void* p, F v) {
    __m128i* q = static_cast<__m128i*>(p);
    _mm_storeu_si128(q, _mm256_cvtps_ph(v.a, 0));
    _mm_storeu_si128(q + 1, _mm256_cvtps_ph(v.b, 0));
  }
  static __m256i round_bf16(__m256 v) {
    __m256i bits = _mm256_castps_si256(v), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i up = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF))), 16);
    __m256 nan = _mm256_cmp_ps(v, v, _CMP_UNORD_Q);
    return _mm256_blendv_epi8(up, _mm256_set1_epi32(0x7FC0), _mm256_castps_si256(nan));
  }
  static void store_bf16(void* p, F v) {
    __m256i packed = _mm256_packus_epi32(round_bf16(v.a), round_bf16(v.b));  // within halves of 128 bits
    _mm256_storeu_si256(static_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xD8));
  }
  // Always inlined: GCC takes a function that only prefetches for one without effect, and drops the call.
  __attribute__((always_inline)) static void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
};

}  // namespace
