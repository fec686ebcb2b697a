// The products, compiled for one instruction set (CMakeLists.txt says which flags).
#include "lanes_neon.h"
#include "product.h"

const lowp::Kernels lowp::kNeonI8mm = {"neoni8mm", false, Lanes::kPanel, run_pack, run_few, run_many, scratch_bytes};
