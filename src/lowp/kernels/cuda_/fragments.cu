// What every kernel over the layout `fragments` shares: its argument, the instructions, decoding in registers, the way out.
//
// A lane of a warpgroup holds 16 pairs of codes of a unit (64 x 64): those of the A operand of wgmma, four pairs for each step of
// 16 columns. `decode_step` makes bf16 or fp16 numbers of them, two to a register:
//
//     integers    the code goes into the mantissa of 128 (bf16) or 1024 (fp16), and 128 + zero point is subtracted: exact
//     floats      sign, exponent and mantissa are moved to their places, and a power of two mends the bias: exact, subnormals too
//     codebooks   two codes are an index into a table of pairs in shared memory, a copy for each lane
//
// then times the scale of the group, rounded once. Scales wait for the sum, where that is less work: those of a row or a tensor for
// the whole of it (GROUP 0, DEFERRED), those of a group for its part of a few tokens (SPANNED).
//
// What is compiled in (-D): NPLANES PW0..PW2 (widths of bit planes, low bits first), KIND (0 integer, 1 small float, 2 codebook),
// SIGNED, EBITS and EBIAS (of a float), GROUP (columns that share a scale; 0: a scale for each row, or one), SCALE (0 bf16, 1 fp16,
// 2 fp32, 3 e8m0, 4 e4m3 with a scale of the tensor, 5 int8 in blocks of `nest`), ZERO (0 none, 1 int8, 2 uint8, 3 bf16, 4 fp16,
// 5 fp32), F16 (type of y, bias and decoded floats: 0 bf16, 1 fp16), X_BITS (16: x in that type too, 8: e4m3), and the sizes of a tile:
// MT (64-row tiles of a warpgroup), WGS (warpgroups that multiply), BM (tokens), KC (64-column chunks of a stage), STAGES.
//
// Legend: M tokens, N output channels, K input channels; a chunk is 64 columns, a unit the 64 x 64 weights of a chunk.
// Sources: PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions", "Data Movement: cp.async.bulk"; the magic numbers are those of
// Kim et al., "Who Says Elephants Can't Run", arXiv 2211.10017, section 3.2.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define DEVICE __device__ __forceinline__

struct Params {
  alignas(64) u8 x_map[128];  // CUtensorMap of x (M, K), box 128 bytes by BM tokens, 128-byte swizzle
  const u8* codes;            // [N/64][K/64][512 * bits bytes], layout `fragments`
  const u8* scale;            // [N/64][K/GROUP][64], or one for each row, or one
  const u8* zero;             // as scale
  const float* scale_scale;   // SCALE 4: one or null; SCALE 5: one for each NEST scales in the order of (N, K/GROUP)
  const float* scale_zero;    // SCALE 5
  const u16* bias;            // [N] in the type of y, or null
  const u16* table;           // KIND 2: 16 values in the type of y
  const float* x_scale;       // X_BITS 8: [M]
  u16* y;                     // [M, N]
  float4* partial;            // STREAM: sums that a block leaves to another, [block * WGS + warpgroup][MT * BM / 8][128 lanes]
  u32* left;                  // STREAM: 1 once they are there, 0 before; same order
  int M, N, K;
  int scale_stride;           // GROUP 0: 1 for a scale a row, 0 for one of the tensor
  int nest;                   // SCALE 5: scales in a block of scale_scale
  int first;                  // of a decoded weight: its first 64 rows that are asked for, which y begins with
};

