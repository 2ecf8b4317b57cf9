// Linear layer + cross-entropy on the CPU, with its gradients, without the (tokens x vocabulary) matrix of logits.
//
// Tokens go in chunks whose logits fit 64 MiB. Each thread owns a range of vocabulary tiles. Pass 1 makes the logits of a
// tile, stores their exponentials and keeps a running maximum and sum of them per token (online softmax); when every tile
// is done the log-sum-exp is known, and pass 2 scales each tile to d loss / d logits and multiplies it, still in cache, into
// dW (owned by the thread) and dH (a partial sum per thread, added in thread order: the result repeats bit for bit for a
// given number of threads). 2 reads of W and 3 matrix products in all, the least there is without keeping the logits.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <iterator>
#include <limits>
#include <numeric>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

namespace wikigpt {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr uint16_t kMinusInfinity = 0xff80;            // in bf16
constexpr int64_t kTileRows = 96;                      // vocabulary rows of a tile: 96 x 128 features are 48 KiB
constexpr int64_t kChainLength = 256;                  // products of a logit that are added without a pause
constexpr int64_t kChunkRows = 256;                    // tokens of a chunk at most
constexpr int64_t kChunkBytes = int64_t{64} << 20;     // logits of a chunk at most

struct Problem {
  int64_t n, d, v;
  const float* input_f32;          // (n, d), or null
  const BFloat16* input_bf16;      // (n, d), or null
  const float* weight;             // (v, d)
  const float* bias;               // (v) or null
  const int64_t* target;           // (n)
  float label_smoothing, z_loss;
  float* d_weight;                 // (v, d) or null
  float* d_bias;                   // (v) or null
  float input(int64_t row, int64_t column) const {
    return input_f32 ? input_f32[row * d + column] : static_cast<float>(input_bf16[row * d + column]);
  }
};

struct Chunk {
  int64_t begin, count, rows;                 // tokens [begin, begin + count), padded to `rows`
  float *h_by_token, *h_by_feature;           // panels [rows / NR][d][NR] and [d / NR][rows][NR]
  float *target_logit, *lse, *softmax_scale;  // (rows)
  float *shift, *target_scale;                // (rows)
};

struct Tile {
  int64_t begin, rows;
};

struct Running {
  float *max, *sum, *total;  // (chunk rows) of one thread
};

struct Kernels {
  const char* name;
  int64_t lanes;
  void (*pack)(const Problem&, const Chunk&);
  void (*forward_tile)(const Problem&, const Chunk&, const Tile&, float*, float*, Running&);
  void (*backward_tile)(const Problem&, const Chunk&, const Tile&, const float*, const float*, float*, float*, bool);
  void (*row_sums)(const uint16_t*, int64_t, bool, float*, float&, double&, double&);
  void (*row_gradient)(uint16_t*, int64_t, const float*, float, float, float);
};

namespace generic {
constexpr int VL = 4, MR = 6;
#include "linear_cross_entropy_kernel.h"
constexpr Kernels kernels{"generic", NR, pack, forward_tile, backward_tile, row_sums, row_gradient};
}  // namespace generic

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define WIKIGPT_X86 1
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
constexpr int VL = 8, MR = 6;
#include "linear_cross_entropy_kernel.h"
constexpr Kernels kernels{"avx2", NR, pack, forward_tile, backward_tile, row_sums, row_gradient};
}  // namespace avx2
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512vl,avx512bw,fma,prefer-vector-width=512")
namespace avx512 {
constexpr int VL = 16, MR = 12;
#include "linear_cross_entropy_kernel.h"
constexpr Kernels kernels{"avx512", NR, pack, forward_tile, backward_tile, row_sums, row_gradient};
}  // namespace avx512
#pragma GCC pop_options
#endif

const Kernels& kernels() {
#ifdef WIKIGPT_X86
  static const Kernels& chosen = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw")
      ? avx512::kernels
      : __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? avx2::kernels : generic::kernels;
  return chosen;
#else
  return generic::kernels;
#endif
}

