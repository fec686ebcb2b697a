// Sixteen lanes of 32 bits in one register: AVX-512 (F, BW, VL) with VNNI, and with BF16 where it is compiled for that.
#pragma once
#include <immintrin.h>

#include <cstdint>

#include "contract.h"

namespace {

struct Lanes {
  using W = __m512i;  // a line: 16 rows x 4 columns of bytes
  using I = __m512i;
  using F = __m512;
  static constexpr bool kSignedBytes = false;
  static constexpr int kPanel = 4;

  static W load(const void* p) { return _mm512_loadu_si512(p); }
  static void store(void* p, W v) { _mm512_storeu_si512(p, v); }
  static W bytes(int v) { return _mm512_set1_epi8(static_cast<char>(v)); }
  static W halves(int v) { return _mm512_set1_epi16(static_cast<short>(v)); }
  static W table16(const int8_t* t) { return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(t))); }
  template <int N>
  static W shift(W v) {  // by N bits to the right, within 16
    if constexpr (N > 0) return _mm512_srli_epi16(v, N);
    if constexpr (N < 0) return _mm512_slli_epi16(v, -N);
    return v;
  }
  static W mask(W v, W m) { return _mm512_and_si512(v, m); }
  static W merge(W into, W v, W m) { return _mm512_ternarylogic_epi32(into, v, m, 0xF8); }   // into | (v & m)
  static W choose(W m, W a, W b) { return _mm512_ternarylogic_epi32(m, a, b, 0xCA); }        // m ? a : b
  static W look_up(W table, W index) { return _mm512_shuffle_epi8(table, index); }
  static W subtract_bytes(W v, W by) { return _mm512_sub_epi8(v, by); }

  static I zero_i() { return _mm512_setzero_si512(); }
  static F zero_f() { return _mm512_setzero_ps(); }
  static I spread(int32_t v) { return _mm512_set1_epi32(v); }
  static F spread(float v) { return _mm512_set1_ps(v); }
  static I add(I a, I b) { return _mm512_add_epi32(a, b); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F fnma(F a, F b, F c) { return _mm512_fnmadd_ps(a, b, c); }
  static F div(F a, F b) { return _mm512_div_ps(a, b); }
  static F larger(F a, F b) { return _mm512_max_ps(a, b); }   // b where one is NaN
  static F smaller(F a, F b) { return _mm512_min_ps(a, b); }
  static F negated(F v) { return _mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(v), _mm512_set1_epi32(INT32_MIN))); }
  static I bits(F v) { return _mm512_castps_si512(v); }
  static I larger(I a, I b) { return _mm512_max_epi32(a, b); }
  static int32_t largest(I v) { return _mm512_reduce_max_epi32(v); }
  static int32_t total(I v) { return _mm512_reduce_add_epi32(v); }
  static I to_int(F v) { return _mm512_cvttps_epi32(v); }
  static void store_bytes(int8_t* p, I v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(v)); }
  static F to_float(I v) { return _mm512_cvtepi32_ps(v); }
  static W spread_word(uint32_t x) { return _mm512_set1_epi32(static_cast<int>(x)); }
  // Spelled out: around the intrinsic GCC 12 copies and spills the sums of a block of 5 x 4, which costs a tenth of its speed and more.
  __attribute__((always_inline)) static I dot(I sum, W w, W x, bool) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x));
    return sum;
  }

  template <int J>
  static I byte(W v) {  // the unsigned byte J of each lane
    if constexpr (J == 0) return _mm512_and_si512(v, _mm512_set1_epi32(255));
    if constexpr (J == 3) return _mm512_srli_epi32(v, 24);
    return _mm512_and_si512(_mm512_srli_epi32(v, 8 * J), _mm512_set1_epi32(255));
  }
  template <int J>
  static I signed_byte(W v) {
    return _mm512_srai_epi32(J == 3 ? v : _mm512_slli_epi32(v, 24 - 8 * J), 24);
  }
  static F look_up16(const float* table, I index) { return _mm512_permutexvar_ps(index, _mm512_loadu_ps(table)); }
  static F look_up256(const float* table, I index) { return _mm512_i32gather_ps(index, table, 4); }

  static F load_f(const float* p) { return _mm512_loadu_ps(p); }
  static void store_f(float* p, F v) { _mm512_storeu_ps(p, v); }
  static F load_bf16(const void* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(p))), 16));
  }
  static F load_fp16(const void* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(p))); }
  // e4m3 by way of fp16, which has a bit of exponent more: 2^8 times too small.
  static __m256i halves_of_e4m3(const void* p) {
    const __m256i v = _mm256_cvtepi8_epi16(_mm_loadu_si128(static_cast<const __m128i*>(p))), size = _mm256_set1_epi16(127);
    const __m256i sign = _mm256_and_si256(v, _mm256_set1_epi16(INT16_MIN)), code = _mm256_and_si256(v, size);
    const __m256i nan = _mm256_and_si256(_mm256_cmpeq_epi16(code, size), _mm256_set1_epi16(0x7E00));
    return _mm256_or_si256(_mm256_or_si256(sign, nan), _mm256_slli_epi16(code, 7));
  }
  static F load_e4m3(const void* p) { return mul(_mm512_cvtph_ps(halves_of_e4m3(p)), spread(256.0f)); }
  static F load_int8(const void* p) { return to_float(_mm512_cvtepi8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p)))); }
  static void store_fp16(void* p, F v) { _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_cvtps_ph(v, 0)); }
  static void store_bf16(void* p, F v) {
    __m512i bits = _mm512_castps_si512(v);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF))), 16);
    __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_mask_set1_epi32(rounded, nan, 0x7FC0)));
  }
  // Always inlined: GCC takes a function that only prefetches for one without effect, and drops the call.
  __attribute__((always_inline)) static void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
};

#ifdef __AVX512BF16__
// Pairs of bf16 in each lane, by tables: the codes of two columns index 32 numbers at a time.
struct PairTables {
  static __m512i load(const uint16_t* t) { return _mm512_loadu_si512(t); }
  static __m512i look_up32(__m512i table, __m512i index) { return _mm512_permutexvar_epi16(index, table); }
  static __m512i look_up64(__m512i low, __m512i high, __m512i index) { return _mm512_permutex2var_epi16(low, index, high); }
  static __m512i by_bit6(__m512i index, __m512i off, __m512i on) {
    return _mm512_mask_mov_epi16(off, _mm512_test_epi16_mask(index, _mm512_set1_epi16(64)), on);
  }
  static __m512i with_sign(__m512i magnitude, __m512i sign) {
    return _mm512_ternarylogic_epi32(magnitude, sign, _mm512_set1_epi16(static_cast<short>(0x8000)), 0xF8);
  }
  static __m512i pairs(__m512 even, __m512 odd) {  // rounded, in the lower and the upper half of each lane
    const __m512i place = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i index = _mm512_or_si512(place, _mm512_slli_epi32(_mm512_or_si512(place, _mm512_set1_epi32(16)), 16));
    return _mm512_permutexvar_epi16(index, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(odd, even)));
  }
  __attribute__((always_inline)) static __m512 dot(__m512 sum, __m512i w, __m512i x) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x));
    return sum;
  }
};
#endif

}  // namespace
