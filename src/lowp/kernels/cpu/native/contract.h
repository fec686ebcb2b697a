// What the floors of the library say to each other: raw pointers and sizes, no torch, no instruction set.
//
//     y_MN = x_MK @ ((code_NK - zero) * scale).T + bias_N
//
// The weight lies in tiles of 16 rows x 32 columns (layouts/planes.py); a tile's columns are cut into *segments*, runs that share
// the weight's scale and the activation's. Inside a segment codes are multiplied alone; between segments floats are added:
//
//     y_mn = sum_s  scale_ns * xscale_ms * (sum_{k in s} value(code_nk) * x_mk  -  zero_ns * sum_{k in s} x_mk)
//
// A product reads x in *blocks* of R rows: for each step of a segment R words of 32 bits, side by side. What a word holds and how
// many steps a quad of 4 columns takes depends on the kind of product (`Dot`). A row of float32 may become 3 rows of bf16.
#pragma once
#include <cstdint>

namespace lowp {

enum class Type : int { fp32, bf16, fp16, e8m0, e4m3, int8, uint8, int32 };

// The kinds of product, and the columns that are worked on at once: a panel of 64 rows of them stays in the first cache. With 3 to 8
// rows of x it is one tile of them, and where products are fast few: so the next come from memory while these are multiplied.
enum class Dot : int { u8, bf16, fp32 };
constexpr int64_t kColumns[] = {512, 256, 128}, kFewColumns[] = {128, 256, 128};
constexpr int kSteps[] = {1, 2, 4};  // words of 32 bits that hold 4 columns

constexpr int64_t kTileRows = 16, kTileColumns = 32;
constexpr int kBlock = 5;  // rows of x in the product of many tokens: 5 x 4 registers of sums, 4 of weights

struct Weight {
  const uint8_t* codes = nullptr;
  int64_t n = 0, k = 0;
  int bits = 0;
  bool is_int = true;   // value = code - offset; else value = table[code]
  int offset = 0;
  const float* table = nullptr;  // of 2^bits values, at 64 bytes
  int halves = 0;  // table * 2 are the integers -halves .. halves: then products of integers serve too (e2m1)

  const void* scale = nullptr;
  const void* zero = nullptr;
  Type scale_type = Type::fp32, zero_type = Type::fp32;
  int64_t group = 0;  // columns that share a scale; 0: all of a row, -1: the whole matrix
  const float* scale_scale = nullptr;  // where the scale is itself quantized, in blocks of nest_rows x nest_columns of scales
  const float* scale_zero = nullptr;
  int64_t nest_rows = 1, nest_columns = 1;
  const float* row_sum = nullptr;  // sum over K of the values, for activations with a zero point

  int64_t tiles() const { return (n + kTileRows - 1) / kTileRows; }
  int64_t tile_bytes() const { return k / kTileColumns * 64 * bits; }
};

struct Activation {
  const void* x = nullptr;
  Type type = Type::fp32;
  int64_t tokens = 0, stride = 0;
  bool quantized = false, asymmetric = false;  // to int8
  bool float8 = false;          // to e4m3, a scale for each token: its values are numbers of bf16
  int64_t group = 0;            // columns that share a scale, 0: a token
  const float* scale = nullptr;  // a static one, or none
};

// One product, once the activation is packed.
struct Job {
  Weight w;
  Dot dot = Dot::fp32;
  int64_t tokens = 0;
  int splits = 1;           // rows of bf16 that one token became
  int block = 1;            // R
  int64_t columns = 0;      // worked on at once: whole segments
  int64_t segment = 0, segments = 0;
  int64_t scaled = 0;       // columns that share a scale that goes into the decoded panel; 0: none does
  // by block: words (K / 4 * steps, R), and for each segment R numbers
  uint32_t* words = nullptr;
  float* xscale = nullptr;
  int32_t* start = nullptr;  // what sums of integers begin with: -offset * sum of x
  float* xsum = nullptr;
  float* token_scale = nullptr;  // (tokens,) where a token has one scale; xscale is null then
  float* shift = nullptr;        // (tokens,) zero point * scale
  int64_t blocks() const { return (tokens * splits + block - 1) / block; }
  int64_t block_words() const { return w.k / 4 * kSteps[static_cast<int>(dot)] * block; }

  void* out = nullptr;
  Type out_type = Type::fp32;
  int64_t out_stride = 0;
  const void* bias = nullptr;
  Type bias_type = Type::fp32;
};

// What one instruction set offers. `few` serves blocks() == 1, `many` any number of blocks of kBlock rows.
struct Kernels {
  const char* name;
  bool has_bf16;
  int panel;  // tiles that `many` works on at a time
  void (*pack)(const Job&, const Activation&, int64_t block);
  void (*few)(const Job&, int64_t first_tile, int64_t last_tile);
  void (*many)(const Job&, int64_t first_panel, int64_t last_panel, void* scratch);
  int64_t (*scratch)(const Job&);
};

extern const Kernels kAvx2, kAvxVnni, kAvx512Vnni, kAvx512Bf16, kNeon, kNeonDot, kNeonI8mm;

const Kernels* pick_kernels(const char* wanted);  // "" for the best that this machine has; null: none

// rows.cpp
float element_value(int code, int ebits, int mbits, int bias, int specials, int bits, bool is_signed);
void decode_row(const Weight& w, int64_t row, float* out);

}  // namespace lowp