// Returns per-token loss (n) and log-sum-exp (n) in float32, and, where row_grad (d objective / d loss, one per token) is
// given, the gradients that are asked for; the others are empty tensors. Users meet the checks of kernels/ first; these keep
// a direct call of the operator inside its memory.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> linear_cross_entropy(
    const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& target,
    const std::optional<Tensor>& row_grad, int64_t ignore_index, double label_smoothing, double z_loss,
    bool need_input_grad, bool need_weight_grad, bool need_bias_grad) {
  STD_TORCH_CHECK(input.dim() == 2 && weight.dim() == 2 && target.dim() == 1, "expected (n, d), (v, d) and (n)");
  STD_TORCH_CHECK(input.size(1) == weight.size(1) && input.size(0) == target.size(0), "sizes do not match");
  STD_TORCH_CHECK(
      input.scalar_type() == ScalarType::Float || input.scalar_type() == ScalarType::BFloat16,
      "input must be float32 or bfloat16");
  STD_TORCH_CHECK(weight.scalar_type() == ScalarType::Float, "weight must be float32");
  STD_TORCH_CHECK(target.scalar_type() == ScalarType::Long, "target must be int64");
  const int64_t n = input.size(0), d = input.size(1), v = weight.size(0);
  STD_TORCH_CHECK(!bias || bias->numel() == v, "bias must be (v)");
  STD_TORCH_CHECK(!row_grad || row_grad->numel() == n, "row_grad must be (n)");
  const Kernels& k = kernels();
  const auto floats = [](const std::optional<Tensor>& t) -> std::optional<Tensor> {
    return t ? std::optional(contiguous(to(*t, ScalarType::Float))) : std::nullopt;
  };
  const Tensor x = contiguous(input), w = contiguous(weight), y = contiguous(target);
  const std::optional<Tensor> b = floats(bias), g = floats(row_grad);
  const bool gradients = g.has_value();

  const auto make = [](std::initializer_list<int64_t> size, ScalarType dtype = ScalarType::Float) {
    return torch::stable::empty({size.begin(), size.size()}, dtype);
  };
  Tensor loss = make({n}), lse = make({n});
  const bool wants_dh = gradients && need_input_grad, wants_dw = gradients && need_weight_grad;
  const bool wants_db = gradients && need_bias_grad && b;
  Tensor d_input = wants_dh ? make({n, d}, x.scalar_type()) : make({0}, x.scalar_type());
  Tensor d_weight = wants_dw ? make({v, d}) : make({0});
  Tensor d_bias = wants_db ? make({v}) : make({0});
  if (n == 0) {  // No tile is ever written.
    zero_(d_weight);
    zero_(d_bias);
    return {loss, lse, d_input, d_weight, d_bias};
  }

  Problem p{};
  p.n = n, p.d = d, p.v = v;
  p.input_f32 = x.scalar_type() == ScalarType::Float ? x.const_data_ptr<float>() : nullptr;
  p.input_bf16 = x.scalar_type() == ScalarType::BFloat16 ? x.const_data_ptr<BFloat16>() : nullptr;
  p.weight = w.const_data_ptr<float>();
  p.bias = b ? b->const_data_ptr<float>() : nullptr;
  p.target = y.const_data_ptr<int64_t>();
  p.label_smoothing = static_cast<float>(label_smoothing);
  p.z_loss = static_cast<float>(z_loss);
  p.d_weight = wants_dw ? d_weight.mutable_data_ptr<float>() : nullptr;
  p.d_bias = wants_db ? d_bias.mutable_data_ptr<float>() : nullptr;
  for (int64_t i = 0; i < n; ++i)
    STD_TORCH_CHECK(
        p.target[i] == ignore_index || (p.target[i] >= 0 && p.target[i] < v), "target: token ", i, " is ", p.target[i],
        ", allowed: 0 to ", v - 1, ", or ignore_index ", ignore_index);

  const auto lanes = [&](int64_t rows) { return (rows + k.lanes - 1) / k.lanes * k.lanes; };
  const int64_t fit = std::max<int64_t>(kChunkBytes / 4 / v / k.lanes * k.lanes, k.lanes);
  const int64_t rows = std::min({kChunkRows, lanes(n), fit});
  const int64_t d_panels = lanes(d), tiles = (v + kTileRows - 1) / kTileRows;
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), tiles);

  // One allocation for all scratch.
  const int64_t tile_of_each = threads * rows * kTileRows;
  const int64_t pieces[] = {
      gradients ? rows * v : tile_of_each,  // logits
      wants_dh ? threads * rows * d : 0,
      threads * 3 * rows,  // running
      tiles * rows,        // tile_max
      gradients ? tile_of_each : 0,
      rows * d, rows * d_panels,       // h_by_token, h_by_feature
      rows, rows, rows, rows, rows};  // the vectors of a chunk
  const Tensor scratch = make({std::accumulate(std::begin(pieces), std::end(pieces), int64_t{0})});
  float* next = scratch.mutable_data_ptr<float>();
  const int64_t* piece = pieces;
  const auto take = [&] { return std::exchange(next, next + *piece++); };
  float *logits = take(), *dh = take(), *running = take(), *tile_max = take(), *gradient = take();
  Chunk c{};
  c.h_by_token = take(), c.h_by_feature = take();
  c.target_logit = take(), c.lse = take(), c.softmax_scale = take(), c.shift = take(), c.target_scale = take();
  std::fill_n(c.h_by_feature, rows * d_panels, 0.0f);

  const auto for_each_tile = [&](const auto& work) {
    torch::stable::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
      for (int64_t thread = first; thread < last; ++thread)
        for (int64_t i = tiles * thread / threads; i < tiles * (thread + 1) / threads; ++i) {
          const Tile t{i * kTileRows, std::min(kTileRows, v - i * kTileRows)};
          work(thread, t, logits + (gradients ? rows * t.begin : thread * rows * kTileRows));
        }
    });
  };
  float *loss_out = loss.mutable_data_ptr<float>(), *lse_out = lse.mutable_data_ptr<float>();
  const float* up_of = gradients ? g->const_data_ptr<float>() : nullptr;
  float* dh_f32 = wants_dh && p.input_f32 ? d_input.mutable_data_ptr<float>() : nullptr;
  BFloat16* dh_bf16 = wants_dh && p.input_bf16 ? d_input.mutable_data_ptr<BFloat16>() : nullptr;

  for (c.begin = 0; c.begin < n; c.begin += rows) {
    c.count = std::min(rows, n - c.begin);
    c.rows = lanes(c.count);
    k.pack(p, c);
    for (int64_t t = 0; t < threads; ++t) {
      std::fill_n(running + t * 3 * rows, rows, std::numeric_limits<float>::lowest());
      std::fill_n(running + t * 3 * rows + rows, 2 * rows, 0.0f);
    }
    for_each_tile([&](int64_t thread, const Tile& t, float* l) {
      float* r = running + thread * 3 * rows;
      Running run{r, r + rows, r + 2 * rows};
      k.forward_tile(p, c, t, l, tile_max + t.begin / kTileRows * rows, run);
    });

    for (int64_t r = 0; r < c.rows; ++r) {
      c.lse[r] = 0.0f, c.softmax_scale[r] = 0.0f, c.shift[r] = 0.0f, c.target_scale[r] = 0.0f;
      if (r >= c.count) continue;
      double top = -std::numeric_limits<double>::infinity(), sum = 0.0, total = 0.0;
      for (int64_t t = 0; t < threads; ++t) top = std::fmax(top, running[t * 3 * rows + r]);
      for (int64_t t = 0; t < threads; ++t) {
        const float* run = running + t * 3 * rows;
        sum += run[rows + r] * std::exp(run[r] - top);
        total += run[2 * rows + r];
      }
      const double l = top + std::log(sum), s = label_smoothing;
      c.lse[r] = static_cast<float>(l);
      lse_out[c.begin + r] = c.lse[r];
      const bool ignored = p.target[c.begin + r] == ignore_index;
      loss_out[c.begin + r] = ignored
          ? 0.0f
          : static_cast<float>((1.0 - s) * (l - c.target_logit[r]) + s * (l - total / v) + z_loss * l * l);
      if (!gradients || ignored) continue;
      const double up = up_of[c.begin + r];
      c.softmax_scale[r] = static_cast<float>(up * (1.0 + 2.0 * z_loss * l));
      c.shift[r] = static_cast<float>(up * s / v);
      c.target_scale[r] = static_cast<float>(up * (1.0 - s));
    }
    if (!gradients) continue;

    if (wants_dh) std::fill_n(dh, threads * rows * d, 0.0f);
    for_each_tile([&](int64_t thread, const Tile& t, float* l) {
      k.backward_tile(
          p, c, t, l, tile_max + t.begin / kTileRows * rows, gradient + thread * rows * kTileRows,
          wants_dh ? dh + thread * rows * d : nullptr, c.begin == 0);
    });
    if (!wants_dh) continue;
    torch::stable::parallel_for(0, c.count, 16, [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; ++r)
        for (int64_t j = 0; j < d; ++j) {
          float sum = 0.0f;
          for (int64_t t = 0; t < threads; ++t)
            sum += dh[t * rows * d + ((r / k.lanes) * d + j) * k.lanes + r % k.lanes];
          if (dh_f32)
            dh_f32[(c.begin + r) * d + j] = sum;
          else
            dh_bf16[(c.begin + r) * d + j] = BFloat16(sum);
        }
    });
  }
  return {loss, lse, d_input, d_weight, d_bias};
}

