// Adam and AdamW over lists of tensors on a GPU (optimizer.h has the arithmetic).
//
// One launch works on hundreds of tensors: their table of pointers is the kernel's parameter (32,764 bytes since CUDA 12.1), so
// nothing is copied to the device, nothing waits, and a CUDA graph can hold the launch. Each tensor is cut into chunks, one
// block takes one chunk and finds its tensor by bisection.
#include "optimizer.h"

#ifdef __CUDACC__  // not where tests/emulated_optimizer.cpp includes this file
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#include <algorithm>

namespace wikigpt {
namespace optimizer {
namespace {

constexpr int kMaxParameterBytes = 32764;
constexpr int kThreads = 256;
constexpr int kChunk = 4096;       // elements of a block's chunk in the update
constexpr int kNormChunk = 16384;  // in the norm

#ifdef __CUDACC__
template <typename... P, typename... A>
cudaError_t start(void (*kernel)(P...), int blocks, cudaStream_t stream, const A&... arguments) {
  kernel<<<blocks, kThreads, 0, stream>>>(arguments...);
  return cudaGetLastError();
}
#endif

// --- loads and stores of V elements: 16 bytes at a time where V * sizeof(T) is at least that ---
// .cs (evict first): what the update reads and writes is not read again soon, unlike gradients that the norm left in L2.

template <int kBytes> struct Word;
template <> struct Word<2> { using type = unsigned short; };
template <> struct Word<4> { using type = unsigned int; };
template <> struct Word<8> { using type = uint2; };
template <> struct Word<16> { using type = uint4; };

template <typename T, int V>
struct alignas(sizeof(T) * V < 16 ? sizeof(T) * V : 16) Pack {
  static constexpr int kBytes = sizeof(T) * V, kWordBytes = kBytes < 16 ? kBytes : 16, kWords = kBytes / kWordBytes;
  using W = typename Word<kWordBytes>::type;
  union {
    T item[V];
    W word[kWords];
  };
  __device__ Pack() {}
  __device__ void load(const T* from) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) word[i] = __ldcs(reinterpret_cast<const W*>(from) + i);
  }
  __device__ void load_cached(const T* from) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) word[i] = __ldg(reinterpret_cast<const W*>(from) + i);
  }
  __device__ void store(T* to) const {
#pragma unroll
    for (int i = 0; i < kWords; ++i) __stcs(reinterpret_cast<W*>(to) + i, word[i]);
  }
};

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
template <typename To> __device__ __forceinline__ To narrow(float x);
template <> __device__ __forceinline__ float narrow(float x) { return x; }
template <> __device__ __forceinline__ __half narrow(float x) { return __float2half_rn(x); }
template <> __device__ __forceinline__ __nv_bfloat16 narrow(float x) { return __float2bfloat16_rn(x); }
template <typename To> __device__ __forceinline__ To narrow(double x) { return x; }

template <typename T> __device__ __forceinline__ T square_root(T x);
template <> __device__ __forceinline__ float square_root(float x) { return sqrtf(x); }
template <> __device__ __forceinline__ double square_root(double x) { return sqrt(x); }

// The last tensor whose first chunk is not above `chunk`: tensors of no element have no chunk and are never found.
__device__ __forceinline__ int find(const int* first, int count, int chunk) {
  int low = 0, high = count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (first[middle] <= chunk)
      low = middle;
    else
      high = middle;
  }
  return low;
}

// Whether this block is the last one to call this, for its first thread. What a block did before its call comes before what
// the last block does after it: the fence before the ticket releases the one, the fence after it acquires the other.
__device__ __forceinline__ bool is_last_block(unsigned int* ticket) {
  __threadfence();
  const bool last = atomicAdd(ticket, 1u) == gridDim.x - 1;
  if (last) *ticket = 0;
  __threadfence();
  return last;
}

// --- norm ---

constexpr int kNormTensors = 1480;

