// Sampling on the GPU: one block of threads a row, no sort, no atomics whose order could matter. Definition and arithmetic:
// sampling.h. The row is read from memory once and then from the L2 cache:
//
//   1. the maximum, with its index (which is the result where temperature is 0), and whether there is a NaN;
//   2. with top_k or top_p: counts and masses of 1984 buckets in shared memory, which say in which bucket the cut falls;
//   3. each of them: the tokens of that bucket, listed in shared memory, where further digits of their place cut exactly
//      (where they are too many, as among equal logits, each digit takes two more passes over the row);
//   4. the draw: the sum of the weights that are left, of the part of the row that each warp owns; one warp goes through its
//      part once more to the token where the distribution function passes the random number.
//
// Masses are added in 32-bit shared memory, which adds in hardware: of the 24-bit mantissas of a bucket, which share their
// power of two, the upper and the lower 12 bits apart, for up to 2^19 tokens; then each thread folds its buckets into 64
// bits. Sums of integers are the same in any order.
#include "sampling.h"

#ifdef __CUDACC__  // not where tests/emulated_sampling.cpp includes this file, with fewer warps
#include <cuda_runtime.h>
#define WIKIGPT_WARPS 32
#endif

namespace wikigpt {
namespace sampling {
namespace {

constexpr int kWarp = 32, kWarps = WIKIGPT_WARPS, kThreads = kWarps * kWarp;
constexpr unsigned kAll = 0xFFFFFFFFu;
constexpr int kBuckets = 2048;    // 1984 and some that stay empty: the same number for each thread
constexpr int kBins = 512;        // of one further digit
constexpr int kDigit = 9;         // its bits
constexpr int kListed = 2048;     // places that fit shared memory
constexpr int kChunk = 1 << 19;   // tokens that 32-bit sums hold
static_assert(kOctaves * kBucketsPerOctave <= kBuckets && 1 << kDigit == kBins);

struct Half {
  uint16_t bits;
  __device__ operator float() const { return half_to_float(bits); }
};
struct BFloat16 {
  uint16_t bits;
  __device__ operator float() const { return float_of(uint32_t{bits} << 16); }
};

struct Sum {
  uint64_t count, mass;
  __device__ Sum operator+(Sum other) const { return {count + other.count, mass + other.mass}; }
};

// A histogram: counts, and masses as two parts while they grow.
template <int N>
struct Histogram {
  uint32_t count[N];
  union {
    uint32_t part[2][N];  // the upper bits of the mantissas, the lower 12
    uint64_t mass[N];
  };
};

struct Shared {
  Histogram<kBuckets> buckets;
  Histogram<kBins> bins;
  uint64_t list[kListed];
  Sum partial[kWarps];
  Row row;
  Sum before;           // where `find` found its bin: all that comes earlier
  int found;            // that bin, or -1
  unsigned listed;
  uint64_t point;       // what is left of the random number in the part of the warp `found`
};

// One row of logits, 16 bytes at a time from an address that is a multiple of 16.
template <typename T>
struct Logits {
  static constexpr int N = 16 / sizeof(T);
  const T* aligned;
  int lead;  // elements between `aligned` and the row
  int end;   // lead + vocabulary

  __device__ Logits(const T* row, int64_t vocabulary) {
    lead = static_cast<int>(reinterpret_cast<uintptr_t>(row) % 16 / sizeof(T));
    aligned = row - lead;
    end = lead + static_cast<int>(vocabulary);
  }
  __device__ int vectors() const { return (end + N - 1) / N; }
};

template <typename T>
union Vector {
  uint4 bits;
  T value[16 / sizeof(T)];
};

// One thread of the block that owns a row.
template <typename T>
struct Sampler {
  static constexpr int N = Logits<T>::N;

  Shared& shared;
  const Logits<T> x;
  const int thread, warp, lane;
  Weights w;

  __device__ Sampler(Shared& shared, const T* row, int64_t vocabulary)
      : shared(shared),
        x(row, vocabulary),
        thread(static_cast<int>(threadIdx.x)),
        warp(static_cast<int>(threadIdx.x) / kWarp),
        lane(static_cast<int>(threadIdx.x) % kWarp) {}

