// Exact attention of bfloat16 blocks in AMX tiles, with the softmax in float32.
//
// A product takes its left operand by rows and its right one in pairs of terms: words of two
// bfloat16 numbers. Lanes are queries in the forward and keys in the backward pass.
#pragma once

#include "block_kernels.h"
#include "tiles.h"

namespace MRA_ISA {

using mra::Bf16BlockList;
using mra::Bf16QueryList;

constexpr int kPairs = kBlock / 2 * kBlock;  // words of a 32 x 32 operand in pairs

MRA_NOINLINE long bf16_scratch_floats(int dim) {
  return 4L * dim * kBlock + (2 * kChunk + 2) * kTile + 4 * kBlock + 3L * kBlock / 2 * dim;
}

MRA_INLINE void fetch(const void* from, int bytes) {
  for (int i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(from) + i);
}

// to[c][r] = from[r][c]; rows and columns are multiples of the lanes.
MRA_NOINLINE void transpose_words(int rows, int columns, const uint32_t* from, long ld_from,
                                  uint32_t* to, long ld_to) {
  for (int r = 0; r < rows; r += kLanes)
    for (int c = 0; c < columns; c += kLanes) {
      Vector x[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; i++)
        x[i] = (Vector) * reinterpret_cast<const Words*>(from + (r + i) * ld_from + c);
      transpose_lanes(x);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; i++)
        *reinterpret_cast<Words*>(to + (c + i) * ld_to + r) = (Words)x[i];
    }
}

// A block [32, dim] as right operand over its dims: words [dim / 2, 32].
MRA_INLINE void pair_dims(int dim, const Half* block, uint32_t* pairs) {
  transpose_words(kBlock, dim / 2, reinterpret_cast<const uint32_t*>(block), dim / 2, pairs,
                  kBlock);
}

// A block [32, dim] as right operand over its tokens: words [16, dim].
MRA_NOINLINE void pair_tokens(int dim, const Half* block, uint32_t* pairs) {
  for (int p = 0; p < kBlock / 2; p++, block += 2 * dim, pairs += dim)
    for (int d = 0; d < dim; d += kLanes)
      *reinterpret_cast<Words*>(pairs + d) = words(block + d) | words(block + dim + d) << 16;
}

MRA_NOINLINE void transpose_halves(int dim, const Half* block, Half* columns, float* scratch) {
  auto* pairs = reinterpret_cast<uint32_t*>(scratch);
  pair_tokens(dim, block, pairs);
  transpose_words(kBlock / 2, dim, pairs, dim, reinterpret_cast<uint32_t*>(columns), kBlock / 2);
}

// Rows of float32 [32, 32] -> words [16, 32] of rows 2p and 2p + 1.
MRA_INLINE void pair_rows(const float* rows, uint32_t* pairs) {
  for (int i = 0; i < kBlock; i += 2)
    for (int v = 0; v < kBlockVectors; v++) {
      const float* at = rows + i * kBlock + v * kLanes;
      Words even = __builtin_convertvector(narrow(load(at)), Words);
      Words odd = __builtin_convertvector(narrow(load(at + kBlock)), Words);
      *reinterpret_cast<Words*>(pairs + i / 2 * kBlock + v * kLanes) = even | odd << 16;
    }
}

// Up to 32 keys as an operand [32, dim]: a square where it lies, narrow blocks gathered, with zeros
// for those that are missing. `blocks` are numbers of key blocks, `rows` [R] blocks.
template <int kWidth>
MRA_INLINE const Half* gather_rows(int dim, const Half* const* rows, const int* blocks, int count,
                                   Half* to) {
  constexpr int kGroup = kBlock / kWidth;
  if (kWidth == kBlock) return rows[*blocks];
  long size = static_cast<long>(kWidth) * dim;
  for (int i = 0; i < kGroup; i++) {
    if (i < count)
      memcpy(to + i * size, rows[blocks[i] / kGroup] + blocks[i] % kGroup * size, size * 2);
    else
      memset(to + i * size, 0, size * 2);
  }
  return to;
}