constexpr int BITS = PW0 + PW1 + PW2;
constexpr int UNIT_BYTES = 512 * BITS;
constexpr int SCALE_BYTES = SCALE == 2 ? 4 : SCALE < 2 ? 2 : 1;
constexpr int ZERO_BYTES = ZERO == 0 ? 0 : ZERO == 5 ? 4 : ZERO > 2 ? 2 : 1;
constexpr int COLUMNS = GROUP == 0 ? 64 : GROUP;  // that share a scale
constexpr int GROUPS = GROUP == 0 ? 0 : GROUP >= 64 * KC ? 1 : 64 * KC / GROUP;  // scale groups a stage
constexpr int X_CHUNK = BM * 128;                                                 // bytes of a chunk of x
constexpr int TABLE_BYTES = KIND == 2 ? 32768 : 0;
constexpr int OUT_TOKENS = BM < 64 ? BM : 64;  // that a warpgroup writes at a time
constexpr int OUT_PITCH = 64 + 8;              // 16-bit words between them in shared memory: no bank conflict
constexpr int OUT_BYTES = OUT_TOKENS * OUT_PITCH * 2;
#ifdef FROM_GLOBAL
constexpr bool SUMS = false;  // a weight is decoded, nothing is summed
#else
constexpr bool SUMS = X_BITS == 16;
#endif
constexpr int UNIT_GROUPS = GROUP > 0 && GROUP < 64 ? 64 / GROUP : 1;  // groups of a unit
// Sums of each group of columns, or of its 64, apart: BM / 2 products of float32 a lane instead of 16 of pairs of weights a unit.
constexpr bool SPANNED = SUMS && (GROUP == 32 || (GROUP > 0 && GROUP % 64 == 0)) && ZERO <= 2 && UNIT_GROUPS * BM <= 16;
// The scale of the tensor behind the scales of groups multiplies the sum. Codes of 4 bits times scales in e4m3 are then exact.
constexpr bool DEFERRED = SUMS && SCALE == 4 && ZERO == 0 && (!F16 || BITS <= 6);

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

enum : u64 { EVICT_FIRST = 0x12F0000000000000ull, EVICT_LAST = 0x14F0000000000000ull };  // createpolicy's encodings

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