  // --- reductions -----------------------------------------------------------------------------------------------------

  static __device__ uint64_t shuffle(uint64_t value, int distance) {
    return __shfl_xor_sync(kAll, static_cast<unsigned long long>(value), distance);
  }

  __device__ uint64_t least_of_warp(uint64_t value) {
    for (int distance = kWarp / 2; distance > 0; distance /= 2) {
      const uint64_t other = shuffle(value, distance);
      value = other < value ? other : value;
    }
    return value;
  }

  __device__ uint64_t least_of_block(uint64_t value) {
    value = least_of_warp(value);
    if (lane == 0) shared.partial[warp].count = value;
    __syncthreads();
    value = least_of_warp(shared.partial[lane % kWarps].count);
    __syncthreads();
    return value;
  }

  __device__ uint64_t sum_of_warp(uint64_t value) {
    for (int distance = kWarp / 2; distance > 0; distance /= 2) value += shuffle(value, distance);
    return value;
  }

  __device__ uint64_t inclusive_scan_of_warp(uint64_t value) {
    for (int distance = 1; distance < kWarp; distance *= 2) {
      const uint64_t other = __shfl_up_sync(kAll, static_cast<unsigned long long>(value), distance);
      if (lane >= distance) value += other;
    }
    return value;
  }

  // The sum over earlier threads; `total` over all.
  __device__ Sum exclusive_scan_of_block(Sum value, Sum& total) {
    const Sum inclusive{inclusive_scan_of_warp(value.count), inclusive_scan_of_warp(value.mass)};
    if (lane == kWarp - 1) shared.partial[warp] = inclusive;
    __syncthreads();
    const Sum other = lane < kWarps ? shared.partial[lane] : Sum{};
    total = {sum_of_warp(other.count), sum_of_warp(other.mass)};
    const uint64_t count = sum_of_warp(lane < warp ? other.count : 0), mass = sum_of_warp(lane < warp ? other.mass : 0);
    __syncthreads();
    return {count + inclusive.count - value.count, mass + inclusive.mass - value.mass};
  }

  // --- passes over the row --------------------------------------------------------------------------------------------

  // The logits of a vector; -inf beside the row, which its first and last vector may reach over.
  __device__ void read(int vector, float (&logits)[N]) const {
    const int first = vector * N;
    if (first >= x.lead && first + N <= x.end) {
      Vector<T> whole;
      whole.bits = __ldg(reinterpret_cast<const uint4*>(x.aligned) + vector);
#pragma unroll
      for (int e = 0; e < N; ++e) logits[e] = whole.value[e];
    } else {
#pragma unroll
      for (int e = 0; e < N; ++e)
        logits[e] = first + e >= x.lead && first + e < x.end ? static_cast<float>(x.aligned[first + e]) : -INFINITY;
    }
  }

  template <typename F>
  __device__ void in_vector(int vector, const F& f) const {
    float logits[N];
    read(vector, logits);
#pragma unroll
    for (int e = 0; e < N; ++e) f(logits[e], static_cast<uint32_t>(vector * N + e - x.lead));
  }

  // f(logit, index) for the vectors first + lane, first + lane + 32 ... before `end`, in their order.
  template <typename F>
  __device__ void in_vectors(int first, int end, const F& f) const {
    constexpr int AHEAD = 2;  // vectors on their way at a time
    const int whole = min(end, x.end / N);
    int v = first + lane;
    if (v == 0) {  // may begin before the row
      in_vector(0, f);
      v += kWarp;
    }
    for (; v + kWarp * (AHEAD - 1) < whole; v += kWarp * AHEAD) {
      Vector<T> ahead[AHEAD];
#pragma unroll
      for (int u = 0; u < AHEAD; ++u) ahead[u].bits = __ldg(reinterpret_cast<const uint4*>(x.aligned) + v + kWarp * u);
#pragma unroll
      for (int u = 0; u < AHEAD; ++u)
#pragma unroll
        for (int e = 0; e < N; ++e)
          f(static_cast<float>(ahead[u].value[e]), static_cast<uint32_t>((v + kWarp * u) * N + e - x.lead));
    }
#pragma unroll 1
    for (; v < end; v += kWarp) in_vector(v, f);
  }

