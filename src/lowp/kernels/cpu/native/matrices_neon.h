// Many rows of x times bytes by the matrix instructions of AArch64 (i8mm): smmla multiplies 2 rows x 8 columns of bytes by another
// 2 x 8 into 2 x 2 sums, twice the work of a dot product.
//
//     weights   two lines (quads q and q + 1 of 16 rows) become 8 pairs of rows x 8 columns, once for each panel
//     x         tokens by twos; a block of 5 has a pair with the last token twice, whose second half is left
//
// Included by product.h, after `block_times_lines`, of which this is the one for bytes in panels.
#pragma once

namespace {

// Lines by twos, 128 bytes: word r of the one beside word r of the other.
inline void pair_lines(uint8_t* lines, int64_t count) {
  for (int64_t i = 0; i < count; i += 2, lines += 128) {
    const Lanes::W one = Lanes::load(lines), other = Lanes::load(lines + 64);
    for (int r = 0; r < 4; r++) {
      const uint32x4_t a = vreinterpretq_u32_u8(one.v[r]), b = vreinterpretq_u32_u8(other.v[r]);
      vst1q_u8(lines + 32 * r, vreinterpretq_u8_u32(vzip1q_u32(a, b)));
      vst1q_u8(lines + 32 * r + 16, vreinterpretq_u8_u32(vzip2q_u32(a, b)));
    }
  }
}

// Tokens 2 p and 2 p + 1 of R, 8 columns each.
template <int R, int P>
LOWP_INLINE inline int8x16_t pair_of_tokens(const uint32_t* words) {
  constexpr bool alone = 2 * P + 1 == R;
  const uint32x2_t a = alone ? vld1_dup_u32(words + 2 * P) : vld1_u32(words + 2 * P);
  const uint32x2_t b = alone ? vld1_dup_u32(words + R + 2 * P) : vld1_u32(words + R + 2 * P);
  return vreinterpretq_s8_u32(vcombine_u32(vzip1_u32(a, b), vzip2_u32(a, b)));
}

// The sums of a segment: for each pair of tokens 8 registers, (token, token + 1) x (row, row + 1).
template <int R>
LOWP_INLINE inline void sum_pairs(const uint8_t* lines, const uint32_t* words, int64_t columns, Lanes::I* by_token) {
  constexpr int Pairs = (R + 1) / 2;
  int32x4_t sums[Pairs][8];
  unroll<0, Pairs>([&](auto p) LOWP_INLINE {
    unroll<0, 8>([&](auto r) LOWP_INLINE { sums[p.value][r.value] = vdupq_n_s32(0); });
  });
  for (int64_t i = 0; i < columns; i += 8, lines += 128, words += 2 * R) {
    int8x16_t x[Pairs];
    unroll<0, Pairs>([&](auto p) LOWP_INLINE { x[p.value] = pair_of_tokens<R, p.value>(words); });
    unroll<0, 8>([&](auto r) LOWP_INLINE {
      const int8x16_t w = vreinterpretq_s8_u8(vld1q_u8(lines + 16 * r.value));
      unroll<0, Pairs>([&](auto p) LOWP_INLINE { sums[p.value][r.value] = vmmlaq_s32(sums[p.value][r.value], x[p.value], w); });
    });
  }
  unroll<0, R>([&](auto token) LOWP_INLINE {
    constexpr int t = token.value;
    unroll<0, 4>([&](auto i) LOWP_INLINE {
      const int64x2_t a = vreinterpretq_s64_s32(sums[t / 2][2 * i.value]), b = vreinterpretq_s64_s32(sums[t / 2][2 * i.value + 1]);
      by_token[t].v[i.value] = vreinterpretq_s32_s64(t % 2 ? vzip2q_s64(a, b) : vzip1q_s64(a, b));
    });
  });
}

template <>
void block_times_lines<OfBytes, lowp::kBlock, 1, 1, false>(const Job& job, int64_t block, int64_t first, int64_t segments,
                                                           const uint8_t* lines, const float* scales, const float* zeros, float* total) {
  constexpr int R = lowp::kBlock;
  const uint32_t* words = job.words + block * job.block_words() + first * job.segment / 4 * R;
  for (int64_t s = 0; s < segments; s++) {
    const int64_t place = (block * job.segments + first + s) * R, left = job.w.k - (first + s) * job.segment;
    const int64_t columns = left < job.segment ? left : job.segment;
    Lanes::I sums[R];
    sum_pairs<R>(lines, words, columns, sums);
    lines += columns * 16;
    words += columns / 4 * R;
    const Lanes::F scale = Lanes::load_f(scales + 16 * s);
    unroll<0, R>([&](auto r) LOWP_INLINE {
      const int64_t at = place + r.value;
      Lanes::F value = Lanes::to_float(Lanes::add(sums[r.value], Lanes::spread(job.start[at])));
      if (job.w.zero) value = Lanes::fnma(Lanes::load_f(zeros + 16 * s), Lanes::spread(job.xsum[at]), value);
      if (job.xscale) value = Lanes::mul(value, Lanes::spread(job.xscale[at]));
      float* to = total + 16 * r.value;
      Lanes::store_f(to, Lanes::fma(value, scale, Lanes::load_f(to)));
    });
  }
}

}  // namespace
