// The steps of `KernelTable`, for the instruction set of this file.
//
// Lanes are the 32 queries of a block and rows are keys, so that the softmax of a query never
// crosses lanes. Query-side operands are transposed once per query block; keys and values are read
// where they lie. The coarse part is the same two products with block means in place of tokens.
#pragma once

#include "kernel_table.h"
#include "vectors.h"

namespace MRA_ISA {

using mra::BlockList;
using mra::CoarseRows;
using mra::CoarseState;

constexpr int kChunk = 4;  // key blocks whose logits are held at a time
constexpr int kTile = kBlock * kBlock;

MRA_NOINLINE long scratch_floats(int dim) {
  return 3L * dim * kBlock + (kChunk + 2) * kTile + 4 * kBlock;
}

MRA_INLINE void hide_padding(int width, uint32_t real, float* logits) {
  for (int j = 0; j < width; j++)
    if (!(real >> j & 1))
      for (int v = 0; v < kBlockVectors; v++)
        store(logits + j * kBlock + v * kLanes, all(-kInfinity));
}

// Logits of key blocks, kRows to a block, times `scale` -> weights, in place; updates maxima and
// denominators, and writes the factor for what was summed before. Returns whether any factor is
// not 1.
template <bool kScales, int kRows = kBlock>
MRA_NOINLINE bool softmax(int blocks, float scale, const float* biases, float* logits,
                          float* maxima, float* denominators, float* factors) {
  auto scaled = [&](const float* at) { return kScales ? load(at) * scale : load(at); };
  bool has_changed = false;
  for (int v = 0; v < kBlockVectors; v++) {
    Vector old = load(maxima + v * kLanes), maximum = old, other = old;
    for (int b = 0; b < blocks; b++) {
      const float* of_block = logits + b * kRows * kBlock + v * kLanes;
      Vector bias = all(biases[b]);
      for (int j = 0; j < kRows; j += 2) {
        maximum = larger(maximum, scaled(of_block + j * kBlock) + bias);
        other = larger(other, scaled(of_block + (j + 1) * kBlock) + bias);
      }
    }
    maximum = larger(maximum, other);
    Vector factor = exp2(old - maximum);
    Vector sum = load(denominators + v * kLanes) * factor, other_sum{};
    for (int b = 0; b < blocks; b++) {
      float* of_block = logits + b * kRows * kBlock + v * kLanes;
      Vector shift = all(biases[b]) - maximum;
      for (int j = 0; j < kRows; j += 2) {
        Vector x = exp2(scaled(of_block + j * kBlock) + shift);
        Vector y = exp2(scaled(of_block + (j + 1) * kBlock) + shift);
        store(of_block + j * kBlock, x);
        store(of_block + (j + 1) * kBlock, y);
        sum += x;
        other_sum += y;
      }
    }
    store(maxima + v * kLanes, maximum);
    store(denominators + v * kLanes, sum + other_sum);
    store(factors + v * kLanes, factor);
    Integers differs = factor != all(1.f);
    for (int i = 0; i < kLanes; i++) has_changed |= differs[i] != 0;
  }
  return has_changed;
}

MRA_INLINE void scale_columns(int dim, const float* factors, float* x) {  // x [dim, 32]
  Vector f[kBlockVectors];
  for (int v = 0; v < kBlockVectors; v++) f[v] = load(factors + v * kLanes);
  for (int d = 0; d < dim; d++)
    for (int v = 0; v < kBlockVectors; v++)
      store(x + d * kBlock + v * kLanes, load(x + d * kBlock + v * kLanes) * f[v]);
}

// Maxima [32], denominators [32] and sums [dim, 32] of the coarse state, the same for each query.
MRA_INLINE void start_from_coarse(int dim, const CoarseState& from, float* maxima,
                                  float* denominators, float* sums) {
  for (int v = 0; v < kBlockVectors; v++) {
    store(maxima + v * kLanes, all(from.maximum ? *from.maximum : kNothing));
    store(denominators + v * kLanes, all(from.denominator ? *from.denominator : 0.f));
    for (int d = 0; d < dim; d++)
      store(sums + d * kBlock + v * kLanes, all(from.numerator ? from.numerator[d] : 0.f));
  }
}

// Sums [dim, 32] -> output [32, dim] and log-sum-exp [32].
MRA_INLINE void divide_sums(int dim, const float* maxima, const float* denominators, float* factors,
                            float* sums, float* output, float* lse) {
  for (int i = 0; i < kBlock; i++) {
    float z = denominators[i];
    factors[i] = z == 0 ? 0.f : 1.f / z;  // NaN stays
    lse[i] = z == 0 ? kInfinity : (maxima[i] + __builtin_log2f(z)) / kLog2E;
  }
  scale_columns(dim, factors, sums);
  transpose(dim, kBlock, sums, kBlock, output, dim, 1.f);
}

// Rows of blocks as operands of one product: `count` of `rows`, by their numbers.
template <int kMost>
struct Pointers {
  Pointers(const float* const* rows, const int* blocks, int count) {
    for (int i = 0; i < kMost; i++) at[i] = rows[blocks[i < count ? i : count - 1]];
  }
  const float* at[kMost];
};

// C [dim, 32] += A^T P for up to 32 keys A: `count` key blocks. Fetches the `following` blocks of
// `next`.
template <int kWidth>
MRA_INLINE void add_values(int dim, const float* const* rows, const int* blocks, int count,
                           const float* p, float* c, const float* const* next, const int* following,
                           int following_count) {
  if constexpr (kWidth == kBlock) {
    add_block_values(dim, rows[*blocks], p, c, next[*following]);
  } else {
    constexpr int kMost = kBlock / kWidth;
    Pointers<kMost> of_blocks(rows, blocks, count), fetched(next, following, following_count);
    add_narrow_values<kWidth>(dim, count, of_blocks.at, p, c, fetched.at);
  }
}

MRA_INLINE int at_most(int most, int count) { return count < most ? count : most; }

template <int kWidth>
MRA_INLINE void attend_width(int dim, float scale, const float* query, const BlockList& list,
                             const CoarseState& coarse_state, float* output, float* lse,
                             float* scratch) {
  constexpr int kGroup = kBlock / kWidth, kMost = kChunk * kGroup, kLogits = kWidth * kBlock;
  float *queries = scratch, *sums = queries + dim * kBlock, *logits = sums + dim * kBlock;
  float *maxima = logits + kChunk * kTile, *denominators = maxima + kBlock;
  float* factors = denominators + kBlock;
  transpose(kBlock, dim, query, dim, queries, kBlock, scale * kLog2E);
  start_from_coarse(dim, coarse_state, maxima, denominators, sums);
  for (int first = 0; first < list.count; first += kMost) {
    const int* blocks = list.blocks + first;
    int left = list.count - first, count = at_most(kMost, left);
    for (int c = 0; c < count; c++) {
      const float* next = c + 1 < count ? list.keys[blocks[c + 1]] : list.values[blocks[0]];
      block_logits<kWidth>(dim, list.keys[blocks[c]], queries, logits + c * kLogits, next);
      uint32_t real = list.real[blocks[c]];
      if (real != ~0u >> (kBlock - kWidth)) hide_padding(kWidth, real, logits + c * kLogits);
    }
    if (softmax<false, kWidth>(count, 1.f, list.biases + first, logits, maxima, denominators,
                               factors))
      scale_columns(dim, factors, sums);
    for (int c = 0; c < count; c += kGroup) {
      bool is_last = c + kGroup >= count;  // then the keys of the next chunk follow
      int following = at_most(list.count - first - 1, c + kGroup);
      add_values<kWidth>(dim, list.values, blocks + c, at_most(kGroup, count - c),
                         logits + c * kLogits, sums, is_last ? list.keys : list.values,
                         blocks + following, left - following);
    }
  }
  divide_sums(dim, maxima, denominators, factors, sums, output, lse);
}

MRA_NOINLINE void attend(int dim, float scale, const float* query, const BlockList& list,
                         const CoarseState& coarse, float* output, float* lse, float* scratch) {
  auto attend_blocks = list.width == kBlock ? attend_width<kBlock>
                       : list.width == 16   ? attend_width<16>
                                            : attend_width<8>;
  attend_blocks(dim, scale, query, list, coarse, output, lse, scratch);
}

// Weights and the gradients of logits of one pair, in place of its logits and of dO V^T; returns
// the sum of the latter, before the factor `scale`. kScales: logits come before the factor, and
// their gradients stay so.
template <int kRows, bool kScales = false>
MRA_INLINE float softmax_backward(const float* lse2, const float* delta, float bias, float scale,
                                  float* logits, float* grad) {
  Vector total{};
  for (int v = 0; v < kBlockVectors; v++) {
    Vector shift = all(bias) - load(lse2 + v * kLanes), d = load(delta + v * kLanes), sum{};
    for (int j = 0; j < kRows; j++) {
      Vector logit = load(logits + j * kBlock + v * kLanes);
      Vector p = exp2(kScales ? logit * (scale * kLog2E) + shift : logit + shift);
      Vector g = p * (load(grad + j * kBlock + v * kLanes) - d);
      store(logits + j * kBlock + v * kLanes, p);
      store(grad + j * kBlock + v * kLanes, kScales ? g : g * scale);
      sum += g;
    }
    total += sum;
  }
  float result = 0;
  for (int i = 0; i < kLanes; i++) result += total[i];
  return result;
}

// C [dim, 32] += A^T P, as `add_values`, of what has just been read.
template <int kWidth>
MRA_INLINE void add_queries(int dim, const float* const* rows, const int* blocks, int count,
                            const float* p, float* c) {
  if constexpr (kWidth == kBlock) {
    add_transposed_product(dim, kBlock, kBlock, rows[*blocks], dim, p, kBlock, c, kBlock);
  } else {
    Pointers<kBlock / kWidth> of_blocks(rows, blocks, count);
    add_narrow_values<kWidth>(dim, count, of_blocks.at, p, c, of_blocks.at);
  }
}

template <int kWidth>
MRA_INLINE void attend_backward_width(int dim, float scale, const float* query,
                                      const float* grad_output, const float* lse2,
                                      const float* delta, const BlockList& list,
                                      const float* grad_query_row, float* grad_query,
                                      float* grad_keys, float* grad_values, float* grad_biases,
                                      float* scratch) {
  constexpr int kGroup = kBlock / kWidth, kLogits = kWidth * kBlock;
  float *queries = scratch, *grads = queries + dim * kBlock, *grad_queries = grads + dim * kBlock;
  float *weights = grad_queries + dim * kBlock, *grad_logits = weights + kTile;
  transpose(kBlock, dim, query, dim, queries, kBlock, scale * kLog2E);
  transpose(kBlock, dim, grad_output, dim, grads, kBlock, 1.f);
  memset(grad_queries, 0, sizeof(float) * dim * kBlock);
  for (int first = 0; first < list.count; first += kGroup) {
    int count = at_most(kGroup, list.count - first);
    for (int i = 0; i < count; i++) {
      int c = first + i, block = list.blocks[c];
      int following = list.blocks[c + 1 < list.count ? c + 1 : c];
      float *weight = weights + i * kLogits, *grad = grad_logits + i * kLogits;
      float* of_keys = grad_keys + static_cast<long>(block) * kWidth * dim;
      float* of_values = grad_values + static_cast<long>(block) * kWidth * dim;
      block_logits<kWidth>(dim, list.keys[block], queries, weight, of_values);
      block_logits<kWidth>(dim, list.values[block], grads, grad, of_keys);
      uint32_t real = list.real[block];
      if (real != ~0u >> (kBlock - kWidth)) hide_padding(kWidth, real, weight);
      float of_bias = softmax_backward<kWidth>(lse2, delta, list.biases[c], scale, weight, grad);
      if (grad_biases) grad_biases[c] = of_bias;
      add_block_rows<kWidth>(dim, weight, grad_output, of_values, list.keys[following]);
      add_block_rows<kWidth>(dim, grad, query, of_keys, list.values[following]);
    }
    add_queries<kWidth>(dim, list.keys, list.blocks + first, count, grad_logits, grad_queries);
  }
  if (grad_query_row)
    for (int d = 0; d < dim; d++)
      for (int v = 0; v < kBlockVectors; v++) {
        float* at = grad_queries + d * kBlock + v * kLanes;
        store(at, load(at) + grad_query_row[d]);
      }
  transpose(dim, kBlock, grad_queries, kBlock, grad_query, dim, 1.f);
}

MRA_NOINLINE void attend_backward(int dim, float scale, const float* query,
                                  const float* grad_output, const float* lse2, const float* delta,
                                  const BlockList& list, const float* grad_query_row,
                                  float* grad_query, float* grad_keys, float* grad_values,
                                  float* grad_biases, float* scratch) {
  auto attend_blocks = list.width == kBlock ? attend_backward_width<kBlock>
                       : list.width == 16   ? attend_backward_width<16>
                                            : attend_backward_width<8>;
  attend_blocks(dim, scale, query, grad_output, lse2, delta, list, grad_query_row, grad_query,
                grad_keys, grad_values, grad_biases, scratch);
}

// Adds biases to logits [columns, 32] of the key blocks from `first` on, and hides what is
// selected, dead or no block.
MRA_NOINLINE void mask_coarse(const CoarseRows& part, int first, int columns, float* logits) {
  int existing = at_most(columns, part.n_keys - first);
  for (int q = 0; q < kBlock; q++) {
    long row = static_cast<long>(q) * part.n_keys + first;
    bool exists = q < part.rows;
    if (exists && part.biases)
      for (int j = 0; j < existing; j++) logits[j * kBlock + q] += part.biases[row + j];
    for (int j = 0; j < columns; j++) {
      uint64_t eight = 1;  // few pairs are selected
      if (exists && j + 8 <= existing) memcpy(&eight, part.selected + row + j, 8);
      if (!eight)
        j += 7;
      else if (!exists || (j < existing && part.selected[row + j]))
        logits[j * kBlock + q] = -kInfinity;
    }
  }
  for (int j = 0; j < columns; j++)
    if (j >= existing || part.counts[first + j] == 0) hide_padding(1, 0, logits + j * kBlock);
}

MRA_NOINLINE void coarse(const CoarseRows& part, float* maxima, float* denominators,
                         float* numerators, float* scratch) {
  int dim = part.dim;
  float *queries = scratch, *sums = queries + dim * kBlock, *logits = sums + dim * kBlock;
  float* factors = logits + kChunk * kTile;
  transpose(kBlock, dim, part.query_means, dim, queries, kBlock, part.scale);
  for (int q = 0; q < kBlock; q++) maxima[q] = kNothing, denominators[q] = 0;
  memset(sums, 0, sizeof(float) * dim * kBlock);
  for (int first = 0; first < part.n_keys; first += kChunk * kBlock) {
    int left = part.n_keys - first, most = kChunk * kBlock;
    int columns = left < most ? (left + kBlock - 1) / kBlock * kBlock : most;
    const float* keys = part.key_means + static_cast<long>(first) * dim;
    product<false>(columns, kBlock, dim, keys, dim, queries, kBlock, logits, kBlock);
    mask_coarse(part, first, columns, logits);
    for (int v = 0; v < kBlockVectors; v++) {
      Vector old = load(maxima + v * kLanes), maximum = old;
      for (int j = 0; j < columns; j++)
        maximum = larger(maximum, load(logits + j * kBlock + v * kLanes));
      Vector factor = exp2(old - maximum), sum = load(denominators + v * kLanes) * factor;
      for (int j = 0; j < columns; j++) {
        Vector p = exp2(load(logits + j * kBlock + v * kLanes) - maximum);
        store(logits + j * kBlock + v * kLanes, p);
        sum += p * part.counts[first + j];
      }
      store(maxima + v * kLanes, maximum);
      store(denominators + v * kLanes, sum);
      store(factors + v * kLanes, factor);
    }
    scale_columns(dim, factors, sums);
    add_transposed_product(dim, kBlock, columns, part.value_sums + static_cast<long>(first) * dim,
                           dim, logits, kBlock, sums, kBlock);
  }
  transpose(dim, kBlock, sums, kBlock, numerators, dim, 1.f);
}

MRA_NOINLINE void coarse_backward(const CoarseRows& part, const float* maxima,
                                  const float* grad_sums, const float* delta_sums,
                                  float* grad_query_means, float* grad_key_means,
                                  float* grad_value_sums, float* grad_logits, float* scratch) {
  int dim = part.dim;
  float *queries = scratch, *grads = queries + dim * kBlock, *sums = grads + dim * kBlock;
  float *weights = sums + dim * kBlock, *differences = weights + kTile;
  transpose(kBlock, dim, part.query_means, dim, queries, kBlock, part.scale);
  transpose(kBlock, dim, grad_sums, dim, grads, kBlock, 1.f);
  memset(sums, 0, sizeof(float) * dim * kBlock);
  for (int first = 0; first < part.n_keys; first += kBlock) {
    long at = static_cast<long>(first) * dim;
    const float *keys = part.key_means + at, *values = part.value_sums + at;
    product<false>(kBlock, kBlock, dim, keys, dim, queries, kBlock, weights, kBlock);
    product<false>(kBlock, kBlock, dim, values, dim, grads, kBlock, differences, kBlock);
    mask_coarse(part, first, kBlock, weights);
    for (int v = 0; v < kBlockVectors; v++) {
      Vector maximum = load(maxima + v * kLanes), delta = load(delta_sums + v * kLanes);
      for (int j = 0; j < kBlock; j++) {
        float* weight = weights + j * kBlock + v * kLanes;
        float* difference = differences + j * kBlock + v * kLanes;
        Vector e = exp2(load(weight) - maximum);
        store(weight, e);
        store(difference, e * (load(difference) - delta * part.counts[first + j]));
      }
    }
    if (grad_logits)
      memcpy(grad_logits + static_cast<long>(first) * kBlock, differences, sizeof(float) * kTile);
    product<true>(kBlock, dim, kBlock, weights, kBlock, grad_sums, dim, grad_value_sums + at, dim);
    product<true>(kBlock, dim, kBlock, differences, kBlock, part.query_means, dim,
                  grad_key_means + at, dim);
    add_transposed_product(dim, kBlock, kBlock, keys, dim, differences, kBlock, sums, kBlock);
  }
  transpose(dim, kBlock, sums, kBlock, grad_query_means, dim, 1.f);
}

MRA_NOINLINE void sum_rows(int dim, int rows, const float* block, float* sum) {
  for (int d = 0; d < dim; d += kLanes) {
    Vector even{}, odd{};
    for (int i = 0; i < rows; i += 2) {
      even += load(block + i * dim + d);
      odd += load(block + (i + 1) * dim + d);
    }
    store(sum + d, even + odd);
  }
}

MRA_NOINLINE void sum_rows_double(int dim, int rows, const float* block, double* sum) {
  for (int d = 0; d < dim; d += kDoubles) {
    Doubles total{};
    for (int i = 0; i < rows; i++) {
      const float* at = block + i * dim + d;
      total += __builtin_convertvector(*reinterpret_cast<const HalfVector*>(at), Doubles);
    }
    *reinterpret_cast<Doubles*>(sum + d) = total;
  }
}

MRA_NOINLINE void weighted_sum(int dim, const float* weights, const float* block, float* sum) {
  for (int d = 0; d < dim; d += kLanes) {
    Vector total{};
    for (int i = 0; i < kBlock; i++) total += load(block + i * dim + d) * weights[i];
    store(sum + d, total);
  }
}

MRA_NOINLINE void row_dots(int dim, const float* a, const float* b, float* dots) {
  for (int i = 0; i < kBlock; i++) {
    Vector total{};
    for (int d = 0; d < dim; d += kLanes) total += load(a + i * dim + d) * load(b + i * dim + d);
    float sum = 0;
    for (int k = 0; k < kLanes; k++) sum += total[k];
    dots[i] = sum;
  }
}

constexpr int kPanel = 2 * kDoubles;  // columns whose means lie together: [kPanel columns, dim]

MRA_NOINLINE void pack_columns(int dim, int columns, const double* key_means, double* packed) {
  for (int y = 0; y < columns; y += kPanel)
    for (int d = 0; d < dim; d++)
      for (int i = 0; i < kPanel; i++)
        *packed++ = y + i < columns ? key_means[static_cast<long>(y + i) * dim + d] : 0;
}

MRA_NOINLINE void coarse_logits(int dim, int rows, int columns, double scale,
                                const double* query_means, const double* packed, double* logits) {
  constexpr int kRows = 4;
  for (int y = 0; y < columns; y += kPanel, packed += kPanel * dim)
    for (int x = 0; x < rows; x += kRows) {
      const double* means[kRows];
      for (int i = 0; i < kRows; i++)
        means[i] = query_means + static_cast<long>(x + i < rows ? x + i : rows - 1) * dim;
      Doubles sums[kRows][2] = {};
      for (int d = 0; d < dim; d++) {
        Doubles left = *reinterpret_cast<const Doubles*>(packed + d * kPanel);
        Doubles right = *reinterpret_cast<const Doubles*>(packed + d * kPanel + kDoubles);
#pragma GCC unroll 4
        for (int i = 0; i < kRows; i++) {
          Doubles factor = means[i][d] - Doubles{};
          sums[i][0] += left * factor;
          sums[i][1] += right * factor;
        }
      }
      for (int i = 0; i < kRows && x + i < rows; i++) {
        double part[kPanel];
        *reinterpret_cast<Doubles*>(part) = sums[i][0] * scale;
        *reinterpret_cast<Doubles*>(part + kDoubles) = sums[i][1] * scale;
        int count = at_most(kPanel, columns - y);
        memcpy(logits + static_cast<long>(x + i) * columns + y, part, sizeof(double) * count);
      }
    }
}

// e^x for x <= 0 to about 3 units in the last place, with subnormal results.
MRA_INLINE Vector exp_to_subnormals(Vector x) {
  constexpr float kRounder = 12582912.f;          // as in exp2
  Vector clipped = x < -110.f ? all(-110.f) : x;  // -inf, too
  Vector n = (clipped * kLog2E + kRounder) - kRounder;
  Vector rest = clipped - n * 0.693145751953125f - n * 1.428606820309417e-6f;  // less n log(2)
  Vector normal = n < -126.f ? all(-126.f) : n;                                // 2^n in two factors
  auto power = [](Vector x) {
    return (Vector)((__builtin_convertvector(x, Integers) + 127) << 23);
  };
  return exp2(rest * kLog2E) * power(normal) * power(n - normal);
}

MRA_NOINLINE void softmax_row(int columns, float* logits) {
  Vector largest = all(-kInfinity);
  for (int y = 0; y < columns; y += kLanes) largest = larger(load(logits + y), largest);
  float maximum = -kInfinity;
  for (int i = 0; i < kLanes; i++) maximum = largest[i] > maximum ? largest[i] : maximum;
  if (maximum == -kInfinity) maximum = 0;
  Doubles sums{};
  for (int y = 0; y < columns; y += kLanes) {
    store(logits + y, exp_to_subnormals(load(logits + y) - maximum));
    for (int half = 0; half < kLanes; half += kDoubles)
      sums += __builtin_convertvector(*reinterpret_cast<HalfVector*>(logits + y + half), Doubles);
  }
  double sum = 0;
  for (int i = 0; i < kDoubles; i++) sum += sums[i];
  float total = static_cast<float>(sum);
  for (int y = 0; y < columns; y += kLanes)
    store(logits + y, total > 0 ? load(logits + y) / total : Vector{});
}

constexpr mra::KernelTable table(const char* name, const mra::Bf16Kernels* bf16 = nullptr) {
  return {name,
          kTileColumns,
          scratch_floats,
          attend,
          attend_backward,
          coarse,
          coarse_backward,
          sum_rows,
          sum_rows_double,
          weighted_sum,
          row_dots,
          pack_columns,
          coarse_logits,
          softmax_row,
          widen_row,
          narrow_row,
          bf16};
}

}  // namespace MRA_ISA
