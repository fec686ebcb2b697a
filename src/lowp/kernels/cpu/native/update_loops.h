// One block of an optimizer's step: see update.h.
#pragma once
#include <cmath>
#include <cstring>

#include "update.h"

namespace lowp {
namespace {

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline int32_t bits_of(float value) {
  int32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

void load(float* out, const void* from, bool bf16, int64_t start, int n) {
  if (bf16) {
    const uint16_t* p = static_cast<const uint16_t*>(from) + start;
    for (int i = 0; i < n; i++) out[i] = float_of(static_cast<uint32_t>(p[i]) << 16);
  } else {
    std::memcpy(out, static_cast<const float*>(from) + start, sizeof(float) * static_cast<std::size_t>(n));
  }
}

void store(const float* x, void* to, bool bf16, int64_t start, int n) {
  if (!bf16) {
    std::memcpy(static_cast<float*>(to) + start, x, sizeof(float) * static_cast<std::size_t>(n));
    return;
  }
  uint16_t* p = static_cast<uint16_t*>(to) + start;
  for (int i = 0; i < n; i++) {
    const uint32_t bits = static_cast<uint32_t>(bits_of(x[i]));
    const uint32_t nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    p[i] = static_cast<uint16_t>(x[i] == x[i] ? nearest : 0x7FC0);
  }
}

void decode(float* out, const Moment& m, int64_t start, int64_t block, int n) {
  if (!m.values) {
    load(out, m.codes, false, start, n);
    return;
  }
  const float scale = m.scales[block];
  const float* values = m.values;
  if (m.bits == 8) {
    const uint8_t* codes = static_cast<const uint8_t*>(m.codes) + start;
    for (int i = 0; i < n; i++) out[i] = values[codes[i]];
  } else {
    const uint8_t* codes = static_cast<const uint8_t*>(m.codes) + start / 2;
    for (int i = 0; i < n / 2; i++) {
      out[2 * i] = values[codes[i] & 15];
      out[2 * i + 1] = values[codes[i] >> 4];
    }
  }
  for (int i = 0; i < n; i++) out[i] *= scale;
}

void encode(const float* x, const Moment& m, int64_t start, int64_t block, int n) {
  if (!m.values) {
    store(x, m.codes, false, start, n);
    return;
  }
  int32_t largest = 0;
  for (int i = 0; i < n; i++) {
    const int32_t size = bits_of(x[i]) & 0x7FFFFFFF;
    largest = size > largest ? size : largest;
  }
  constexpr float tiny = 1.17549435e-38f;  // 2**-126
  float scale = float_of(static_cast<uint32_t>(largest));
  scale = scale < tiny ? tiny : scale;
  m.scales[block] = scale;
  const int32_t base = m.base, top = m.top, shift = m.shift, first = m.first;
  const int32_t mask = first ? 0x7FFFFFFF : -1, flip = first ? -1 : 0;
  const int32_t* words = m.words;
  // Look-ups stand alone: compilers make vectors of the loops around them.
  alignas(64) uint8_t codes[kLargestBlock];
  alignas(64) int32_t keys[kLargestBlock], found[kLargestBlock];
  for (int i = 0; i < n; i++) {
    const float q = x[i] / scale;
    const int32_t bits = q == q ? bits_of(q) : 0x7F800000;
    int32_t key = bits & mask;
    key = key < base ? base : key;
    key = (key > top ? top : key) - base;
    keys[i] = key ^ (bits >> 31 & flip);
    found[i] = (keys[i] >> shift) + first;
  }
  for (int i = 0; i < n; i++) found[i] = words[found[i]];
  for (int i = 0; i < n; i++) codes[i] = static_cast<uint8_t>((found[i] + keys[i]) >> shift);
  if (m.bits == 8) {
    std::memcpy(static_cast<uint8_t*>(m.codes) + start, codes, static_cast<std::size_t>(n));
  } else {
    uint8_t* packed = static_cast<uint8_t*>(m.codes) + start / 2;
    for (int i = 0; i < n / 2; i++) packed[i] = static_cast<uint8_t>(codes[2 * i] | codes[2 * i + 1] << 4);
  }
}

void update_block(const Update& u, int64_t block) {
  alignas(64) float p[kLargestBlock], g[kLargestBlock], m[kLargestBlock], v[kLargestBlock], top[kLargestBlock];
  const int64_t start = block * u.block;
  const int n = static_cast<int>(u.count - start < u.block ? u.count - start : u.block);
  load(p, u.param, u.param_bf16, start, n);
  load(g, u.grad, u.grad_bf16, start, n);
  decode(m, u.moments[0], start, block, n);
  if (u.scaled)
    for (int i = 0; i < n; i++) g[i] *= u.inverse_scale;
  if (u.maximize)
    for (int i = 0; i < n; i++) g[i] = -g[i];
  if (u.coupled)
    for (int i = 0; i < n; i++) g[i] += p[i] * u.weight_decay;
  if (u.rule == 0) {
    decode(v, u.moments[1], start, block, n);
    for (int i = 0; i < n; i++) m[i] += (g[i] - m[i]) * u.keep1;
    for (int i = 0; i < n; i++) v[i] = v[i] * u.beta2 + g[i] * g[i] * u.keep2;
    const float* under = v;
    if (u.amsgrad) {
      decode(top, u.moments[2], start, block, n);
      for (int i = 0; i < n; i++) top[i] = top[i] > v[i] || top[i] != top[i] ? top[i] : v[i];
      encode(top, u.moments[2], start, block, n);
      under = top;
    }
    for (int i = 0; i < n; i++) p[i] = p[i] * u.decay - m[i] / (std::sqrt(under[i]) * u.root + u.eps) * u.rate;
    encode(v, u.moments[1], start, block, n);
  } else if (u.rule == 1) {
    for (int i = 0; i < n; i++) m[i] = m[i] * u.beta1 + g[i] * u.first;
    if (u.nesterov)
      for (int i = 0; i < n; i++) p[i] = p[i] * u.decay - (g[i] + m[i] * u.beta1) * u.rate;
    else
      for (int i = 0; i < n; i++) p[i] = p[i] * u.decay - m[i] * u.rate;
  } else {
    for (int i = 0; i < n; i++) {
      const float way = m[i] * u.beta1 + g[i] * u.keep1;
      const float sign = way > 0 ? 1.0f : way < 0 ? -1.0f : 0.0f;
      p[i] = p[i] * u.decay - sign * u.rate;
      m[i] = m[i] * u.beta2 + g[i] * u.keep2;
    }
  }
  encode(m, u.moments[0], start, block, n);
  store(p, u.param, u.param_bf16, start, n);
}

void update_blocks(const Update& u, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; block++) update_block(u, block);
}

}  // namespace
}  // namespace lowp
