// Sampling: what the CPU (sampling.cpp) and the GPU (sampling.cu) share. Needs no torch header.
//
// A row of logits l with maximum m gets integer weights
//   W = floor(2^bits * 2^-a),   a = (m - l) * log2(e) / temperature  in float32,
// so that sums of weights depend on no order, and the same operations, each rounded once, make the same W on every device:
// one (seed, offset) gives one token, on a CPU or a GPU, with any number of threads.
//
// a also gives the bucket of a token, floor(32 a). Buckets hold tokens in the order of their logits, and all weights of a
// bucket have the same power of two, 2^-(bucket / 32).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "shared.h"

namespace wikigpt {
namespace sampling {

// One number for all rows, or one for each (float32 or float64).
struct Real {
  const void* rows;
  bool is_double;
  double value;
  WIKIGPT_SHARED double at(int64_t row) const {
    if (rows == nullptr) return value;
    return is_double ? static_cast<const double*>(rows)[row] : static_cast<const float*>(rows)[row];
  }
};

// The same, of 64-bit integers; stride 0 where a tensor has one number for all rows.
struct Integer {
  const int64_t* rows;
  int64_t stride, value;
  WIKIGPT_SHARED int64_t at(int64_t row) const { return rows == nullptr ? value : rows[row * stride]; }
};

enum class Dtype { f32, f16, bf16 };

struct Problem {
  const void* logits;
  Dtype dtype;
  int64_t batch, vocabulary, stride;  // stride: elements from one row to the next
  Real temperature, top_p, min_p;
  Integer top_k, seed, offset;
  bool joint;   // top_p counts the mass of the whole row, not of what top_k left
  int64_t* ids;  // (batch); -1 for a row that is no distribution
};

constexpr int64_t kMaxVocabulary = int64_t{1} << 30;
constexpr int kOctaveShift = 5;
constexpr int kBucketsPerOctave = 1 << kOctaveShift;
constexpr int kOctaves = 62;  // a token that is 2^62 times less likely than the best weighs 0
constexpr int kMantissaBits = 23;

// The parameters of one row as the algorithm uses them.
struct Row {
  bool valid, greedy;
  float scale;           // log2(e) / temperature
  int64_t top_k;         // at most the vocabulary, which is no filter
  bool has_top_p;
  uint64_t top_p;        // the fraction times 2^64
  uint64_t least_weight;  // min_p
  uint64_t random;
};

// 2^bits is the weight of the likeliest token: the sum over the vocabulary stays below 2^63.
WIKIGPT_SHARED int weight_bits(int64_t vocabulary) {
  int bits = 63;
  while (bits > 0 && (int64_t{1} << (63 - bits)) < vocabulary) --bits;
  return bits < 60 ? bits : 60;
}

// The first 64 bits of Philox4x32-10, key seed, counter (offset, row).
WIKIGPT_SHARED uint64_t random_bits(uint64_t seed, uint64_t offset, uint64_t row) {
  const Words bits = philox<10>(
      static_cast<uint32_t>(offset), static_cast<uint32_t>(offset >> 32), static_cast<uint32_t>(row),
      static_cast<uint32_t>(row >> 32), static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
  return uint64_t{bits.word[1]} << 32 | bits.word[0];
}

WIKIGPT_SHARED Row row_of(const Problem& p, int64_t i) {
  const double temperature = p.temperature.at(i), top_p = p.top_p.at(i), min_p = p.min_p.at(i);
  const int64_t top_k = p.top_k.at(i);
  Row row;
  row.valid = temperature >= 0.0 && temperature <= 1.7976931348623157e308 && top_k >= 1 && top_p > 0.0 && top_p <= 1.0 &&
      min_p >= 0.0 && min_p <= 1.0;
  row.greedy = temperature == 0.0;
  // Within float32's normal numbers, so that 0 * scale is 0 and -inf * scale is -inf.
  double scale = 1.4426950408889634 / (temperature > 1e-30 ? temperature : 1e-30);
  row.scale = static_cast<float>(scale > 1.2e-38 ? scale : 1.2e-38);
  row.top_k = top_k < p.vocabulary ? top_k : p.vocabulary;
  row.has_top_p = top_p < 1.0;
  row.top_p = row.valid && row.has_top_p ? static_cast<uint64_t>(top_p * 18446744073709551616.0) : 0;
  const double least = min_p * static_cast<double>(uint64_t{1} << weight_bits(p.vocabulary));
  row.least_weight = 0;
  if (row.valid) {
    row.least_weight = static_cast<uint64_t>(least);
    row.least_weight += static_cast<double>(row.least_weight) < least;
  }
  // A seed of its own makes a row's token independent of its place in the batch.
  const bool own_seed = p.seed.rows != nullptr && p.seed.stride != 0;
  row.random = random_bits(
      static_cast<uint64_t>(p.seed.at(i)), static_cast<uint64_t>(p.offset.at(i)), own_seed ? 0 : static_cast<uint64_t>(i));
  return row;
}

WIKIGPT_SHARED uint64_t high_product(uint64_t a, uint64_t b) {
#ifdef __CUDA_ARCH__
  return __umul64hi(a, b);
#else
  return static_cast<uint64_t>(static_cast<unsigned __int128>(a) * b >> 64);
#endif
}

// ceil(fraction * total), at least 1: what top_p's tokens must weigh together.
WIKIGPT_SHARED uint64_t mass_to_reach(uint64_t total, uint64_t fraction) {
  const uint64_t whole = high_product(total, fraction) + (total * fraction != 0);
  return whole > 0 ? whole : 1;
}

WIKIGPT_SHARED uint32_t bits_of(float x) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(x);
#else
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
#endif
}

WIKIGPT_SHARED float float_of(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
#endif
}

// A token's place in the order of the filters, as one integer: the larger logit first, of equal ones the lower index.
WIKIGPT_SHARED uint64_t place_of(float logit, uint32_t index) {
  uint32_t bits = bits_of(logit);
  if (bits == 0x80000000u) bits = 0;  // -0 equals +0
  const uint32_t descending = bits & 0x80000000u ? bits : ~bits & 0x7FFFFFFFu;
  return uint64_t{descending} << 32 | index;
}

WIKIGPT_SHARED float logit_of(uint64_t place) {
  const uint32_t descending = static_cast<uint32_t>(place >> 32);
  return float_of(descending & 0x80000000u ? descending : ~descending & 0x7FFFFFFFu);
}

// What the filters keep: places up to `last`.
struct Kept {
  float logit;
  uint32_t index;
  WIKIGPT_SHARED explicit Kept(uint64_t last) : logit(logit_of(last)), index(static_cast<uint32_t>(last)) {}
  WIKIGPT_SHARED bool has(float x, uint32_t i) const { return x > logit || (x == logit && i <= index); }
};

// The place behind all others: that of -inf.
constexpr uint64_t kEverything = uint64_t{0xFF800000u} << 32 | INT32_MAX;

// A product that no compiler merges with a later sum.
WIKIGPT_SHARED float product(float x, float y) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(x, y);
#else
  float z = x * y;
#if defined(__x86_64__) && defined(__GNUC__)
  __asm__("" : "+x"(z));
#elif defined(__aarch64__) && defined(__GNUC__)
  __asm__("" : "+w"(z));
#endif
  return z;
#endif
}

// 2^-r * 2^23 for 0 <= r < 1 is kC0 + r (kC1 + r (kC2 + ...)); relative error 2e-9.
constexpr float kC1 = -0x1.62e42cp+22f, kC2 = 0x1.ebfacp+20f, kC3 = -0x1.c6948ep+18f, kC4 = 0x1.39e3fcp+16f,
                kC5 = -0x1.4e2aeap+13f, kC6 = 0x1.c946dp+9f;
// The last step adds 2^23 once more: floats from there to 2^24 are the integers.
constexpr float kC0 = 16777216.0f;
constexpr int32_t kIntegers = 0x4B000000;  // the bits of 2^23

// How the logits of one row become weights.
struct Weights {
  float top, scale;
  int bits;

