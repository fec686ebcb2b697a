// See drive.h.
#include "drive.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <stdexcept>

namespace lowp {
namespace {

std::atomic<const Kernels*> chosen{nullptr};

const Kernels& kernels() {
  const Kernels* found = chosen.load(std::memory_order_relaxed);
  if (!found) {
    found = pick_kernels("");
    if (!found) throw std::runtime_error("lowp's CPU products want AVX2 with FMA, or AArch64: this machine has neither.");
    chosen = found;
  }
  return *found;
}

// Memory that a thread keeps between calls, at 64 bytes: up to 16 MB of it, what 1024 tokens of 8192 columns in bf16 take. More is given
// back when its call ends.
class Buffer {
 public:
  static constexpr int64_t kKept = 16 << 20;
  ~Buffer() { std::free(memory_); }
  void end_call() {
    if (size_ <= kKept) return;
    std::free(memory_);
    memory_ = nullptr;
    size_ = 0;
  }
  void* of(int64_t bytes) {
    if (bytes > size_) {
      std::free(memory_);
      memory_ = nullptr;
      size_ = (bytes + 4095) / 4096 * 4096;
      memory_ = std::aligned_alloc(64, static_cast<std::size_t>(size_));
      if (!memory_) {
        size_ = 0;
        throw std::bad_alloc();
      }
    }
    return memory_;
  }

 private:
  void* memory_ = nullptr;
  int64_t size_ = 0;
};

thread_local Buffer packed, scratch;

// Whether a pass over the decoded panel pays that brings in its scales, rounded to bf16 as the reference in bf16 would: where x is bf16,
// sums of short groups cost 3 to 12 % of a product otherwise, the pass as much as some tens of rows.
bool rescales(const Job& job, const Activation& a) {
  const int64_t rows = job.tokens * job.splits;
  return job.dot == Dot::bf16 && a.type == Type::bf16 && job.segment <= 64 && rows >= 4 * job.segment && kColumns[1] % job.segment == 0;
}

bool exact_in_bf16(const Weight& w) {
  if (w.is_int) return true;
  for (int i = 0; i < 1 << w.bits; i++) {
    uint32_t bits;
    std::memcpy(&bits, &w.table[i], 4);
    if (bits & 0xFFFF && w.table[i] == w.table[i]) return false;
  }
  return true;
}

bool sign_and_magnitude(const Weight& w) {
  for (int i = 0; i < 128; i++) {
    const float low = w.table[i], high = w.table[128 + i];
    if (!(high == -low || (low != low && high != high))) return false;
  }
  return true;
}

Dot dot_of(const Weight& w, const Activation& a, const Kernels& use) {
  if (a.quantized) {
    if (!w.is_int && (w.bits != 4 || w.halves < 1))
      throw std::invalid_argument("lowp's CPU products multiply int8 with integers and with e2m1 only.");
    return Dot::u8;
  }
  if (!use.has_bf16) return Dot::fp32;
  if (!w.is_int && (w.bits == 7 || (w.bits == 8 && !sign_and_magnitude(w)))) return Dot::fp32;
  return a.type == Type::bf16 || exact_in_bf16(w) ? Dot::bf16 : Dot::fp32;
}

// The longest run of at most so many columns that no scale changes in.
int64_t segment_of(const Weight& w, const Activation& a, int64_t most) {
  const int64_t common = std::gcd(w.group > 0 ? w.group : 0, a.quantized ? a.group : 0);  // 0: the same for a whole row
  if (common == 0) return most;
  for (int64_t size = common < most ? common : most; size >= 16; size--)
    if (common % size == 0 && (size % kTileColumns == 0 || size == 16)) return size;
  throw std::invalid_argument("lowp's CPU products want groups of 16 or multiples of 32 columns.");
}

constexpr int64_t kPiece = 65536;  // bytes of a weight that a thread takes at least where x has few rows: worth waking it for

struct Work {
  const Kernels* kernels;
  const Job* job;
  const Activation* a;
  int64_t pieces = 0, length = 1;  // of work, and how many tiles or panels each has
  std::atomic<int64_t> taken{0};