// x is K-major with a swizzle of 128 bytes: 8 tokens are 1024 bytes apart. PTX ISA, "Matrix descriptor".
DEVICE u32 descriptor_of(u32 address) { return (address & 0x3FFFF) >> 4 | 1 << 16; }
DEVICE u64 descriptor(u32 low, int bytes_on) {
  u64 r;
  asm("mov.b64 %0, {%1, %2};" : "=l"(r) : "r"(low + (bytes_on >> 4)), "r"(64 | 1 << 30));
  return r;
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

// What computes with these registers stays on its side of this line: the compiler does not know that a wait changes sums.
template <int N> DEVICE void hold(float (&v)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+f"(v[i])::"memory");
}

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

// Codes and scales come from shared memory in the products, from global memory where a whole weight is decoded.
#ifdef FROM_GLOBAL
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

// The bits of one plane for a pair, moved so that the lowest lies at bit `to` of each half, exclusive-or `with`: one shift and one
// LOP3, which takes one constant: so `with` must be in a register.
template <int W> DEVICE u32 plane_bits(const u32* word, int pair, int to, u32 with) {
  constexpr int SLOTS = 16 / (W > 0 ? W : 1);
  const u32 mask = (u32)((1 << W) - 1) << to;
  return (shift_right(word[pair / SLOTS], W * (pair % SLOTS) - to) & (mask | mask << 16)) ^ with;
}

DEVICE u32 pair_bits(const Codes& codes, int pair, int to, u32 with) {
  u32 bits = plane_bits<PW0>(codes.word, pair, to, with);
  if constexpr (PW1 > 0) bits = plane_bits<PW1>(codes.word + PW0, pair, to + PW0, bits);
  if constexpr (PW2 > 0) bits = plane_bits<PW2>(codes.word + PW0 + PW1, pair, to + PW0 + PW1, bits);
  return bits;
}

// What a group of columns brings for the rows g and g + 8 of a lane: twice in each word; SPANNED: the scale as a float.
struct Rows { u32 scale[2], zero[2]; float by[2]; };

constexpr int MANTISSA = F16 ? 10 : 7, BIAS = F16 ? 15 : 127, TYPE_EBITS = F16 ? 5 : 8;
constexpr u32 MAGIC = F16 ? 0x6400 : 0x4300;  // 1024 or 128: the code is the low bits of the mantissa
DEVICE constexpr u32 twice_of(u32 h) { return h | h << 16; }
constexpr int HALF_RANGE = SIGNED ? 1 << (BITS - 1) : 0;
// 2^n in the type of y, as bits
DEVICE constexpr u32 power(int n) { return (u32)(n + BIAS) << MANTISSA; }
// What mends the bias of a small float rides on its scale, as far as 448 * 2^118 is finite in bf16; the rest on the sum.
constexpr int LIFT = DEFERRED && !SPANNED && KIND == 1 && !F16 ? (BIAS - EBIAS < 118 ? BIAS - EBIAS : 118) : 0;
// a whole number below 2048 (fp16) or 256 (bf16), as bits
DEVICE constexpr u32 whole(int n) {
  int exponent = 0;
  while ((2 << exponent) <= n) exponent++;
  return n == 0 ? 0 : power(exponent) | (((u32)n << MANTISSA >> exponent) & ((1u << MANTISSA) - 1));
}

// What decoding needs from outside: the address of this lane's table, or the magic number. N is never negative, which the
// compiler does not know: a constant it would not leave in a register.
DEVICE u32 decode_start(u32 table, const Params& p) {
  return KIND == 2 ? table : twice_of(MAGIC | (BITS == 8 && !F16 ? 0 : HALF_RANGE)) ^ (u32)(p.N >> 31);
}

template <int PAIR> DEVICE u32 decode_pair(const Codes& codes, const Rows& rows, u32 start) {
  constexpr int r = PAIR & 1;
  u32 v;
  if constexpr (KIND == 2) {
    // Two codes are a byte, the byte is an entry of 256 pairs, and each lane has its own copy: no bank conflict.
    const u32 at = shift_right(codes.word[PAIR / 4], 8 * (PAIR % 4) - 7) & 0x7F80;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(at + start));
  } else if constexpr (KIND == 1) {
    // Sign to bit 15; exponent and mantissa to where the wider float has them; then the bias, exact for subnormals too.
    constexpr int DOWN = TYPE_EBITS - EBITS;
    constexpr u32 MAGNITUDE = ((1u << (BITS - 1)) - 1) << (16 - BITS) >> DOWN;
    if constexpr (NPLANES == 1 && BITS == 4 && DOWN >= BITS) {
      // One product makes both copies of a code, that of the sign and that of the magnitude: they do not overlap.
      constexpr int AT = 4 * (PAIR % 2), UP = 16 - BITS - AT;
      const u32 word = codes.word[PAIR / 4] >> 8 * (PAIR / 2 % 2);
      v = (word & twice_of(15u << AT)) * (1u << UP | 1u << (UP - DOWN)) & twice_of(MAGNITUDE | 0x8000u);
    } else if constexpr (NPLANES == 1) {
      constexpr int SLOTS = 16 / BITS, AT = BITS * (PAIR % SLOTS);
      const u32 word = codes.word[PAIR / SLOTS];
      v = (shift_right(word, AT + BITS - 16 + DOWN) & twice_of(MAGNITUDE)) | (shift_right(word, AT + BITS - 16) & 0x80008000u);
    } else {
      const u32 top = pair_bits(codes, PAIR, 16 - BITS, 0);
      v = (top >> DOWN & twice_of(MAGNITUDE)) | (top & 0x80008000u);
    }
    if constexpr (BIAS != EBIAS && LIFT == 0) v = mul2(v, twice_of(power(BIAS - EBIAS)));
  } else if constexpr (BITS == 8 && !F16) {
    // bf16 has 7 bits of mantissa. The eighth is the lowest of the exponent: (128 + low bits) - (128 or 256).
    const u32 x = shift_right(codes.word[PAIR / 2], 8 * (PAIR % 2));
    v = sub2((x & 0x007F007Fu) ^ start, (x & 0x00800080u) ^ (SIGNED ? start : start ^ 0x00800080u));
    if constexpr (!SIGNED) v = sub2(v, twice_of(0x8000u | whole(128)));
    if constexpr (ZERO == 1 || ZERO == 2) v = sub2(v, rows.zero[r]);
  } else {
    v = pair_bits(codes, PAIR, 0, start);
    if constexpr (ZERO == 1 || ZERO == 2) v = sub2(v, rows.zero[r]);
    else v = sub2(v, twice_of(whole((F16 ? 1024 : 128) + HALF_RANGE)));
  }
  if constexpr (GROUP == 0 || SPANNED) return v;
  if constexpr (ZERO > 2) return fma2(v, rows.scale[r], rows.zero[r]);
  return mul2(v, rows.scale[r]);
}

