// The loops of optimizer.cpp, compiled once for each instruction set: VL floats are one vector. No include guard.

typedef float lanes __attribute__((vector_size(VL * 4), aligned(4), may_alias));

// --- conversions of a block ---

inline void widen(const float* in, float* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = in[i];
}
inline void widen(const Half* in, float* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<float>(in[i]);
}
inline void widen(const BFloat16* in, float* out, int64_t n) {
  const uint16_t* bits = reinterpret_cast<const uint16_t*>(in);
  for (int64_t i = 0; i < n; ++i) out[i] = std::bit_cast<float>(uint32_t{bits[i]} << 16);
}

inline void narrow(const float* in, Half* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<Half>(in[i]);
}
inline void narrow(const float* in, BFloat16* out, int64_t n) {
  uint16_t* to = reinterpret_cast<uint16_t*>(out);
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = std::bit_cast<uint32_t>(in[i]);
    const uint32_t nearest = (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;  // to even
    to[i] = static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : nearest);
  }
}

// `first` is a multiple of 8, the element of the parameter where the block begins.
inline void narrow_stochastically(
    const float* in, BFloat16* out, int64_t n, uint32_t seed, uint32_t step, uint32_t index, uint32_t stream, int64_t first) {
  uint16_t random[kBlock];
  for (int64_t b = 0; b < (n + 7) / 8; ++b) {
    const Words bits = random_bits(seed, step, index, stream, first / 8 + b);
    for (int k = 0; k < 4; ++k) {
      random[8 * b + 2 * k] = static_cast<uint16_t>(bits.word[k]);
      random[8 * b + 2 * k + 1] = static_cast<uint16_t>(bits.word[k] >> 16);
    }
  }
  uint16_t* to = reinterpret_cast<uint16_t*>(out);
  for (int64_t i = 0; i < n; ++i) to[i] = round_stochastically(std::bit_cast<uint32_t>(in[i]), random[i]);
}

// --- sum of squares ---

// Of floats, added in an order that depends on n alone. Four streams, because the hardware fetches each page of one stream
// ahead only after its first miss.
inline double sum_of_squares(const float* in, int64_t n) {
  constexpr int64_t kStreams = 4, kStride = 2 * VL, kFlush = 64 * kStride;  // float sums stay short
  const int64_t length = n / kStreams / kStride * kStride;
  double total = 0;
  for (int64_t begin = 0; begin < length; begin += kFlush) {
    const int64_t end = std::min(begin + kFlush, length);
    lanes sum[kStreams][2] = {};
    for (int64_t i = begin; i < end; i += kStride)
      for (int64_t s = 0; s < kStreams; ++s) {
        const float* x = in + s * length + i;
        const lanes a = *reinterpret_cast<const lanes*>(x), b = *reinterpret_cast<const lanes*>(x + VL);
        sum[s][0] += a * a;
        sum[s][1] += b * b;
      }
    for (int64_t s = 0; s < kStreams; ++s)
      for (int64_t k = 0; k < VL; ++k) total += sum[s][0][k] + sum[s][1][k];
  }
  for (int64_t i = kStreams * length; i < n; ++i) total += double{in[i]} * in[i];
  return total;
}

inline double sum_of_squares(const double* in, int64_t n) {
  double total = 0;
  for (int64_t i = 0; i < n; ++i) total += in[i] * in[i];
  return total;
}

// Where the sum in floats overflows, which a square does above 1.8e19.
template <typename G>
inline double sum_of_squares_in_double(const G* in, int64_t n) {
  double total = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double x = static_cast<float>(in[i]);
    total += x * x;
  }
  return total;
}

template <typename G>
inline double sum_of_squares(const G* in, int64_t n) {
  float wide[kBlock];
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t count = std::min(kBlock, n - begin);
    widen(in + begin, wide, count);
    total += sum_of_squares(static_cast<const float*>(wide), count);
  }
  return total;
}

inline double norm_chunk(const void* grad, Dtype dtype, int64_t begin, int64_t end) {
  const auto in_floats = [&](const auto* in) {
    const double total = sum_of_squares(in, end - begin);
    return std::isinf(total) ? sum_of_squares_in_double(in, end - begin) : total;
  };
  switch (dtype) {
    case Dtype::f32: return in_floats(static_cast<const float*>(grad) + begin);
    case Dtype::f16: return in_floats(static_cast<const Half*>(grad) + begin);
    case Dtype::bf16: return in_floats(static_cast<const BFloat16*>(grad) + begin);
    default: return sum_of_squares(static_cast<const double*>(grad) + begin, end - begin);
  }
}

// --- update ---