// The same of columns [R, dim, 32], as an operand [dim, 32].
template <int kWidth>
MRA_INLINE const Half* gather_columns(int dim, const Half* columns, const int* blocks, int count,
                                      Half* to) {
  constexpr int kGroup = kBlock / kWidth;
  long size = static_cast<long>(kBlock) * dim;
  if (kWidth == kBlock) return columns + *blocks * size;
  for (int i = 0; i < kGroup; i++) {
    int block = blocks[i < count ? i : 0];
    const Half* from = columns + block / kGroup * size + block % kGroup * kWidth;
    for (int d = 0; d < dim; d++) {
      Half* at = to + d * kBlock + i * kWidth;
      if (i < count)
        memcpy(at, from + d * kBlock, kWidth * 2);
      else
        memset(at, 0, kWidth * 2);
    }
  }
  return to;
}

template <int kWidth>
MRA_INLINE void fetch_keys(int dim, const Half* const* rows, const int* blocks, int count) {
  constexpr int kGroup = kBlock / kWidth;
  for (int i = 0; i < count; i++)
    fetch(rows[blocks[i] / kGroup] + blocks[i] % kGroup * kWidth * dim, kWidth * dim * 2);
}

template <int kWidth>
MRA_INLINE void bf16_attend_width(int dim, float scale, const Half* query,
                                  const Bf16BlockList& given, const CoarseState& coarse_state,
                                  float* output, float* lse, float* scratch) {
  constexpr int kGroup = kBlock / kWidth, kMost = kChunk * kGroup, kLogits = kWidth * kBlock;
  const BlockList& list = given.list;
  float *sums = scratch, *logits = sums + dim * kBlock, *maxima = logits + kChunk * kTile;
  float *denominators = maxima + kBlock, *factors = denominators + kBlock;
  auto* queries = reinterpret_cast<uint32_t*>(factors + kBlock);
  uint32_t* weights = queries + kBlock / 2 * dim;  // [kChunk, 16, 32]
  Half* gathered = reinterpret_cast<Half*>(weights + kChunk * kPairs);
  long size = static_cast<long>(kBlock) * dim;
  pair_dims(dim, query, queries);
  start_from_coarse(dim, coarse_state, maxima, denominators, sums);
  for (int first = 0; first < list.count; first += kMost) {
    const int* blocks = list.blocks + first;
    int left = list.count - first, count = at_most(kMost, left);
    int tiles = (count + kGroup - 1) / kGroup;
    const Half* values[kChunk];
    for (int t = 0; t < tiles; t++) {
      int c = t * kGroup, after = c + kGroup;
      const Half* keys = gather_rows<kWidth>(dim, given.keys, blocks + c, count - c, gathered);
      auto step = [&](int s) { return Step{keys + s * kBlock, queries + s * kPairs}; };
      tile_product<false>(dim / kBlock, step, dim, kBlock, logits + t * kTile, kBlock);
      fetch_keys<kWidth>(dim, given.keys, blocks + after, at_most(kGroup, left - after));
      if (kWidth == kBlock) fetch(given.value_columns + blocks[c] * size, kBlock * dim * 2);
    }
    for (int c = 0; c < count; c++) {
      uint32_t real = list.real[blocks[c]];
      if (real != ~0u >> (kBlock - kWidth)) hide_padding(kWidth, real, logits + c * kLogits);
    }
    // Logits of missing blocks stay as they are, 0: weights of nothing.
    if (softmax<true, kWidth>(count, scale * kLog2E, list.biases + first, logits, maxima,
                              denominators, factors))
      scale_columns(dim, factors, sums);
    for (int t = 0; t < tiles; t++) {
      int c = t * kGroup;
      pair_rows(logits + t * kTile, weights + t * kPairs);
      values[t] = gather_columns<kWidth>(dim, given.value_columns, blocks + c, count - c,
                                         gathered + (t + 1) * size);
    }
    for (int d = 0; d < dim; d += kBlock) {
      auto step = [&](int t) { return Step{values[t] + d * kBlock, weights + t * kPairs}; };
      tile_product<true>(tiles, step, kBlock, kBlock, sums + d * kBlock, kBlock);
    }
  }
  divide_sums(dim, maxima, denominators, factors, sums, output, lse);
}

