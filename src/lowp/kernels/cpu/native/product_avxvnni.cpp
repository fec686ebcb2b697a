// The products, compiled for one instruction set (CMakeLists.txt says which flags).
#include "lanes_avx2.h"
#include "product.h"

const lowp::Kernels lowp::kAvxVnni = {"avxvnni", false, Lanes::kPanel, run_pack, run_few, run_many, scratch_bytes};
