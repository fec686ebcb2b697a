// y[M, N] = x[M, K] @ W[N, K].T with W in 1 to 8 bits: W from registers. For decoding and the way out see fragments.cu.
//
// What. y^T = W x^T: W is the left operand of wgmma, m64 rows by n = BM tokens, so that a batch of 8 tokens fills the
// instruction. Its registers are where the codes are decoded: no decoded weight ever touches memory.
//
// How. One producer warp streams codes, scales and the tile of x into shared memory by bulk copies, STAGES deep. Warpgroups decode
// and multiply: see multiply16.cu (x in bf16 or fp16) and multiply8.cu (x in e4m3). The blocks of a cluster share the columns of a
// tile (SPLIT) and add their sums through distributed shared memory, in fixed order.

constexpr int ROWS = 64 * MT * WGS;
constexpr int X_COLUMNS = 1024 / X_BITS, X_CHUNKS = KC * 64 / X_COLUMNS;  // 128 bytes of a token; chunks of x in a stage
constexpr int CODES_AT = X_CHUNKS * X_CHUNK;
constexpr int SCALES_AT = CODES_AT + MT * WGS * KC * UNIT_BYTES;
constexpr int ZEROS_AT = SCALES_AT + MT * WGS * GROUPS * 64 * SCALE_BYTES;
constexpr int STAGE_USED = ZEROS_AT + MT * WGS * GROUPS * 64 * ZERO_BYTES;
constexpr int STAGE_BYTES = (STAGE_USED + 1023) / 1024 * 1024;
constexpr int SUM_PITCH = ROWS + 4;  // floats between tokens where a cluster adds sums
constexpr int CONSUMERS = 128 * WGS;
// Large tiles want more registers than an even share: whole warpgroups then trade them.
constexpr bool TRADE = WGS == 2 && MT * BM >= 128;
constexpr int THREADS = CONSUMERS + (TRADE ? 128 : 32);

// The stages in shared memory, and which one comes next; the table of a codebook beside them.
struct Pipe { u32 stages, full, empty, table; int s; u32 phase; };

// What a warpgroup multiplies: `unit`, its first in a stage, is `n64` in the weight; `token`, the first of the tile.
struct Place { int unit, n64, token; };

//@MULTIPLY@

// The share of the work of a block: segments of tiles, counted in turns. SPLIT: the ranks of a cluster take equal parts of one tile.
// STREAM: what does not fill a last round of whole tiles is cut into equal parts, tile after tile, so that all blocks end together
// (Osama et al., "Stream-K", arXiv 2301.03598, section 5); after that whole tiles.
struct Segment { int tile, first, last; };

struct Walk {
  int tiles, turns, streamed, at, end, whole;

  DEVICE Walk(int tiles, int turns, int rank) : tiles(tiles), turns(turns) {
    const int blocks = gridDim.x, b = blockIdx.x;
    streamed = !STREAM || tiles % blocks == 0 ? 0 : tiles < blocks ? tiles : tiles % blocks + blocks;
    at = STREAM ? (int)((u64)streamed * turns * b / blocks) : turns * rank / SPLIT;
    end = STREAM ? (int)((u64)streamed * turns * (b + 1) / blocks) : turns * (rank + 1) / SPLIT;
    whole = streamed + b / SPLIT;
  }

  DEVICE bool next(Segment& segment) {
    if (STREAM && at < end) {
      segment.tile = at / turns;
      segment.first = at - segment.tile * turns;
      segment.last = min(turns, segment.first + end - at);
      at += segment.last - segment.first;
      return true;
    }
    if (whole >= tiles) return false;
    segment = STREAM ? Segment{whole, 0, turns} : Segment{whole, at, end};
    whole += gridDim.x / SPLIT;
    return true;
  }

