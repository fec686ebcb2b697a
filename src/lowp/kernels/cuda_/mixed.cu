// Mixed-input product on Hopper: y[M, N] = x[M, K] @ W[N, K].T, x in bf16 or fp16, W in 1 to 8 bits.
//
// What. W is the left operand of wgmma, from registers: m64 rows of W by n = BM tokens by k16. So a batch of 8 tokens fills the
// instruction, and the codes are decoded in registers, where the tensor cores read them: no decoded weight ever touches memory.
//
// Why it is fast. One producer warp streams codes, scales and the tile of x into shared memory by bulk copies (TMA), STAGES deep.
// Each consumer warpgroup decodes the next 64 x 64 weights while the tensor cores work on the last: two sets of A registers.
// Layout `fragments` lays codes out in the order in which lanes need them: a lane's codes are consecutive, 16-byte loads,
// no bank conflicts, no shuffles.
//
// Small M: the tiles of one cluster share the columns K (SPLIT) and add their sums through distributed shared memory, in fixed
// order. Large M: blocks stay and walk over tiles, the producer runs ahead of the epilogue.
//
// What is compiled in (-D): MT (64-row tiles a warpgroup), WGS (consumer warpgroups), BM (tokens a tile), KC (64-column chunks a
// stage), STAGES, SPLIT, NPLANES PW0..PW2 (widths of bit planes, low bits first), KIND (0 integer, 1 small float, 2 codebook),
// SIGNED, EBITS and EBIAS (of a float), GROUP (columns that share a scale; 0: a scale for each row, in the epilogue),
// SCALE (0 bf16, 1 fp16, 2 fp32, 3 e8m0, 4 e4m3 with a scale of the tensor, 5 int8 in blocks of NEST), ZERO (0 none, 1 int8,
// 2 uint8, 3 bf16, 4 fp16, 5 fp32), F16 (the type of x, y and the decoded weight: 0 bf16, 1 fp16), TOKEN (a scale for each token).
//
// Legend: M tokens, N output channels, K input channels; a chunk is 64 columns, a unit the 64 x 64 weights of a chunk.
// Source of the instructions: PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions" and "Data Movement: cp.async.bulk".

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define DEVICE __device__ __forceinline__

struct Params {
  alignas(64) u8 x_map[128];  // CUtensorMap of x (M, K), box 64 columns by BM tokens, 128-byte swizzle
  const u8* codes;            // [N/64][K/64][512 * bits bytes], layout `fragments`
  const u8* scale;            // [N/64][K/GROUP][64], or one for each row, or one
  const u8* zero;             // as scale
  const float* scale_scale;   // SCALE 4: one or null; SCALE 5: one for each NEST scales in the order of (N, K/GROUP)
  const float* scale_zero;    // SCALE 5
  const float* token_scale;   // [M], TOKEN
  const u16* bias;            // [N] in the type of y, or null
  const u16* table;           // KIND 2: 16 values in the type of x
  u16* y;                     // [M, N]
  int M, N, K;
  int scale_stride;           // GROUP 0: 1 for a scale a row, 0 for one of the tensor
  int nest;                   // SCALE 5: scales in a block of scale_scale
};

constexpr int BITS = PW0 + PW1 + PW2;
constexpr int ROWS = 64 * MT * WGS;
constexpr int UNIT_BYTES = 512 * BITS;
constexpr int SCALE_BYTES = SCALE == 2 ? 4 : SCALE < 2 ? 2 : 1;
constexpr int ZERO_BYTES = ZERO == 0 ? 0 : ZERO == 5 ? 4 : ZERO > 2 ? 2 : 1;
constexpr int COLUMNS = GROUP == 0 ? 64 : GROUP;  // that share a scale
constexpr int GROUPS = GROUP == 0 ? 0 : GROUP >= 64 * KC ? 1 : 64 * KC / GROUP;  // scale groups a stage
constexpr int X_CHUNK = BM * 128;                                                 // bytes of 64 columns of x
constexpr int CODES_AT = KC * X_CHUNK;
constexpr int SCALES_AT = CODES_AT + MT * WGS * KC * UNIT_BYTES;
constexpr int ZEROS_AT = SCALES_AT + MT * WGS * GROUPS * 64 * SCALE_BYTES;
constexpr int STAGE_USED = ZEROS_AT + MT * WGS * GROUPS * 64 * ZERO_BYTES;
constexpr int STAGE_BYTES = (STAGE_USED + 1023) / 1024 * 1024;
constexpr int TABLE_BYTES = KIND == 2 ? 32768 : 0;
constexpr int OUT_PITCH = 64 * MT + 8;     // 16-bit words between tokens in the epilogue's buffer: no bank conflict
constexpr int SUM_PITCH = ROWS + 4;        // floats between tokens where a cluster adds sums
constexpr int CONSUMERS = 128 * WGS;
// Large tiles want more registers than an even share: whole warpgroups then trade them.
constexpr bool TRADE = WGS == 2 && MT * BM >= 128;
constexpr int THREADS = CONSUMERS + (TRADE ? 128 : 32);
static_assert(MT == 2 || KC % 2 == 0, "two sets of A registers take turns");

