// sum[64 MT rows][BM tokens] = W x^T over some stages, x in e4m3: m64 by n = BM by k32, twice the rate of bf16.
//
//     y = x_scale * sum over groups of ( w_scale * (codes of W times codes of x, on the tensor cores) )
//
// Decoding. An integer of at most 16 in magnitude is an e4m3 number as it stands: up to 16 the bits of e4m3 count in steps of 2^-9,
// subnormals first. So sign and magnitude are all there is to make of it, four codes at a time. A small float moves to the top of
// e4m3's mantissa. What both are too small by, FACTOR, is mended once, with the scale of the token.
//
// Sums, of spans of columns: a group or 128.
//
//     by span    they leave the tensor cores, which hold 14 bits of a sum of float8 products, are multiplied by the scale of the row
//                and added in float32 (DeepSeek-V3, arXiv 2412.19437, section 3.3.2)
//     RUNNING    they stay, in units of the scale of the span: before the next one they are multiplied by scale / next scale. Half the
//                registers, so a tile has twice the tokens; the bits lost are those of torch's `use_fast_accum`, more of them with
//                more columns: for results in bf16 and a K that is not large alone, see `candidates` in tiling.py
//
// Meanwhile the other warpgroup multiplies.
//
// A lane holds columns 2t, 2t + 1, 2t + 8 and 2t + 9 of each 16 of a row (layout `fragments`), where k32 wants four neighbours: the
// order of columns within 16 is free, so x comes with the halves of each 16 columns interleaved, column c at 2 (c % 8) + c / 8.

constexpr int SPAN = GROUP == 0 || GROUP > 128 ? 128 : GROUP;  // columns that the tensor cores sum
constexpr int STEPS = SPAN / 32, SPANS = KC * 64 / SPAN;       // instructions of a span, spans of a stage
constexpr bool RUNNING = BM == 256;
constexpr int TURNS = 1;
static_assert(KC % 2 == 0, "a chunk of x is 128 columns");
static_assert(!(RUNNING && F16), "RUNNING sums are too coarse for fp16");
constexpr int MBITS = BITS - 1 - EBITS;
constexpr float FACTOR = KIND == 0 ? 512.0f : (float)(1 << (7 - EBIAS));  // 2^9, or the distance of the biases

// The bits of one plane for row g + 8 R and the 16 columns of STEP, a code to a byte, its lowest bit at `to`.
template <int W, int STEP, int R> DEVICE u32 plane_four(const u32* word, int to) {
  if constexpr (W == 8) return __byte_perm(word[2 * STEP], word[2 * STEP + 1], R == 0 ? 0x6240 : 0x7351);
  constexpr int SLOTS = 16 / W, PAIR = 4 * STEP + R, AT = W * (PAIR % SLOTS);
  const u32 two = twice_of((u32)((1 << W) - 1) << to), from = word[PAIR / SLOTS];
  if constexpr (W == 4) return shift_right(from, AT - to) & (two | two << 8);  // pairs R and R + 2 are 8 bits apart
  return (shift_right(from, AT - to) & two) | (shift_right(from, AT + 2 * W - 8 - to) & (two << 8));
}

template <int STEP, int R> DEVICE u32 decode_four(const Codes& codes) {
  constexpr int TO = KIND == 0 ? 0 : 3 - MBITS;
  u32 code = plane_four<PW0, STEP, R>(codes.word, TO);
  if constexpr (PW1 > 0) code |= plane_four<PW1, STEP, R>(codes.word + PW0, TO + PW0);
  if constexpr (BITS == 8 || (KIND == 0 && !SIGNED)) return code;
  if constexpr (KIND == 0) {  // two's complement: -code = ~code + 1, in each byte for itself; the sign is 128
    const u32 minus = code >> (BITS - 1) & 0x01010101u;
    return (code ^ minus * ((1 << BITS) - 1)) + minus * 129u;
  }
  constexpr u32 MAGNITUDE = 0x01010101u * (((1u << (BITS - 1)) - 1) << TO);
  return (code & MAGNITUDE) | (code << (8 - BITS - TO) & 0x80808080u);
}

// Columns 32 HALF to 32 HALF + 31 of a unit.
template <int HALF> DEVICE void decode_half(u32 (&a)[4], const Codes& codes) {
  a[0] = decode_four<2 * HALF, 0>(codes);
  a[1] = decode_four<2 * HALF, 1>(codes);
  a[2] = decode_four<2 * HALF + 1, 0>(codes);
  a[3] = decode_four<2 * HALF + 1, 1>(codes);
}

// As `hold` of sums: the compiler would decode between two instructions of a span, where the tensor cores must not be kept waiting.
DEVICE void hold(u32 (&a)[4]) { asm volatile("" : "+r"(a[0]), "+r"(a[1]), "+r"(a[2]), "+r"(a[3])::"memory"); }

// The cast wrote these scales a moment ago: they are read past the L1 cache, which another kernel may have filled before.
DEVICE void scale_tokens(float (&sum)[MT][BM / 2], const Params& p, int token) {
#pragma unroll
  for (int i = 0; i < BM / 8; i++)
#pragma unroll
    for (int e = 0; e < 2; e++) {
      const int at = token + 8 * i + 2 * (threadIdx.x % 4) + e;
      const float by = __ldcg(p.x_scale + min(at, p.M - 1));
#pragma unroll
      for (int m = 0; m < MT; m++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
          float& s = sum[m][4 * i + 2 * r + e];
          s = s * by * FACTOR;  // in this order: a large scale of a token times FACTOR may be infinite
        }
    }
}

