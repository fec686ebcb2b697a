// The product for many tokens: W decoded into shared memory by warps of their own. For the shared part see fragments.cu.
//
// Why. With many tokens the tensor cores are the limit, and all that the multiplying warps do beside them costs. So the work is
// divided: warpgroups 0 and 1 only multiply (64 rows each, BM tokens, both operands in shared memory); warpgroups 2 and 3 decode (a
// unit of 64 x 64 weights each, in the swizzle that wgmma reads), and two of their threads ask for what is copied (codes; x).
//
// Two blocks of a cluster work on neighbouring rows and the same tokens: each copies half of the tile of x to both (multicast), which
// halves what is read from the L2 cache, the second limit. Blocks stay and walk over tiles: copies and decoding run ahead.

constexpr int A_BYTES = 128 * 128;  // 128 rows of 64 columns of 16 bits
constexpr int STAGE_BYTES = A_BYTES + X_CHUNK;
constexpr int CODE_STAGES = 3;
constexpr int SCALES_AT = 2 * UNIT_BYTES;
constexpr int ZEROS_AT = SCALES_AT + 2 * GROUPS * 64 * SCALE_BYTES;
constexpr int CODE_BYTES = (ZEROS_AT + 2 * GROUPS * 64 * ZERO_BYTES + 127) / 128 * 128;

//@WGMMA shared@

struct Ring {  // a place in a ring of buffers, and the phase of its barriers
  int at;
  u32 phase;
  DEVICE void next(int size) {
    if (++at == size) { at = 0; phase ^= 1; }
  }
};