struct NormTable {
  const void* grad[kNormTensors];
  long long numel[kNormTensors];
  int first[kNormTensors + 1];
  int count;
};
static_assert(sizeof(NormTable) + 64 <= kMaxParameterBytes);

template <typename T>
__device__ T sum_over_block(T x) {
  __shared__ T shared[kThreads / 32];
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_down_sync(0xFFFFFFFFu, x, offset);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  x = 0;
  if (threadIdx.x == 0)
#pragma unroll
    for (int i = 0; i < kThreads / 32; ++i) x += shared[i];
  __syncthreads();
  return x;  // of thread 0
}

// Of what a thread reads of a chunk, summed in T.
template <typename T, typename G>
__device__ __forceinline__ T sum_of_squares(const G* grad, int n) {
  constexpr int V = 16 / sizeof(G);
  T sum = 0;
  int done = 0;
  if (reinterpret_cast<unsigned long long>(grad) % 16 == 0) {
    done = n / V * V;
#pragma unroll 4
    for (int k = threadIdx.x * V; k < done; k += kThreads * V) {
      Pack<G, V> g;
      g.load_cached(grad + k);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const T x = widen(g.item[j]);
        sum += x * x;
      }
    }
  }
  for (int k = done + threadIdx.x; k < n; k += kThreads) {
    const T x = widen(grad[k]);
    sum += x * x;
  }
  return sum;
}

// Chunks from the last to the first, so that the update, which begins with the first, finds them in L2. A sum of squares for
// each chunk; the last block of the last launch adds them in the order of chunks: the same bits in every run.
template <typename G, typename T>
__global__ void __launch_bounds__(kThreads) norm_kernel(
    const __grid_constant__ NormTable table, double* partials, long long before, bool last_launch, const float* grad_scale,
    void* result, bool result_is_double, unsigned int* ticket) {
  const int chunks = table.first[table.count];
  const int chunk = chunks - 1 - static_cast<int>(blockIdx.x);
  double total = 0;
  if (chunk >= 0) {
    const int i = find(table.first, table.count, chunk);
    const long long begin = static_cast<long long>(chunk - table.first[i]) * kNormChunk;
    const int n = static_cast<int>(min(static_cast<long long>(kNormChunk), table.numel[i] - begin));
    const G* grad = static_cast<const G*>(table.grad[i]) + begin;
    total = sum_of_squares<T>(grad, n);
    if (sizeof(T) < sizeof(double) && total > double(kLargest<float>))  // the square of 1.8e19
      total = sum_of_squares<double>(grad, n);
  }
  total = sum_over_block(total);
  __shared__ bool last;
  if (threadIdx.x == 0) {
    if (chunk >= 0) partials[before + chunk] = total;
    last = is_last_block(ticket);
  }
  __syncthreads();
  if (!last || !last_launch) return;
  double all = 0;
#pragma unroll 8
  for (long long k = threadIdx.x; k < before + chunks; k += kThreads) all += __ldcg(partials + k);
  all = sum_over_block(all);
  if (threadIdx.x == 0) {
    const double norm = sqrt(all) / (grad_scale != nullptr ? *grad_scale : 1.0f);
    if (result_is_double)
      *static_cast<double*>(result) = norm;
    else
      *static_cast<float*>(result) = static_cast<float>(norm);
  }
}

// --- update ---

constexpr int kTensors = 370;
constexpr int kGroups = 16;

struct Table {
  Entry entry[kTensors];
  Group group[kGroups];
  int first[kTensors + 1];
  int count;
};
static_assert(sizeof(Table) + sizeof(Options) + 64 <= kMaxParameterBytes);