  // The part of the vectors first to end that this warp owns: the warps' parts follow each other.
  template <typename F>
  __device__ void in_part(int first, int end, const F& f) const {
    const int each = ((end - first + kWarps - 1) / kWarps + kWarp - 1) / kWarp * kWarp;
    const int from = first + each * warp;
    if (from < end) f(from, min(from + each, end));
  }

  template <typename F>
  __device__ void for_each(int first, int end, const F& f) const {
    in_part(first, end, [&](int from, int to) { in_vectors(from, to, f); });
  }

  // --- the filters ----------------------------------------------------------------------------------------------------

  // Fills a histogram in chunks: each(chunk, add) calls add(bin, logit) for its tokens. The bins' masses have the power of
  // two of their bucket, bucket_of(bin).
  template <int BINS, typename Each, typename BucketOf>
  __device__ void fill(Histogram<BINS>& h, int chunks, bool counts, bool masses, const Each& each, const BucketOf& bucket_of) {
    constexpr int OWN = (BINS + kThreads - 1) / kThreads;
    uint64_t mass[OWN] = {};
    for (int i = thread; i < BINS; i += kThreads) h.count[i] = h.part[0][i] = h.part[1][i] = 0;
    __syncthreads();
    for (int chunk = 0; chunk < chunks; ++chunk) {
      each(chunk, [&](int bin, float octaves, int bucket) {
        if (counts) atomicAdd(&h.count[bin], 1u);
        if (masses) {
          const uint32_t mantissa = Weights::mantissa(octaves, bucket) >> w.down(bucket);
          atomicAdd(&h.part[0][bin], mantissa >> 12);
          atomicAdd(&h.part[1][bin], mantissa & 0xFFFu);
        }
      });
      __syncthreads();
      for (int i = 0; i < OWN; ++i) {
        const int bin = thread * OWN + i;
        if (bin >= BINS) break;
        mass[i] += ((uint64_t{h.part[0][bin]} << 12) + h.part[1][bin]) << w.up(bucket_of(bin));
        h.part[0][bin] = h.part[1][bin] = 0;
      }
      __syncthreads();
    }
    for (int i = 0; i < OWN; ++i)
      if (thread * OWN + i < BINS) h.mass[thread * OWN + i] = mass[i];
    __syncthreads();
  }

  // The first bin where the count, or the mass, of all bins up to it and of what is `before` them reaches `wanted`: leaves it
  // and what comes before it in shared.found and shared.before. Returns the sum of all.
  template <int BINS>
  __device__ Sum find(const Histogram<BINS>& h, bool by_mass, uint64_t wanted, Sum before) {
    constexpr int OWN = (BINS + kThreads - 1) / kThreads;
    const int first = thread * OWN, end = first + OWN < BINS ? first + OWN : BINS;
    Sum own{}, total;
    for (int bin = first; bin < end; ++bin) own = own + Sum{h.count[bin], h.mass[bin]};
    __syncthreads();  // what an earlier call left has been read
    if (thread == 0) shared.found = -1;
    Sum here = before + exclusive_scan_of_block(own, total);  // which synchronises
    for (int bin = first; bin < end; ++bin) {
      const Sum next = here + Sum{h.count[bin], h.mass[bin]};
      if ((by_mass ? here.mass : here.count) < wanted && (by_mass ? next.mass : next.count) >= wanted) {
        shared.found = bin;
        shared.before = here;
      }
      here = next;
    }
    __syncthreads();
    return before + total;
  }

  // Whole vectors that hold kChunk tokens.
  static constexpr int kChunkVectors = kChunk / N;

  __device__ int chunks() const { return (x.vectors() + kChunkVectors - 1) / kChunkVectors; }

  template <typename F>
  __device__ void for_each_of_chunk(int chunk, const F& f) const {
    const int first = chunk * kChunkVectors;
    for_each(first, min(first + kChunkVectors, x.vectors()), f);
  }

