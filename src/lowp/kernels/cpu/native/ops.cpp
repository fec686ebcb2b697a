// The operators, as torch sees them: arguments out of torch's words, a result allocated by torch, threads of torch's pool. Their
// schemas and what they mean to a tracer stand in kernels/cpu/planes.py.
#include <cstring>
#include <stdexcept>
#include <string>

#include "drive.h"
#include "torch_shim.h"

namespace {

using lowp::Activation;
using lowp::Result;
using lowp::Type;
using lowp::Weight;

void check(int32_t error, const char* what) {
  if (error) throw std::runtime_error(std::string("lowp: torch refused ") + what);
}

class Tensor {
 public:
  explicit Tensor(TorchTensor handle = nullptr) : handle_(handle) {}
  Tensor(const Tensor&) = delete;
  Tensor& operator=(const Tensor&) = delete;
  ~Tensor() {
    if (handle_) aoti_torch_delete_tensor_object(handle_);
  }
  static TorchTensor optional(Word word) {
    if (!word) return nullptr;
    Word* inner = reinterpret_cast<Word*>(word);
    TorchTensor handle = reinterpret_cast<TorchTensor>(*inner);
    delete inner;
    return handle;
  }
  bool there() const { return handle_; }
  void* data() const {
    void* p = nullptr;
    if (handle_) check(aoti_torch_get_data_ptr(handle_, &p), "the address of a tensor");
    return p;
  }
  int64_t size(int64_t axis) const {
    int64_t* sizes;
    check(aoti_torch_get_sizes(handle_, &sizes), "the sizes of a tensor");
    return sizes[axis];
  }
  int64_t stride(int64_t axis) const {
    int64_t* strides;
    check(aoti_torch_get_strides(handle_, &strides), "the strides of a tensor");
    return strides[axis];
  }
  int64_t dim() const {
    int64_t n;
    check(aoti_torch_get_dim(handle_, &n), "the rank of a tensor");
    return n;
  }
  int64_t numel() const {
    int64_t n;
    check(aoti_torch_get_numel(handle_, &n), "the size of a tensor");
    return n;
  }
  int32_t dtype() const {
    int32_t t;
    check(aoti_torch_get_dtype(handle_, &t), "the dtype of a tensor");
    return t;
  }
  bool contiguous() const {
    int64_t expected = 1, *sizes, *strides;
    check(aoti_torch_get_sizes(handle_, &sizes), "the sizes of a tensor");
    check(aoti_torch_get_strides(handle_, &strides), "the strides of a tensor");
    for (int64_t axis = dim() - 1; axis >= 0; axis--) {
      if (sizes[axis] != 1 && strides[axis] != expected) return false;
      expected *= sizes[axis];
    }
    return true;
  }
  TorchTensor release() {
    TorchTensor handle = handle_;
    handle_ = nullptr;
    return handle;
  }

