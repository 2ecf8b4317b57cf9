// The kernel of csrc/sampling.cu, run on the CPU: tests/test_sampling.py compares its tokens with those of csrc/sampling.cpp.
#include "emulated_cuda.h"

#define WIKIGPT_WARPS 3
#include "../csrc/sampling.cu"

namespace {

template <typename T>
void run(const wikigpt::sampling::Problem& p, unsigned order) {
  for (int64_t i = 0; i < p.batch; ++i) {
    blockIdx.x = static_cast<unsigned>(i);
    emulated::run(wikigpt::sampling::kThreads, order, [&] { wikigpt::sampling::sample_rows<T>(p); });
  }
}

}  // namespace

// dtype: 0 float32, 1 float16, 2 bfloat16.
extern "C" void emulated_sampling(
    const void* logits, int dtype, int64_t batch, int64_t vocabulary, int64_t stride, const double* temperature,
    const int64_t* top_k, const double* top_p, const double* min_p, int64_t seed, int64_t offset, int joint, unsigned order,
    int64_t* ids) {
  using namespace wikigpt::sampling;
  Problem p{};
  p.logits = logits, p.dtype = static_cast<Dtype>(dtype);
  p.batch = batch, p.vocabulary = vocabulary, p.stride = stride;
  p.temperature = {temperature, true, 0.0}, p.top_p = {top_p, true, 0.0}, p.min_p = {min_p, true, 0.0};
  p.top_k = {top_k, 1, 0}, p.seed = {nullptr, 0, seed}, p.offset = {nullptr, 0, offset};
  p.joint = joint != 0, p.ids = ids;
  if (p.dtype == Dtype::f32)
    run<float>(p, order);
  else if (p.dtype == Dtype::f16)
    run<Half>(p, order);
  else
    run<BFloat16>(p, order);
}