extern "C" __global__ void __launch_bounds__(512, 1) __cluster_dims__(CLUSTER, 1, 1) large(const __grid_constant__ Params p) {
  extern __shared__ __align__(1024) u8 memory[];
  const u32 stages = (shared_address(memory) + 1023) & ~1023u;
  const u32 codes_at = stages + STAGES * STAGE_BYTES;
  const u32 table_at = codes_at + CODE_STAGES * CODE_BYTES;
  const u32 out_at = table_at + TABLE_BYTES;
  __shared__ u64 barriers[2 * STAGES + 2 * CODE_STAGES];
  const u32 full = shared_address(barriers), empty = full + 8 * STAGES;
  const u32 codes_full = empty + 8 * STAGES, codes_empty = codes_full + 8 * CODE_STAGES;
  const int lane = threadIdx.x % 32, lane128 = threadIdx.x % 128, role = threadIdx.x / 128;
  const u32 rank = cluster_rank();

  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; s++) {
      barrier_init(full + 8 * s, 1 + 8);             // the copy of x, the warps that decode
      barrier_init(empty + 8 * s, 8 * CLUSTER);      // the warps that multiply, of both blocks
    }
    for (int s = 0; s < CODE_STAGES; s++) { barrier_init(codes_full + 8 * s, 1); barrier_init(codes_empty + 8 * s, 8); }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  fill_table(table_at, p, 512);
  __syncthreads();
  cluster_sync();

  const int chunks = p.K / 64, n64_all = (p.N + 63) / 64, groups = GROUP == 0 ? 0 : p.K / COLUMNS;
  const int row_tiles = (p.N + 255) / 256, token_tiles = (p.M + BM - 1) / BM, tiles = row_tiles * token_tiles;
  const int first_tile = blockIdx.x / CLUSTER, tile_step = gridDim.x / CLUSTER;

  if (role >= 2) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 88;");
    const int unit = role - 2;
    const int row = 16 * (lane128 / 32) + lane / 4;
    const u32 start = decode_start(table_at + 4 * lane, p);
    // stmatrix: this lane gives the address of row `i` of the 8 x 8 matrix of part lane / 8 (rows g or g + 8; columns 0 or 8 on)
    const int i = lane % 8, store_row = 16 * (lane128 / 32) + 8 * (lane / 8 & 1) + i, right = lane / 16;
    Ring ring = {0, 1}, codes_ring = {0, 0}, ask_ring = {0, 1};
    int ask_index = first_tile, ask_k = 0;
    // One thread asks for the codes and scales of the next stage that has not been asked for.
    auto ask = [&]() {
      if (ask_index >= tiles) return;
      const int n64 = 4 * tile_at(ask_index, row_tiles, token_tiles).row + 2 * rank, height = min(2, max(0, n64_all - n64));
      barrier_wait(codes_empty + 8 * ask_ring.at, ask_ring.phase);
      const u32 at = codes_at + ask_ring.at * CODE_BYTES, bar = codes_full + 8 * ask_ring.at;
      barrier_expect(bar, height * (UNIT_BYTES + GROUPS * 64 * (SCALE_BYTES + ZERO_BYTES)));
      for (int t = 0; t < height; t++) {
        copy_bytes(at + t * UNIT_BYTES, p.codes + ((u64)(n64 + t) * chunks + ask_k) * UNIT_BYTES, UNIT_BYTES, bar, EVICT_LAST);
        if constexpr (GROUP > 0) {
          const u64 first = ((u64)(n64 + t) * groups + (u64)ask_k * 64 / COLUMNS) * 64;
          copy_bytes(at + SCALES_AT + t * GROUPS * 64 * SCALE_BYTES, p.scale + first * SCALE_BYTES, GROUPS * 64 * SCALE_BYTES, bar, EVICT_LAST);
          if constexpr (ZERO > 0)
            copy_bytes(at + ZEROS_AT + t * GROUPS * 64 * ZERO_BYTES, p.zero + first * ZERO_BYTES, GROUPS * 64 * ZERO_BYTES, bar, EVICT_LAST);
        }
      }
      ask_ring.next(CODE_STAGES);
      if (++ask_k == chunks) { ask_k = 0; ask_index += tile_step; }
    };
    if (threadIdx.x == 256)
      for (int s = 0; s < CODE_STAGES - 1; s++) ask();
    for (int index = first_tile; index < tiles; index += tile_step) {
      const Tile tile = tile_at(index, row_tiles, token_tiles);
      const int n64 = 4 * tile.row + 2 * rank;
      for (int k = 0; k < chunks; k++, ring.next(STAGES), codes_ring.next(CODE_STAGES)) {
        if (threadIdx.x == 256) ask();
        __syncwarp();
        barrier_wait(codes_full + 8 * codes_ring.at, codes_ring.phase);
        const u32 from = codes_at + codes_ring.at * CODE_BYTES;
        u32 a[4][4];
        const Codes codes = load_codes(from + unit * UNIT_BYTES, lane128);
        Rows rows;
#pragma unroll
        for (int step = 0; step < 4; step++) {
          if constexpr (GROUP > 0)
            if (step == 0 || (16 * step) % COLUMNS == 0) {
              const int g = 16 * step / COLUMNS, block = SCALE == 5 ? ((n64 + unit) * 64 + row) * groups + (64 * k + 16 * step) / COLUMNS : 0;
              rows = load_rows(from + SCALES_AT + (unit * GROUPS + g) * 64 * SCALE_BYTES,
                               from + ZEROS_AT + (unit * GROUPS + g) * 64 * ZERO_BYTES, row, p, block, groups);
            }
          if (step == 0) decode_step<0>(a[0], codes, rows, start);
          if (step == 1) decode_step<1>(a[1], codes, rows, start);
          if (step == 2) decode_step<2>(a[2], codes, rows, start);
          if (step == 3) decode_step<3>(a[3], codes, rows, start);
        }
        __syncwarp();
        if (lane == 0) barrier_arrive(codes_empty + 8 * codes_ring.at);
        barrier_wait(empty + 8 * ring.at, ring.phase);
        if (threadIdx.x == 384) {  // x: half of the tokens, to both blocks
          barrier_expect(full + 8 * ring.at, X_CHUNK);
          copy_tile_to_both(stages + ring.at * STAGE_BYTES + A_BYTES + rank * (X_CHUNK / CLUSTER), p.x_map, k * 64,
                            tile.token * BM + rank * (BM / CLUSTER), full + 8 * ring.at);
        }
        __syncwarp();
        const u32 to = stages + ring.at * STAGE_BYTES + unit * 8192 + store_row * 128;
#pragma unroll
        for (int step = 0; step < 4; step++)
          asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to + (((2 * step + right) ^ i) << 4)),
                       "r"(a[step][0]), "r"(a[step][1]), "r"(a[step][2]), "r"(a[step][3]) : "memory");
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        __syncwarp();
        if (lane == 0) barrier_arrive(full + 8 * ring.at);
      }
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 168;");
    float sum[BM / 2];
    Ring ring = {0, 0};
    for (int index = first_tile; index < tiles; index += tile_step) {
      const Tile tile = tile_at(index, row_tiles, token_tiles);
      int last = -1;
      for (int k = 0; k < chunks; k++, ring.next(STAGES)) {
        barrier_wait(full + 8 * ring.at, ring.phase);
        const u32 a = descriptor_of(stages + ring.at * STAGE_BYTES + role * 8192), x = descriptor_of(stages + ring.at * STAGE_BYTES + A_BYTES);
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < 4; step++) wgmma(sum, descriptor(a, 32 * step), descriptor(x, 32 * step), k > 0 || step > 0);
        wgmma_commit();
        wgmma_wait<1>();
        if (last >= 0 && lane < CLUSTER) barrier_arrive_at(empty + 8 * last, lane);
        last = ring.at;
      }
      wgmma_wait<0>();
      if (lane < CLUSTER) barrier_arrive_at(empty + 8 * last, lane);
      store_tile(sum, p, (4 * tile.row + 2 * rank + role) * 64, tile.token * BM, out_at + role * OUT_BYTES, 1 + role);
    }
  }
  cluster_sync();  // nobody leaves while its neighbour may still write to it
}