 private:
  TorchTensor handle_;
};

struct DTypes {
  int32_t fp32 = aoti_torch_dtype_float32(), bf16 = aoti_torch_dtype_bfloat16(), fp16 = aoti_torch_dtype_float16();
  int32_t int8 = aoti_torch_dtype_int8(), uint8 = aoti_torch_dtype_uint8(), int32 = aoti_torch_dtype_int32();
  int32_t int64 = aoti_torch_dtype_int64(), e4m3 = aoti_torch_dtype_float8_e4m3fn(), cpu = aoti_torch_device_type_cpu();
  int32_t e8m0 = 44;  // c10::ScalarType::Float8_e8m0fnu: torch 2.10 has no function that says so
  Type type(int32_t dtype, const char* name) const {
    const int32_t known[] = {fp32, bf16, fp16, e8m0, e4m3, int8, uint8, int32};  // in the order of Type
    for (int i = 0; i < 8; i++)
      if (dtype == known[i]) return static_cast<Type>(i);
    throw std::invalid_argument(std::string("lowp: planes want ") + name +
                                " in float32, bfloat16, float16, float8_e8m0fnu, float8_e4m3fn, int8, uint8 or int32.");
  }
};

const DTypes& dtypes() {
  static const DTypes all;
  return all;
}

Tensor empty(int64_t dim, const int64_t* sizes, int32_t dtype) {
  int64_t strides[3] = {1, 1, 1};
  for (int64_t axis = dim - 2; axis >= 0; axis--) strides[axis] = strides[axis + 1] * (sizes[axis + 1] > 1 ? sizes[axis + 1] : 1);
  TorchTensor handle;
  check(aoti_torch_empty_strided(dim, sizes, strides, dtype, dtypes().cpu, 0, &handle), "memory");
  return Tensor(handle);
}

struct Format {  // as planes.py packs it: each number of a list costs a call time
  int64_t n, k;
  int32_t group, act_group, nest_rows, nest_columns;
  int16_t bits, is_int, offset, is_signed, ebits, mbits, bias, specials, act, table, spare[2];
};
constexpr int kFormatWords = sizeof(Format) / 8;

template <class Number>
int64_t read_list(Word word, Number* to, int64_t most) {
  TorchList list = reinterpret_cast<TorchList>(word);
  size_t count = 0;
  check(torch_list_size(list, &count), "a list");
  for (size_t i = 0; i < count && static_cast<int64_t>(i) < most; i++) {
    Word item;
    check(torch_list_get_item(list, i, &item), "an item of a list");
    std::memcpy(&to[i], &item, sizeof(Number));
  }
  torch_delete_list(list);
  return static_cast<int64_t>(count);
}

// The values of an element that is no integer: a codebook as it is given, a float by its fields, kept for the next call.
struct Table {
  alignas(64) float values[256];
  int64_t key[6] = {};
  int halves = 0;
};

const Table& table_of(const Format& f, const double* codebook) {
  thread_local Table kept;
  const int64_t key[6] = {f.bits, f.ebits, f.mbits, f.bias, f.specials, 1};
  if (f.ebits && !std::memcmp(key, kept.key, sizeof key)) return kept;
  bool whole = f.bits == 4;
  float top = 0;
  for (int code = 0; code < 1 << f.bits; code++) {
    const float value = f.ebits ? lowp::element_value(code, static_cast<int>(f.ebits), static_cast<int>(f.mbits), static_cast<int>(f.bias),
                                                      static_cast<int>(f.specials), static_cast<int>(f.bits), f.is_signed)
                                : static_cast<float>(codebook[code]);
    kept.values[code] = value;
    const float twice = 2 * value;
    whole = whole && twice > -64 && twice < 64 && twice == static_cast<float>(static_cast<int>(twice));
    top = twice > top ? twice : top;
  }
  kept.halves = whole ? static_cast<int>(top) : 0;
  std::memcpy(kept.key, key, sizeof key);
  if (!f.ebits) kept.key[5] = 0;
  return kept;
}

// The tensors of a weight, as each schema begins after its first argument: qdata, scale, then optional ones.
struct Held {
  Tensor codes, scale, zero, scale_scale, scale_zero;
  explicit Held(const Word* words)
      : codes(reinterpret_cast<TorchTensor>(words[0])),
        scale(reinterpret_cast<TorchTensor>(words[1])),
        zero(Tensor::optional(words[2])),
        scale_scale(Tensor::optional(words[3])),
        scale_zero(Tensor::optional(words[4])) {}
};

struct Spec {
  Format f{};
  double codebook[256];
  Spec(Word format, Word values) {
    int64_t numbers[kFormatWords];
    const int64_t count = read_list(format, numbers, kFormatWords);
    const int64_t entries = read_list(values, codebook, 256);
    if (count != kFormatWords) throw std::invalid_argument("lowp: a format of another version of the library.");
    std::memcpy(&f, numbers, sizeof numbers);
    if (f.table && !f.ebits && entries != 1 << f.bits) throw std::invalid_argument("lowp: a codebook wants a value for each code.");
  }
};

// The address of `count` numbers that are read as they lie, null where the tensor is not there.
const void* numbers(const Tensor& tensor, int64_t count, const char* name) {
  if (!tensor.there()) return nullptr;
  if (tensor.numel() != count || !tensor.contiguous())
    throw std::invalid_argument(std::string("lowp: planes want ") + name + " of " + std::to_string(count) + " numbers side by side, got " +
                                std::to_string(tensor.numel()) + (tensor.contiguous() ? "." : ", apart: call .contiguous()."));
  return tensor.data();
}

const float* floats(const Tensor& tensor, int64_t count, const char* name) {
  if (tensor.there() && tensor.dtype() != dtypes().fp32) throw std::invalid_argument(std::string("lowp: planes want ") + name + " in float32.");
  return static_cast<const float*>(numbers(tensor, count, name));
}

// float32, bfloat16 or float16: what x and bias may be.
Type float_type(const Tensor& tensor, const char* name) {
  const int32_t dtype = tensor.dtype();
  if (dtype != dtypes().fp32 && dtype != dtypes().bf16 && dtype != dtypes().fp16)
    throw std::invalid_argument(std::string("lowp: planes want ") + name + " in float32, bfloat16 or float16.");
  return dtypes().type(dtype, name);
}

int64_t padded_rows(const Format& f) { return (f.n + 15) / 16 * 16; }

Weight weight_of(const Held& held, const Spec& spec, int64_t matrices, const Tensor& row_sum) {
  const Format& f = spec.f;
  Weight w;
  w.n = f.n;
  w.k = f.k;
  if (f.bits < 1 || f.bits > 8 || f.n < 0 || f.k < 0 || f.k % 32 || (f.group > 0 && f.k % f.group))
    throw std::invalid_argument("lowp: planes want 1 to 8 bits, K in multiples of 32 and groups that divide K.");
  w.bits = static_cast<int>(f.bits);
  w.is_int = f.is_int;
  w.offset = static_cast<int>(f.offset);
  if (!f.is_int) {
    const Table& table = table_of(f, spec.codebook);
    w.table = table.values;
    w.halves = table.halves;
  }
  w.group = f.group;
  w.nest_rows = f.nest_rows;
  w.nest_columns = f.nest_columns;
  const int64_t wanted = matrices * w.tiles() * w.tile_bytes();
  if (held.codes.numel() != wanted || !held.codes.contiguous() || !held.scale.contiguous())
    throw std::invalid_argument("lowp: planes of " + std::to_string(f.n) + " x " + std::to_string(f.k) + " codes want " +
                                std::to_string(wanted) + " contiguous bytes, got " + std::to_string(held.codes.numel()) + ".");
  const int64_t scales = f.group > 0 ? padded_rows(f) * (f.k / f.group) : f.group < 0 ? 1 : f.n;
  if (held.scale.numel() != matrices * scales) throw std::invalid_argument("lowp: planes want a scale for each group of each row.");
  w.codes = static_cast<const uint8_t*>(held.codes.data());
  w.scale = held.scale.data();
  w.scale_type = dtypes().type(held.scale.dtype(), "scales");
  w.zero = numbers(held.zero, matrices * scales, "a zero point");
  if (w.zero) w.zero_type = dtypes().type(held.zero.dtype(), "zero points");
  const int64_t outer = f.group > 0 ? matrices * (f.n / f.nest_rows) * (f.k / f.group / f.nest_columns) : 0;
  w.scale_scale = floats(held.scale_scale, outer, "a scale of scales");
  w.scale_zero = floats(held.scale_zero, outer, "a zero point of scales");
  w.row_sum = floats(row_sum, matrices * padded_rows(f), "sums of rows");
  return w;
}

Activation activation_of(const Tensor& x, int64_t axes, const Format& f, const Tensor& static_scale) {
  Activation a;
  const int64_t axis = x.dim() - 1;
  if (x.dim() != axes || x.size(axis) != f.k || (f.k > 1 && x.stride(axis) != 1))
    throw std::invalid_argument("lowp: planes want x of " + std::to_string(axes) + " axes with K = " + std::to_string(f.k) +
                                " columns side by side.");
  a.x = x.data();
  a.type = float_type(x, "x");
  a.stride = x.stride(axis - 1);
  a.tokens = x.size(axis - 1);
  a.quantized = f.act == 1 || f.act == 2;
  a.float8 = f.act == 3;
  a.asymmetric = f.act == 2;
  a.group = f.act_group;
  a.scale = floats(static_scale, 1, "a static scale");
  return a;
}

void parallel(int64_t begin, int64_t end, int64_t grain, lowp::Body body, void* context) {
  check(torch_parallel_for(begin, end, grain, body, context), "threads");
}

int size_of(Type type) { return type == Type::fp32 || type == Type::int32 ? 4 : type == Type::bf16 || type == Type::fp16 ? 2 : 1; }

// The matrix at place e of a stack.
Weight at(const Weight& w, int64_t e) {
  Weight one = w;
  const int64_t groups = w.group > 0 ? w.k / w.group : 1, scales = w.group > 0 ? w.tiles() * 16 * groups : w.group < 0 ? 1 : w.n;
  one.codes += e * w.tiles() * w.tile_bytes();
  one.scale = static_cast<const uint8_t*>(w.scale) + e * scales * size_of(w.scale_type);
  if (w.zero) one.zero = static_cast<const uint8_t*>(w.zero) + e * scales * size_of(w.zero_type);
  const int64_t outer = w.n / w.nest_rows * (groups / w.nest_columns);
  if (w.scale_scale) one.scale_scale += e * outer;
  if (w.scale_zero) one.scale_zero += e * outer;
  if (w.row_sum) one.row_sum += e * w.tiles() * 16;
  return one;
}

// planes_linear(x, qdata, scale, zero_point?, scale_scale?, scale_zero_point?, row_sum?, act_scale?, bias?, format, codebook)
void linear(Word* words, uint64_t, uint64_t) {
  const Tensor x(reinterpret_cast<TorchTensor>(words[0]));
  const Held held(words + 1);
  const Tensor row_sum(Tensor::optional(words[6])), act_scale(Tensor::optional(words[7])), bias(Tensor::optional(words[8]));
  const Spec spec(words[9], words[10]);
  const Weight w = weight_of(held, spec, 1, row_sum);
  const Activation a = activation_of(x, 2, spec.f, act_scale);
  const int64_t sizes[2] = {a.tokens, w.n};
  Tensor y = empty(2, sizes, x.dtype());
  Result result{y.data(), a.type, w.n, numbers(bias, w.n, "a bias"), Type::fp32};
  if (bias.there()) result.bias_type = float_type(bias, "a bias");
  lowp::linear(w, a, result, parallel);
  words[0] = reinterpret_cast<Word>(y.release());
}

// planes_grouped(x, qdata, scale, zero_point?, scale_scale?, scale_zero_point?, row_sum?, act_scale?, offs?, format, codebook)
void grouped(Word* words, uint64_t, uint64_t) {
  const Tensor x(reinterpret_cast<TorchTensor>(words[0]));
  const Held held(words + 1);
  const Tensor row_sum(Tensor::optional(words[6])), act_scale(Tensor::optional(words[7])), offs(Tensor::optional(words[8]));
  const Spec spec(words[9], words[10]);
  const int64_t experts = held.codes.size(0);
  const Weight w = weight_of(held, spec, experts, row_sum);
  const Activation a = activation_of(x, offs.there() ? 2 : 3, spec.f, act_scale);
  if (offs.there() ? offs.dtype() != dtypes().int32 : x.size(0) != experts)
    throw std::invalid_argument("lowp: planes_grouped wants offsets in int32, or x with a matrix for each of " + std::to_string(experts) + " experts.");
  const int64_t sizes[3] = {experts, a.tokens, w.n};
  Tensor y = offs.there() ? empty(2, sizes + 1, x.dtype()) : empty(3, sizes, x.dtype());
  const int32_t* ends = static_cast<const int32_t*>(numbers(offs, experts, "offsets"));
  int64_t start = 0;
  for (int64_t e = 0; e < experts; e++) {
    const int64_t end = ends ? ends[e] : a.tokens;
    if (end < start || end > a.tokens) throw std::invalid_argument("lowp: offsets of experts want to rise, up to the number of tokens.");
    Activation part = a;
    part.tokens = end - start;
    const int64_t skipped = ends ? start * a.stride : e * x.stride(0), row = ends ? start : e * a.tokens;
    part.x = static_cast<const uint8_t*>(a.x) + skipped * size_of(a.type);
    const Result result{static_cast<uint8_t*>(y.data()) + row * w.n * size_of(a.type), a.type, w.n, nullptr, Type::fp32};
    lowp::linear(at(w, e), part, result, parallel);
    start = ends ? end : 0;
  }
  words[0] = reinterpret_cast<Word>(y.release());
}

// planes_embedding(ids, qdata, scale, zero_point?, scale_scale?, scale_zero_point?, format, codebook) -> float32
void embedding(Word* words, uint64_t, uint64_t) {
  const Tensor ids(reinterpret_cast<TorchTensor>(words[0]));
  const Held held(words + 1);
  const Spec spec(words[6], words[7]);
  const Weight w = weight_of(held, spec, 1, Tensor());
  if (ids.dim() != 1 || !ids.contiguous() || ids.dtype() != dtypes().int64) throw std::invalid_argument("lowp: planes_embedding wants a vector of int64.");
  const int64_t sizes[2] = {ids.numel(), w.k};
  Tensor y = empty(2, sizes, dtypes().fp32);
  struct Rows {
    const Weight* w;
    const int64_t* ids;
    float* out;
  } rows{&w, static_cast<const int64_t*>(ids.data()), static_cast<float*>(y.data())};
  for (int64_t i = 0; i < sizes[0]; i++)
    if (rows.ids[i] < 0 || rows.ids[i] >= w.n)
      throw std::out_of_range("index out of range in a table of " + std::to_string(w.n) + " rows: " + std::to_string(rows.ids[i]));
  parallel(0, sizes[0], 4, [](int64_t begin, int64_t end, void* context) {
    const Rows& r = *static_cast<Rows*>(context);
    for (int64_t i = begin; i < end; i++) lowp::decode_row(*r.w, r.ids[i], r.out + i * r.w->k);
  }, &rows);
  words[0] = reinterpret_cast<Word>(y.release());
}

struct Registration {
  Registration() {
    TorchLibrary library;  // torch keeps what it registers as long as this lives, and this lives as long as the process
    check(aoti_torch_library_init_impl("lowp", "CPU", __FILE__, __LINE__, &library), "a library of operators");
    check(torch_library_impl(library, "planes_linear", linear, kTorchVersion), "planes_linear");
    check(torch_library_impl(library, "planes_grouped", grouped, kTorchVersion), "planes_grouped");
    check(torch_library_impl(library, "planes_embedding", embedding, kTorchVersion), "planes_embedding");
  }
} registration;

}  // namespace

// The instruction set in use from now on, null where this machine lacks it; "" for the best.
extern "C" __attribute__((visibility("default"))) const char* lowp_cpu_use(const char* name) { return lowp::use(name); }
