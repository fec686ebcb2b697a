// sum[64 MT rows][BM tokens] = W x^T over some stages, x in bf16 or fp16: m64 by n = BM by k16.
//
// A warpgroup decodes the next unit while the tensor cores work on the last: two sets of registers take turns. Scales of groups are
// multiplied into the decoded weight, or, SPANNED, into the sums of a unit's groups, which are then added in float32; those of rows
// into the whole sum, on the way out.

constexpr int TURNS = MT == 2 || KC % 2 == 0 ? 1 : 2;  // stages until the two sets of A registers are where they were

constexpr bool AHEAD = BM <= 64 && SCALE != 5;  // there are registers for what the first unit of the next stage is made of
static_assert(STAGES >= 3, "the codes of the next stage are read before the last one is given back");

// first, end: stages.
DEVICE void multiply(float (&sum)[MT][BM / 2], Pipe& pipe, const Params& p, int first, int end, Place place) {
  const int lane128 = threadIdx.x % 128, lane = lane128 % 32, row = 16 * (lane128 / 32) + lane / 4;  // and row + 8
  const int groups = GROUP == 0 ? 0 : p.K / COLUMNS, unit = place.unit;
  const u32 start = decode_start(pipe.table + 4 * lane, p);
  u32 a[2][4][4];
  float part[2][UNIT_GROUPS][BM / 2], by[2][UNIT_GROUPS][2];  // SPANNED: sums of the groups of a unit, their scales
  Codes codes;
  Rows rows[MT][UNIT_GROUPS];
  int last = -1;  // stage to give back
  if (SPANNED || first == end) {
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
      for (int i = 0; i < BM / 2; i++) sum[m][i] = 0.0f;
  }
  if (first == end) return;

  auto load = [&](u32 at, int k, int c, int m) {
    codes = load_codes(at + CODES_AT + ((unit + m) * KC + c) * UNIT_BYTES, lane128);
    if constexpr (GROUP > 0)
#pragma unroll
      for (int s = 0; s < UNIT_GROUPS; s++) {
        const int column = 64 * c + 64 / UNIT_GROUPS * s;
        if (column % COLUMNS != 0) continue;
        const int g = GROUP >= 64 * KC ? 0 : column / COLUMNS;
        const int index = SCALE == 5 ? ((place.n64 + m) * 64 + row) * groups + (k * KC * 64 + column) / COLUMNS : 0;
        rows[m][s] = load_rows(at + SCALES_AT + ((unit + m) * GROUPS + g) * 64 * SCALE_BYTES,
                               at + ZEROS_AT + ((unit + m) * GROUPS + g) * 64 * ZERO_BYTES, row, p, index, groups);
      }
  };
  // The stage that comes next, once it is there. All lanes have the same: said so that descriptors lie in uniform registers.
  auto next_stage = [&] {
    barrier_wait(pipe.full + 8 * pipe.s, pipe.phase);
    return __shfl_sync(0xFFFFFFFF, pipe.stages + pipe.s * STAGE_BYTES, 0);
  };
  auto finish = [&](int set, float (&to)[BM / 2]) {
    if constexpr (SPANNED)
#pragma unroll
      for (int s = 0; s < UNIT_GROUPS; s++) {
        hold(part[set][s]);
#pragma unroll
        for (int i = 0; i < BM / 2; i++) to[i] = fmaf(part[set][s][i], by[set][s][i / 2 & 1], to[i]);
      }
  };

  u32 at;
  if constexpr (AHEAD) {
    at = next_stage();
    load(at, first, 0, 0);
  }
  for (int turn = first; turn < end; turn += TURNS)
#pragma unroll
    for (int k = turn; k < turn + TURNS; k++) {
      if constexpr (!AHEAD) {
        at = next_stage();
        load(at, k, 0, 0);
      }
      const u32 x = descriptor_of(at);
      const int stage = pipe.s;
#pragma unroll
      for (int c = 0; c < KC; c++) {
#pragma unroll
        for (int m = 0; m < MT; m++) {
          const int set = MT == 2 ? m : KC % 2 == 0 ? c & 1 : k - turn;
          const bool ends = c == KC - 1 && m == MT - 1;  // the stage
#pragma unroll
          for (int step = 0; step < 4; step++) {
            const Rows& of = rows[m][step * UNIT_GROUPS / 4];
            if constexpr (SPANNED) by[set][step * UNIT_GROUPS / 4][0] = of.by[0], by[set][step * UNIT_GROUPS / 4][1] = of.by[1];
            if (step == 0) decode_step<0>(a[set][0], codes, of, start);
            if (step == 1) decode_step<1>(a[set][1], codes, of, start);
            if (step == 2) decode_step<2>(a[set][2], codes, of, start);
            if (step == 3) decode_step<3>(a[set][3], codes, of, start);
          }
          wgmma_fence();
#pragma unroll
          for (int step = 0; step < 4; step++)
            wgmma(SPANNED ? part[set][step * UNIT_GROUPS / 4] : sum[m], a[set][step], descriptor(x, c * X_CHUNK + 32 * step),
                  SPANNED ? step % (4 / UNIT_GROUPS) > 0 : k > first || c > 0 || step > 0);
          wgmma_commit();
          // What the next unit is made of is asked for before anything is waited for.
          if (!ends) {
            load(at, k, m == MT - 1 ? c + 1 : c, m == MT - 1 ? 0 : m + 1);
          } else {
            if (++pipe.s == STAGES) { pipe.s = 0; pipe.phase ^= 1; }
            if (AHEAD && k + 1 < end) {
              at = next_stage();
              load(at, k + 1, 0, 0);
            }
          }
          if (SPANNED && ends) {  // sums on their way from one turn to the next would make the compiler wait everywhere
            wgmma_wait<0>();
            finish(set ^ 1, sum[MT - 1 - m]);
            finish(set, sum[m]);
            if (lane == 0) barrier_arrive(pipe.empty + 8 * stage);
          } else {
            wgmma_wait<1>();
            if (c > 0 || m > 0) finish(set ^ 1, sum[MT - 1 - m]);
          }
          if (!SPANNED && c == 0 && m == 0 && last >= 0 && lane == 0) barrier_arrive(pipe.empty + 8 * last);
        }
      }
      last = stage;
    }
  wgmma_wait<0>();
  if (!SPANNED && lane == 0) barrier_arrive(pipe.empty + 8 * last);
}