template <int STEP> DEVICE void decode_step(u32 (&a)[4], const Codes& codes, const Rows& rows, u32 start) {
  a[0] = decode_pair<4 * STEP>(codes, rows, start);
  a[1] = decode_pair<4 * STEP + 1>(codes, rows, start);
  a[2] = decode_pair<4 * STEP + 2>(codes, rows, start);
  a[3] = decode_pair<4 * STEP + 3>(codes, rows, start);
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

DEVICE float scale_of_scales(const Params& p) { return p.scale_scale == nullptr ? 1.0f : p.scale_scale[0]; }

// A stored scale as a float. `index` counts scales in the order of (N, K / GROUP), for those that are quantized themselves.
DEVICE float scale_value(u32 bits, const Params& p, int index) {
  if constexpr (SCALE == 0) return from_bf16((u16)bits);
  if constexpr (SCALE == 1) return from_half((u16)bits);
  if constexpr (SCALE == 2) return __int_as_float(bits);
  if constexpr (SCALE == 3) return __int_as_float(bits == 0 ? 0x00400000u : bits << 23);  // code 0 is 2^-127, a subnormal
  if constexpr (SCALE == 4) return e4m3_to_float(bits) * (DEFERRED ? 1.0f : scale_of_scales(p));
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
  if constexpr (DEFERRED && !SPANNED) {  // both rows at a time
    const u32 low = load_bits<1>(scales + row), high = load_bits<1>(scales + row + 8);
    u32 two;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(two) : "h"((u16)(low | high << 8)));
    if constexpr (!F16) two = pack_two(from_half((u16)two), from_half((u16)(two >> 16)));
    if constexpr (LIFT > 0) two = mul2(two, twice_of(power(LIFT)));
    rows.scale[0] = twice(two);
    rows.scale[1] = __byte_perm(two, two, 0x3232);
    return rows;
  }
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const u32 bits = load_bits<SCALE_BYTES>(scales + (row + 8 * r) * SCALE_BYTES);
    const bool same = (SCALE == 0 && !F16) || (SCALE == 1 && F16);
    float value = 0.0f;
    if constexpr (!same || ZERO > 2 || SPANNED) value = scale_value(bits, p, index + 8 * r * index_step);
    if constexpr (SPANNED) rows.by[r] = value;
    else rows.scale[r] = same ? twice(bits) : pack_two(value, value);
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

// -- the way out ------------------------------------------------------------------------------------------------------------

DEVICE void named_barrier(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
DEVICE void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\n barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
DEVICE u32 cluster_rank() { u32 r; asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r)); return r; }

struct Tile { int row, token; };  // counted in tiles

// Tiles that run at the same time share rows of W and tokens: BAND tiles of tokens, then the next rows.
DEVICE Tile tile_at(int index, int row_tiles, int token_tiles) {
  const int band = index / (BAND * row_tiles), first = band * BAND;
  const int height = min(BAND, token_tiles - first), within = index - band * BAND * row_tiles;
  return {within / height, first + within % height};
}

