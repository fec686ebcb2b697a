// A weight, decoded once: rows of [N][K] in the type of y, for cuBLAS.
//
// A block decodes units of 64 rows, one after another along K, through shared memory, so that rows are written 128 bytes at a time.

constexpr int TILE_PITCH = 72;  // elements; rows start at multiples of 16 bytes

extern "C" __global__ void __launch_bounds__(128) weight(const __grid_constant__ Params p) {
  __shared__ __align__(16) u16 tile[2][64 * TILE_PITCH];
  extern __shared__ __align__(16) u32 pairs[];  // KIND 2: the table of pairs
  const int lane128 = threadIdx.x, lane = lane128 % 32, row = 16 * (lane128 / 32) + lane / 4;
  asm volatile("griddepcontrol.wait;" ::: "memory");  // until the kernel before, which may have made the table, has ended
  if constexpr (KIND == 2) {
    fill_table(shared_address(pairs), p, 128);
    __syncthreads();
  }
  const u32 start = decode_start(shared_address(pairs) + 4 * lane, p);
  const int chunks = p.K / 64, groups = GROUP == 0 ? 0 : p.K / COLUMNS;
  const int first = (u64)chunks * blockIdx.y / gridDim.y, last = (u64)chunks * (blockIdx.y + 1) / gridDim.y;
  const int n64 = p.first + blockIdx.x;
  int buffer = 0;
  for (int c = first; c < last; c++, buffer ^= 1) {
    const Codes codes = load_codes((u64)p.codes + ((u64)n64 * chunks + c) * UNIT_BYTES, lane128);
    Rows rows[UNIT_GROUPS];
    if constexpr (GROUP > 0)
#pragma unroll
      for (int s = 0; s < UNIT_GROUPS; s++) {  // all of them asked for before the first is used
        const int g = (64 * c + 64 / UNIT_GROUPS * s) / COLUMNS;
        const u64 at = ((u64)n64 * groups + g) * 64;
        rows[s] = load_rows((u64)p.scale + at * SCALE_BYTES, (u64)p.zero + at * ZERO_BYTES, row, p, (n64 * 64 + row) * groups + g, groups);
      }
    u32 a[4][4];
    decode_step<0>(a[0], codes, rows[0], start);
    decode_step<1>(a[1], codes, rows[UNIT_GROUPS / 4], start);
    decode_step<2>(a[2], codes, rows[UNIT_GROUPS / 2], start);
    decode_step<3>(a[3], codes, rows[3 * UNIT_GROUPS / 4], start);
#pragma unroll
    for (int step = 0; step < 4; step++)
#pragma unroll
      for (int part = 0; part < 4; part++) {
        u32 v = a[step][part];
        const int r = row + 8 * (part & 1), k = 16 * step + 8 * (part >> 1) + 2 * (lane % 4);
        if constexpr (GROUP == 0) {
          const float by = n64 * 64 + r < p.N ? scale_value(load_row_scale(p, n64 * 64 + r), p, 0) : 0.0f;
          v = pack_two(to_float((u16)v) * by, to_float((u16)(v >> 16)) * by);
        }
        *(u32*)&tile[buffer][r * TILE_PITCH + k] = v;
      }
    __syncthreads();
#pragma unroll
    for (int i = lane128; i < 64 * 8; i += 128) {
      const int r = i / 8, k = i % 8 * 8;
      if (n64 * 64 + r < p.N)
        *(uint4*)(p.y + (u64)(blockIdx.x * 64 + r) * p.K + 64 * c + k) = *(const uint4*)(tile[buffer] + r * TILE_PITCH + k);
    }
  }
}
