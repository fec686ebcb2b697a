#include "update_loops.h"
namespace lowp {
void update_avx2(const Update& u, int64_t begin, int64_t end) { update_blocks(u, begin, end); }
}
