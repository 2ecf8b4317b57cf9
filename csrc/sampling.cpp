// Sampling on the CPU: one row after the other on each thread. Definition and arithmetic: sampling.h.
//
// A first pass takes the maximum of each block of 64 logits. These bound what later passes need to look at: top_k skips
// blocks below the k-th largest maximum, and the draw those below the cut. Filters cut by a histogram of 1984 buckets (a
// 32nd of an octave each) and, inside the bucket where the cut falls, by selection: nothing is sorted. The draw inverts the
// distribution function: sums of blocks, then one block again.
#include "sampling.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <functional>
#include <optional>
#include <vector>

#ifdef WIKIGPT_CUDA
#include <torch/csrc/stable/accelerator.h>

#include "cuda_stream.h"
#endif

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define WIKIGPT_X86 1
#include <immintrin.h>
#endif

namespace wikigpt {
namespace sampling {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kBlock = 64;
constexpr int kDead = kOctaves * kBucketsPerOctave;  // the bucket of tokens that weigh nothing
constexpr int kBuckets = kDead + 1;

struct Candidate {
  uint64_t place, weight;
};

// What one thread needs beside the logits.
struct Scratch {
  std::vector<float> block_max, copy;
  std::vector<uint64_t> block_sum;
  std::vector<Candidate> candidates;
  uint32_t count[kBuckets];
  uint64_t mass[kBuckets];
};

namespace generic {
constexpr int VL = 4;
typedef float lanes __attribute__((vector_size(VL * 4)));
typedef int32_t mask __attribute__((vector_size(VL * 4)));
inline bool any(mask x) { return (x[0] | x[1] | x[2] | x[3]) != 0; }
inline lanes fma(lanes a, lanes b, lanes c) {
  lanes sum{};
  for (int i = 0; i < VL; ++i) sum[i] = std::fma(a[i], b[i], c[i]);
  return sum;
}
inline void halves(const uint16_t* in, float* out) {
  for (int i = 0; i < VL; ++i) out[i] = half_to_float(in[i]);
}
#include "sampling_kernel.h"
}  // namespace generic

#ifdef WIKIGPT_X86
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
namespace avx2 {
constexpr int VL = 8;
typedef __m256i mask;
inline bool any(mask x) { return _mm256_movemask_epi8(x) != 0; }
inline __m256 fma(__m256 a, __m256 b, __m256 c) { return _mm256_fmadd_ps(a, b, c); }
inline void halves(const uint16_t* in, float* out) {
  _mm256_storeu_ps(out, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in))));
}
#include "sampling_kernel.h"
}  // namespace avx2
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512vl,avx512bw,fma,f16c,prefer-vector-width=512")
namespace avx512 {
constexpr int VL = 16;
typedef __m512i mask;
inline bool any(mask x) { return _mm512_movepi32_mask(x) != 0; }
inline __m512 fma(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(a, b, c); }
inline void halves(const uint16_t* in, float* out) {
  // Halves of it, as GCC 12 warns of its own _mm512_cvtph_ps.
  for (int i = 0; i < VL; i += 8)
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i))));
}
#include "sampling_kernel.h"
}  // namespace avx512
#pragma GCC pop_options
#endif

template <auto sample_row, typename Logits>
void sample_rows_with(const Problem& p, int64_t first, int64_t last) {
  Scratch scratch;
  const int64_t row_bytes = p.stride * (p.dtype == Dtype::f32 ? 4 : 2);
  for (int64_t i = first; i < last; ++i) {
    const Logits logits{static_cast<const char*>(p.logits) + i * row_bytes, p.dtype, p.vocabulary};
    p.ids[i] = sample_row(logits, row_of(p, i), p.joint, scratch);
  }
}

using Rows = void (*)(const Problem&, int64_t, int64_t);

// The function for vectors of `lanes` floats (tests take each in turn), 0 for the widest; null where the processor has none.
Rows rows_for(int64_t lanes) {
#ifdef WIKIGPT_X86
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("f16c");
  if (has_avx512 && (lanes == 0 || lanes == avx512::VL)) return sample_rows_with<avx512::sample_row, avx512::Logits>;
  const bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (has_avx2 && (lanes == 0 || lanes == avx2::VL)) return sample_rows_with<avx2::sample_row, avx2::Logits>;
#endif
  return lanes == 0 || lanes == generic::VL ? sample_rows_with<generic::sample_row, generic::Logits> : nullptr;
}

// A tensor's numbers must not be read beyond their end, nor by another type: the checks of kernels/sampling.py, which name
// the user's argument, come first, and these keep a direct call of the operator inside its memory.
Real real(const char* name, const std::optional<Tensor>& rows, double value, int64_t batch) {
  if (!rows) return {nullptr, false, value};
  const bool is_double = rows->scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(is_double || rows->scalar_type() == ScalarType::Float, name, ": must be float32 or float64");
  STD_TORCH_CHECK(rows->dim() == 1 && rows->size(0) == batch && rows->is_contiguous(), name, ": must be (", batch, ")");
  return {rows->const_data_ptr(), is_double, 0.0};
}