// What multiplies the sum of a row.
DEVICE float row_scale(const Params& p, int n) {
  if constexpr (DEFERRED && GROUP != 0) return scale_of_scales(p) * (LIFT > 0 ? (float)(1ull << (BIAS - EBIAS - LIFT)) : 1.0f);
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

// The sums of 64 rows by BM tokens of a warpgroup, to y. [row][token] in registers becomes [token][row] in shared memory by a
// transposing store, then rows of y in pieces of 16 bytes. `out`: OUT_BYTES of this warpgroup alone; `barrier`: its own.
DEVICE void store_tile(const float (&sum)[BM / 2], const Params& p, int n, int token, u32 out, int barrier) {
  const int lane128 = threadIdx.x % 128, lane = lane128 % 32, row = 16 * (lane128 / 32) + lane / 4;
  float by[2], add[2];
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const int at = n + row + 8 * r;
    by[r] = at < p.N ? row_scale(p, at) : 0.0f;
    add[r] = p.bias != nullptr && at < p.N ? to_float(p.bias[at]) : 0.0f;
  }
#pragma unroll
  for (int piece = 0; piece < BM / OUT_TOKENS; piece++) {
    if (token + piece * OUT_TOKENS >= p.M) break;
#pragma unroll
    for (int t = 0; t < OUT_TOKENS / 8; t++) {
      const float* v = &sum[4 * (piece * OUT_TOKENS / 8 + t)];
      const u32 low = pack_two(fmaf(v[0], by[0], add[0]), fmaf(v[1], by[0], add[0]));
      const u32 high = pack_two(fmaf(v[2], by[1], add[1]), fmaf(v[3], by[1], add[1]));
      const u32 to = out + ((8 * t + lane % 8) * OUT_PITCH + 16 * (lane128 / 32) + 8 * (lane / 8 % 2)) * 2;
      asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(to), "r"(low), "r"(high) : "memory");
    }
    named_barrier(barrier, 128);
#pragma unroll
    for (int i = lane128; i < OUT_TOKENS * 8; i += 128) {
      const int t = i / 8, r8 = i % 8 * 8;
      u32 v[4];
      asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
                   : "r"(out + (t * OUT_PITCH + r8) * 2));
      if (token + piece * OUT_TOKENS + t < p.M) store_rows(p, token + piece * OUT_TOKENS + t, n + r8, v);
    }
    named_barrier(barrier, 128);
  }
}

// Sums handed from one block to another through memory: those of a lane to the lane that has the same place in its block.
template <int MT_> DEVICE void leave_sums(const float (&sum)[MT_][BM / 2], const Params& p, int slot, int barrier) {
  constexpr int PIECES = MT_ * BM / 8;
  float4* to = p.partial + (u64)slot * PIECES * 128 + threadIdx.x % 128;
#pragma unroll
  for (int i = 0; i < PIECES; i++) {
    const float* v = &sum[i / (BM / 8)][4 * (i % (BM / 8))];
    to[i * 128] = float4{v[0], v[1], v[2], v[3]};
  }
  asm volatile("fence.acq_rel.gpu;" ::: "memory");
  named_barrier(barrier, 128);
  if (threadIdx.x % 128 == 0) asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(p.left + slot), "r"(1) : "memory");
}

template <int MT_> DEVICE void add_sums(float (&sum)[MT_][BM / 2], const Params& p, int slot, int barrier) {
  constexpr int PIECES = MT_ * BM / 8;
  if (threadIdx.x % 128 == 0) {
    u32 there;
    do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(there) : "l"(p.left + slot) : "memory");
    while (!there);
  }
  named_barrier(barrier, 128);
  asm volatile("fence.acq_rel.gpu;" ::: "memory");
  const float4* from = p.partial + (u64)slot * PIECES * 128 + threadIdx.x % 128;
#pragma unroll
  for (int i = 0; i < PIECES; i++) {
    const float4 v = __ldcg(from + i * 128);
    float* to = &sum[i / (BM / 8)][4 * (i % (BM / 8))];
    to[0] += v.x; to[1] += v.y; to[2] += v.z; to[3] += v.w;
  }
}

// Fill the table of pairs of a codebook: entry e of lane l at 4 * (32 e + l).
DEVICE void fill_table(u32 table_at, const Params& p, int threads) {
  if constexpr (KIND == 2)
    for (int i = threadIdx.x; i < 8192; i += threads)
      asm volatile("st.shared.u32 [%0], %1;" ::"r"(table_at + 4 * i), "r"(p.table[i / 32 & 15] | (u32)p.table[i / 512] << 16) : "memory");
}
