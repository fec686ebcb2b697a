"""The pipeline of multiply16.cu, run on the host: its own text, over a stand-in for the tensor cores and the copy engine.

Products are done when they are waited for, not when they are asked for: until then their sums are NaN, and their registers and
their stage must keep what they hold. A stage that is given back is filled anew at once. One lane, whole numbers: sums are exact.
"""

import shutil
import subprocess
from pathlib import Path

import pytest

from lowp.kernels.cuda_ import mixed

HOST = r"""
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>
#define DEVICE inline
typedef unsigned u32;
typedef unsigned long long u64;
constexpr int COLUMNS = GROUP == 0 ? 64 : GROUP, GROUPS = GROUP == 0 ? 0 : GROUP >= 64 * KC ? 1 : 64 * KC / GROUP;
constexpr int UNIT_GROUPS = GROUP > 0 && GROUP < 64 ? 64 / GROUP : 1, SCALE = 0, SCALE_BYTES = 1, ZERO_BYTES = 0, UNIT_BYTES = 1;
constexpr bool SPANNED = (GROUP == 32 || (GROUP > 0 && GROUP % 64 == 0)) && UNIT_GROUPS * BM <= 16;
constexpr int X_CHUNK = 1000, CODES_AT = 10000, SCALES_AT = 20000, ZEROS_AT = 30000, STAGE_BYTES = 40000;
struct { int x; } threadIdx = {0};
struct Params { int K; };
struct Place { int unit, n64, token; };
struct Pipe { u32 stages, full, empty, table; int s; u32 phase; };
struct Rows { u32 scale[2], zero[2]; float by[2]; };
struct Codes { int k, chunk, unit; };

void expect(bool right, const char* what) { if (!right) { std::puts(what); std::exit(1); } }
int code_of(int k, int chunk, int unit, int step) { return 1 + (7 * k + 5 * chunk + 3 * unit + step) % 5; }
int x_of(int k, int chunk, int step) { return 1 + (3 * k + 2 * chunk + step) % 4; }
int scale_of(int group, int unit) { return 1 + (5 * group + unit) % 7; }

// the producer: which stage of the weight is in which slot
std::vector<int> work;
int filled = 0, slot[STAGES];
bool full_now[STAGES];
void fill() {
  for (; filled < (int)work.size() && !full_now[filled % STAGES]; filled++)
    full_now[filled % STAGES] = true, slot[filled % STAGES] = work[filled];
}
int read = 0;
void barrier_wait(u32 bar, u32 phase) {
  const int s = (int)bar / 8;
  fill();
  expect(full_now[s] && read < filled && s == read % STAGES, "waits for a stage that never comes");
  expect(phase == (u32)(read / STAGES & 1), "waits for the wrong phase");
  read++;
}

// the tensor cores
struct Job { float* d; const u32* a; int s, chunk, step; bool add; };
std::vector<std::vector<Job>> groups_asked;
std::vector<Job> open_group;
struct Held { float* d; float value; int left; };
std::vector<Held> held;
void wgmma(float (&d)[BM / 2], const u32 (&a)[4], u64 b, int add) {
  Held* at = nullptr;
  for (Held& one : held) if (one.d == d) at = &one;
  if (!at) held.push_back({d, d[0], 0}), at = &held.back();
  at->left++;
  for (float& one : d) one = NAN;
  const int s = (int)b / STAGE_BYTES, within = (int)b % STAGE_BYTES;
  open_group.push_back({d, a, s, within / X_CHUNK, within % X_CHUNK / 32, add != 0});
}
void wgmma_fence() {}
void wgmma_commit() { groups_asked.push_back(open_group); open_group.clear(); }
void run(const Job& job) {
  for (std::size_t i = 0; i < held.size(); i++) {
    Held& one = held[i];
    if (one.d != job.d) continue;
    one.value = (job.add ? one.value : 0) + (float)job.a[0] * (float)x_of(slot[job.s], job.chunk, job.step);
    if (--one.left) return;
    for (int j = 0; j < BM / 2; j++) one.d[j] = one.value;
    held.erase(held.begin() + (long)i);
    return;
  }
}
template <int N> void wgmma_wait() {
  while ((int)groups_asked.size() > N) {
    for (const Job& job : groups_asked.front()) run(job);
    groups_asked.erase(groups_asked.begin());
  }
}
void barrier_arrive(u32 bar) {
  const int s = ((int)bar - 1000000) / 8;
  expect(s >= 0 && s < STAGES && full_now[s], "gives back a stage that it does not have");
  for (auto& group : groups_asked) for (const Job& job : group) expect(job.s != s, "gives back a stage that is being read");
  full_now[s] = false;
  fill();
}
template <int N> void hold(float (&)[N]) {}
u32 __shfl_sync(u32, u32 v, int) { return v; }
u32 descriptor_of(u32 address) { return address; }
u64 descriptor(u32 low, int on) { return low + (u32)on; }
u32 decode_start(u32, const Params&) { return 0; }
Codes load_codes(u32 at, int) {
  const int index = (int)at % STAGE_BYTES - CODES_AT;
  return {slot[at / STAGE_BYTES], index % KC, index / KC};
}
Rows load_rows(u32 at, u32, int, const Params&, int, int) {
  const int index = ((int)at % STAGE_BYTES - SCALES_AT) / 64, k = slot[at / STAGE_BYTES];
  Rows rows = {};
  rows.scale[0] = (u32)scale_of(k * KC * 64 / COLUMNS + index % GROUPS, index / GROUPS);
  rows.by[0] = rows.by[1] = (float)rows.scale[0];
  return rows;
}
template <int STEP> void decode_step(u32 (&a)[4], const Codes& c, const Rows& rows, u32) {
  a[0] = (u32)code_of(c.k, c.chunk, c.unit, STEP) * (SPANNED || GROUP == 0 ? 1 : rows.scale[0]);
}
//@MULTIPLY@
int main() {
  const int all[] = {2, 4, 0, 6, 2, 8, 2};
  int first[7];
  for (int i = 0; i < 7; i++) {
    first[i] = i % 2 * 4;
    for (int k = first[i]; k < first[i] + all[i]; k++) work.push_back(k);
  }
  Pipe pipe = {0, 0, 1000000, 0, 0, 0};
  const Params p = {64 * KC * 96};
  for (int i = 0; i < 7; i++) {
    float sum[MT][BM / 2];
    multiply(sum, pipe, p, first[i], first[i] + all[i], Place{0, 0, 0});
    for (int m = 0; m < MT; m++) {
      float wanted = 0;
      for (int k = first[i]; k < first[i] + all[i]; k++)
        for (int c = 0; c < KC; c++)
          for (int step = 0; step < 4; step++)
            wanted += (float)(code_of(k, c, m, step) * x_of(k, c, step) *
                              (GROUP == 0 ? 1 : scale_of((k * KC * 64 + 64 * c + 16 * step) / COLUMNS, m)));
      for (float one : sum[m]) if (one != wanted) std::printf("tile %d: wanted %g, got %g\n", i, wanted, one), std::exit(1);
    }
  }
  for (bool one : full_now) expect(!one, "keeps a stage");
}
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize(
    ("mt", "kc", "stages", "group", "bm"),
    [
        (1, 4, 2, 64, 16), (1, 4, 3, 32, 8), (1, 4, 4, 128, 8), (1, 4, 3, 16, 8), (1, 4, 3, 256, 32), (1, 2, 3, 128, 16),
        (1, 2, 2, 256, 8), (1, 1, 2, 192, 8), (1, 1, 3, 64, 16), (1, 1, 4, 32, 8), (1, 1, 6, 64, 64), (1, 1, 4, 0, 8),
        (2, 4, 2, 64, 8), (2, 1, 3, 32, 8), (2, 1, 2, 192, 16), (2, 2, 4, 128, 64), (2, 1, 6, 0, 128),
    ],
)  # fmt: skip
def test_every_pipeline_sums_what_it_should(mt, kc, stages, group, bm, tmp_path):
    text = tmp_path / "host.cpp"
    text.write_text(HOST.replace("//@MULTIPLY@", (Path(mixed.__file__).parent / "multiply16.cu").read_text()))
    sizes = [f"-D{name}={size}" for name, size in dict(MT=mt, KC=kc, STAGES=stages, GROUP=group, BM=bm).items()]
    program = tmp_path / "host"
    made = subprocess.run(
        ["g++", "-std=c++17", "-O0", "-w", *sizes, "-o", program, text], capture_output=True, text=True, timeout=120
    )
    assert made.returncode == 0, made.stderr
    ran = subprocess.run([program], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stdout
