#include "gradients.h"

#include <cmath>
#include <cstring>
#include <initializer_list>

namespace mra {
namespace {

constexpr float kLog2E = 1.4426950408889634f;

}  // namespace

Gradients::Gradients(const Shape& shape, Arena& arena) {
  long vectors = static_cast<long>(shape.padded_blocks) * shape.dim;
  of_query_means = arena.take<float>(vectors);
  of_key_means = arena.take<float>(static_cast<long>(shape.padded_keys) * shape.dim);
  of_value_sums = arena.take<float>(static_cast<long>(shape.padded_keys) * shape.dim);
  sums = arena.take<float>(vectors);
  delta_sums = arena.take<float>(shape.padded_blocks);
  delta = arena.take<float>(static_cast<long>(shape.n_blocks) * kBlock);
  lse2 = arena.take<float>(static_cast<long>(shape.n_blocks) * kBlock);
  of_logits = arena.take<float>(static_cast<long>(shape.padded_keys) * kBlock);
  of_biases = shape.call.grad_bias ? arena.take<float>(shape.n_keys) : nullptr;
  by_distance = nullptr;
}

void Gradients::start(const Shape& shape, long item) {
  size_t vectors = sizeof(float) * shape.padded_blocks * shape.dim;
  size_t key_vectors = sizeof(float) * shape.padded_keys * shape.dim;
  for (float* x : {of_query_means, sums}) memset(x, 0, vectors);
  for (float* x : {of_key_means, of_value_sums}) memset(x, 0, key_vectors);
  memset(delta_sums, 0, sizeof(float) * shape.padded_blocks);
  if (!shape.call.grad_bias) return;
  by_distance = shape.call.grad_bias + item * shape.n_blocks;
  memset(by_distance, 0, sizeof(double) * shape.n_blocks);
}

void Gradients::read_queries(const Shape& shape, const Sample& sample, const float* lse,
                             const Blocks& grad_output, const Blocks& output, const float* maxima) {
  for (int x = 0; x < shape.n_blocks; x++) {
    float *deltas = delta + x * kBlock, *powers = lse2 + x * kBlock, weights[kBlock];
    shape.kernels.row_dots(shape.dim, grad_output[x], output[x], deltas);
    float sum = 0;
    for (int i = 0; i < kBlock; i++) {
      bool is_real = sample.real[x] >> i & 1;
      powers[i] = is_real ? lse[static_cast<long>(x) * kBlock + i] * kLog2E : INFINITY;
      weights[i] = maxima ? exp2f(maxima[x] - powers[i]) : 0.f;
      sum += weights[i] * deltas[i];
    }
    if (!maxima) continue;
    delta_sums[x] = sum;
    shape.kernels.weighted_sum(shape.dim, weights, grad_output[x],
                               sums + static_cast<long>(x) * shape.dim);
  }
}

void Gradients::go_through_coarse(const Shape& shape, const Sample& sample, long item,
                                  const uint8_t* selected, PairBiases& pair_biases,
                                  CoarsePart& coarse, float* scratch) {
  const KernelTable& kernels = shape.kernels;
  long head = item % shape.call.heads;
  for (int x = 0; x < shape.n_blocks; x += kBlock) {
    long at = static_cast<long>(x) * shape.dim;
    const float* biases = pair_biases.read(shape, sample, head, x);
    kernels.coarse_backward(coarse.rows(shape, sample, selected, biases, x), coarse.maxima + x,
                            sums + at, delta_sums + x, of_query_means + at, of_key_means,
                            of_value_sums, by_distance ? of_logits : nullptr, scratch);
    if (by_distance) add_coarse_biases(shape, sample, x);
  }
  auto divide = [&](int blocks, const float* counts, float* rows) {
    for (int y = 0; y < blocks; y++, rows += shape.dim) {
      float share = counts[y] ? static_cast<float>(shape.call.scale) / counts[y] : 0.f;
      for (int d = 0; d < shape.dim; d++) rows[d] *= share;
    }
  };
  divide(shape.n_blocks, sample.counts, of_query_means);
  divide(shape.n_keys, sample.key_counts, of_key_means);
}

// Pairs that are global have no bias.
void Gradients::add_coarse_biases(const Shape& shape, const Sample& sample, int first) {
  for (int q = 0; q < kBlock && first + q < shape.n_blocks; q++) {
    int x = first + q;
    if (sample.is_first[x]) continue;
    for (int i = 0; i < shape.n_keys; i++) {
      int y = i / shape.per_block();
      if (!sample.is_first[y])
        by_distance[x < y ? y - x : x - y] += of_logits[static_cast<long>(i) * kBlock + q];
    }
  }
}

void Gradients::add_biases(const Shape& shape, const Sample& sample, int x, const BlockList& list) {
  if (!by_distance || sample.is_first[x]) return;
  for (int c = 0; c < list.count; c++) {
    int y = list.blocks[c] / shape.per_block();
    if (!sample.is_first[y]) by_distance[x < y ? y - x : x - y] += of_biases[c];
  }
}

void fill_key_block(const Shape& shape, const float* row, float* block) {
  for (int i = 0; i < shape.width; i++)
    memcpy(block + static_cast<long>(i) * shape.dim, row, sizeof(float) * shape.dim);
}

}  // namespace mra
