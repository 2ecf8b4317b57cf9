// The arithmetic of linear_cross_entropy for one instruction set. linear_cross_entropy.cpp includes this file once per
// set, inside a namespace of its own, with VL = floats in one vector register and MR = rows of one register tile.
//
// Everything is kept "vocabulary rows x token lanes": a panel is NR = 2 * VL tokens side by side, so that maxima, sums and
// exponentials over the vocabulary are plain vector operations with one token a lane, and the three matrix products
//   logits^T = W H^T,   dH^T += W^T p^T,   dW += p^T H
// all read their left factor by broadcast and their right factor as contiguous panels: no tile is ever transposed.

#define WIKIGPT_INLINE inline __attribute__((always_inline))

constexpr int NR = 2 * VL;
typedef float vf __attribute__((vector_size(VL * 4)));
typedef float vf_u __attribute__((vector_size(VL * 4), aligned(4)));
typedef int vi __attribute__((vector_size(VL * 4)));

static WIKIGPT_INLINE vf load(const float* p) { return (vf) * (const vf_u*)p; }
static WIKIGPT_INLINE void store(float* p, vf x) { *(vf_u*)p = (vf_u)x; }
static WIKIGPT_INLINE vf set1(float x) { return x - vf{}; }
typedef uint32_t vu __attribute__((vector_size(VL * 4)));
typedef uint16_t vh __attribute__((vector_size(VL * 2)));
typedef uint16_t vh_u __attribute__((vector_size(VL * 2), aligned(2), may_alias));

static WIKIGPT_INLINE vf load_bf16(const uint16_t* p) { return (vf)(__builtin_convertvector((vh) * (const vh_u*)p, vu) << 16); }
static WIKIGPT_INLINE void store_bf16(uint16_t* p, vf x) {  // to nearest, ties to even; NaN stays NaN
  const vu bits = (vu)x, rounded = bits + 0x7fff + (bits >> 16 & 1);
  *(vh_u*)p = (vh_u)__builtin_convertvector((x == x ? rounded : bits | 0x400000) >> 16, vh);
}
static WIKIGPT_INLINE vf maximum(vf a, vf b) { return a > b ? a : b; }

