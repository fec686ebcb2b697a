// The products, compiled for one instruction set (CMakeLists.txt says which flags).
#include "lanes_avx512.h"
#include "product.h"

const lowp::Kernels lowp::kAvx512Bf16 = {"avx512bf16", true, Lanes::kPanel, run_pack, run_few, run_many, scratch_bytes};