  // What is left is taken in runs that grow shorter, half of a fair share each, until nothing is: long ones are read faster, and at the
  // end a thread whose core is busy elsewhere has taken less, and nobody waits for it. `share` pieces would be this thread's.
  template <class Run>
  void drain(int64_t share, int64_t whole, Run run) {
    for (int64_t first = taken.load(std::memory_order_relaxed); first < pieces;) {
      const int64_t fair = (pieces - first) * share / pieces / 2, past = first + (fair > 1 ? fair : 1);
      if (!taken.compare_exchange_weak(first, past, std::memory_order_relaxed)) continue;
      run(first * length, past * length < whole ? past * length : whole);
      first = taken.load(std::memory_order_relaxed);
    }
  }
};

void lay_out(Job& job) {
  const int64_t words = job.blocks() * job.block_words(), numbers = job.blocks() * job.segments * job.block;
  const int64_t gap = 16;  // numbers; each array begins at 64 bytes
  auto whole = [=](int64_t n) { return (n + gap - 1) / gap * gap; };
  uint32_t* at = static_cast<uint32_t*>(packed.of(4 * (whole(words) + 3 * whole(numbers) + 2 * whole(job.tokens))));
  job.words = at;
  job.xscale = reinterpret_cast<float*>(at + whole(words));
  job.start = reinterpret_cast<int32_t*>(job.xscale + whole(numbers));
  job.xsum = reinterpret_cast<float*>(job.start + whole(numbers));
  job.shift = job.xsum + whole(numbers);
  job.token_scale = job.shift + whole(job.tokens);
}

}  // namespace

const char* use(const char* name) {
  const Kernels* found = pick_kernels(name);
  if (found) chosen = found;
  return found ? found->name : nullptr;
}

void linear(const Weight& w, const Activation& a, const Result& y, Parallel parallel) {
  if (a.tokens == 0 || w.n == 0) return;
  if (w.k <= 0 || w.k % kTileColumns) throw std::invalid_argument("lowp's CPU products want K in multiples of 32.");
  if (a.asymmetric && !w.row_sum) throw std::invalid_argument("lowp: an activation with a zero point wants the sums of the weight's rows.");
  const Kernels& use = kernels();
  Job job;
  job.w = w;
  job.dot = dot_of(w, a, use);  // not kernels() again: another thread may have chosen anew
  job.tokens = a.tokens;
  if (job.dot == Dot::u8 && !w.is_int) job.w.offset = w.halves;
  if (job.dot == Dot::bf16) job.splits = a.type == Type::bf16 || a.float8 ? 1 : a.type == Type::fp16 ? 2 : 3;
  const int64_t rows = job.tokens * job.splits;
  job.block = rows <= 2 ? static_cast<int>(rows) : rows <= 4 ? 4 : rows <= 8 ? 8 : kBlock;
  const int64_t most = (rows > 2 && rows <= 8 ? kFewColumns : kColumns)[static_cast<int>(job.dot)];
  job.segment = segment_of(w, a, most);
  if (rescales(job, a)) {
    job.scaled = job.segment;
    job.segment = most;
  }
  job.columns = most / job.segment * job.segment;
  job.segments = (w.k + job.segment - 1) / job.segment;
  lay_out(job);
  if (!a.asymmetric) job.shift = nullptr;
  if ((!a.quantized || a.group) && !a.float8) job.token_scale = nullptr;
  if (!a.quantized || !a.group) job.xscale = nullptr;
  job.out = y.y;
  job.out_type = y.type;
  job.out_stride = y.stride;
  job.bias = y.bias;
  job.bias_type = y.bias_type;
  const struct End {
    ~End() { packed.end_call(); }
  } end;
  Work work{&use, &job, &a};
  const Body pack = [](int64_t begin, int64_t end, void* context) {
    const Work& work = *static_cast<Work*>(context);
    for (int64_t b = begin; b < end; b++) work.kernels->pack(*work.job, *work.a, b);
  };
  if (rows <= 8) {
    pack(0, 1, &work);
    work.length = kPiece / job.w.tile_bytes() + 1;
    work.pieces = (job.w.tiles() + work.length - 1) / work.length;
    parallel(0, work.pieces, 1, [](int64_t from, int64_t to, void* context) {
      Work& work = *static_cast<Work*>(context);
      work.drain(to - from, work.job->w.tiles(), [&](int64_t begin, int64_t end) { work.kernels->few(*work.job, begin, end); });
    }, &work);
    return;
  }
  parallel(0, job.blocks(), 8, pack, &work);
  work.pieces = (job.w.tiles() + use.panel - 1) / use.panel;
  parallel(0, work.pieces, 1, [](int64_t from, int64_t to, void* context) {
    Work& work = *static_cast<Work*>(context);
    void* memory = scratch.of(work.kernels->scratch(*work.job));
    work.drain(to - from, work.pieces, [&](int64_t begin, int64_t end) { work.kernels->many(*work.job, begin, end, memory); });
  }, &work);
}

}  // namespace lowp
