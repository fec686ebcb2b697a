// Optimizer steps on a CPU, one pass over memory: decode, update in float32, encode, block by block in the nearest cache.
//
// The equations are those of ops/update.py, in its order and without fused multiply-adds, so that states are the reference's own
// bytes. A map of values is decoded by one look-up and encoded by another, see numerics/buckets.py. Each instruction set compiles
// this text for itself (update_avx2.cpp ...), the compiler makes vectors of its loops.
#pragma once
#include <cstdint>

namespace lowp {

constexpr int kLargestBlock = 2048;  // elements, five rows of floats of which fit a cache of 48 KB

struct Moment {
  void* codes;          // or the floats themselves where there is no map
  float* scales;        // one a block
  const float* values;  // by code; null: no map
  const int32_t* words;
  int32_t bits, shift, base, top, first;
};

struct Update {
  void* param;
  const void* grad;
  Moment moments[3];
  int64_t count, block;
  int32_t rule;  // 0 adam, 1 sgd, 2 lion
  int32_t param_bf16, grad_bf16, amsgrad, scaled, maximize, coupled, nesterov;
  float inverse_scale, decay, rate, root, first, beta1, keep1, beta2, keep2, eps, weight_decay;
};

using UpdateBlocks = void (*)(const Update&, int64_t begin, int64_t end);  // blocks

}  // namespace lowp
