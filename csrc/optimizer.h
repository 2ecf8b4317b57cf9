// Adam and AdamW over lists of tensors: what the operators (optimizer.cpp), the loops of the CPU (optimizer_kernel.h) and the
// GPU's kernels (optimizer.cu) share. Needs no torch header.
//
// For every element, in float32 (float64 for float64 parameters), with t the step after this one:
//   g  = grad / grad_scale * min(1, max_norm / (norm + 1e-6)), negated to maximize
//   g += weight_decay * w                       (Adam; AdamW: w loses lr * weight_decay * w below)
//   m  = beta1 m + (1 - beta1) g;  v = beta2 v + (1 - beta2) g^2;  with amsgrad u = max(u, v), else u = v
//   w -= lr / (1 - beta1^t) * m / (sqrt(u) / sqrt(1 - beta2^t) + eps) + lr * weight_decay * w
//   ema = ema_decay ema + (1 - ema_decay) w
// grad itself becomes 0 (zero_grad), else grad / grad_scale where there is one, as torch's fused optimizers leave it.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "shared.h"

namespace wikigpt {
namespace optimizer {

enum class Dtype : uint8_t { f32, f16, bf16, f64 };

// One parameter. master: float32, where the parameter has 16 bits; null pointers for what is not kept.
struct Entry {
  void *param, *grad, *exp_avg, *exp_avg_sq, *max_exp_avg_sq, *master, *ema;
  float* step;
  int64_t numel;
  uint32_t index;   // of the parameter in its optimizer: rounding draws other bits for each
  uint16_t group;
  uint16_t vector;  // whether all pointers are aligned for vector loads
};

struct Group {
  const void* lr_tensor;  // on the device, in place of lr
  double lr, beta1, beta2, log_beta1, log_beta2, eps, weight_decay;
  bool lr_is_double, maximize;
};

// What all tensors of one launch share.
struct Options {
  const void* norm;  // of all gradients, or null
  const float *grad_scale, *found_inf;
  double max_norm, ema_decay;
  uint32_t seed;
  bool norm_is_double, decoupled, zero_grad, stochastic;
};

template <typename T>
constexpr T kLargest = std::numeric_limits<T>::max();

// decay * old + (1 - decay) * x with one rounded coefficient w, the smaller one: as old - w old + w x, or x - w x + w old. So
// neither a slow average (the sum of two rounded coefficients would not be 1) nor a fast one loses digits. No difference of old
// and x is taken, which could overflow.
template <typename T>
struct Average {
  T weight;
  bool fast;
  WIKIGPT_SHARED Average(double decay) : weight(T(decay > 0.5 ? 1 - decay : -decay)), fast(decay <= 0.5) {}
  WIKIGPT_SHARED T operator()(T old, T x) const {
    return weight * x + (fast ? x : T(0)) + ((fast ? T(0) : old) - weight * old);
  }
  // Of x^2. Where even (1 - decay) x^2 leaves T the average is infinite from then on, and the step of that element 0, as in
  // torch.optim: an infinite `old` must not meet its own negative, which would be NaN.
  WIKIGPT_SHARED T of_square(T old, T x) const {
    const T part = old < kLargest<T> || weight < 0 ? old : kLargest<T>;
    return (weight * x + (fast ? x : T(0))) * x + ((fast ? T(0) : old) - weight * part);
  }
};

// A parameter of -inf stays one, as in torch.optim, where decay would make it NaN.
template <typename T>
WIKIGPT_SHARED T stepped(T w, T change) {
  return w < -kLargest<T> || w > kLargest<T> ? w : w - change;
}

// The numbers of a step for one parameter, rounded once from float64.
template <typename T>
struct Coefficients {
  T grad, l2, step_size, denominator, eps, decay;
  Average<T> first, second, ema;

