// Enough of CUDA to run the kernels of csrc/*.cu on a CPU, one block of threads at a time, as a test of their algorithm: a
// thread is a coroutine (ucontext) that runs until it waits for others. Which thread goes on is a fixed pseudorandom order
// that `order` seeds, so that a missing barrier shows as a result that depends on it.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <vector>

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(n)
#define __shared__ static  // one block at a time

struct Dim {
  unsigned x = 0;
};
inline Dim threadIdx, blockIdx;
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
using std::min;

namespace emulated {

constexpr int kWarp = 32;
constexpr size_t kStack = 1 << 16;

// A barrier of `size` threads that also hands a number of each to all.
struct Barrier {
  int size = 0, arrived = 0;
  uint64_t round = 0;
  std::vector<uint64_t> values, last;
};

struct Block {
  std::vector<ucontext_t> contexts;
  std::vector<std::unique_ptr<char[]>> stacks;
  std::vector<Barrier*> waits_for;  // null: can run
  std::vector<uint64_t> waits_round;
  std::vector<bool> done;
  std::vector<Barrier> warps;
  Barrier all;
  ucontext_t scheduler;
  std::function<void()> body;
  int current = 0;
};
inline Block* block = nullptr;

inline void entry() {
  block->body();
  block->done[block->current] = true;
  swapcontext(&block->contexts[block->current], &block->scheduler);
}

// Waits until all threads of the barrier are here; the values they brought.
inline const std::vector<uint64_t>& meet(Barrier& barrier, int place, uint64_t value) {
  barrier.values[place] = value;
  const uint64_t round = barrier.round;
  if (++barrier.arrived == barrier.size) {
    barrier.last = barrier.values;
    barrier.arrived = 0;
    ++barrier.round;
  } else {
    const int me = block->current;
    block->waits_for[me] = &barrier;
    block->waits_round[me] = round;
    swapcontext(&block->contexts[me], &block->scheduler);
  }
  return barrier.last;
}

inline void run(int threads, unsigned order, std::function<void()> body) {
  Block here;
  block = &here;
  here.body = std::move(body);
  here.contexts.resize(threads);
  here.stacks.resize(threads);
  here.waits_for.assign(threads, nullptr);
  here.waits_round.assign(threads, 0);
  here.done.assign(threads, false);
  here.warps.resize((threads + kWarp - 1) / kWarp);
  for (size_t w = 0; w < here.warps.size(); ++w) {
    here.warps[w].size = std::min<int>(kWarp, threads - static_cast<int>(w) * kWarp);
    here.warps[w].values.resize(kWarp);
  }
  here.all.size = threads;
  here.all.values.resize(threads);
  for (int t = 0; t < threads; ++t) {
    here.stacks[t].reset(new char[kStack]);
    getcontext(&here.contexts[t]);
    here.contexts[t].uc_stack.ss_sp = here.stacks[t].get();
    here.contexts[t].uc_stack.ss_size = kStack;
    here.contexts[t].uc_link = nullptr;
    makecontext(&here.contexts[t], entry, 0);
  }
  std::vector<int> turn(threads);
  for (int t = 0; t < threads; ++t) turn[t] = t;
  uint64_t state = order;
  for (int left = threads; left > 0;) {
    if (order != 0)  // else in the order of their numbers
      for (int i = threads - 1; i > 0; --i) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        std::swap(turn[i], turn[(state >> 33) % (i + 1)]);
      }
    bool moved = false;
    for (int t : turn) {
      if (here.done[t]) continue;
      if (here.waits_for[t] != nullptr && here.waits_for[t]->round == here.waits_round[t]) continue;
      here.waits_for[t] = nullptr;
      here.current = t;
      threadIdx.x = t;
      swapcontext(&here.scheduler, &here.contexts[t]);
      moved = true;
      left -= here.done[t];
    }
    if (!moved && left > 0) {
      std::fprintf(stderr, "deadlock: %d threads wait\n", left);
      std::abort();
    }
  }
  block = nullptr;
}

inline Barrier& my_warp() { return block->warps[block->current / kWarp]; }
inline int my_lane() { return block->current % kWarp; }

}  // namespace emulated

// A coroutine reads threadIdx after each wait again: the scheduler has set it.
inline void __syncthreads() { emulated::meet(emulated::block->all, emulated::block->current, 0); }

inline int __syncthreads_or(int value) {
  const auto& values = emulated::meet(emulated::block->all, emulated::block->current, value != 0);
  return std::any_of(values.begin(), values.end(), [](uint64_t v) { return v != 0; });
}

// The second meeting keeps a fast thread's next value from a slow one that has yet to read this.
inline uint64_t emulated_shuffle(uint64_t value, int from) {
  const uint64_t got = emulated::meet(emulated::my_warp(), emulated::my_lane(), value)[from & 31];
  emulated::meet(emulated::my_warp(), emulated::my_lane(), value);
  return got;
}
inline unsigned long long __shfl_xor_sync(unsigned, unsigned long long value, int mask) {
  return emulated_shuffle(value, emulated::my_lane() ^ mask);
}
inline unsigned long long __shfl_up_sync(unsigned, unsigned long long value, int delta) {
  const int lane = emulated::my_lane();
  return emulated_shuffle(value, lane >= delta ? lane - delta : lane);
}
inline unsigned long long __shfl_sync(unsigned, unsigned long long value, int lane) { return emulated_shuffle(value, lane); }

inline uint32_t atomicAdd(uint32_t* address, uint32_t value) {
  const uint32_t before = *address;
  *address += value;
  return before;
}
inline int __clzll(long long x) { return x == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(x)); }
template <typename T>
inline T __ldg(const T* address) {
  return *address;
}
