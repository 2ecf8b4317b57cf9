// Adam and AdamW over lists of tensors (optimizer.h has the arithmetic): the operators, and the CPU's part of them.
//
// Every tensor is cut into chunks of kChunk elements, and each thread takes a run of chunks. The norm walks each run from its
// end to its beginning, the update from its beginning to its end: what the norm read last is still in the cache. A sum of
// squares for each chunk, added in the order of chunks, gives one norm whatever the number of threads.
#include "cuda_stream.h"
#include "optimizer.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace wikigpt {
namespace optimizer {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

constexpr int64_t kChunk = 16384;
constexpr int64_t kBlock = 1024;  // elements in hand at a time where they are widened: divides kChunk, a multiple of 8

struct Kernels {
  double (*norm)(const void*, Dtype, int64_t, int64_t);
  void (*update)(const Entry&, const Group&, const Options&, Dtype, Dtype, int64_t, int64_t);
};

namespace generic {
constexpr int VL = 4;
#include "optimizer_kernel.h"
constexpr Kernels kernels{norm_chunk, update};
}  // namespace generic

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define WIKIGPT_X86 1
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
constexpr int VL = 8;
#include "optimizer_kernel.h"
constexpr Kernels kernels{norm_chunk, update};
}  // namespace avx2
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512vl,avx512bw,fma,prefer-vector-width=512")
namespace avx512 {
constexpr int VL = 16;
#include "optimizer_kernel.h"
constexpr Kernels kernels{norm_chunk, update};
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

// --- from tensors to entries; the checks keep a direct call of an operator inside its memory ---

Dtype dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Dtype::f32;
    case ScalarType::Half: return Dtype::f16;
    case ScalarType::BFloat16: return Dtype::bf16;
    case ScalarType::Double: return Dtype::f64;
    default: STD_TORCH_CHECK(false, name, ": must be float32, float16, bfloat16 or float64");
  }
}

// Whether the elements fill their memory without gaps or overlaps, in whatever order.
bool is_dense(const Tensor& tensor) {
  if (tensor.is_contiguous()) return true;
  std::vector<std::pair<int64_t, int64_t>> dims;  // stride, size
  for (int64_t d = 0; d < tensor.dim(); ++d)
    if (tensor.size(d) != 1) dims.emplace_back(tensor.stride(d), tensor.size(d));
  std::sort(dims.begin(), dims.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : dims) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

// What the tensors of one parameter have in common. Looked up once: each look goes through PyTorch's C interface.
struct Layout {
  int32_t device_type, device_index;
  int64_t dim;
  const int64_t *sizes, *strides;
  explicit Layout(const Tensor& t) {
    int64_t *own_sizes, *own_strides;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &device_type));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(t.get(), &device_index));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(t.get(), &dim));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(t.get(), &own_sizes));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(t.get(), &own_strides));
    sizes = own_sizes, strides = own_strides;
  }
  bool same_device(const Layout& other) const {
    return device_type == other.device_type && device_index == other.device_index;
  }
  bool same_places(const Layout& other) const {
    if (dim != other.dim) return false;
    for (int64_t d = 0; d < dim; ++d)
      if (sizes[d] != other.sizes[d] || (sizes[d] != 1 && strides[d] != other.strides[d])) return false;
    return true;
  }
};

int32_t type_code(const Tensor& tensor) {
  int32_t code;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &code));
  return code;
}

const void* scalar(const std::optional<Tensor>& tensor, const Layout& like, ScalarType dtype, const char* name) {
  if (!tensor) return nullptr;
  STD_TORCH_CHECK(tensor->numel() == 1, name, ": must have one element");
  STD_TORCH_CHECK(Layout(*tensor).same_device(like), name, ": must be on the device of the gradients");
  STD_TORCH_CHECK(tensor->scalar_type() == dtype, name, ": has another dtype than expected");
  return tensor->const_data_ptr();
}

bool is_double(const std::optional<Tensor>& tensor) { return tensor && tensor->scalar_type() == ScalarType::Double; }

ScalarType float_or_double(const std::optional<Tensor>& tensor) {
  return is_double(tensor) ? ScalarType::Double : ScalarType::Float;
}

// chunks[i] is the first chunk of entry i, chunks[count] the number of all.
std::vector<int64_t> count_chunks(const std::vector<Entry>& entries) {
  std::vector<int64_t> first{0};
  for (const Entry& e : entries) first.push_back(first.back() + (e.numel + kChunk - 1) / kChunk);
  return first;
}