  // Where the share of another block ends, in turns of all streamed tiles.
  DEVICE int end_of(int block) const { return (int)((u64)streamed * turns * (block + 1) / gridDim.x); }
};

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
#if SPLIT > 1
__cluster_dims__(SPLIT, 1, 1)
#endif
product(const __grid_constant__ Params p) {
  extern __shared__ __align__(16) u8 memory[];  // what swizzled copies want, 1024, is seen to in the next line
  const u32 stages = (shared_address(memory) + 1023) & ~1023u;
  const u32 table_at = stages + STAGES * STAGE_BYTES;
  const u32 out_at = table_at + TABLE_BYTES;
  __shared__ u64 barriers[2 * STAGES];
  const u32 full = shared_address(barriers), empty = full + 8 * STAGES;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

  if (threadIdx.x == 0) {
#pragma unroll
    for (int s = 0; s < STAGES; s++) { barrier_init(full + 8 * s, 1); barrier_init(empty + 8 * s, 4 * WGS); }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  fill_table(table_at, p, THREADS);
  __syncthreads();
  asm volatile("griddepcontrol.launch_dependents;");  // the next kernel may begin where there is room; it waits before it reads y

  const int chunks = p.K / 64, all_stages = chunks / KC;
  const u32 rank = SPLIT > 1 ? cluster_rank() : 0;
  const int turns = all_stages / TURNS;
  const int row_tiles = (p.N + ROWS - 1) / ROWS, token_tiles = (p.M + BM - 1) / BM;
  const int tiles = row_tiles * token_tiles, n64_all = (p.N + 63) / 64;
  const int groups = GROUP == 0 ? 0 : p.K / COLUMNS;

  if (warp >= 4 * WGS) {  // the producer
    if constexpr (TRADE) asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(X_BITS == 8 ? 40 : 56));
    if (warp == 4 * WGS && lane == 0) {
      const bool once = token_tiles == 1;
      auto copy_weight = [&](const Tile& tile, int k, int s) {
        const int n64 = tile.row * MT * WGS, height = min(MT * WGS, n64_all - n64);
        const u32 at = stages + s * STAGE_BYTES, bar = full + 8 * s;
        barrier_expect(bar, X_CHUNKS * X_CHUNK + height * (KC * UNIT_BYTES + GROUPS * 64 * (SCALE_BYTES + ZERO_BYTES)));
        for (int t = 0; t < height; t++) {
          copy_bytes(at + CODES_AT + t * KC * UNIT_BYTES, p.codes + ((u64)(n64 + t) * chunks + k * KC) * UNIT_BYTES, KC * UNIT_BYTES,
                     bar, once ? EVICT_FIRST : EVICT_LAST);
          if constexpr (GROUP > 0) {
            const u64 first = ((u64)(n64 + t) * groups + (u64)k * KC * 64 / COLUMNS) * 64;
            copy_bytes(at + SCALES_AT + t * GROUPS * 64 * SCALE_BYTES, p.scale + first * SCALE_BYTES, GROUPS * 64 * SCALE_BYTES, bar,
                       EVICT_LAST);
            if constexpr (ZERO > 0)
              copy_bytes(at + ZEROS_AT + t * GROUPS * 64 * ZERO_BYTES, p.zero + first * ZERO_BYTES, GROUPS * 64 * ZERO_BYTES, bar,
                         EVICT_LAST);
          }
        }
      };
      // The weight does not depend on the kernel before: its first stages are asked for while that one still runs.
      Walk walk(tiles, turns, rank), ahead = walk;
      int asked = 0;
      for (Segment segment; asked < STAGES && ahead.next(segment);)
        for (int k = TURNS * segment.first; k < TURNS * segment.last && asked < STAGES; k++)
          copy_weight(tile_at(segment.tile, row_tiles, token_tiles), k, asked++);
      asm volatile("griddepcontrol.wait;" ::: "memory");
      int s = 0, stage = 0;
      u32 phase = 1;
      for (Segment segment; walk.next(segment);) {
        const Tile tile = tile_at(segment.tile, row_tiles, token_tiles);
        for (int k = TURNS * segment.first; k < TURNS * segment.last; k++, stage++) {
          if (stage >= asked) {
            barrier_wait(empty + 8 * s, phase);
            copy_weight(tile, k, s);
          }
#pragma unroll
          for (int c = 0; c < X_CHUNKS; c++)
            copy_tile(stages + s * STAGE_BYTES + c * X_CHUNK, p.x_map, (k * X_CHUNKS + c) * X_COLUMNS, tile.token * BM, full + 8 * s,
                      EVICT_LAST);
          if (++s == STAGES) { s = 0; phase ^= 1; }
        }
      }
    }
    __syncwarp();
    if constexpr (SPLIT > 1) { cluster_sync(); cluster_sync(); }
    return;
  }

  // a consumer warpgroup: MT * 64 rows
  if constexpr (TRADE) asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(X_BITS == 8 ? 232 : 224));
  const int group_of_warps = warp / 4, row = 16 * (warp % 4) + lane / 4;  // and row + 8
  float sum[MT][BM / 2];
  Pipe pipe = {stages, full, empty, table_at, 0, 0};

  Walk walk(tiles, turns, rank);
  for (Segment segment; walk.next(segment);) {
    const Tile tile = tile_at(segment.tile, row_tiles, token_tiles);
    const int n64 = tile.row * MT * WGS + group_of_warps * MT;
    multiply(sum, pipe, p, TURNS * segment.first, TURNS * segment.last, Place{group_of_warps * MT, n64, tile.token * BM});

    if constexpr (STREAM) {
      if (segment.first > 0) {  // the rest of a tile that another block began
        leave_sums<MT>(sum, p, blockIdx.x * WGS + group_of_warps, 1 + group_of_warps);
        continue;
      }
      if (segment.last < turns)  // and this one began it: those that took the rest come next, in order; a share may be empty
        for (int b = blockIdx.x, end = (segment.tile + 1) * turns; walk.end_of(b) < end; b++)
          if (walk.end_of(b + 1) > walk.end_of(b)) add_sums<MT>(sum, p, (b + 1) * WGS + group_of_warps, 1 + group_of_warps);
    }
    if constexpr (SPLIT == 1) {
#pragma unroll
      for (int m = 0; m < MT; m++)
        store_tile(sum[m], p, (n64 + m) * 64, tile.token * BM, out_at + group_of_warps * OUT_BYTES, 1 + group_of_warps);
    } else {
      // Sums of the whole cluster: each block writes its own, then adds a share of all of them, in the order of the ranks.
      const u32 sums = stages;
      named_barrier(1, CONSUMERS);  // every stage was read
#pragma unroll
      for (int m = 0; m < MT; m++)
#pragma unroll
        for (int i = 0; i < BM / 2; i++) {
          const int token = 8 * (i / 4) + 2 * (lane % 4) + (i & 1);
          const int r = (group_of_warps * MT + m) * 64 + row + 8 * (i / 2 & 1);
          asm volatile("st.shared.f32 [%0], %1;" ::"r"(sums + (token * SUM_PITCH + r) * 4), "f"(sum[m][i]) : "memory");
        }
      cluster_sync();
      constexpr int PIECES = BM * ROWS / 8;
      for (int i = rank * (PIECES / SPLIT) + threadIdx.x; i < (rank + 1) * (PIECES / SPLIT); i += CONSUMERS) {
        const int token = i / (ROWS / 8), r8 = i % (ROWS / 8) * 8, n = tile.row * ROWS + r8;
        if (tile.token * BM + token >= p.M || n >= p.N) continue;
        float total[8] = {0, 0, 0, 0, 0, 0, 0, 0};
#pragma unroll
        for (int from = 0; from < SPLIT; from++) {
          u32 remote;
          asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(sums + (token * SUM_PITCH + r8) * 4), "r"(from));
#pragma unroll
          for (int h = 0; h < 2; h++) {
            float v[4];
            asm volatile("ld.shared::cluster.v4.f32 {%0,%1,%2,%3}, [%4];" : "=f"(v[0]), "=f"(v[1]), "=f"(v[2]), "=f"(v[3])
                         : "r"(remote + 16 * h));
            total[4 * h] += v[0]; total[4 * h + 1] += v[1]; total[4 * h + 2] += v[2]; total[4 * h + 3] += v[3];
          }
        }
        u32 v[4];
#pragma unroll
        for (int h = 0; h < 4; h++) {
          float two[2];
#pragma unroll
          for (int e = 0; e < 2; e++) {
            const int at = min(n + 2 * h + e, p.N - 1);
            two[e] = fmaf(total[2 * h + e], row_scale(p, at), p.bias != nullptr ? to_float(p.bias[at]) : 0.0f);
          }
          v[h] = pack_two(two[0], two[1]);
        }
        store_rows(p, tile.token * BM + token, n, v);
      }
      cluster_sync();  // nobody leaves while its sums are read
    }
  }
}