// Cross-entropy of given bf16 logits (n, v), contiguous: per-token loss (n) and log-sum-exp (n) in float32. Where row_grad
// (d objective / d loss, one per token) is given, the logits become their gradient, while the row is in cache.
std::tuple<Tensor, Tensor> cross_entropy_rows(
    Tensor logits, const Tensor& target, const std::optional<Tensor>& row_grad, int64_t ignore_index, double label_smoothing,
    double z_loss) {
  STD_TORCH_CHECK(logits.dim() == 2 && logits.is_contiguous(), "logits must be (n, v) and contiguous");
  STD_TORCH_CHECK(logits.scalar_type() == ScalarType::BFloat16, "logits must be bfloat16");
  STD_TORCH_CHECK(target.scalar_type() == ScalarType::Long && target.dim() == 1, "target must be int64 and (n)");
  const int64_t n = logits.size(0), v = logits.size(1);
  STD_TORCH_CHECK(target.numel() == n && (!row_grad || row_grad->numel() == n), "target and row_grad must be (n)");
  const Kernels& k = kernels();
  const Tensor y = contiguous(target);
  const Tensor g = row_grad ? contiguous(to(*row_grad, ScalarType::Float)) : Tensor();
  const auto make = [&] { return torch::stable::empty({&n, 1}, ScalarType::Float); };
  Tensor loss = make(), lse = make();
  uint16_t* const z = reinterpret_cast<uint16_t*>(logits.mutable_data_ptr<BFloat16>());
  const int64_t* const targets = y.const_data_ptr<int64_t>();
  const float* const up_of = row_grad ? g.const_data_ptr<float>() : nullptr;
  float *const loss_out = loss.mutable_data_ptr<float>(), *const lse_out = lse.mutable_data_ptr<float>();
  for (int64_t i = 0; i < n; ++i)
    STD_TORCH_CHECK(
        targets[i] == ignore_index || (targets[i] >= 0 && targets[i] < v), "target: token ", i, " is ", targets[i],
        ", allowed: 0 to ", v - 1, ", or ignore_index ", ignore_index);
  const double s = label_smoothing;
  torch::stable::parallel_for(0, n, 1, [&](int64_t first, int64_t last) {
    std::vector<float> exps(v + k.lanes);
    for (int64_t r = first; r < last; ++r) {
      uint16_t* const row = z + r * v;
      float largest;
      double sum, total;
      k.row_sums(row, v, s > 0.0, exps.data(), largest, sum, total);
      const double l = largest + std::log(sum);
      lse_out[r] = static_cast<float>(l);
      loss_out[r] = 0.0f;
      if (targets[r] == ignore_index) {
        if (up_of) std::fill_n(row, v, uint16_t{0});
        continue;
      }
      uint16_t& entry = row[targets[r]];
      const double of_target = static_cast<float>(BFloat16(entry, BFloat16::from_bits()));
      loss_out[r] = static_cast<float>((1.0 - s) * (l - of_target) + s * (l - total / v) + z_loss * l * l);
      if (!up_of) continue;
      const double up = up_of[r], scale = up * (1.0 + 2.0 * z_loss * l), shift = up * s / v;
      const float least = static_cast<float>(1e-30 * sum);
      k.row_gradient(row, v, exps.data(), least, static_cast<float>(scale / sum), static_cast<float>(shift));
      entry = BFloat16(static_cast<float>(std::exp(of_target - l) * scale - shift - up * (1.0 - s))).x;
    }
  });
  return {loss, lse};
}

}  // namespace

const char* instruction_set() { return kernels().name; }

}  // namespace wikigpt

STABLE_TORCH_LIBRARY_FRAGMENT(wikigpt, m) {
  m.def(
      "linear_cross_entropy_cpu(Tensor input, Tensor weight, Tensor? bias, Tensor target, Tensor? row_grad, "
      "int ignore_index, float label_smoothing, float z_loss, bool need_input_grad, bool need_weight_grad, "
      "bool need_bias_grad) -> (Tensor loss, Tensor lse, Tensor d_input, Tensor d_weight, Tensor d_bias)");
  m.def(
      "cross_entropy_rows_cpu(Tensor(a!) logits, Tensor target, Tensor? row_grad, int ignore_index, float label_smoothing, "
      "float z_loss) -> (Tensor loss, Tensor lse)");
}

STABLE_TORCH_LIBRARY_IMPL(wikigpt, CPU, m) {
  m.impl("linear_cross_entropy_cpu", TORCH_BOX(&wikigpt::linear_cross_entropy));
  m.impl("cross_entropy_rows_cpu", TORCH_BOX(&wikigpt::cross_entropy_rows));
}