// Calls work(chunk, entry, begin, end) for every chunk.
template <typename F>
void for_each_chunk(const std::vector<Entry>& entries, const std::vector<int64_t>& first, bool backwards, const F& work) {
  torch::stable::parallel_for(0, first.back(), 1, [&](int64_t from, int64_t to) {
    size_t i = std::upper_bound(first.begin(), first.end(), backwards ? to - 1 : from) - first.begin() - 1;
    for (int64_t k = 0; k < to - from; ++k) {
      const int64_t chunk = backwards ? to - 1 - k : from + k;
      while (chunk >= first[i + 1]) ++i;
      while (chunk < first[i]) --i;
      const int64_t begin = (chunk - first[i]) * kChunk;
      work(chunk, entries[i], begin, std::min(begin + kChunk, entries[i].numel));
    }
  });
}

#ifdef WIKIGPT_CUDA
uint32_t* ticket_of(const std::optional<Tensor>& ticket, const Layout& like) {
  STD_TORCH_CHECK(ticket.has_value(), "ticket: needed on a GPU, one int32 that is 0");
  return const_cast<uint32_t*>(static_cast<const uint32_t*>(scalar(ticket, like, ScalarType::Int, "ticket")));
}

void check_cuda(int error) { STD_TORCH_CHECK(error == 0, "CUDA error ", error, " in the optimizer's kernels"); }
#endif

Tensor grad_norm(const Tensors grads, const std::optional<Tensor> grad_scale, const std::optional<Tensor> ticket) {
  STD_TORCH_CHECK(!grads.empty(), "grads: at least one tensor is needed");
  std::vector<Entry> entries;
  std::vector<Dtype> dtypes;
  const Layout place(grads[0]);
  bool wide = false;
  for (const Tensor& grad : grads) {
    STD_TORCH_CHECK(Layout(grad).same_device(place), "grads: must be on one device");
    STD_TORCH_CHECK(is_dense(grad), "grads: must fill their memory");
    Entry e{};
    e.grad = const_cast<void*>(grad.const_data_ptr());
    e.numel = grad.numel();
    e.vector = reinterpret_cast<uintptr_t>(e.grad) % 16 == 0;
    entries.push_back(e);
    dtypes.push_back(dtype_of(grad, "grads"));
    wide = wide || dtypes.back() == Dtype::f64;
  }
  const float* scale = static_cast<const float*>(scalar(grad_scale, place, ScalarType::Float, "grad_scale"));
  const auto result_type = wide ? ScalarType::Double : ScalarType::Float;
  Tensor result = torch::stable::new_empty(grads[0], {}, result_type);
  if (grads[0].is_cuda()) {
#ifdef WIKIGPT_CUDA
    const torch::stable::accelerator::DeviceGuard guard(grads[0].get_device_index());
    // One launch for each dtype: stable, so that the order of the sum follows from the order of the gradients.
    std::vector<size_t> order(entries.size());
    for (size_t i = 0; i < order.size(); ++i) order[i] = i;
    std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return dtypes[a] < dtypes[b]; });
    int64_t chunks = 0;
    for (const Entry& e : entries) chunks += cuda_norm_chunks(e.numel);
    const Tensor partials = torch::stable::new_empty(grads[0], {std::max<int64_t>(chunks, 1)}, ScalarType::Double);
    int64_t before = 0;
    for (size_t begin = 0, end; begin < order.size(); begin = end) {
      std::vector<Entry> run;
      for (end = begin; end < order.size() && dtypes[order[end]] == dtypes[order[begin]]; ++end)
        run.push_back(entries[order[end]]);
      check_cuda(cuda_norm(
          run.data(), static_cast<int>(run.size()), dtypes[order[begin]], partials.mutable_data_ptr<double>(), before,
          end == order.size(), scale, result.mutable_data_ptr(), wide, ticket_of(ticket, place),
          current_cuda_stream(place.device_index)));
      for (const Entry& e : run) before += cuda_norm_chunks(e.numel);
    }
    return result;
#else
    STD_TORCH_CHECK(false, "wikigpt._C was built without CUDA");
#endif
  }
  const auto first = count_chunks(entries);
  std::vector<double> partials(first.back());
  const Kernels& k = kernels();
  for_each_chunk(entries, first, true, [&](int64_t chunk, const Entry& e, int64_t begin, int64_t end) {
    partials[chunk] = k.norm(e.grad, dtypes[&e - entries.data()], begin, end);
  });
  double total = 0;
  for (double partial : partials) total += partial;
  const double norm = std::sqrt(total) / (scale ? *scale : 1.0f);
  if (wide)
    *result.mutable_data_ptr<double>() = norm;
  else
    *result.mutable_data_ptr<float>() = static_cast<float>(norm);
  return result;
}