Integer integer(const char* name, const std::optional<Tensor>& rows, int64_t value, int64_t batch) {
  if (!rows) return {nullptr, 0, value};
  STD_TORCH_CHECK(rows->scalar_type() == ScalarType::Long, name, ": must be int64");
  STD_TORCH_CHECK(
      rows->dim() <= 1 && (rows->numel() == 1 || rows->numel() == batch) && rows->is_contiguous(), name,
      ": must have 1 or ", batch, " numbers");
  return {static_cast<const int64_t*>(rows->const_data_ptr()), rows->numel() == 1 ? 0 : 1, 0};
}

// Token ids (batch) int64 of logits (batch, vocabulary). Each parameter is a tensor or, where that is absent, a number.
Tensor sample(
    const Tensor& logits, const std::optional<Tensor>& temperature, double temperature_value,
    const std::optional<Tensor>& top_k, int64_t top_k_value, const std::optional<Tensor>& top_p, double top_p_value,
    const std::optional<Tensor>& min_p, double min_p_value, const std::optional<Tensor>& seed, int64_t seed_value,
    const std::optional<Tensor>& offset, int64_t offset_value, bool joint, int64_t lanes) {
  const ScalarType dtype = logits.scalar_type();
  STD_TORCH_CHECK(
      dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16,
      "logits: must be float32, float16 or bfloat16");
  STD_TORCH_CHECK(logits.dim() == 2 && (logits.stride(1) == 1 || logits.size(1) == 1), "logits: must have rows without gaps");
  const int64_t batch = logits.size(0);
  STD_TORCH_CHECK(logits.size(1) >= 1 && logits.size(1) <= kMaxVocabulary, "logits: no such vocabulary");
  for (const auto* parameter : {&temperature, &top_k, &top_p, &min_p, &seed, &offset})
    STD_TORCH_CHECK(
        !*parameter || ((*parameter)->is_cuda() == logits.is_cuda() &&
                        (*parameter)->get_device_index() == logits.get_device_index()),
        "a parameter is on another device than logits");
  Tensor ids = torch::stable::empty({&batch, 1}, ScalarType::Long, std::nullopt, logits.device());
  Problem p{};
  p.logits = logits.const_data_ptr();
  p.dtype = dtype == ScalarType::Float ? Dtype::f32 : dtype == ScalarType::Half ? Dtype::f16 : Dtype::bf16;
  p.batch = batch, p.vocabulary = logits.size(1), p.stride = logits.stride(0);
  p.temperature = real("temperature", temperature, temperature_value, batch);
  p.top_k = integer("top_k", top_k, top_k_value, batch);
  p.top_p = real("top_p", top_p, top_p_value, batch);
  p.min_p = real("min_p", min_p, min_p_value, batch);
  p.seed = integer("seed", seed, seed_value, batch);
  p.offset = integer("offset", offset, offset_value, batch);
  p.joint = joint;
  p.ids = static_cast<int64_t*>(ids.mutable_data_ptr());
  if (batch == 0) return ids;
#ifdef WIKIGPT_CUDA
  if (logits.is_cuda()) {
    STD_TORCH_CHECK(batch <= INT32_MAX, "logits: ", batch, " rows, allowed on a GPU are as many as a launch has blocks");
    const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
    const char* error = launch_sampling(p, current_cuda_stream(logits.get_device_index()));
    STD_TORCH_CHECK(error == nullptr, "sample: ", error);
    return ids;
  }
#endif
  const Rows rows = rows_for(lanes);
  STD_TORCH_CHECK(rows != nullptr, "lanes: this processor has no vectors of ", lanes, " floats");
  const int64_t grain = std::max<int64_t>(1, 32768 / p.vocabulary);
  torch::stable::parallel_for(0, batch, grain, [&](int64_t first, int64_t last) { rows(p, first, last); });
  return ids;
}

}  // namespace
}  // namespace sampling
}  // namespace wikigpt

STABLE_TORCH_LIBRARY_FRAGMENT(wikigpt, m) {
  m.def(
      "sample_rows(Tensor logits, Tensor? temperature, float temperature_value, Tensor? top_k, int top_k_value, "
      "Tensor? top_p, float top_p_value, Tensor? min_p, float min_p_value, Tensor? seed, int seed_value, Tensor? offset, "
      "int offset_value, bool joint, int lanes) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(wikigpt, CPU, m) { m.impl("sample_rows", TORCH_BOX(&wikigpt::sampling::sample)); }
#ifdef WIKIGPT_CUDA
STABLE_TORCH_LIBRARY_IMPL(wikigpt, CUDA, m) { m.impl("sample_rows", TORCH_BOX(&wikigpt::sampling::sample)); }
#endif