// Random bits of 8 elements, drawn when the first of them is met.
template <int V>
__device__ __forceinline__ void round_all(
    const float (&x)[V], __nv_bfloat16 (&out)[V], const Options& o, unsigned int step, unsigned int index, unsigned int stream,
    long long element) {
  const Words bits = random_bits(o.seed, step, index, stream, element / 8);
#pragma unroll
  for (int j = 0; j < V; ++j) {
    const int at = static_cast<int>((element + j) % 8);  // V divides 8: a constant of the loop where V is 8
    unsigned int word = bits.word[0];
    if constexpr (V == 8) {
      word = bits.word[j / 2];
    } else {
      word = at / 2 == 1 ? bits.word[1] : at / 2 == 2 ? bits.word[2] : at / 2 == 3 ? bits.word[3] : word;
    }
    const unsigned int random = (V == 8 ? j : at) % 2 ? word >> 16 : word & 0xFFFFu;
    out[j] = __ushort_as_bfloat16(round_stochastically(__float_as_uint(x[j]), random));
  }
}

// P: the parameter and its gradient. S: its moments. T: master, ema and arithmetic. V elements from `at` on.
template <int V, bool kStochastic, typename P, typename S, typename T>
__device__ __forceinline__ void update_elements(
    const Entry& e, const Coefficients<T>& c, const Options& o, unsigned int step, long long at) {
  constexpr bool kMaster = sizeof(P) < sizeof(S);
  Pack<P, V> param, grad;
  Pack<S, V> exp_avg, exp_avg_sq, largest;
  Pack<T, V> master, ema;
  // All loads first: they are in flight together.
  grad.load(static_cast<const P*>(e.grad) + at);
  if constexpr (kMaster)
    master.load(static_cast<const T*>(e.master) + at);
  else
    param.load(static_cast<const P*>(e.param) + at);
  exp_avg.load(static_cast<const S*>(e.exp_avg) + at);
  exp_avg_sq.load(static_cast<const S*>(e.exp_avg_sq) + at);
  if (e.max_exp_avg_sq != nullptr) largest.load(static_cast<const S*>(e.max_exp_avg_sq) + at);
  if (e.ema != nullptr) ema.load(static_cast<const T*>(e.ema) + at);

  T w[V], m[V], v[V];
#pragma unroll
  for (int j = 0; j < V; ++j) {
    if constexpr (kMaster)
      w[j] = master.item[j];
    else
      w[j] = widen(param.item[j]);
    T g = c.grad * widen(grad.item[j]);
    if (c.l2 != T(0)) g += c.l2 * w[j];  // 0 times a parameter of -inf would be NaN
    m[j] = c.first(widen(exp_avg.item[j]), g);
    v[j] = c.second.of_square(widen(exp_avg_sq.item[j]), g);
    T u = v[j];
    if (e.max_exp_avg_sq != nullptr) {
      const T before = widen(largest.item[j]);
      u = u > before || u != u ? u : before;
    }
    w[j] = stepped(w[j], c.step_size * (m[j] / (square_root(u) * c.denominator + c.eps)) + c.decay * w[j]);
  }
  if constexpr (kStochastic) {
    round_all<V>(w, param.item, o, step, e.index, kParam, at);
    round_all<V>(m, exp_avg.item, o, step, e.index, kExpAvg, at);
    round_all<V>(v, exp_avg_sq.item, o, step, e.index, kExpAvgSq, at);
  } else {
#pragma unroll
    for (int j = 0; j < V; ++j) {
      param.item[j] = narrow<P>(w[j]);
      exp_avg.item[j] = narrow<S>(m[j]);
      exp_avg_sq.item[j] = narrow<S>(v[j]);
    }
  }
  param.store(static_cast<P*>(e.param) + at);
  exp_avg.store(static_cast<S*>(e.exp_avg) + at);
  exp_avg_sq.store(static_cast<S*>(e.exp_avg_sq) + at);
  if constexpr (kMaster) {
#pragma unroll
    for (int j = 0; j < V; ++j) master.item[j] = w[j];
    master.store(static_cast<T*>(e.master) + at);
  }
  if (e.max_exp_avg_sq != nullptr) {  // the larger of two stored numbers needs no rounding of its own
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const T before = widen(largest.item[j]), now = widen(exp_avg_sq.item[j]);
      if (now > before || now != now) largest.item[j] = exp_avg_sq.item[j];
    }
    largest.store(static_cast<S*>(e.max_exp_avg_sq) + at);
  }
  if (e.ema != nullptr) {
#pragma unroll
    for (int j = 0; j < V; ++j) ema.item[j] = c.ema(ema.item[j], kMaster ? w[j] : widen(param.item[j]));
    ema.store(static_cast<T*>(e.ema) + at);
  }
  if (o.zero_grad) {
#pragma unroll
    for (int j = 0; j < V; ++j) grad.item[j] = narrow<P>(T(0));
    grad.store(static_cast<P*>(e.grad) + at);
  }
}