// hyper: lr, beta1, beta2, eps, weight_decay, maximize (0 or 1) of each group. counts: parameters of each group, in order.
void adamw_(
    const Tensors params, const Tensors grads, const Tensors exp_avgs, const Tensors exp_avg_sqs,
    const Tensors max_exp_avg_sqs, const Tensors masters, const Tensors emas, const Tensors steps, const Tensors lrs,
    const std::optional<Tensor> norm, const std::optional<Tensor> grad_scale, const std::optional<Tensor> found_inf,
    const std::optional<Tensor> ticket, const std::vector<double> hyper, const std::vector<int64_t> counts,
    const std::vector<int64_t> indices, double max_norm, double ema_decay, bool decoupled, bool zero_grad, bool stochastic,
    int64_t seed) {
  constexpr size_t kHyper = 6;
  const size_t n = params.size();
  STD_TORCH_CHECK(n > 0, "params: at least one tensor is needed");
  const auto check_list = [&](const Tensors& list, bool optional, const char* name) {
    STD_TORCH_CHECK(list.size() == n || (optional && list.empty()), name, ": ", list.size(), " tensors for ", n, " params");
  };
  check_list(grads, false, "grads"), check_list(exp_avgs, false, "exp_avgs"), check_list(exp_avg_sqs, false, "exp_avg_sqs");
  check_list(max_exp_avg_sqs, true, "max_exp_avg_sqs"), check_list(masters, true, "masters"), check_list(emas, true, "emas");
  check_list(steps, false, "steps");
  STD_TORCH_CHECK(indices.size() == n, "indices: ", indices.size(), " numbers for ", n, " params");
  STD_TORCH_CHECK(hyper.size() == kHyper * counts.size(), "hyper: 6 numbers for each group are needed");
  STD_TORCH_CHECK(lrs.empty() || lrs.size() == counts.size(), "lrs: none, or one for each group");
  STD_TORCH_CHECK(counts.size() < 65536, "counts: too many groups");

  const Dtype param_dtype = dtype_of(params[0], "params"), state_dtype = dtype_of(exp_avgs[0], "exp_avgs");
  const ScalarType param_type = params[0].scalar_type(), state_type = exp_avgs[0].scalar_type();
  const ScalarType wide_type = param_dtype == Dtype::f64 ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(state_type == param_type || state_type == wide_type, "exp_avgs: have another dtype than expected");
  STD_TORCH_CHECK(masters.empty() || (param_type != wide_type && state_type == wide_type),
      "masters: for 16-bit params with float32 moments alone");
  STD_TORCH_CHECK(!stochastic || (param_dtype == Dtype::bf16 && state_dtype == Dtype::bf16),
      "stochastic: for bfloat16 params and moments alone");

  const Layout place(params[0]);
  const int32_t param_code = type_code(params[0]), state_code = type_code(exp_avgs[0]);
  const int32_t float_code = aoti_torch_dtype_float32();
  const int32_t wide_code = wide_type == ScalarType::Double ? aoti_torch_dtype_float64() : float_code;
  std::vector<Group> groups;
  std::vector<Entry> entries;
  entries.reserve(n);
  for (size_t g = 0, i = 0; g < counts.size(); ++g) {
    const double* h = &hyper[kHyper * g];
    const std::optional<Tensor> lr = lrs.empty() ? std::nullopt : std::optional(lrs[g]);
    groups.push_back(Group{
        scalar(lr, place, float_or_double(lr), "lrs"), h[0], h[1], h[2], std::log(h[1]), std::log(h[2]), h[3], h[4],
        is_double(lr), h[5] != 0});
    for (int64_t j = 0; j < counts[g]; ++j, ++i) {
      STD_TORCH_CHECK(i < n, "counts: more than there are params");
      const Tensor& param = params[i];
      const Layout layout(param);
      STD_TORCH_CHECK(layout.same_device(place), "params: tensor ", i, " is on another device than the first one");
      STD_TORCH_CHECK(type_code(param) == param_code, "params: tensor ", i, " has another dtype than the first one");
      STD_TORCH_CHECK(is_dense(param), "params: tensor ", i, " does not fill its memory");
      const auto pointer = [&](const Tensors& list, int32_t code, const char* name) -> void* {
        if (list.empty()) return nullptr;
        const Layout other(list[i]);
        STD_TORCH_CHECK(other.same_device(layout), name, ": tensor ", i, " is on another device than its param");
        STD_TORCH_CHECK(other.same_places(layout), name, ": tensor ", i, " has another shape or strides than its param");
        STD_TORCH_CHECK(type_code(list[i]) == code, name, ": tensor ", i, " has another dtype than expected");
        return list[i].mutable_data_ptr();
      };
      Entry e{};
      e.param = param.mutable_data_ptr();
      e.grad = pointer(grads, param_code, "grads");
      e.exp_avg = pointer(exp_avgs, state_code, "exp_avgs");
      e.exp_avg_sq = pointer(exp_avg_sqs, state_code, "exp_avg_sqs");
      e.max_exp_avg_sq = pointer(max_exp_avg_sqs, state_code, "max_exp_avg_sqs");
      e.master = pointer(masters, float_code, "masters");
      e.ema = pointer(emas, wide_code, "emas");
      STD_TORCH_CHECK(steps[i].numel() == 1, "steps: tensor ", i, " must have one element");
      STD_TORCH_CHECK(
          type_code(steps[i]) == float_code && Layout(steps[i]).same_device(place), "steps: tensor ", i,
          " must be float32 on the device of its param");
      e.step = static_cast<float*>(steps[i].mutable_data_ptr());
      e.numel = param.numel();
      e.index = static_cast<uint32_t>(indices[i]);
      e.group = static_cast<uint16_t>(g);
      uintptr_t bits = 0;
      for (const void* p : {e.param, e.grad, e.exp_avg, e.exp_avg_sq, e.max_exp_avg_sq, e.master, e.ema})
        bits |= reinterpret_cast<uintptr_t>(p);
      e.vector = bits % 16 == 0;
      entries.push_back(e);
    }
  }
  STD_TORCH_CHECK(entries.size() == n, "counts: fewer than there are params");
  Options o{};
  o.norm = scalar(norm, place, float_or_double(norm), "norm");
  o.norm_is_double = is_double(norm);
  o.grad_scale = static_cast<const float*>(scalar(grad_scale, place, ScalarType::Float, "grad_scale"));
  o.found_inf = static_cast<const float*>(scalar(found_inf, place, ScalarType::Float, "found_inf"));
  o.max_norm = max_norm, o.ema_decay = ema_decay, o.seed = static_cast<uint32_t>(seed);
  o.decoupled = decoupled, o.zero_grad = zero_grad, o.stochastic = stochastic;

  if (params[0].is_cuda()) {
#ifdef WIKIGPT_CUDA
    const torch::stable::accelerator::DeviceGuard guard(params[0].get_device_index());
    check_cuda(cuda_update(
        entries.data(), static_cast<int>(n), groups.data(), static_cast<int>(groups.size()), o, param_dtype, state_dtype,
        ticket_of(ticket, place), current_cuda_stream(place.device_index)));
    return;
#else
    STD_TORCH_CHECK(false, "wikigpt._C was built without CUDA");
#endif
  }
  const bool skip = o.found_inf != nullptr && *o.found_inf != 0;
  const Kernels& k = kernels();
  const auto first = count_chunks(entries);
  const size_t element = params[0].element_size();
  for_each_chunk(entries, first, false, [&](int64_t, const Entry& e, int64_t begin, int64_t end) {
    if (!skip)
      k.update(e, groups[e.group], o, param_dtype, state_dtype, begin, end);
    else if (zero_grad)
      std::memset(static_cast<char*>(e.grad) + begin * element, 0, (end - begin) * element);
  });
  if (!skip)
    for (const Entry& e : entries) *e.step += 1;
}

}  // namespace
}  // namespace optimizer
}  // namespace wikigpt

