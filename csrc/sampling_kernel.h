// The algorithm of sampling.cpp for one instruction set: included once per set, inside a namespace of its own, with
// VL = floats in one vector register, fma(a, b, c) = a * b + c rounded once, any(x) = whether a lane of the mask x is set,
// and halves(in, out) = VL half floats to floats.

typedef float vf __attribute__((vector_size(VL * 4)));
typedef float vf_u __attribute__((vector_size(VL * 4), aligned(4)));
typedef int32_t vi __attribute__((vector_size(VL * 4)));
typedef int32_t vi_half __attribute__((vector_size(VL * 2)));
typedef int64_t vw __attribute__((vector_size(VL * 4)));

static inline vf load(const float* p) { return (vf) * (const vf_u*)p; }
static inline vf set1(float x) { return x - vf{}; }

// As `Weights::octaves`; those that weigh nothing are at kOctaves.
static inline vf octaves(vf x, const Weights& w) {
  vf a = (set1(w.top) - x) * w.scale;
#if defined(__x86_64__)
  __asm__("" : "+x"(a));
#elif defined(__aarch64__)
  __asm__("" : "+w"(a));
#endif
  return a < static_cast<float>(kOctaves) ? a : set1(static_cast<float>(kOctaves));
}

static inline vi buckets(vf octaves) {
  return __builtin_convertvector(octaves * static_cast<float>(kBucketsPerOctave), vi);
}

// The logits of a row, kBlock at a time, as floats; behind the last one there are -inf.
struct Logits {
  const void* data;
  Dtype dtype;
  int64_t vocabulary;

  int64_t blocks() const { return (vocabulary + kBlock - 1) / kBlock; }

  const float* block(int64_t b, float* buffer) const {
    const int64_t first = b * kBlock, count = std::min(kBlock, vocabulary - first);
    const float* floats = static_cast<const float*>(data) + first;
    const uint16_t* shorts = static_cast<const uint16_t*>(data) + first;
    if (count == kBlock && dtype == Dtype::f32) return floats;
    if (count == kBlock) {
      if (dtype == Dtype::f16)
        for (int64_t i = 0; i < kBlock; i += VL) halves(shorts + i, buffer + i);
      else
        for (int64_t i = 0; i < kBlock; ++i) buffer[i] = float_of(uint32_t{shorts[i]} << 16);
      return buffer;
    }
    for (int64_t i = 0; i < count; ++i)
      buffer[i] = dtype == Dtype::f32 ? floats[i]
          : dtype == Dtype::f16       ? half_to_float(shorts[i])
                                      : float_of(uint32_t{shorts[i]} << 16);
    std::fill(buffer + count, buffer + kBlock, -INFINITY);
    return buffer;
  }
};

// The largest logit of each block; whether the row has a NaN.
static bool maxima(const Logits& x, float* block_max) {
  alignas(64) float buffer[kBlock], lanes[VL];
  vi nan{};
  for (int64_t b = 0; b < x.blocks(); ++b) {
    const float* l = x.block(b, buffer);
    vf top = load(l);
    nan |= top != top;
    for (int64_t i = VL; i < kBlock; i += VL) {
      const vf next = load(l + i);
      nan |= next != next;
      top = next > top ? next : top;
    }
    *(vf*)lanes = top;
    for (int i = 1; i < VL; ++i) lanes[0] = std::max(lanes[0], lanes[i]);
    block_max[b] = lanes[0];
  }
  int any = 0;
  for (int i = 0; i < VL; ++i) any |= nan[i];
  return any != 0;
}

// Buckets and weights of a block whose first index is `first`; those not kept weigh 0. Returns the sum of the weights.
static inline uint64_t weigh(
    const float* l, int64_t first, const Weights& w, const Kept& kept, uint64_t least, int32_t* bucket, uint64_t* weight) {
  vi lane;
  for (int i = 0; i < VL; ++i) lane[i] = i;
  const int last = static_cast<int>(std::min<int64_t>(static_cast<int64_t>(kept.index) - first, kBlock));
  alignas(64) int32_t mantissa[kBlock];
  for (int i = 0; i < kBlock; i += VL) {
    const vf x = load(l + i);
    const vi keep = (x > kept.logit) | ((x == kept.logit) & (lane + i <= last));
    const vf a = keep ? octaves(x, w) : set1(static_cast<float>(kOctaves));
    const vi b = buckets(a);
    const vf r = a - __builtin_convertvector(b >> kOctaveShift, vf);
    vf h = fma(set1(kC6), r, set1(kC5));
    h = fma(h, r, set1(kC4));
    h = fma(h, r, set1(kC3));
    h = fma(h, r, set1(kC2));
    h = fma(h, r, set1(kC1));
    h = fma(h, r, set1(kC0));
    *(vi*)(mantissa + i) = (vi)h - kIntegers;
    *(vi*)(bucket + i) = b;
  }
  vw sum{};
  for (int i = 0; i < kBlock; i += VL / 2) {
    const vw n = __builtin_convertvector(*(const vi_half*)(bucket + i) >> kOctaveShift, vw);
    vw integer = __builtin_convertvector(*(const vi_half*)(mantissa + i), vw) << (w.bits - kMantissaBits) >> n;
    integer &= integer >= static_cast<int64_t>(least);
    sum += integer;
    *(vw*)(weight + i) = integer;
  }
  uint64_t total = 0;
  for (int i = 0; i < VL / 2; ++i) total += static_cast<uint64_t>(sum[i]);
  return total;
}