// With 4-byte moments 64 registers do, which are 4 blocks a multiprocessor.
template <bool kStochastic, typename P, typename S, typename T>
__global__ void __launch_bounds__(kThreads, sizeof(S) == 4 ? 4 : 2)
    update_kernel(const __grid_constant__ Table table, const __grid_constant__ Options o, unsigned int* ticket) {
  constexpr int V = 16 / sizeof(S);
  const bool skip = o.found_inf != nullptr && *o.found_inf != 0;
  if (skip && !o.zero_grad) return;
  const int chunk = static_cast<int>(blockIdx.x);
  const int i = find(table.first, table.count, chunk);
  const Entry& e = table.entry[i];
  const long long begin = static_cast<long long>(chunk - table.first[i]) * kChunk;
  const int n = chunk < table.first[table.count] ? static_cast<int>(min(static_cast<long long>(kChunk), e.numel - begin)) : 0;
  if (skip) {
    P* grad = static_cast<P*>(e.grad) + begin;
    for (int k = threadIdx.x; k < n; k += kThreads) grad[k] = narrow<P>(T(0));
    return;
  }
  const float step = *e.step + 1;
  __syncthreads();  // all threads have read the step
  __shared__ bool last;
  if (threadIdx.x == 0) last = is_last_block(ticket);
  const Group& group = table.group[e.group];
  const Coefficients<T> c(group, o, learning_rate(group), step, static_cast<T>(gradient_factor(o)));
  const unsigned int count = static_cast<unsigned int>(step);
  const int whole = e.vector ? n / V * V : 0;
  for (int k = threadIdx.x * V; k < whole; k += kThreads * V)
    update_elements<V, kStochastic, P, S, T>(e, c, o, count, begin + k);
  for (int k = whole + threadIdx.x; k < n; k += kThreads)
    update_elements<1, kStochastic, P, S, T>(e, c, o, count, begin + k);
  __syncthreads();
  if (o.grad_scale != nullptr && !o.zero_grad) {  // a loop of its own: above it would take registers from all who scale nothing
    P* grad = static_cast<P*>(e.grad) + begin;
    const T scale = *o.grad_scale;
    for (int k = threadIdx.x; k < n; k += kThreads) grad[k] = narrow<P>(widen(grad[k]) / scale);
  }
  // The block that drew the last ticket knows that every block has read its step: it counts them up.
  if (last)
    for (int k = threadIdx.x; k < table.count; k += kThreads) *table.entry[k].step += 1;
}

template <bool kStochastic, typename P, typename S, typename T>
cudaError_t launch_update(const Table& table, const Options& options, unsigned int* ticket, cudaStream_t stream) {
  const int blocks = std::max(table.first[table.count], 1);
  return start(update_kernel<kStochastic, P, S, T>, blocks, stream, table, options, ticket);
}