STABLE_TORCH_LIBRARY_FRAGMENT(wikigpt, m) {
  m.def("grad_norm(Tensor[] grads, Tensor? grad_scale, Tensor(a!)? ticket) -> Tensor");
  m.def(
      "adamw_(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] exp_avgs, Tensor(d!)[] exp_avg_sqs, "
      "Tensor(e!)[] max_exp_avg_sqs, Tensor(f!)[] masters, Tensor(g!)[] emas, Tensor(h!)[] steps, Tensor[] lrs, Tensor? norm, "
      "Tensor? grad_scale, Tensor? found_inf, Tensor(i!)? ticket, float[] hyper, int[] counts, int[] indices, "
      "float max_norm, float ema_decay, bool decoupled, bool zero_grad, bool stochastic, int seed) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(wikigpt, CPU, m) {
  m.impl("grad_norm", TORCH_BOX(&wikigpt::optimizer::grad_norm));
  m.impl("adamw_", TORCH_BOX(&wikigpt::optimizer::adamw_));
}

#ifdef WIKIGPT_CUDA
STABLE_TORCH_LIBRARY_IMPL(wikigpt, CUDA, m) {
  m.impl("grad_norm", TORCH_BOX(&wikigpt::optimizer::grad_norm));
  m.impl("adamw_", TORCH_BOX(&wikigpt::optimizer::adamw_));
}
#endif