// exp(x) for x <= ~88, relative error below 2e-7; NaN stays NaN, anything below -87 gives about 1e-38.
static WIKIGPT_INLINE vf exp_(vf x) {
  const vf low = set1(-87.0f);
  x = x < low ? low : x;
  const vf magic = set1(12582912.0f);  // 1.5 * 2^23: adding it leaves round(x) in the low mantissa bits
  const vf t = x * 1.44269504088896341f + magic;
  const vf n = t - magic;
  vf r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  vf p = set1(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const vi exponent = ((vi)t - (vi)magic + 127) << 23;
  return p * (vf)exponent;
}

// C (M x NR, row stride c_row) = [C +] sum over o, k of A[i * a_row + o * a_outer + k * a_k] * B[(o * k_len + k) * NR + j].
// C is added last: a long sum then has the rounding errors of a few short ones, not of one long chain.
template <int M>
static WIKIGPT_INLINE void tile(
    int64_t outer, int64_t k_len, const float* a, int64_t a_row, int64_t a_k, int64_t a_outer, const float* b, float* c,
    int64_t c_row, bool accumulate) {
  vf acc[M][2];
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i) {
    acc[i][0] = vf{};
    acc[i][1] = vf{};
  }
  for (int64_t o = 0; o < outer; ++o) {
    const float* ao = a + o * a_outer;
    for (int64_t k = 0; k < k_len; ++k, b += NR, ao += a_k) {
      const vf b0 = load(b), b1 = load(b + VL);
#pragma GCC unroll 16
      for (int i = 0; i < M; ++i) {
        const vf x = set1(ao[i * a_row]);
        acc[i][0] += x * b0;
        acc[i][1] += x * b1;
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i) {
    float* out = c + i * c_row;
    store(out, accumulate ? load(out) + acc[i][0] : acc[i][0]);
    store(out + VL, accumulate ? load(out + VL) + acc[i][1] : acc[i][1]);
  }
}

template <int M>
static void tile_rows(
    int64_t m, int64_t outer, int64_t k_len, const float* a, int64_t a_row, int64_t a_k, int64_t a_outer,
    const float* b, float* c, int64_t c_row, bool accumulate) {
  if (m == M) {
    // Constant strides let the compiler fold the addresses of the broadcasts into the instructions.
    if (a_row == 1)
      tile<M>(outer, k_len, a, 1, a_k, a_outer, b, c, c_row, accumulate);
    else if (a_row == NR && a_k == 1)
      tile<M>(outer, k_len, a, NR, 1, a_outer, b, c, c_row, accumulate);
    else
      tile<M>(outer, k_len, a, a_row, 1, a_outer, b, c, c_row, accumulate);
  } else if constexpr (M > 1) {
    tile_rows<M - 1>(m, outer, k_len, a, a_row, a_k, a_outer, b, c, c_row, accumulate);
  }
}

// rows x NR outputs, MR rows at a time; only the first `columns` of the NR columns of C exist.
static void multiply(
    int64_t rows, int64_t columns, int64_t outer, int64_t k_len, const float* a, int64_t a_row, int64_t a_k,
    int64_t a_outer, const float* b, float* c, int64_t c_row, bool accumulate) {
  alignas(64) float edge[MR * NR];
  for (int64_t i = 0; i < rows; i += MR) {
    const int64_t m = rows - i < MR ? rows - i : MR;
    if (columns == NR) {
      tile_rows<MR>(m, outer, k_len, a + i * a_row, a_row, a_k, a_outer, b, c + i * c_row, c_row, accumulate);
      continue;
    }
    tile_rows<MR>(m, outer, k_len, a + i * a_row, a_row, a_k, a_outer, b, edge, NR, false);
    for (int64_t r = 0; r < m; ++r)
      for (int64_t j = 0; j < columns; ++j) {
        float& out = c[(i + r) * c_row + j];
        out = accumulate ? out + edge[r * NR + j] : edge[r * NR + j];
      }
  }
}

// A chunk of up to `rows` tokens, packed both ways. rows is a multiple of NR; lanes past the last token are zero.
static void pack(const Problem& p, const Chunk& c) {
  for (int64_t r = 0; r < c.rows; ++r)
    for (int64_t d = 0; d < p.d; ++d) {
      const float x = r < c.count ? p.input(c.begin + r, d) : 0.0f;
      c.h_by_token[((r / NR) * p.d + d) * NR + r % NR] = x;
      c.h_by_feature[((d / NR) * c.rows + r) * NR + d % NR] = x;
    }
}

// First pass over one vocabulary tile: exp(logit - running maximum) into `tile_exp` (panels of [tile rows][NR]), the
// maximum it is relative to into `tile_max`, running maximum and sum of exponentials (and of logits, for label smoothing)
// of this thread's tokens, and the logits of those targets that lie in the tile.
static void forward_tile(const Problem& p, const Chunk& c, const Tile& t, float* tile_exp, float* tile_max, Running& run) {
  for (int64_t panel = 0; panel < c.rows / NR; ++panel) {
    float* l = tile_exp + panel * t.rows * NR;
    int64_t d = 0;
    do {  // once without a feature too, for the zeros
      const int64_t k = p.d - d < kChainLength ? p.d - d : kChainLength;
      multiply(
          t.rows, NR, 1, k, p.weight + t.begin * p.d + d, p.d, 1, 0, c.h_by_token + (panel * p.d + d) * NR, l, NR, d > 0);
      d += k;
    } while (d < p.d);
    if (p.bias != nullptr)
      for (int64_t i = 0; i < t.rows; ++i)
        for (int half = 0; half < 2; ++half) {
          float* x = l + i * NR + half * VL;
          store(x, load(x) + p.bias[t.begin + i]);
        }
    for (int64_t r = panel * NR; r < c.count && r < (panel + 1) * NR; ++r) {
      const int64_t y = p.target[c.begin + r] - t.begin;
      if (y >= 0 && y < t.rows) c.target_logit[r] = l[y * NR + r % NR];
    }
    for (int half = 0; half < 2; ++half) {
      const int64_t lane = panel * NR + half * VL;
      float* x = l + half * VL;
      const vf before = load(run.max + lane);
      vf top = before, total = vf{}, sum = vf{};
      for (int64_t i = 0; i < t.rows; ++i) top = maximum(load(x + i * NR), top);
      if (p.label_smoothing > 0.0f)
        for (int64_t i = 0; i < t.rows; ++i) total += load(x + i * NR);
      for (int64_t i = 0; i < t.rows; ++i) {
        const vf e = exp_(load(x + i * NR) - top);
        store(x + i * NR, e);
        sum += e;
      }
      store(tile_max + lane, top);
      store(run.max + lane, top);
      store(run.sum + lane, load(run.sum + lane) * exp_(before - top) + sum);
      store(run.total + lane, load(run.total + lane) + total);
    }
  }
}

// Second pass over one tile: the exponentials become d loss / d logits in `gradient`, a buffer of the thread that stays in
// its cache (writing back in place would double the traffic to memory), which feeds dW, db and this thread's dH^T.
// Probabilities below 1e-30 become 0: where logits are far apart most of them are, and the products of what is near or below
// the smallest normal number are several times slower.
static void backward_tile(
    const Problem& p, const Chunk& c, const Tile& t, const float* tile_exp, const float* tile_max, float* gradient,
    float* dh, bool first) {
  const int64_t panels = c.rows / NR;
  for (int64_t panel = 0; panel < panels; ++panel) {
    const int64_t lane = panel * NR;
    vf scale[2], shift[2], least[2];
    for (int half = 0; half < 2; ++half) {
      const int64_t l = lane + half * VL;
      const vf of_tile = exp_(load(tile_max + l) - load(c.lse + l));
      scale[half] = of_tile * load(c.softmax_scale + l);
      shift[half] = load(c.shift + l);
      least[half] = 1e-30f / of_tile;
    }
    const int64_t offset = panel * t.rows * NR;
    for (int64_t i = 0; i < t.rows * NR; i += NR)
      for (int half = 0; half < 2; ++half) {
        const int64_t at = offset + i + half * VL;
        const vf e = load(tile_exp + at);
        store(gradient + at, (e < least[half] ? vf{} : e) * scale[half] - shift[half]);
      }
  }
  for (int64_t r = 0; r < c.count; ++r) {
    const int64_t y = p.target[c.begin + r] - t.begin;
    if (y >= 0 && y < t.rows) gradient[((r / NR) * t.rows + y) * NR + r % NR] -= c.target_scale[r];
  }
  if (p.d_bias != nullptr)
    for (int64_t i = 0; i < t.rows; ++i) {
      vf sum = vf{};
      for (int64_t panel = 0; panel < panels; ++panel)
        for (int half = 0; half < 2; ++half) sum += load(gradient + (panel * t.rows + i) * NR + half * VL);
      float total = 0.0f;
      for (int j = 0; j < VL; ++j) total += sum[j];
      p.d_bias[t.begin + i] = first ? total : p.d_bias[t.begin + i] + total;
    }
  if (p.d_weight != nullptr)
    for (int64_t d = 0; d < p.d; d += NR)
      multiply(
          t.rows, p.d - d < NR ? p.d - d : NR, panels, NR, gradient, NR, 1, t.rows * NR,
          c.h_by_feature + (d / NR) * c.rows * NR, p.d_weight + t.begin * p.d + d, p.d, !first);
  if (dh != nullptr)
    for (int64_t panel = 0; panel < panels; ++panel)
      multiply(
          p.d, NR, 1, t.rows, p.weight + t.begin * p.d, 1, p.d, 0, gradient + panel * t.rows * NR, dh + panel * p.d * NR,
          NR, true);
}

// Of one row of bf16 logits: the largest, the sum of exp(logit - largest) and, for label smoothing, that of the logits; partial
// sums of 4,096 numbers are added in float64. The exponentials are left in `exps`, which has room for v rounded up to VL.
static void row_sums(
    const uint16_t* row, int64_t v, bool with_total, float* exps, float& largest, double& sum, double& total) {
  const int64_t whole = v / VL * VL;
  uint16_t rest[VL];
  for (int j = 0; j < VL; ++j) rest[j] = whole + j < v ? row[whole + j] : kMinusInfinity;
  vf top[4] = {load_bf16(rest)};
  for (int k = 1; k < 4; ++k) top[k] = top[0];
  int64_t i = 0;
  for (; i + 4 * VL <= whole; i += 4 * VL)
    for (int k = 0; k < 4; ++k) top[k] = maximum(load_bf16(row + i + k * VL), top[k]);
  for (; i < whole; i += VL) top[0] = maximum(load_bf16(row + i), top[0]);
  const vf most = maximum(maximum(top[0], top[1]), maximum(top[2], top[3]));
  largest = std::numeric_limits<float>::lowest();
  for (int j = 0; j < VL; ++j) largest = most[j] > largest ? most[j] : largest;
  sum = total = 0.0;
  for (int64_t first = 0; first < whole; first += 4096) {
    const int64_t end = first + 4096 < whole ? first + 4096 : whole;
    vf block = vf{}, of_logits = vf{};
    for (i = first; i < end; i += VL) {
      const vf e = exp_(load_bf16(row + i) - largest);
      store(exps + i, e);
      block += e;
    }
    if (with_total)
      for (i = first; i < end; i += VL) of_logits += load_bf16(row + i);
    for (int j = 0; j < VL; ++j) sum += block[j], total += of_logits[j];
  }
  if (whole == v) return;
  const vf x = load_bf16(rest), e = exp_(x - largest);
  store(exps + whole, e);
  for (int j = 0; whole + j < v; ++j) sum += e[j], total += x[j];
}

// The row becomes scale * exps - shift in bf16. As in backward_tile, what is below `least` (a probability of 1e-30) counts as 0.
static void row_gradient(uint16_t* row, int64_t v, const float* exps, float least, float scale, float shift) {
  const vf bound = set1(least);
  const int64_t whole = v / VL * VL;
  for (int64_t i = 0; i < whole; i += VL) {
    const vf e = load(exps + i);
    store_bf16(row + i, (e < bound ? vf{} : e) * scale - shift);
  }
  if (whole == v) return;
  uint16_t rest[VL];
  const vf e = load(exps + whole);
  store_bf16(rest, (e < bound ? vf{} : e) * scale - shift);
  for (int64_t i = whole; i < v; ++i) row[i] = rest[i - whole];
}

#undef WIKIGPT_INLINE