// One row's token, or -1 where the row is no distribution.
static int64_t sample_row(const Logits& x, const Row& row, bool joint, Scratch& s) {
  alignas(64) float buffer[kBlock];
  alignas(64) int32_t bucket[kBlock];
  alignas(64) uint64_t weight[kBlock];
  const int64_t blocks = x.blocks();
  s.block_max.resize(blocks);
  if (!row.valid || maxima(x, s.block_max.data())) return -1;
  const auto best = std::max_element(s.block_max.begin(), s.block_max.end());
  if (!std::isfinite(*best)) return -1;
  if (row.greedy) {
    const int64_t b = best - s.block_max.begin();
    const float* l = x.block(b, buffer);
    return b * kBlock + (std::find(l, l + kBlock, *best) - l);
  }
  const Weights w{*best, row.scale, weight_bits(x.vocabulary)};
  const auto weightless = [&](int64_t b) { return !(w.octaves(s.block_max[b]) < kOctaves); };

  uint64_t last = kEverything;
  const bool has_top_k = row.top_k < x.vocabulary;
  if (has_top_k || row.has_top_p) {
    // The k-th largest of the blocks' maxima: at least k tokens are as large, so top_k needs no block below.
    float floor = -INFINITY;
    if (has_top_k && row.top_k <= blocks && (!row.has_top_p || !joint)) {
      s.copy = s.block_max;
      std::nth_element(s.copy.begin(), s.copy.begin() + (row.top_k - 1), s.copy.end(), std::greater<float>());
      floor = s.copy[row.top_k - 1];
    }
    std::fill_n(s.count, kBuckets, 0);
    std::fill_n(s.mass, kBuckets, 0);
    for (int64_t b = 0; b < blocks; ++b) {
      if (s.block_max[b] < floor || weightless(b)) continue;
      weigh(x.block(b, buffer), b * kBlock, w, Kept(kEverything), 0, bucket, weight);
      if (has_top_k)
        for (int64_t i = 0; i < kBlock; ++i) s.count[bucket[i]] += 1;
      if (row.has_top_p)
        for (int64_t i = 0; i < kBlock; ++i) s.mass[bucket[i]] += weight[i];
    }
    uint64_t total = 0;
    for (int i = 0; i < kDead; ++i) total += s.mass[i];

    // The last place of the shortest beginning of the order that holds `wanted` tokens or this mass, and its mass.
    const auto cut = [&](bool by_mass, uint64_t wanted, uint64_t& reached) -> uint64_t {
      uint64_t before = 0, mass = 0;
      int found = 0;
      for (; found < kDead; ++found) {
        const uint64_t here = by_mass ? s.mass[found] : s.count[found];
        if (before + here >= wanted) break;
        before += here, mass += s.mass[found];
      }
      reached = total;
      if (found == kDead) return kEverything;
      s.candidates.clear();
      for (int64_t b = 0; b < blocks; ++b) {
        if (s.block_max[b] < floor || weightless(b) || Weights::bucket(w.octaves(s.block_max[b])) > found) continue;
        const float* l = x.block(b, buffer);
        for (int64_t i = 0; i < kBlock; i += VL) {
          const vi hit = buckets(octaves(load(l + i), w)) == found;
          if (!any((mask)hit)) continue;
          for (int64_t j = i; j < i + VL; ++j)
            if (hit[j - i]) s.candidates.push_back({place_of(l[j], static_cast<uint32_t>(b * kBlock + j)), w.of(l[j])});
        }
      }
      auto first = s.candidates.begin(), end = s.candidates.end();
      while (end - first > 1) {
        const auto middle = first + (end - first) / 2;
        std::nth_element(first, middle, end, [](const Candidate& a, const Candidate& b) { return a.place < b.place; });
        uint64_t half = 0;
        for (auto c = first; c != middle; ++c) half += c->weight;
        const uint64_t here = by_mass ? half : static_cast<uint64_t>(middle - first);
        if (before + here >= wanted) {
          end = middle;
        } else {
          before += here, mass += half;
          first = middle;
        }
      }
      reached = mass + first->weight;
      return first->place;
    };
    uint64_t reached = total;
    if (has_top_k) last = cut(false, static_cast<uint64_t>(row.top_k), reached);
    if (row.has_top_p) last = std::min(last, cut(true, mass_to_reach(joint ? total : reached, row.top_p), reached));
  }

  const Kept kept(last);
  const auto skip = [&](int64_t b) { return s.block_max[b] < kept.logit || weightless(b); };
  uint64_t total = 0;
  s.block_sum.resize(blocks);
  for (int64_t b = 0; b < blocks; ++b) {
    s.block_sum[b] =
        skip(b) ? 0 : weigh(x.block(b, buffer), b * kBlock, w, kept, row.least_weight, bucket, weight);
    total += s.block_sum[b];
  }
  uint64_t point = high_product(row.random, total);
  int64_t b = 0;
  for (; point >= s.block_sum[b]; ++b) point -= s.block_sum[b];
  weigh(x.block(b, buffer), b * kBlock, w, kept, row.least_weight, bucket, weight);
  int64_t i = 0;
  for (; point >= weight[i]; ++i) point -= weight[i];
  return b * kBlock + i;
}