// -- instructions -------------------------------------------------------------------------------------------------------

DEVICE u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

DEVICE void barrier_init(u32 bar, int count) { asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(bar), "r"(count)); }

DEVICE void barrier_expect(u32 bar, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}

DEVICE void barrier_arrive(u32 bar) { asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(bar) : "memory"); }

DEVICE void barrier_wait(u32 bar, u32 phase) {
  asm volatile(
      "{ .reg .pred done;\n"
      "again: mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n"
      "@done bra over;\n bra again;\n over: }" ::"r"(bar), "r"(phase) : "memory");
}

constexpr u64 EVICT_FIRST = 0x12F0000000000000ull, EVICT_LAST = 0x14F0000000000000ull;  // createpolicy's encodings

DEVICE void copy_bytes(u32 to, const void* from, u32 bytes, u32 bar, u64 policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(to),
      "l"(from), "r"(bytes), "r"(bar), "l"(policy) : "memory");
}

DEVICE void copy_tile(u32 to, const void* map, int column, int row, u32 bar, u64 policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%2, %3}], "
      "[%4], %5;" ::"r"(to), "l"(map), "r"(column), "r"(row), "r"(bar), "l"(policy) : "memory");
}

DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N> DEVICE void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }

//@WGMMA@  void wgmma(float (&d)[BM / 2], const u32 (&a)[4], u64 b, int accumulate), generated for BM and the type

// x is K-major with a swizzle of 128 bytes: 8 tokens are 1024 bytes apart. PTX ISA, "Matrix descriptor".
DEVICE u64 descriptor(u32 address) {
  return (u64)((address & 0x3FFFF) >> 4) | (1ull << 16) | (64ull << 32) | (1ull << 62);
}

DEVICE u32 pack_two(float low, float high) {
  u32 r;
#if F16
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
#else
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
#endif
  return r;
}
DEVICE float from_half(u16 h) { float r; asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(h)); return r; }
DEVICE float from_bf16(u16 h) { return __int_as_float((u32)h << 16); }
DEVICE float to_float(u16 h) { return F16 ? from_half(h) : from_bf16(h); }