  __device__ Sum fill_buckets(bool counts, bool masses) {
    fill(
        shared.buckets, chunks(), counts, masses,
        [&](int chunk, const auto& add) {
          for_each_of_chunk(chunk, [&](float logit, uint32_t) {
            const float a = w.octaves(logit);
            if (!(a < kOctaves)) return;
            const int bucket = Weights::bucket(a);
            add(bucket, a, bucket);
          });
        },
        [](int bucket) { return bucket; });
    return find(shared.buckets, false, 0, Sum{});
  }

  // The last place of the shortest beginning of the order that holds `wanted` tokens or this mass. `upto` becomes the sum up
  // to there, or stays where all tokens that have a weight do not reach `wanted`.
  __device__ uint64_t cut(bool by_mass, uint64_t wanted, bool counts, bool masses, Sum& upto) {
    find(shared.buckets, by_mass, wanted, Sum{});
    const int bucket = shared.found;
    if (bucket < 0) return kEverything;
    Sum before = shared.before;
    // The candidates are the bucket's places that, shifted, equal `beginning`: at first all of them.
    bool listed = false, all = true;
    int shift = 0;
    uint64_t beginning = 0;
    const auto candidates = [&](int chunk, const auto& f) {
      if (listed) {
        for (unsigned i = thread; i < shared.listed; i += kThreads)
          if (all || shared.list[i] >> shift == beginning) f(shared.list[i]);
        return;
      }
      for_each_of_chunk(chunk, [&](float logit, uint32_t index) {
        const float a = w.octaves(logit);
        if (!(a < kOctaves) || Weights::bucket(a) != bucket) return;
        const uint64_t place = place_of(logit, index);
        if (all || place >> shift == beginning) f(place);
      });
    };
    for (;;) {
      const bool listing = !listed;
      if (listing && thread == 0) shared.listed = 0;
      __syncthreads();
      uint64_t least = ~uint64_t{0}, most = 0;
      bool full = false;
      for (int chunk = 0; chunk < (listed ? 1 : chunks()); ++chunk)
        candidates(chunk, [&](uint64_t place) {
          least = place < least ? place : least;
          most = place > most ? place : most;
          if (!listing || full) return;
          const unsigned i = atomicAdd(&shared.listed, 1u);
          full = i >= kListed;
          if (!full) shared.list[i] = place;
        });
      least = least_of_block(least);
      most = ~least_of_block(~most);
      if (least == most) {
        upto = before + Sum{1, w.of(logit_of(least))};
        return least;
      }
      listed = shared.listed <= kListed;
      const int differ = 64 - __clzll(static_cast<long long>(least ^ most));
      const int digit = differ > kDigit ? differ - kDigit : 0;  // the bits from here on, of those where candidates differ
      fill(
          shared.bins, listed ? 1 : chunks(), counts, masses,
          [&](int chunk, const auto& add) {
            candidates(chunk, [&](uint64_t place) {
              add(static_cast<int>(place >> digit & (kBins - 1)), w.octaves(logit_of(place)), bucket);
            });
          },
          [bucket](int) { return bucket; });
      find(shared.bins, by_mass, wanted, before);
      before = shared.before;
      shift = digit;
      beginning = (least >> shift & ~uint64_t{kBins - 1}) | static_cast<uint64_t>(shared.found);
      all = false;
    }
  }

  // --- the draw -------------------------------------------------------------------------------------------------------