// The scale of a span in RUNNING sums. One that is more than 2^64 times smaller than the largest before would let the sums overflow:
// it counts as that, and what it multiplies is off by 2^-64 of the largest scale.
DEVICE float at_least(float scale, float& largest) {
  const float least = fmaxf(largest * 0x1p-64f, 0x1p-126f);
  largest = fmaxf(largest, fabsf(scale));
  return fabsf(scale) < least ? copysignf(least, scale) : scale;
}

// first, end: stages.
DEVICE void multiply(float (&sum)[MT][BM / 2], Pipe& pipe, const Params& p, int first, int end, Place place) {
  const int lane128 = threadIdx.x % 128, lane = lane128 % 32, row = 16 * (lane128 / 32) + lane / 4;  // and row + 8
  float part[BM / 2], by[MT][2], largest[MT][2];
  u32 a[STEPS][4];
  const int unit = place.unit;
  int last = -1;  // stage to give back
#pragma unroll
  for (int i = 0; i < BM / 2; i++) {
    if constexpr (!RUNNING) part[i] = 0.0f;
#pragma unroll
    for (int m = 0; m < MT; m++) sum[m][i] = 0.0f;
  }
#pragma unroll
  for (int i = 0; i < 2 * MT; i++) by[i / 2][i % 2] = GROUP == 0 ? 1.0f : 0.0f, largest[i / 2][i % 2] = 0.0f;
  // The span that is on the tensor cores is done. Before the first there is none: a condition here would make the compiler wait
  // wherever it is not sure of it.
  auto finish = [&](int m, bool gives_back) {
    wgmma_wait<0>();
    hold(RUNNING ? sum[m] : part);
    if (gives_back && last >= 0 && lane == 0) barrier_arrive(pipe.empty + 8 * last);
    if constexpr (!RUNNING) {
#pragma unroll
      for (int i = 0; i < BM / 2; i++) sum[m][i] = GROUP == 0 ? sum[m][i] + part[i] : fmaf(part[i], by[m][i / 2 & 1], sum[m][i]);
      hold(sum[m]);
    }
  };
  for (int k = first; k < end; k++) {
    barrier_wait(pipe.full + 8 * pipe.s, pipe.phase);
    const u32 at = pipe.stages + pipe.s * STAGE_BYTES, x = descriptor_of(at);
    Codes codes[MT];
#pragma unroll
    for (int i = 0; i < SPANS * MT; i++) {
      const int m = i % MT, span = i / MT, g = GROUP == 0 || GROUP >= 64 * KC ? 0 : span * SPAN / COLUMNS;
      auto decode = [&](int step) {
        const int column = span * SPAN + 32 * step;
        if (column % 64 == 0) codes[m] = load_codes(at + CODES_AT + ((unit + m) * KC + column / 64) * UNIT_BYTES, lane128);
        if (column % 64 == 0) decode_half<0>(a[step], codes[m]);
        else decode_half<1>(a[step], codes[m]);
        hold(a[step]);
      };
      auto issue = [&](int step) {
        const int column = span * SPAN + 32 * step;
        wgmma(RUNNING ? sum[m] : part, a[step], descriptor(x, column / 128 * X_CHUNK + column % 128), RUNNING || step > 0);
        wgmma_commit();
      };
      float scale[2] = {1.0f, 1.0f};
      if constexpr (GROUP > 0)
#pragma unroll
        for (int r = 0; r < 2; r++)
          scale[r] = scale_value(load_bits<SCALE_BYTES>(at + SCALES_AT + (((unit + m) * GROUPS + g) * 64 + row + 8 * r) * SCALE_BYTES),
                                 p, 0);
      if constexpr (STEPS > 1) { wgmma_wait<STEPS - 1>(); decode(0); }
      if constexpr (STEPS > 2) { wgmma_wait<STEPS - 2>(); decode(1); wgmma_wait<STEPS - 3>(); decode(2); }
      finish((m + MT - 1) % MT, i == 0);
      if constexpr (GROUP > 0) {
        float ratio[2];
#pragma unroll
        for (int r = 0; r < 2; r++) {
          if constexpr (RUNNING) scale[r] = at_least(scale[r], largest[m][r]), ratio[r] = __fdividef(by[m][r], scale[r]);
          by[m][r] = scale[r];
        }
        if constexpr (RUNNING)
#pragma unroll
          for (int i = 0; i < BM / 2; i++) sum[m][i] *= ratio[i / 2 & 1];
      }
      hold(RUNNING ? sum[m] : part);
      if constexpr (STEPS > 1) {
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < STEPS - 1; step++) issue(step);
      }
      decode(STEPS - 1);
      wgmma_fence();
      issue(STEPS - 1);
    }
    last = pipe.s;
    if (++pipe.s == STAGES) { pipe.s = 0; pipe.phase ^= 1; }
  }
  finish(MT - 1, true);
  if constexpr (RUNNING && GROUP > 0)
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
      for (int i = 0; i < BM / 2; i++) sum[m][i] *= by[m][i / 2 & 1];
  scale_tokens(sum, p, place.token);
}