#if F16
#define TYPE2 "f16x2"
#else
#define TYPE2 "bf16x2"
#endif
DEVICE u32 sub2(u32 a, u32 b) { u32 r; asm("sub.rn." TYPE2 " %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b)); return r; }
DEVICE u32 mul2(u32 a, u32 b) { u32 r; asm("mul.rn." TYPE2 " %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b)); return r; }
DEVICE u32 fma2(u32 a, u32 b, u32 c) {
  u32 r;
  asm("fma.rn." TYPE2 " %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
  return r;
}
DEVICE u32 twice(u32 h) { return __byte_perm(h, h, 0x1010); }

// -- decode -------------------------------------------------------------------------------------------------------------

// Codes and scales come from shared memory in the product, from global memory where a whole weight is decoded.
#ifdef DEQUANTIZE
typedef u64 Address;
#define SPACE "global"
#define AT(x) "l"(x)
#else
typedef u32 Address;
#define SPACE "shared"
#define AT(x) "r"(x)
#endif

// The codes of a lane in one unit: 16 pairs, pair 4 * step + part; part 0: row g, 1: row g + 8, 2 and 3: the same, 8 columns on.
struct Codes { u32 word[BITS]; };

template <int W> DEVICE void load_plane(u32* word, Address at, int lane128) {
  if constexpr (W == 8 || W == 4) {
#pragma unroll
    for (int half = 0; half < W / 4; half++)
      asm volatile("ld." SPACE ".v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(word[4 * half]), "=r"(word[4 * half + 1]),
                   "=r"(word[4 * half + 2]), "=r"(word[4 * half + 3]) : AT(at + half * 2048 + lane128 * 16));
  } else if constexpr (W == 2) {
    asm volatile("ld." SPACE ".v2.u32 {%0,%1}, [%2];" : "=r"(word[0]), "=r"(word[1]) : AT(at + lane128 * 8));
  } else if constexpr (W == 1) {
    asm volatile("ld." SPACE ".u32 %0, [%1];" : "=r"(word[0]) : AT(at + lane128 * 4));
  }
}

DEVICE Codes load_codes(Address at, int lane128) {
  Codes codes;
  load_plane<PW0>(codes.word, at, lane128);
  if constexpr (PW1 > 0) load_plane<PW1>(codes.word + PW0, at + 512 * PW0, lane128);
  if constexpr (PW2 > 0) load_plane<PW2>(codes.word + PW0 + PW1, at + 512 * (PW0 + PW1), lane128);
  return codes;
}

DEVICE u32 shift_right(u32 x, int by) { return by >= 0 ? x >> by : x << -by; }

// The bits of one plane for a pair, moved so that the lowest lies at bit `to` of each half.
template <int W> DEVICE u32 plane_bits(const u32* word, int pair, int to) {
  constexpr int SLOTS = 16 / (W > 0 ? W : 1);
  const u32 mask = (u32)((1 << W) - 1) << to;
  return shift_right(word[pair / SLOTS], W * (pair % SLOTS) - to) & (mask | mask << 16);
}

DEVICE u32 pair_bits(const Codes& codes, int pair, int to) {
  u32 bits = plane_bits<PW0>(codes.word, pair, to);
  if constexpr (PW1 > 0) bits ^= plane_bits<PW1>(codes.word + PW0, pair, to + PW0);
  if constexpr (PW2 > 0) bits ^= plane_bits<PW2>(codes.word + PW0 + PW1, pair, to + PW0 + PW1);
  return bits;
}

// What a group of columns brings for the rows g and g + 8 of a lane, twice in each word.
struct Rows { u32 scale[2], zero[2]; };

constexpr int MANTISSA = F16 ? 10 : 7, BIAS = F16 ? 15 : 127, TYPE_EBITS = F16 ? 5 : 8;
constexpr u32 MAGIC = F16 ? 0x6400 : 0x4300;  // 1024 or 128: the code is the low bits of the mantissa
DEVICE constexpr u32 twice_of(u32 h) { return h | h << 16; }
constexpr int HALF_RANGE = SIGNED ? 1 << (BITS - 1) : 0;
// 2^n in the type of x, as bits
DEVICE constexpr u32 power(int n) { return (u32)(n + BIAS) << MANTISSA; }
// a whole number below 2048 (fp16) or 256 (bf16), as bits
DEVICE constexpr u32 whole(int n) {
  int exponent = 0;
  while ((2 << exponent) <= n) exponent++;
  return n == 0 ? 0 : power(exponent) | (((u32)n << MANTISSA >> exponent) & ((1u << MANTISSA) - 1));
}

template <int PAIR> DEVICE u32 decode_pair(const Codes& codes, const Rows& rows, u32 table) {
  constexpr int r = PAIR & 1;
  u32 v;
  if constexpr (KIND == 2) {
    // Two codes are a byte, the byte is an entry of 256 pairs, and each lane has its own copy: no bank conflict.
    const u32 at = shift_right(codes.word[PAIR / 4], 8 * (PAIR % 4) - 7) & 0x7F80;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(at + table));
  } else if constexpr (KIND == 1) {
    // Sign to bit 15; exponent and mantissa to where the wider float has them; then the bias, exact for subnormals too.
    constexpr int DOWN = TYPE_EBITS - EBITS;
    constexpr u32 MAGNITUDE = ((1u << (BITS - 1)) - 1) << (16 - BITS) >> DOWN;
    if constexpr (NPLANES == 1) {
      constexpr int SLOTS = 16 / BITS, AT = BITS * (PAIR % SLOTS);
      const u32 word = codes.word[PAIR / SLOTS];
      v = (shift_right(word, AT + BITS - 16 + DOWN) & twice_of(MAGNITUDE)) | (shift_right(word, AT + BITS - 16) & 0x80008000u);
    } else {
      const u32 top = pair_bits(codes, PAIR, 16 - BITS);
      v = (top >> DOWN & twice_of(MAGNITUDE)) | (top & 0x80008000u);
    }
    if constexpr (BIAS != EBIAS) v = mul2(v, twice_of(power(BIAS - EBIAS)));
  } else if constexpr (BITS == 8 && !F16) {
    // bf16 has 7 bits of mantissa. The eighth is the lowest of the exponent: (128 + low bits) - (128 or 256).
    const u32 x = pair_bits(codes, PAIR, 0) ^ (SIGNED ? 0u : 0x00800080u);
    v = sub2((x & 0x007F007Fu) | twice_of(MAGIC), (x & 0x00800080u) | twice_of(MAGIC));
    if constexpr (!SIGNED) v = sub2(v, twice_of(0x8000u | whole(128)));
    if constexpr (ZERO == 1 || ZERO == 2) v = sub2(v, rows.zero[r]);
  } else {
    v = pair_bits(codes, PAIR, 0) ^ twice_of(MAGIC | HALF_RANGE);
    if constexpr (ZERO == 1 || ZERO == 2) v = sub2(v, rows.zero[r]);
    else v = sub2(v, twice_of(whole((F16 ? 1024 : 128) + HALF_RANGE)));
  }
  if constexpr (GROUP == 0) return v;
  if constexpr (ZERO > 2) return fma2(v, rows.scale[r], rows.zero[r]);
  return mul2(v, rows.scale[r]);
}

template <int STEP> DEVICE void decode_step(u32 (&a)[4], const Codes& codes, const Rows& rows, u32 table) {
  a[0] = decode_pair<4 * STEP>(codes, rows, table);
  a[1] = decode_pair<4 * STEP + 1>(codes, rows, table);
  a[2] = decode_pair<4 * STEP + 2>(codes, rows, table);
  a[3] = decode_pair<4 * STEP + 3>(codes, rows, table);
}

template <int BYTES> DEVICE u32 load_bits(Address at) {
  u32 r;
  if constexpr (BYTES == 4) asm volatile("ld." SPACE ".u32 %0, [%1];" : "=r"(r) : AT(at));
  if constexpr (BYTES == 2) { u16 h; asm volatile("ld." SPACE ".u16 %0, [%1];" : "=h"(h) : AT(at)); r = h; }
  if constexpr (BYTES == 1) asm volatile("ld." SPACE ".u8 %0, [%1];" : "=r"(r) : AT(at));
  return r;
}

DEVICE float e4m3_to_float(u32 code) {
  u32 two;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(two) : "h"((u16)code));
  return from_half((u16)two);
}

// A stored scale as a float. `index` counts scales in the order of (N, K / GROUP), for those that are quantized themselves.
DEVICE float scale_value(u32 bits, const Params& p, int index) {
  if constexpr (SCALE == 0) return from_bf16((u16)bits);
  if constexpr (SCALE == 1) return from_half((u16)bits);
  if constexpr (SCALE == 2) return __int_as_float(bits);
  if constexpr (SCALE == 3) return __int_as_float(bits == 0 ? 0x00400000u : bits << 23);  // code 0 is 2^-127, a subnormal
  if constexpr (SCALE == 4) return e4m3_to_float(bits) * (p.scale_scale == nullptr ? 1.0f : p.scale_scale[0]);
  const int block = min(index, p.N * (p.K / COLUMNS) - 1) / p.nest;
  return fmaxf(((float)(int)(signed char)bits - p.scale_zero[block]) * p.scale_scale[block], 1.17549435e-38f);
}

DEVICE float zero_value(u32 bits) {
  if constexpr (ZERO == 1) return (float)(int)(signed char)bits;
  if constexpr (ZERO == 2) return (float)(int)bits;
  if constexpr (ZERO == 3) return from_bf16((u16)bits);
  if constexpr (ZERO == 4) return from_half((u16)bits);
  return __int_as_float(bits);
}

DEVICE Rows load_rows(Address scales, Address zeros, int row, const Params& p, int index, int index_step) {
  Rows rows;
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const u32 bits = load_bits<SCALE_BYTES>(scales + (row + 8 * r) * SCALE_BYTES);
    const bool same = (SCALE == 0 && !F16) || (SCALE == 1 && F16);
    float value = 0.0f;
    if constexpr (!same || ZERO > 2) value = scale_value(bits, p, index + 8 * r * index_step);
    rows.scale[r] = same ? twice(bits) : pack_two(value, value);
    if constexpr (ZERO > 0) {
      const float zero = zero_value(load_bits<ZERO_BYTES>(zeros + (row + 8 * r) * ZERO_BYTES));
      // An integer zero point is exact and goes into what is subtracted; a float one becomes -zero * scale.
      const float magic = (BITS == 8 && !F16) ? 0.0f : (float)((F16 ? 1024 : 128) + HALF_RANGE);
      const float merged = ZERO > 2 ? -zero * value : zero + magic;
      rows.zero[r] = pack_two(merged, merged);
    }
  }
  return rows;
}

// The scale of a row, where it is not that of a group of columns.
DEVICE u32 load_row_scale(const Params& p, int n) {
  const int at = n * p.scale_stride;
  return SCALE_BYTES == 4 ? ((const u32*)p.scale)[at] : SCALE_BYTES == 2 ? ((const u16*)p.scale)[at] : p.scale[at];
}

#ifndef DEQUANTIZE
// -- the product --------------------------------------------------------------------------------------------------------

DEVICE void named_barrier(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
DEVICE void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\n barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
DEVICE u32 cluster_rank() { u32 r; asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r)); return r; }

struct Tile { int n64, token; };  // first 64-row tile and first token

// Tiles that run at the same time share rows of W and tokens: 16 tiles of tokens, then the next rows.
DEVICE Tile tile_at(int index, int row_tiles, int token_tiles) {
  constexpr int BAND = 16;
  const int band = index / (BAND * row_tiles), first = band * BAND;
  const int height = min(BAND, token_tiles - first), within = index - band * BAND * row_tiles;
  return {within / height * MT * WGS, (first + within % height) * BM};
}

DEVICE float row_scale(const Params& p, int n) {
  if constexpr (GROUP != 0) return 1.0f;
  return scale_value(load_row_scale(p, n), p, 0);
}

DEVICE void store_rows(const Params& p, int token, int n, const u32 (&v)[4]) {  // 8 outputs of one token
  u16* to = p.y + (u64)token * p.N + n;
  if ((p.N & 7) == 0 && n + 8 <= p.N) {
    asm volatile("st.global.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(to), "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3]) : "memory");
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; i++)
    if (n + i < p.N) to[i] = (u16)(v[i / 2] >> (16 * (i & 1)));
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
#if SPLIT > 1
__cluster_dims__(SPLIT, 1, 1)
#endif
mixed(const __grid_constant__ Params p) {
  extern __shared__ __align__(1024) u8 memory[];
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
  if constexpr (KIND == 2)
    for (int i = threadIdx.x; i < 8192; i += THREADS) {
      const int entry = i / 32;
      const u32 pair = p.table[entry & 15] | (u32)p.table[entry >> 4] << 16;
      asm volatile("st.shared.u32 [%0], %1;" ::"r"(table_at + 4 * i), "r"(pair) : "memory");
    }
  __syncthreads();

  const int chunks = p.K / 64, all_stages = chunks / KC;
  const u32 rank = SPLIT > 1 ? cluster_rank() : 0;
  const int stage_first = all_stages * rank / SPLIT, stage_last = all_stages * (rank + 1) / SPLIT;
  const int row_tiles = ((p.N + 63) / 64 + MT * WGS - 1) / (MT * WGS), token_tiles = (p.M + BM - 1) / BM;
  const int tiles = row_tiles * token_tiles, n64_all = (p.N + 63) / 64;
  const int groups = GROUP == 0 ? 0 : p.K / COLUMNS;

  if (warp >= 4 * WGS) {  // the producer
    if constexpr (TRADE) asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
    if (warp == 4 * WGS && lane == 0) {
      int s = 0;
      u32 phase = 1;
      const bool once = token_tiles == 1;
      for (int index = blockIdx.x / SPLIT; index < tiles; index += gridDim.x / SPLIT) {
        const Tile tile = tile_at(index, row_tiles, token_tiles);
        const int height = min(MT * WGS, n64_all - tile.n64);
        for (int k = stage_first; k < stage_last; k++) {
          barrier_wait(empty + 8 * s, phase);
          const u32 at = stages + s * STAGE_BYTES, bar = full + 8 * s;
          barrier_expect(bar, KC * X_CHUNK + height * (KC * UNIT_BYTES + GROUPS * 64 * (SCALE_BYTES + ZERO_BYTES)));
          for (int t = 0; t < height; t++) {
            copy_bytes(at + CODES_AT + t * KC * UNIT_BYTES, p.codes + ((u64)(tile.n64 + t) * chunks + k * KC) * UNIT_BYTES,
                       KC * UNIT_BYTES, bar, once ? EVICT_FIRST : EVICT_LAST);
            if constexpr (GROUP > 0) {
              const u64 first = ((u64)(tile.n64 + t) * groups + (u64)k * KC * 64 / COLUMNS) * 64;
              copy_bytes(at + SCALES_AT + t * GROUPS * 64 * SCALE_BYTES, p.scale + first * SCALE_BYTES, GROUPS * 64 * SCALE_BYTES,
                         bar, EVICT_LAST);
              if constexpr (ZERO > 0)
                copy_bytes(at + ZEROS_AT + t * GROUPS * 64 * ZERO_BYTES, p.zero + first * ZERO_BYTES, GROUPS * 64 * ZERO_BYTES,
                           bar, EVICT_LAST);
            }
          }
#pragma unroll
          for (int c = 0; c < KC; c++)
            copy_tile(at + c * X_CHUNK, p.x_map, (k * KC + c) * 64, tile.token, bar, EVICT_LAST);
          if (++s == STAGES) { s = 0; phase ^= 1; }
        }
      }
    }
    __syncwarp();
    if constexpr (SPLIT > 1) { cluster_sync(); cluster_sync(); }
    return;
  }

  // a consumer warpgroup: MT * 64 rows
  if constexpr (TRADE) asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
  const int group_of_warps = warp / 4, lane128 = threadIdx.x % 128;
  const int row = 16 * (warp % 4) + lane / 4;  // and row + 8
  const u32 table = table_at + 4 * lane;
  float sum[MT][BM / 2];
  u32 a[2][4][4];
  int s = 0;
  u32 phase = 0;

  for (int index = blockIdx.x / SPLIT; index < tiles; index += gridDim.x / SPLIT) {
    const Tile tile = tile_at(index, row_tiles, token_tiles);
    const int n64 = tile.n64 + group_of_warps * MT;
    int last = -1;  // stage to give back
    if (stage_first == stage_last) {
#pragma unroll
      for (int m = 0; m < MT; m++)
#pragma unroll
        for (int i = 0; i < BM / 2; i++) sum[m][i] = 0.0f;
    }
    for (int k = stage_first; k < stage_last; k++) {
      barrier_wait(full + 8 * s, phase);
      const u32 at = stages + s * STAGE_BYTES;
      Rows rows[MT];
#pragma unroll
      for (int c = 0; c < KC; c++) {
#pragma unroll
        for (int m = 0; m < MT; m++) {
          constexpr bool by_unit = MT == 2;
          const int set = by_unit ? m : c & 1;
          const int unit = group_of_warps * MT + m;
          const Codes codes = load_codes(at + CODES_AT + (unit * KC + c) * UNIT_BYTES, lane128);
          const u32 x = at + c * X_CHUNK;
#pragma unroll
          for (int step = 0; step < 4; step++) {
            if constexpr (GROUP > 0) {
              const int column = 64 * c + 16 * step;
              if (column % COLUMNS == 0) {
                const int g = GROUP >= 64 * KC ? 0 : column / COLUMNS;
                const int index = SCALE == 5 ? ((n64 + m) * 64 + row) * groups + (k * KC * 64 + column) / COLUMNS : 0;
                rows[m] = load_rows(at + SCALES_AT + (unit * GROUPS + g) * 64 * SCALE_BYTES,
                                    at + ZEROS_AT + (unit * GROUPS + g) * 64 * ZERO_BYTES, row, p, index, groups);
              }
            }
            if (step == 0) decode_step<0>(a[set][0], codes, rows[m], table);
            if (step == 1) decode_step<1>(a[set][1], codes, rows[m], table);
            if (step == 2) decode_step<2>(a[set][2], codes, rows[m], table);
            if (step == 3) decode_step<3>(a[set][3], codes, rows[m], table);
          }
          wgmma_fence();
#pragma unroll
          for (int step = 0; step < 4; step++)
            wgmma(sum[m], a[set][step], descriptor(x + 32 * step), k > stage_first || c > 0 || step > 0);
          wgmma_commit();
          wgmma_wait<1>();
          if (c == 0 && m == 0 && last >= 0 && lane == 0) barrier_arrive(empty + 8 * last);
        }
      }
      last = s;
      if (++s == STAGES) { s = 0; phase ^= 1; }
    }
    wgmma_wait<0>();
    if (last >= 0 && lane == 0) barrier_arrive(empty + 8 * last);

    if constexpr (SPLIT == 1) {
      // [row][token] in registers becomes [token][row] in memory by a transposing store, then rows of y.
      const u32 out = out_at + group_of_warps * BM * OUT_PITCH * 2;
#pragma unroll
      for (int m = 0; m < MT; m++) {
        float by[2], add[2];
#pragma unroll
        for (int r = 0; r < 2; r++) {
          const int n = (n64 + m) * 64 + row + 8 * r;
          by[r] = n < p.N ? row_scale(p, n) : 0.0f;
          add[r] = p.bias != nullptr && n < p.N ? to_float(p.bias[n]) : 0.0f;
        }
#pragma unroll
        for (int t = 0; t < BM / 8; t++) {
          float token[2] = {1.0f, 1.0f};
          if constexpr (TOKEN) {
            const int first = tile.token + 8 * t + 2 * (lane % 4);
            token[0] = first < p.M ? p.token_scale[first] : 0.0f;
            token[1] = first + 1 < p.M ? p.token_scale[first + 1] : 0.0f;
          }
          const float* v = &sum[m][4 * t];
          const u32 low = pack_two(fmaf(v[0] * token[0], by[0], add[0]), fmaf(v[1] * token[1], by[0], add[0]));
          const u32 high = pack_two(fmaf(v[2] * token[0], by[1], add[1]), fmaf(v[3] * token[1], by[1], add[1]));
          const u32 to = out + ((8 * t + lane % 8) * OUT_PITCH + 64 * m + 16 * (warp % 4) + 8 * (lane / 8 % 2)) * 2;
          asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(to), "r"(low), "r"(high) : "memory");
        }
      }
      named_barrier(1 + group_of_warps, 128);
      for (int i = lane128; i < BM * MT * 8; i += 128) {
        const int token = i / (MT * 8), r8 = i % (MT * 8) * 8;
        u32 v[4];
        asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
                     : "r"(out + (token * OUT_PITCH + r8) * 2));
        if (tile.token + token < p.M) store_rows(p, tile.token + token, n64 * 64 + r8, v);
      }
      named_barrier(1 + group_of_warps, 128);
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
        const int token = i / (ROWS / 8), r8 = i % (ROWS / 8) * 8, n = tile.n64 * 64 + r8;
        if (tile.token + token >= p.M || n >= p.N) continue;
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
        const float by_token = TOKEN ? p.token_scale[tile.token + token] : 1.0f;
        u32 v[4];
#pragma unroll
        for (int h = 0; h < 4; h++) {
          float two[2];
#pragma unroll
          for (int e = 0; e < 2; e++) {
            const int at = min(n + 2 * h + e, p.N - 1);
            two[e] = fmaf(total[2 * h + e] * by_token, row_scale(p, at), p.bias != nullptr ? to_float(p.bias[at]) : 0.0f);
          }
          v[h] = pack_two(two[0], two[1]);
        }
        store_rows(p, tile.token + token, n, v);
      }
      cluster_sync();  // nobody leaves while its sums are read
    }
  }
}
#else
// -- a whole weight, decoded: [N][K] in the type of x, or in e4m3 without its scales (E4M3) -----------------------------------