  // Leaves the token in `id`.
  __device__ void draw(uint64_t last, int64_t* id) {
    const Kept kept(last);
    const uint64_t least = shared.row.least_weight;
    const auto weight = [&](float logit, uint32_t index) {
      const uint64_t weight = kept.has(logit, index) ? w.of(logit) : 0;
      return weight >= least ? weight : 0;
    };
    uint64_t sum = 0;
    for_each(0, x.vectors(), [&](float logit, uint32_t index) { sum += weight(logit, index); });
    sum = sum_of_warp(sum);
    if (lane == 0) shared.partial[warp].mass = sum;
    __syncthreads();
    if (thread == 0) {
      uint64_t total = 0;
      for (int i = 0; i < kWarps; ++i) total += shared.partial[i].mass;
      uint64_t point = high_product(shared.row.random, total);
      int i = 0;
      for (; point >= shared.partial[i].mass; ++i) point -= shared.partial[i].mass;
      shared.found = i;
      shared.point = point;
    }
    __syncthreads();
    if (warp != shared.found) return;
    in_part(0, x.vectors(), [&](int from, int to) {
      uint64_t point = shared.point;
      for (; from < to; from += kWarp) {
        const int vector = from + lane;
        float logits[N];
        uint64_t weights[N], own = 0;
        if (vector < to) read(vector, logits);
#pragma unroll
        for (int e = 0; e < N; ++e) {
          weights[e] = vector < to ? weight(logits[e], static_cast<uint32_t>(vector * N + e - x.lead)) : 0;
          own += weights[e];
        }
        const uint64_t inclusive = inclusive_scan_of_warp(own), before = inclusive - own;
        const uint64_t total = __shfl_sync(kAll, static_cast<unsigned long long>(inclusive), kWarp - 1);
        if (point >= total) {
          point -= total;
          continue;
        }
        if (point < before || point >= inclusive) return;
        point -= before;
        bool passed = true;
#pragma unroll
        for (int e = 0; e < N; ++e) {
          if (passed && point < weights[e]) {
            *id = vector * N + e - x.lead;
            passed = false;
          }
          point -= weights[e];
        }
        return;
      }
    });
  }

  __device__ void run(const Problem& p, int64_t i) {
    if (thread == 0) shared.row = row_of(p, i);
    uint64_t best = kEverything;
    float top = -INFINITY;
    uint32_t index = 0;
    bool nan = false;
    for_each(0, x.vectors(), [&](float logit, uint32_t j) {
      nan |= logit != logit;
      if (logit > top) top = logit, index = j;
    });
    if (top > -INFINITY) best = place_of(top, index);
    nan = __syncthreads_or(nan);
    best = least_of_block(best);
    w = Weights{logit_of(best), shared.row.scale, weight_bits(p.vocabulary)};
    const Row& row = shared.row;
    const bool valid = !nan && row.valid && w.top > -INFINITY && w.top < INFINITY;
    if (!valid || row.greedy) {
      if (thread == 0) p.ids[i] = valid ? static_cast<int64_t>(best & 0xFFFFFFFFu) : -1;
      return;
    }
    uint64_t last = kEverything;
    const bool has_top_k = row.top_k < p.vocabulary;
    if (has_top_k || row.has_top_p) {
      const Sum total = fill_buckets(has_top_k, row.has_top_p);
      Sum upto = total;
#pragma unroll 1  // one copy of the code for both
      for (int by_mass = has_top_k ? 0 : 1; by_mass < (row.has_top_p ? 2 : 1); ++by_mass) {
        const uint64_t wanted =
            by_mass ? mass_to_reach(p.joint ? total.mass : upto.mass, row.top_p) : static_cast<uint64_t>(row.top_k);
        const uint64_t place = cut(by_mass, wanted, has_top_k, row.has_top_p, upto);
        last = place < last ? place : last;
      }
    }
    draw(last, p.ids + i);
  }
};

template <typename T>
__global__ void __launch_bounds__(kThreads) sample_rows(const Problem p) {
  __shared__ Shared shared;
  const int64_t i = blockIdx.x;
  Sampler<T>(shared, static_cast<const T*>(p.logits) + i * p.stride, p.vocabulary).run(p, i);
}

}  // namespace
}  // namespace sampling

#ifdef __CUDACC__
namespace sampling {
namespace {

template <typename T>
void launch(const Problem& p, cudaStream_t stream) {
  sample_rows<T><<<static_cast<unsigned>(p.batch), kThreads, 0, stream>>>(p);
}

}  // namespace
}  // namespace sampling

const char* launch_sampling(const sampling::Problem& p, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  if (p.dtype == sampling::Dtype::f32)
    sampling::launch<float>(p, s);
  else if (p.dtype == sampling::Dtype::f16)
    sampling::launch<sampling::Half>(p, s);
  else
    sampling::launch<sampling::BFloat16>(p, s);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
#endif

}  // namespace wikigpt