MRA_NOINLINE void bf16_attend(int dim, float scale, const Half* query, const Bf16BlockList& list,
                              const CoarseState& coarse, float* output, float* lse,
                              float* scratch) {
  auto attend_blocks = list.list.width == kBlock ? bf16_attend_width<kBlock>
                       : list.list.width == 16   ? bf16_attend_width<16>
                                                 : bf16_attend_width<8>;
  attend_blocks(dim, scale, query, list, coarse, output, lse, scratch);
}

// Lanes whose bit is set, from the bit `first` on.
MRA_INLINE Integers lanes_of(uint32_t bits, int first) {
  static_assert(kLanes == 16);
  Words bit = {1,      1 << 1, 1 << 2,  1 << 3,  1 << 4,  1 << 5,  1 << 6,  1 << 7,
               1 << 8, 1 << 9, 1 << 10, 1 << 11, 1 << 12, 1 << 13, 1 << 14, 1 << 15};
  return (Integers)((bit & (bits >> first)) != 0);
}

// Weights and gradients of logits of one pair, [32 queries, 32 keys]: from logits before the scale
// and dO V^T, in place. Returns the sum of the latter.
MRA_INLINE float bf16_softmax_backward(float scale, float bias, uint32_t real, const float* lse2,
                                       const float* delta, float* logits, float* grad) {
  Vector total{};
  for (int v = 0; v < kBlockVectors; v++) {
    Integers is_real = lanes_of(real, v * kLanes);
    for (int i = 0; i < kBlock; i++) {
      float *weight = logits + i * kBlock + v * kLanes, *of = grad + i * kBlock + v * kLanes;
      Vector p = exp2(load(weight) * scale + (bias - lse2[i]));
      p = is_real ? p : Vector{};
      Vector g = p * (load(of) - delta[i]);
      store(weight, p);
      store(of, g);
      total += g;
    }
  }
  float sum = 0;
  for (int i = 0; i < kLanes; i++) sum += total[i];
  return sum;
}

