// One linear layer from raw pointers: which product, how x is cut, how the work is divided. No torch here.
#pragma once
#include "contract.h"

namespace lowp {

using Body = void (*)(int64_t begin, int64_t end, void* context);
using Parallel = void (*)(int64_t begin, int64_t end, int64_t grain, Body, void* context);

struct Result {
  void* y = nullptr;
  Type type = Type::fp32;
  int64_t stride = 0;
  const void* bias = nullptr;
  Type bias_type = Type::fp32;
};

// Throws std::invalid_argument where the sizes do not go together, std::runtime_error where no kernel runs on this machine.
void linear(const Weight& w, const Activation& a, const Result& y, Parallel parallel);

const char* use(const char* name);  // the instruction set to use from now on, "" for the best; null where this machine lacks it

}  // namespace lowp