  // Octaves below the top, 0 or more.
  WIKIGPT_SHARED float octaves(float logit) const { return product(top - logit, scale); }

  static WIKIGPT_SHARED int bucket(float octaves) {
#ifdef __CUDA_ARCH__
    // At 2^18 the last bit of a float is 1/32.
    return __float_as_int(__fadd_rd(octaves, 262144.0f)) - 0x48800000;
#else
    return static_cast<int>(octaves * kBucketsPerOctave);
#endif
  }

  // 2^-fraction * 2^23, rounded: from 2^22 to 2^23.
  static WIKIGPT_SHARED uint32_t mantissa(float octaves, int bucket) {
    const float r = octaves - static_cast<float>(bucket >> kOctaveShift);
#ifdef __CUDA_ARCH__
    const auto step = [r](float h, float c) { return __fmaf_rn(h, r, c); };
#else
    const auto step = [r](float h, float c) { return std::fma(h, r, c); };
#endif
    const float x = step(step(step(step(step(step(kC6, kC5), kC4), kC3), kC2), kC1), kC0);
    return bits_of(x) - kIntegers;
  }

  // The mantissas of a bucket, shifted right by `down` and left by `up`, are its weights.
  WIKIGPT_SHARED int up(int bucket) const {
    const int by = bits - kMantissaBits - (bucket >> kOctaveShift);
    return by > 0 ? by : 0;
  }
  WIKIGPT_SHARED int down(int bucket) const {
    const int by = (bucket >> kOctaveShift) - (bits - kMantissaBits);
    return by > 0 ? by : 0;
  }

  WIKIGPT_SHARED uint64_t of(float logit) const {
    const float a = octaves(logit);
    if (!(a < kOctaves)) return 0;
    const int b = bucket(a);
    return (uint64_t{mantissa(a, b)} << (bits - kMantissaBits)) >> (b >> kOctaveShift);
  }
};

WIKIGPT_SHARED float half_to_float(uint16_t half) {
#ifdef __CUDA_ARCH__
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(half));
  return x;
#else
  const uint32_t sign = uint32_t{half & 0x8000u} << 16, rest = half & 0x7FFFu;
  if (rest >= 0x7C00u) return float_of(sign | 0x7F800000u | (rest & 0x3FFu) << 13);
  // 2^-14 and below: exact as an integer times 2^-24.
  if (rest < 0x400u) return float_of(sign | bits_of(static_cast<float>(rest) * 0x1p-24f));
  return float_of(sign | ((rest << 13) + (112u << 23)));
#endif
}

}  // namespace sampling

// Starts the kernel (sampling.cu); returns null or CUDA's error message. No argument is checked.
const char* launch_sampling(const sampling::Problem& problem, void* stream);

}  // namespace wikigpt