template <bool kAmsgrad, typename T>
inline void update_block(
    T* __restrict param, const T* __restrict grad, T* __restrict exp_avg, T* __restrict exp_avg_sq,
    T* __restrict max_exp_avg_sq, int64_t n, const Coefficients<T>& coefficients) {
  const Coefficients<T> c = coefficients;
  for (int64_t i = 0; i < n; ++i) {
    const T w = param[i], g = c.grad * grad[i] + (c.l2 != T(0) ? c.l2 * w : T(0));
    const T m = c.first(exp_avg[i], g), v = c.second.of_square(exp_avg_sq[i], g);
    exp_avg[i] = m;
    exp_avg_sq[i] = v;
    T u = v;
    if constexpr (kAmsgrad) {
      const T before = max_exp_avg_sq[i];
      u = v > before || v != v ? v : before;
      max_exp_avg_sq[i] = u;
    }
    param[i] = stepped(w, c.step_size * (m / (std::sqrt(u) * c.denominator + c.eps)) + c.decay * w);
  }
}

template <typename T>
inline void average_block(T* __restrict ema, const T* __restrict param, int64_t n, Average<T> average) {
  for (int64_t i = 0; i < n; ++i) ema[i] = average(ema[i], param[i]);
}

// P: the parameter and its gradient. S: its moments. T: master, ema and arithmetic.
template <typename P, typename S, typename T>
inline void update_chunk(
    const Entry& e, const Coefficients<T>& c, const Options& o, uint32_t step, int64_t begin, int64_t end) {
  alignas(64) T wide[5][kBlock];
  // Where a tensor has the dtype of the arithmetic it is worked on in place, else in a copy that stays in the L1 cache.
  const auto load = [](auto* tensor, T* copy, int64_t n) -> T* {
    if constexpr (std::is_same_v<std::remove_pointer_t<decltype(tensor)>, T>) {
      return tensor;
    } else {
      widen(tensor, copy, n);
      return copy;
    }
  };
  for (int64_t first = begin; first < end; first += kBlock) {
    const int64_t n = std::min(kBlock, end - first);
    P *param = static_cast<P*>(e.param) + first, *grad = static_cast<P*>(e.grad) + first;
    S *exp_avg = static_cast<S*>(e.exp_avg) + first, *exp_avg_sq = static_cast<S*>(e.exp_avg_sq) + first;
    S* largest = e.max_exp_avg_sq ? static_cast<S*>(e.max_exp_avg_sq) + first : nullptr;
    T* w = e.master ? static_cast<T*>(e.master) + first : load(param, wide[0], n);
    T* g = load(grad, wide[1], n);
    T *m = load(exp_avg, wide[2], n), *v = load(exp_avg_sq, wide[3], n);
    if (largest)
      update_block<true>(w, g, m, v, load(largest, wide[4], n), n, c);
    else
      update_block<false>(w, g, m, v, static_cast<T*>(nullptr), n, c);

    const auto store = [&](auto* tensor, const T* from, uint32_t stream) {
      using To = std::remove_pointer_t<decltype(tensor)>;
      if constexpr (!std::is_same_v<To, T>) {
        if constexpr (std::is_same_v<To, BFloat16>)
          if (o.stochastic) return narrow_stochastically(from, tensor, n, o.seed, step, e.index, stream, first);
        narrow(from, tensor, n);
      }
    };
    store(param, w, kParam);
    store(exp_avg, m, kExpAvg);
    store(exp_avg_sq, v, kExpAvgSq);
    if (largest) {
      // The larger of two stored numbers needs no rounding of its own.
      if constexpr (!std::is_same_v<S, T>)
        for (int64_t i = 0; i < n; ++i) {
          const T before = static_cast<T>(largest[i]), now = static_cast<T>(exp_avg_sq[i]);
          if (now > before || now != now) largest[i] = exp_avg_sq[i];
        }
    }
    if (e.ema) average_block(static_cast<T*>(e.ema) + first, e.master ? w : load(param, w, n), n, c.ema);
    if (o.zero_grad) {
      std::fill_n(grad, n, P(0));
    } else if (o.grad_scale) {
      const T scale = *o.grad_scale;
      for (int64_t i = 0; i < n; ++i) g[i] /= scale;
      if constexpr (!std::is_same_v<P, T>) narrow(g, grad, n);
    }
  }
}

inline void update(
    const Entry& e, const Group& group, const Options& o, Dtype param, Dtype state, int64_t begin, int64_t end) {
  const float step = *e.step + 1;
  const double factor = gradient_factor(o), lr = learning_rate(group);
  const uint32_t count = static_cast<uint32_t>(step);
  if (param == Dtype::f64) {
    update_chunk<double, double, double>(e, Coefficients<double>(group, o, lr, step, factor), o, count, begin, end);
    return;
  }
  const Coefficients<float> c(group, o, lr, step, static_cast<float>(factor));
  if (param == Dtype::f32)
    update_chunk<float, float, float>(e, c, o, count, begin, end);
  else if (param == Dtype::f16 && state == Dtype::f32)
    update_chunk<Half, float, float>(e, c, o, count, begin, end);
  else if (param == Dtype::f16)
    update_chunk<Half, Half, float>(e, c, o, count, begin, end);
  else if (state == Dtype::f32)
    update_chunk<BFloat16, float, float>(e, c, o, count, begin, end);
  else
    update_chunk<BFloat16, BFloat16, float>(e, c, o, count, begin, end);
}