constexpr int TILE_PITCH = 72;  // elements

extern "C" __global__ void __launch_bounds__(128) dequantize(const __grid_constant__ Params p) {
  __shared__ __align__(16) u16 tile[2][64 * TILE_PITCH];
  __shared__ __align__(16) u32 pairs[KIND == 2 ? 8192 : 1];
  const int lane128 = threadIdx.x, lane = lane128 % 32, row = 16 * (lane128 / 32) + lane / 4;
  if constexpr (KIND == 2) {
    for (int i = lane128; i < 8192; i += 128) pairs[i] = p.table[i / 32 & 15] | (u32)p.table[i / 512] << 16;
    __syncthreads();
  }
  const u32 table = shared_address(pairs) + 4 * lane;
  const int chunks = p.K / 64, groups = GROUP == 0 ? 0 : p.K / COLUMNS;
  const int first = (u64)chunks * blockIdx.y / gridDim.y, last = (u64)chunks * (blockIdx.y + 1) / gridDim.y;
  const int n64 = blockIdx.x;
  int buffer = 0;
  for (int c = first; c < last; c++, buffer ^= 1) {
    const Codes codes = load_codes((u64)p.codes + ((u64)n64 * chunks + c) * UNIT_BYTES, lane128);
    u32 a[4][4];
    Rows rows;
#pragma unroll
    for (int step = 0; step < 4; step++) {
      if constexpr (GROUP > 0)
        if (step == 0 || (16 * step) % COLUMNS == 0) {
          const int g = (64 * c + 16 * step) / COLUMNS;
          const u64 at = ((u64)n64 * groups + g) * 64;
          rows = load_rows((u64)p.scale + at * SCALE_BYTES, (u64)p.zero + at * ZERO_BYTES, row, p, (n64 * 64 + row) * groups + g, groups);
        }
      if (step == 0) decode_step<0>(a[0], codes, rows, table);
      if (step == 1) decode_step<1>(a[1], codes, rows, table);
      if (step == 2) decode_step<2>(a[2], codes, rows, table);
      if (step == 3) decode_step<3>(a[3], codes, rows, table);
    }
#pragma unroll
    for (int step = 0; step < 4; step++)
#pragma unroll
      for (int part = 0; part < 4; part++) {
        u32 v = a[step][part];
        const int r = row + 8 * (part & 1), k = 16 * step + 8 * (part >> 1) + 2 * (lane % 4);
        if constexpr (GROUP == 0 && !E4M3) {
          const float by = n64 * 64 + r < p.N ? scale_value(load_row_scale(p, n64 * 64 + r), p, 0) : 0.0f;
          v = pack_two(to_float((u16)v) * by, to_float((u16)(v >> 16)) * by);
        }
        if constexpr (E4M3) {
          u16 two;
          asm("cvt.rn.satfinite.e4m3x2.f16x2 %0, %1;" : "=h"(two) : "r"(v));
          tile[buffer][r * (TILE_PITCH / 2) + k / 2] = two;
        } else {
          *(u32*)&tile[buffer][r * TILE_PITCH + k] = v;
        }
      }
    __syncthreads();
    constexpr int BYTES = E4M3 ? 1 : 2, PIECES = 4 * BYTES;  // 16-byte pieces of 64 columns
#pragma unroll
    for (int i = lane128; i < 64 * PIECES; i += 128) {
      const int r = i / PIECES, piece = i % PIECES;
      if (n64 * 64 + r < p.N)
        *(uint4*)((u8*)p.y + ((u64)(n64 * 64 + r) * p.K + 64 * c) * BYTES + 16 * piece) =
            *(const uint4*)((const u8*)tile[buffer] + r * TILE_PITCH * BYTES + 16 * piece);
    }
  }
}
#endif
