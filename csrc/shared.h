// What the operators of this folder share, on the CPU and on the GPU. Needs no torch header.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define WIKIGPT_SHARED __host__ __device__ __forceinline__
#else
#define WIKIGPT_SHARED inline
#endif

namespace wikigpt {

struct Words {
  uint32_t word[4];
};

// Philox4x32 (Salmon et al. 2011).
template <int kRounds>
WIKIGPT_SHARED Words philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) {
#ifdef __CUDACC__
#pragma unroll
#endif
  for (int round = 0; round < kRounds; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53} * c0, p2 = uint64_t{0xCD9E8D57} * c2;
    c0 = static_cast<uint32_t>(p2 >> 32) ^ c1 ^ k0, c1 = static_cast<uint32_t>(p2);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1, c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

}  // namespace wikigpt
