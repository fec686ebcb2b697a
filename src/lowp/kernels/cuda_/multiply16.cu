// sum[64 MT rows][BM tokens] = W x^T over some stages, x in bf16 or fp16: m64 by n = BM by k16.
//
// A warpgroup decodes the next unit while the tensor cores work on the last: two sets of registers take turns. Scales of groups are
// multiplied into the decoded weight, or, SPANNED, into the sums of a unit's groups, which are then added in float32; those of rows
// into the whole sum, on the way out.
//
// A stage is given back before the next one is waited for. Waiting for it first, to read its codes sooner, leaves one stage less in
// flight: up to 30 % slower at few tokens on an H200, in two runs (int4 of 28672 or 4096 rows by 4096 columns: 5 to 9 % faster).

constexpr int TURNS = MT == 2 || KC % 2 == 0 ? 1 : 2;  // stages until the two sets of A registers are where they were

// first, end: stages.
DEVICE void multiply(float (&sum)[MT][BM / 2], Pipe& pipe, const Params& p, int first, int end, Place place) {
  const int lane128 = threadIdx.x % 128, lane = lane128 % 32, row = 16 * (lane128 / 32) + lane / 4;  // and row + 8
  const int groups = GROUP == 0 ? 0 : p.K / COLUMNS, unit = place.unit;
  const u32 start = decode_start(pipe.table + 4 * lane, p);
  u32 a[2][4][4];
  float part[2][UNIT_GROUPS][BM / 2], by[2][UNIT_GROUPS][2];  // SPANNED: sums of the groups of a unit, their scales
  int last = -1;  // stage to give back
  if (SPANNED || first == end) {
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
      for (int i = 0; i < BM / 2; i++) sum[m][i] = 0.0f;
  }
  auto finish = [&](int set, float (&to)[BM / 2]) {
    if constexpr (SPANNED)
#pragma unroll
      for (int s = 0; s < UNIT_GROUPS; s++) {
        hold(part[set][s]);
#pragma unroll
        for (int i = 0; i < BM / 2; i++) to[i] = fmaf(part[set][s][i], by[set][s][i / 2 & 1], to[i]);
      }
  };
  for (int turn = first; turn < end; turn += TURNS)
#pragma unroll
    for (int k = turn; k < turn + TURNS; k++) {
      barrier_wait(pipe.full + 8 * pipe.s, pipe.phase);
      const u32 at = __shfl_sync(0xFFFFFFFF, pipe.stages + pipe.s * STAGE_BYTES, 0), x = descriptor_of(at);
      Rows rows[MT];
#pragma unroll
      for (int c = 0; c < KC; c++) {
#pragma unroll
        for (int m = 0; m < MT; m++) {
          const int set = MT == 2 ? m : KC % 2 == 0 ? c & 1 : k - turn;
          const Codes codes = load_codes(at + CODES_AT + ((unit + m) * KC + c) * UNIT_BYTES, lane128);
#pragma unroll
          for (int step = 0; step < 4; step++) {
            if constexpr (GROUP > 0) {
              const int column = 64 * c + 16 * step;
              if (column % COLUMNS == 0) {
                const int g = GROUP >= 64 * KC ? 0 : column / COLUMNS;
                const int index = SCALE == 5 ? ((place.n64 + m) * 64 + row) * groups + (k * KC * 64 + column) / COLUMNS : 0;
                rows[m] = load_rows(at + SCALES_AT + ((unit + m) * GROUPS + g) * 64 * SCALE_BYTES,
                                    at + ZEROS_AT + ((unit + m) * GROUPS + g) * 64 * ZERO_BYTES, row, p, index, groups);
              }
            }
            if constexpr (SPANNED)
              if (step % (4 / UNIT_GROUPS) == 0) by[set][step * UNIT_GROUPS / 4][0] = rows[m].by[0], by[set][step * UNIT_GROUPS / 4][1] = rows[m].by[1];
            if (step == 0) decode_step<0>(a[set][0], codes, rows[m], start);
            if (step == 1) decode_step<1>(a[set][1], codes, rows[m], start);
            if (step == 2) decode_step<2>(a[set][2], codes, rows[m], start);
            if (step == 3) decode_step<3>(a[set][3], codes, rows[m], start);
          }
          wgmma_fence();
#pragma unroll
          for (int step = 0; step < 4; step++)
            wgmma(SPANNED ? part[set][step * UNIT_GROUPS / 4] : sum[m], a[set][step], descriptor(x, c * X_CHUNK + 32 * step),
                  SPANNED ? step % (4 / UNIT_GROUPS) > 0 : k > first || c > 0 || step > 0);
          wgmma_commit();
          const bool whole = SPANNED && c == KC - 1 && m == MT - 1;
          if (whole) wgmma_wait<0>();
          else wgmma_wait<1>();
          if (c > 0 || m > 0) finish(set ^ 1, sum[MT - 1 - m]);  // the last unit of the stage before was finished there
          if (whole) {
            finish(set, sum[m]);
            if (lane == 0) barrier_arrive(pipe.empty + 8 * pipe.s);
          }
          if (!SPANNED && c == 0 && m == 0 && last >= 0 && lane == 0) barrier_arrive(pipe.empty + 8 * last);
        }
      }
      last = pipe.s;
      if (++pipe.s == STAGES) { pipe.s = 0; pipe.phase ^= 1; }
    }
  wgmma_wait<0>();
  if (!SPANNED && last >= 0 && lane == 0) barrier_arrive(pipe.empty + 8 * last);
}