cudaError_t launch_update(
    const Table& table, const Options& options, Dtype param, Dtype state, unsigned int* ticket, cudaStream_t stream) {
  if (param == Dtype::f64) return launch_update<false, double, double, double>(table, options, ticket, stream);
  if (param == Dtype::f32) return launch_update<false, float, float, float>(table, options, ticket, stream);
  if (param == Dtype::f16 && state == Dtype::f32)
    return launch_update<false, __half, float, float>(table, options, ticket, stream);
  if (param == Dtype::f16) return launch_update<false, __half, __half, float>(table, options, ticket, stream);
  if (state == Dtype::f32) return launch_update<false, __nv_bfloat16, float, float>(table, options, ticket, stream);
  if (options.stochastic)
    return launch_update<true, __nv_bfloat16, __nv_bfloat16, float>(table, options, ticket, stream);
  return launch_update<false, __nv_bfloat16, __nv_bfloat16, float>(table, options, ticket, stream);
}

template <typename G, typename T>
cudaError_t launch_norm(
    const NormTable& table, double* partials, long long before, bool last, const float* grad_scale, void* result,
    bool result_is_double, unsigned int* ticket, cudaStream_t stream) {
  const int blocks = std::max(table.first[table.count], 1);
  return start(
      norm_kernel<G, T>, blocks, stream, table, partials, before, last, grad_scale, result, result_is_double, ticket);
}

constexpr int64_t kMaxChunks = int64_t{1} << 30;  // of one launch

}  // namespace

int64_t cuda_norm_chunks(int64_t numel) { return (numel + kNormChunk - 1) / kNormChunk; }

int cuda_norm(
    const Entry* entries, int count, Dtype dtype, double* partials, int64_t before, bool last, const float* grad_scale,
    void* result, bool result_is_double, uint32_t* ticket, void* stream) {
  for (int begin = 0, end; begin < count; begin = end) {
    NormTable table;
    table.count = 0;
    table.first[0] = 0;
    for (end = begin; end < count && table.count < kNormTensors; ++end) {
      const int64_t chunks = cuda_norm_chunks(entries[end].numel);
      if (table.count > 0 && table.first[table.count] + chunks > kMaxChunks) break;
      table.grad[table.count] = entries[end].grad;
      table.numel[table.count] = entries[end].numel;
      table.first[table.count + 1] = static_cast<int>(table.first[table.count] + chunks);
      ++table.count;
    }
    const bool final = last && end == count;
    const auto launch = dtype == Dtype::f32 ? launch_norm<float, float>
        : dtype == Dtype::f16               ? launch_norm<__half, float>
        : dtype == Dtype::bf16              ? launch_norm<__nv_bfloat16, float>
                                            : launch_norm<double, double>;
    const cudaError_t error = launch(
        table, partials, before, final, grad_scale, result, result_is_double, ticket, static_cast<cudaStream_t>(stream));
    if (error != cudaSuccess) return error;
    before += table.first[table.count];
  }
  return cudaSuccess;
}

int cuda_update(
    const Entry* entries, int count, const Group* groups, int group_count, const Options& options, Dtype param, Dtype state,
    uint32_t* ticket, void* stream) {
  (void)group_count;
  for (int begin = 0, end; begin < count; begin = end) {
    Table table;
    table.count = 0;
    table.first[0] = 0;
    int used = 0;  // groups in the table
    for (end = begin; end < count && table.count < kTensors; ++end) {
      const Entry& entry = entries[end];
      const bool next_group = table.count == 0 || entry.group != entries[end - 1].group;
      const int64_t chunks = (entry.numel + kChunk - 1) / kChunk;
      if ((next_group && used == kGroups) || (table.count > 0 && table.first[table.count] + chunks > kMaxChunks)) break;
      if (next_group) table.group[used++] = groups[entry.group];
      table.entry[table.count] = entry;
      table.entry[table.count].group = static_cast<uint16_t>(used - 1);
      table.first[table.count + 1] = static_cast<int>(table.first[table.count] + chunks);
      ++table.count;
    }
    const cudaError_t error = launch_update(table, options, param, state, ticket, static_cast<cudaStream_t>(stream));
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace optimizer
}  // namespace wikigpt
