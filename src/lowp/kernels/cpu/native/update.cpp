// The optimizers' entry for ctypes: which instruction set, and blocks shared among torch's threads. See update.h.
#include <stddef.h>

#include "torch_shim.h"
#include "update.h"

namespace lowp {
#if defined(__x86_64__)
void update_avx2(const Update& u, int64_t begin, int64_t end);
void update_avx512(const Update& u, int64_t begin, int64_t end);

static UpdateBlocks best() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") ? update_avx512
                                                                                                                      : update_avx2;
}
#else
void update_neon(const Update& u, int64_t begin, int64_t end);

static UpdateBlocks best() { return update_neon; }
#endif
}  // namespace lowp

extern "C" __attribute__((visibility("default"))) int32_t lowp_cpu_update(const lowp::Update* u) {
  if (u->block < 1 || u->block > lowp::kLargestBlock) return 1;
  const int64_t blocks = (u->count + u->block - 1) / u->block, grain = (1 << 15) / u->block + 1;
  return torch_parallel_for(
      0, blocks, grain,
      [](int64_t begin, int64_t end, void* context) {
        static const lowp::UpdateBlocks run = lowp::best();
        run(*static_cast<const lowp::Update*>(context), begin, end);
      },
      const_cast<lowp::Update*>(u));
}
