// The kernels of csrc/optimizer.cu, run on the CPU: tests/test_optimizer.py gives them the steps of FusedAdamW. Blocks run one
// after the other in a fixed pseudorandom order, so that which of them is the last differs from launch to launch.
#include "emulated_cuda.h"

#include <bit>
#include <cstring>
#include <numeric>
#include <utility>

#undef __launch_bounds__
#define __launch_bounds__(...)
#define __grid_constant__

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0;
inline Dim gridDim;

struct alignas(8) uint2 {
  uint32_t x, y;
};
struct __half {
  uint16_t bits;
};
struct __nv_bfloat16 {
  uint16_t bits;
};

// float16 is the business of CUDA's own conversions: not emulated.
inline float __half2float(__half) { std::abort(); }
inline __half __float2half_rn(float) { std::abort(); }
inline float __bfloat162float(__nv_bfloat16 x) { return std::bit_cast<float>(uint32_t{x.bits} << 16); }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) { return {bits}; }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  const uint32_t bits = __float_as_uint(x);
  if (x != x) return {0x7FFF};
  return {static_cast<uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16)};
}

// A block that draws a ticket must have released what it did before, and acquired what the others did before it hands the
// ticket to its other threads: a fence on either side of the atomic operation. (Here one block runs after the other, so that a
// missing one changes no result.)
inline bool fence_before = false, fence_after = true;
inline int missing_fences = 0;
inline void __threadfence() { fence_before = fence_after = true; }
inline uint32_t atomic_add_with_fences(uint32_t* address, uint32_t value) {
  missing_fences += !fence_before;
  fence_after = false;
  return atomicAdd(address, value);
}
inline void syncthreads_with_fences() {
  if (threadIdx.x == 0) {
    missing_fences += !fence_after;
    fence_before = false;
    fence_after = true;
  }
  __syncthreads();
}
template <typename T>
T __ldcs(const T* address) {
  if (reinterpret_cast<uintptr_t>(address) % sizeof(T) != 0) std::abort();  // a GPU would fault
  return *address;
}
template <typename T>
T __ldcg(const T* address) {
  return *address;
}
template <typename T>
void __stcs(T* address, T value) {
  if (reinterpret_cast<uintptr_t>(address) % sizeof(T) != 0) std::abort();
  *address = value;
}
template <typename T>
T __shfl_down_sync(unsigned, T value, int delta) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  const int lane = emulated::my_lane();
  bits = emulated_shuffle(bits, lane + delta < 32 ? lane + delta : lane);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

inline int launches = 0;

template <typename... P, typename... A>
cudaError_t start(void (*kernel)(P...), int blocks, cudaStream_t, const A&... arguments) {
  gridDim.x = static_cast<unsigned>(blocks);
  std::vector<int> order(blocks);
  std::iota(order.begin(), order.end(), 0);
  uint64_t state = static_cast<uint64_t>(++launches);
  for (int i = blocks - 1; i > 0; --i) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    std::swap(order[i], order[(state >> 33) % (i + 1)]);
  }
  for (int block : order) {
    blockIdx.x = static_cast<unsigned>(block);
    emulated::run(256, static_cast<unsigned>(launches), [&] { kernel(arguments...); });
  }
  return cudaSuccess;
}

#define atomicAdd atomic_add_with_fences
#define __syncthreads syncthreads_with_fences
#include "../csrc/optimizer.cu"

using namespace wikigpt::optimizer;

extern "C" int64_t emulated_norm_chunks(int64_t numel) { return cuda_norm_chunks(numel); }

extern "C" int emulated_norm(
    const Entry* entries, int count, int dtype, double* partials, int64_t before, int last, const float* grad_scale,
    void* result, int result_is_double, uint32_t* ticket) {
  return cuda_norm(
      entries, count, static_cast<Dtype>(dtype), partials, before, last != 0, grad_scale, result, result_is_double != 0, ticket,
      nullptr);
}

extern "C" int emulated_update(
    const Entry* entries, int count, const Group* groups, int group_count, const Options* options, int param, int state,
    uint32_t* ticket) {
  return cuda_update(
      entries, count, groups, group_count, *options, static_cast<Dtype>(param), static_cast<Dtype>(state), ticket, nullptr);
}

extern "C" int emulated_launches() { return launches; }

extern "C" int emulated_missing_fences() { return missing_fences; }
