// ggml's matrix product beside ours: the median time of mul_mat of a quantized weight with float32 activations.
//
//     g++ -O2 -std=c++17 benchmarks/ggml_products.cpp -I GGML/include -L BUILD/src -lggml -lggml-base -lggml-cpu -o ggml_products
//     ggml_products TYPE N K M THREADS      prints the bytes of the weight, then for each line of input, a number of seconds,
//                                           computes for so long and prints what each product took, in seconds, on one line
//
// So its turns and another process's can alternate. The weight is laid out as llama.cpp lays it out (in the repacked buffer where the type has one); copies of it that together are
// larger than the caches take turns. With one thread processor time is measured, else wall time.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <string>
#include <vector>

#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml.h"

static ggml_backend_buffer_type_t repacked() {
  ggml_backend_reg_t reg = ggml_backend_cpu_reg();
  auto extra = reinterpret_cast<ggml_backend_dev_get_extra_bufts_t>(ggml_backend_reg_get_proc_address(reg, "ggml_backend_dev_get_extra_bufts"));
  if (!extra) return nullptr;
  ggml_backend_buffer_type_t* all = extra(ggml_backend_reg_dev_get(reg, 0));
  return all && all[0] ? all[0] : nullptr;
}

static double now(bool processor) {
  if (processor) {
    timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
  }
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

int main(int, char** arg) {
  std::string name = arg[1];
  const bool plain = name.back() == '-';  // "Q4_0-": not repacked
  if (plain) name.pop_back();
  const int64_t n = atoll(arg[2]), k = atoll(arg[3]), m = atoll(arg[4]);
  const int threads = atoi(arg[5]);
  ggml_type type = GGML_TYPE_COUNT;
  for (int i = 0; i < GGML_TYPE_COUNT; i++)
    if (ggml_type_name(static_cast<ggml_type>(i)) && name == ggml_type_name(static_cast<ggml_type>(i))) type = static_cast<ggml_type>(i);
  if (type == GGML_TYPE_COUNT) return std::fprintf(stderr, "no type %s\n", name.c_str()), 1;
  const size_t bytes = ggml_row_size(type, k) * static_cast<size_t>(n);
  const int copies = m > 8 ? 1 : static_cast<int>(std::max<size_t>(1, (128u << 20) / bytes + 1));
  std::vector<float> rows(static_cast<size_t>(n * k));
  for (size_t i = 0; i < rows.size(); i++) rows[i] = static_cast<float>(i * 2654435761u % 2001) / 20000.0f - 0.05f;
  std::vector<uint8_t> quantized(bytes);
  ggml_quantize_chunk(type, rows.data(), quantized.data(), 0, n, k, nullptr);

  ggml_backend_t backend = ggml_backend_cpu_init();
  ggml_backend_cpu_set_n_threads(backend, threads);
  ggml_context* weights = ggml_init({ggml_tensor_overhead() * static_cast<size_t>(copies + 8), nullptr, true});
  ggml_context* inputs = ggml_init({ggml_tensor_overhead() * 8, nullptr, true});
  std::vector<ggml_tensor*> w;
  for (int i = 0; i < copies; i++) w.push_back(ggml_new_tensor_2d(weights, type, k, n));
  ggml_tensor* x = ggml_new_tensor_2d(inputs, GGML_TYPE_F32, k, m);
  ggml_backend_buffer_type_t place = plain || !repacked() ? ggml_backend_cpu_buffer_type() : repacked();
  ggml_backend_alloc_ctx_tensors_from_buft(weights, place);
  ggml_backend_alloc_ctx_tensors(inputs, backend);
  for (ggml_tensor* one : w) ggml_backend_tensor_set(one, quantized.data(), 0, bytes);
  std::vector<float> xs(static_cast<size_t>(k * m), 0.25f);
  ggml_backend_tensor_set(x, xs.data(), 0, xs.size() * 4);

  std::vector<ggml_cgraph*> graphs;
  for (ggml_tensor* one : w) {
    ggml_context* c = ggml_init({ggml_tensor_overhead() * 8 + ggml_graph_overhead() * 2, nullptr, true});
    ggml_cgraph* graph = ggml_new_graph(c);
    ggml_build_forward_expand(graph, ggml_mul_mat(c, one, x));
    ggml_backend_alloc_ctx_tensors(c, backend);
    graphs.push_back(graph);
  }
  ggml_backend_graph_compute(backend, graphs[0]);
  std::printf("%zu\n", bytes);
  std::fflush(stdout);
  size_t turn = 0;
  for (double seconds; std::scanf("%lf", &seconds) == 1;) {
    const double until = now(false) + seconds;
    do {
      const double start = now(threads == 1);
      ggml_backend_graph_compute(backend, graphs[turn++ % graphs.size()]);
      std::printf("%.9f ", now(threads == 1) - start);
    } while (now(false) < until);
    std::printf("\n");
    std::fflush(stdout);
  }
  return 0;
}
