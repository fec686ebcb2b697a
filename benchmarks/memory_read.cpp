// How fast memory can be read: all bytes of a piece once, by so many threads, each its own part from front to back. What a product of
// one token is held against. benchmarks/linear_cpu.py compiles and calls it:
//
//     g++ -O3 -march=native -fopenmp -shared -fPIC benchmarks/memory_read.cpp -o memory_read.so
//
// `ahead` bytes are fetched before their use (0: what the processor fetches by itself). The sum is there so that nothing is left out.
#include <cstdint>

using Line = uint64_t __attribute__((vector_size(64), aligned(64)));

extern "C" uint64_t memory_read(const uint8_t* from, int64_t bytes, int64_t ahead, int threads) {
  const int64_t lines = bytes / 64;
  uint64_t total = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(+ : total)
  for (int part = 0; part < threads; part++) {
    Line sums[4] = {};
    int64_t i = lines * part / threads;
    const int64_t past = lines * (part + 1) / threads;
    const Line* line = reinterpret_cast<const Line*>(from);
    for (; i + 4 <= past; i += 4)
      for (int j = 0; j < 4; j++) {
        if (ahead) __builtin_prefetch(from + 64 * (i + j) + ahead, 0, 0);
        sums[j] += line[i + j];
      }
    for (; i < past; i++) sums[0] += line[i];
    const Line all = sums[0] + sums[1] + sums[2] + sums[3];
    for (int j = 0; j < 8; j++) total += all[j];
  }
  return total;
}