MRA_NOINLINE void bf16_attend_backward(int dim, float scale, const Half* key, const Half* value,
                                       uint32_t real, const Bf16QueryList& list,
                                       float* grad_queries, float* grad_key, float* grad_value,
                                       float* grad_biases, float* scratch) {
  float *grad_keys = scratch, *grad_values = grad_keys + dim * kBlock;  // [dim, 32]
  float *logits = grad_values + dim * kBlock, *grad_logits = logits + kTile;
  auto* keys = reinterpret_cast<uint32_t*>(grad_logits + kTile);
  uint32_t *values = keys + kBlock / 2 * dim, *key_tokens = values + kBlock / 2 * dim;
  uint32_t *weights = key_tokens + kBlock / 2 * dim, *gradients = weights + kChunk * kPairs;
  Half* gradient_rows = reinterpret_cast<Half*>(gradients + kChunk * kPairs);  // [32, 32]
  memset(grad_keys, 0, sizeof(float) * 2 * dim * kBlock);
  if (list.count) {
    pair_dims(dim, key, keys);
    pair_dims(dim, value, values);
    pair_tokens(dim, key, key_tokens);
  }
  long size = static_cast<long>(kBlock) * dim;
  for (int first = 0; first < list.count; first += kChunk) {
    const int* blocks = list.blocks + first;
    int count = list.count - first < kChunk ? list.count - first : kChunk;
    for (int c = 0; c < count; c++) {
      long x = blocks[c];
      const Half *queries = list.queries[x], *grads = list.grads[x];
      auto logit = [&](int s) { return Step{queries + s * kBlock, keys + s * kPairs}; };
      auto grad = [&](int s) { return Step{grads + s * kBlock, values + s * kPairs}; };
      tile_product<false>(dim / kBlock, logit, dim, kBlock, logits, kBlock);
      tile_product<false>(dim / kBlock, grad, dim, kBlock, grad_logits, kBlock);
      if (first + c + 1 < list.count) {
        fetch(list.queries[blocks[c + 1]], kBlock * dim * 2);
        fetch(list.grads[blocks[c + 1]], kBlock * dim * 2);
      }
      fetch(list.query_columns + x * size, kBlock * dim * 2);
      fetch(list.grad_columns + x * size, kBlock * dim * 2);
      fetch(grad_queries + x * size, kBlock * dim * 4);
      float of_bias = bf16_softmax_backward(scale * kLog2E, list.biases[first + c], real,
                                            list.lse2 + x * kBlock, list.delta + x * kBlock, logits,
                                            grad_logits);
      if (grad_biases) grad_biases[first + c] = of_bias;
      pair_rows(logits, weights + c * kPairs);
      pair_rows(grad_logits, gradients + c * kPairs);
      narrow_row(kTile, grad_logits, gradient_rows);
      for (int d = 0; d < dim; d += kBlock) {
        auto step = [&](int) { return Step{gradient_rows, key_tokens + d}; };
        tile_product<true>(1, step, kBlock, dim, grad_queries + x * size + d, dim);
      }
    }
    for (int d = 0; d < dim; d += kBlock) {
      auto value_step = [&](int c) {
        return Step{list.grad_columns + blocks[c] * size + d * kBlock, weights + c * kPairs};
      };
      auto key_step = [&](int c) {
        return Step{list.query_columns + blocks[c] * size + d * kBlock, gradients + c * kPairs};
      };
      tile_product<true>(count, value_step, kBlock, kBlock, grad_values + d * kBlock, kBlock);
      tile_product<true>(count, key_step, kBlock, kBlock, grad_keys + d * kBlock, kBlock);
    }
  }
  transpose(dim, kBlock, grad_keys, kBlock, grad_key, dim, 1.f);
  transpose(dim, kBlock, grad_values, kBlock, grad_value, dim, 1.f);
}

// Adds the product of A [32, 32] and tokens in pairs [16, dim] to `count` key blocks of `to`.
template <int kWidth>
MRA_INLINE void add_to_blocks(int dim, const Half* a, const uint32_t* tokens, const int* blocks,
                              int count, float* product, float* to) {
  for (int d = 0; d < dim; d += kBlock) {
    auto step = [&](int) { return Step{a, tokens + d}; };
    tile_product<false>(1, step, kBlock, dim, product + d, dim);
  }
  long size = static_cast<long>(kWidth) * dim;
  for (int i = 0; i < count; i++, product += size) {
    float* at = to + blocks[i] * size;
    for (long k = 0; k < size; k += kLanes) store(at + k, load(at + k) + load(product + k));
  }
}