  WIKIGPT_SHARED Coefficients(const Group& group, const Options& options, double lr, float step, T grad_scale)
      : grad(group.maximize ? -grad_scale : grad_scale),
        l2(T(options.decoupled ? 0.0 : group.weight_decay)),
        // 1 - beta^t as -expm1(t log beta): full precision without pow.
        step_size(T(lr) / -expm1_(T(step) * T(group.log_beta1))),
        denominator(T(1) / sqrt_(-expm1_(T(step) * T(group.log_beta2)))),
        eps(T(group.eps)),
        decay(T(options.decoupled ? lr * group.weight_decay : 0.0)),
        first(group.beta1),
        second(group.beta2),
        ema(options.ema_decay) {}

 private:
  static WIKIGPT_SHARED float expm1_(float x) { return expm1f(x); }
  static WIKIGPT_SHARED double expm1_(double x) { return expm1(x); }
  static WIKIGPT_SHARED float sqrt_(float x) { return sqrtf(x); }
  static WIKIGPT_SHARED double sqrt_(double x) { return sqrt(x); }
};

// The factor of all gradients. A norm that is not finite gives 0 or NaN, as in torch.nn.utils.clip_grad_norm_.
WIKIGPT_SHARED double gradient_factor(const Options& o) {
  double factor = 1;
  if (o.norm != nullptr) {
    const double norm = o.norm_is_double ? *static_cast<const double*>(o.norm) : *static_cast<const float*>(o.norm);
    factor = o.max_norm / (norm + 1e-6);
    if (factor > 1) factor = 1;
  }
  return o.grad_scale != nullptr ? factor / *o.grad_scale : factor;
}

WIKIGPT_SHARED double learning_rate(const Group& group) {
  if (group.lr_tensor == nullptr) return group.lr;
  return group.lr_is_double ? *static_cast<const double*>(group.lr_tensor) : *static_cast<const float*>(group.lr_tensor);
}

// --- stochastic rounding of float32 to bfloat16 ---

// What is rounded: 16 random bits for each element of each.
enum Stream : uint32_t { kParam, kExpAvg, kExpAvgSq };

// 128 bits for elements [8 block, 8 block + 8): element 8 block + j takes half j % 2 of word j / 2, low half first.
// Philox4x32-7 (Salmon et al. 2011), key (seed, step), counter (block, parameter, stream).
WIKIGPT_SHARED Words random_bits(uint32_t seed, uint32_t step, uint32_t index, uint32_t stream, int64_t block) {
  return philox<7>(uint32_t(block), uint32_t(uint64_t(block) >> 32), index, stream, seed, step);
}

// The 16 bits that bfloat16 drops decide, against 16 random ones, whether the rest goes up: right on average. NaN and
// infinities stay; a number that would become infinite by rounding to nearest may.
WIKIGPT_SHARED uint16_t round_stochastically(uint32_t bits, uint32_t random) {
  const bool finite = (bits & 0x7F800000u) != 0x7F800000u;
  const uint16_t up = uint16_t((bits + random) >> 16);
  const uint16_t other = uint16_t(bits >> 16) | uint16_t((bits & 0x7FFFFFu) != 0 ? 0x40 : 0);  // a NaN stays one
  return finite ? up : other;
}

// --- CUDA (optimizer.cu). Return a cudaError_t. ---

// Sums of squares of gradients of one dtype, one for each chunk, into partials[before...]. Where these are the last ones,
// `result` (float or double) gets the norm: the root of the sum of all partials, divided by grad_scale.
int64_t cuda_norm_chunks(int64_t numel);
int cuda_norm(
    const Entry* entries, int count, Dtype dtype, double* partials, int64_t before, bool last, const float* grad_scale,
    void* result, bool result_is_double, uint32_t* ticket, void* stream);

int cuda_update(
    const Entry* entries, int count, const Group* groups, int group_count, const Options& options, Dtype param, Dtype state,
    uint32_t* ticket, void* stream);

}  // namespace optimizer
}  // namespace wikigpt
