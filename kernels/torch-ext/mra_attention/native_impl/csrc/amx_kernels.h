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
  return 3L * dim * kBlock + (2 * kChunk + 2) * kTile + 4 * kBlock + 3L * kBlock / 2 * dim;
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

MRA_NOINLINE void bf16_attend(int dim, float scale, const Half* query, const Bf16BlockList& given,
                              const CoarseState& coarse_state, float* output, float* lse,
                              float* scratch) {
  const BlockList& list = given.list;
  float *sums = scratch, *logits = sums + dim * kBlock, *maxima = logits + kChunk * kTile;
  float *denominators = maxima + kBlock, *factors = denominators + kBlock;
  auto* queries = reinterpret_cast<uint32_t*>(factors + kBlock);
  uint32_t* weights = queries + kBlock / 2 * dim;  // [kChunk, 16, 32]
  pair_dims(dim, query, queries);
  start_from_coarse(dim, coarse_state, maxima, denominators, sums);
  long size = static_cast<long>(kBlock) * dim;
  for (int first = 0; first < list.count; first += kChunk) {
    const int* blocks = list.blocks + first;
    int count = list.count - first < kChunk ? list.count - first : kChunk;
    for (int c = 0; c < count; c++) {
      const Half* keys = given.keys[blocks[c]];
      float* to = logits + c * kTile;
      auto step = [&](int s) { return Step{keys + s * kBlock, queries + s * kPairs}; };
      tile_product<false>(dim / kBlock, step, dim, kBlock, to, kBlock);
      if (first + c + 1 < list.count) fetch(given.keys[blocks[c + 1]], kBlock * dim * 2);
      fetch(given.value_columns + blocks[c] * size, kBlock * dim * 2);
      if (list.real[blocks[c]] != ~0u) hide_padding(kBlock, list.real[blocks[c]], to);
    }
    if (softmax<true>(count, scale * kLog2E, list.biases + first, logits, maxima, denominators,
                      factors))
      scale_columns(dim, factors, sums);
    for (int c = 0; c < count; c++) pair_rows(logits + c * kTile, weights + c * kPairs);
    for (int d = 0; d < dim; d += kBlock) {
      auto step = [&](int c) {
        return Step{given.value_columns + blocks[c] * size + d * kBlock, weights + c * kPairs};
      };
      tile_product<true>(count, step, kBlock, kBlock, sums + d * kBlock, kBlock);
    }
  }
  divide_sums(dim, maxima, denominators, factors, sums, output, lse);
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

MRA_NOINLINE void open_bf16(void* found) { open_tiles(found); }
MRA_NOINLINE void close_bf16(const void* found) { close_tiles(found); }

constexpr mra::Bf16Kernels bf16_kernels() {
  return {kBlock,           bf16_scratch_floats, open_bf16,           close_bf16,
          transpose_halves, bf16_attend,         bf16_attend_backward};
}

}  // namespace MRA_ISA