template <int kWidth>
MRA_INLINE void bf16_attend_backward_width(int dim, float scale, const Half* query,
                                           const Half* grad, const float* lse2, const float* delta,
                                           const Bf16BlockList& given, float* grad_query,
                                           float* grad_keys, float* grad_values, float* grad_biases,
                                           float* scratch) {
  constexpr int kGroup = kBlock / kWidth, kLogits = kWidth * kBlock;
  const BlockList& list = given.list;
  long size = static_cast<long>(kBlock) * dim;
  float *grad_queries = scratch, *product = grad_queries + size;  // [dim, 32] and [32, dim]
  float *logits = product + size, *grad_logits = logits + kTile;
  auto* queries = reinterpret_cast<uint32_t*>(grad_logits + kTile);
  uint32_t *grads = queries + size / 2, *query_tokens = grads + size / 2;
  uint32_t *grad_tokens = query_tokens + size / 2, *gradients = grad_tokens + size / 2;
  Half *rows = reinterpret_cast<Half*>(gradients + kPairs), *gathered = rows + kTile;
  memset(grad_queries, 0, sizeof(float) * size);
  pair_dims(dim, query, queries);
  pair_dims(dim, grad, grads);
  pair_tokens(dim, query, query_tokens);
  pair_tokens(dim, grad, grad_tokens);
  for (int first = 0; first < list.count; first += kGroup) {
    const int* blocks = list.blocks + first;
    int count = at_most(kGroup, list.count - first);
    const Half* keys = gather_rows<kWidth>(dim, given.keys, blocks, count, gathered);
    const Half* values = gather_rows<kWidth>(dim, given.values, blocks, count, gathered + size);
    const Half* columns =
        gather_columns<kWidth>(dim, given.key_columns, blocks, count, gathered + 2 * size);
    auto logit = [&](int s) { return Step{keys + s * kBlock, queries + s * kPairs}; };
    auto of_weight = [&](int s) { return Step{values + s * kBlock, grads + s * kPairs}; };
    tile_product<false>(dim / kBlock, logit, dim, kBlock, logits, kBlock);
    tile_product<false>(dim / kBlock, of_weight, dim, kBlock, grad_logits, kBlock);
    for (int i = 0; i < count; i++) {
      uint32_t real = list.real[blocks[i]];
      if (real != ~0u >> (kBlock - kWidth)) hide_padding(kWidth, real, logits + i * kLogits);
      float of_bias =
          softmax_backward<kWidth, true>(lse2, delta, list.biases[first + i], scale,
                                         logits + i * kLogits, grad_logits + i * kLogits);
      if (grad_biases) grad_biases[first + i] = of_bias;
    }
    // Rows of missing blocks are products of zeros.
    narrow_row(kTile, logits, rows);
    add_to_blocks<kWidth>(dim, rows, grad_tokens, blocks, count, product, grad_values);
    narrow_row(kTile, grad_logits, rows);
    add_to_blocks<kWidth>(dim, rows, query_tokens, blocks, count, product, grad_keys);
    pair_rows(grad_logits, gradients);
    for (int d = 0; d < dim; d += kBlock) {
      auto step = [&](int) { return Step{columns + d * kBlock, gradients}; };
      tile_product<true>(1, step, kBlock, kBlock, grad_queries + d * kBlock, kBlock);
    }
  }
  transpose(dim, kBlock, grad_queries, kBlock, grad_query, dim, 1.f);
}

MRA_NOINLINE void bf16_attend_backward_narrow(int dim, float scale, const Half* query,
                                              const Half* grad, const float* lse2,
                                              const float* delta, const Bf16BlockList& list,
                                              float* grad_query, float* grad_keys,
                                              float* grad_values, float* grad_biases,
                                              float* scratch) {
  auto attend_blocks =
      list.list.width == 16 ? bf16_attend_backward_width<16> : bf16_attend_backward_width<8>;
  attend_blocks(dim, scale, query, grad, lse2, delta, list, grad_query, grad_keys, grad_values,
                grad_biases, scratch);
}

MRA_NOINLINE void open_bf16(void* found) { open_tiles(found); }
MRA_NOINLINE void close_bf16(const void* found) { close_tiles(found); }

constexpr mra::Bf16Kernels bf16_kernels() {
  return {kBlock,
          bf16_scratch_floats,
          open_bf16,
          close_bf16,
          transpose_halves,
          bf16_attend,
          bf16_attend_backward,
          bf16_attend_backward_narrow};
}

}  // namespace MRA_ISA
