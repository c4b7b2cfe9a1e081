#include "head.h"

#include <cmath>
#include <cstring>
#include <initializer_list>

namespace mra {
namespace {

constexpr float kLog2E = 1.4426950408889634f;

// The gradients of one head, and what is known of its queries.
struct Gradients {
  Gradients(const Shape& shape, Arena& arena) {
    long tokens = shape.n_blocks * shape.block_floats();
    long vectors = static_cast<long>(shape.padded_blocks) * shape.dim;
    of_keys = arena.take<float>(tokens);
    of_values = arena.take<float>(tokens);
    of_query_means = arena.take<float>(vectors);
    of_key_means = arena.take<float>(vectors);
    of_value_sums = arena.take<float>(vectors);
    sums = arena.take<float>(vectors);
    delta_sums = arena.take<float>(shape.padded_blocks);
    delta = arena.take<float>(static_cast<long>(shape.n_blocks) * kBlock);
    lse2 = arena.take<float>(static_cast<long>(shape.n_blocks) * kBlock);
    of_logits = arena.take<float>(static_cast<long>(shape.padded_blocks) * kBlock);
    of_biases = arena.take<float>(shape.n_blocks);
  }

  float *of_keys, *of_values;                            // [R, 32, dim]
  float *of_query_means, *of_key_means, *of_value_sums;  // [R rounded up to 32, dim]
  float *sums, *delta_sums;  // sums over a block's queries of w dO and w delta
  float *delta, *lse2;       // [R, 32]
  float* of_logits;          // [R rounded up to 32, 32] of coarse logits of 32 rows
  float* of_biases;          // [R] of the pairs of one row
};

// delta = dO . O, the log-sum-exp in powers of two, and the sums the coarse part needs.
void read_queries(const Shape& shape, const Sample& sample, const float* lse,
                  const Blocks& grad_output, const Blocks& output, const float* maxima,
                  Gradients& grads) {
  for (int x = 0; x < shape.n_blocks; x++) {
    float *delta = grads.delta + x * kBlock, *lse2 = grads.lse2 + x * kBlock, weights[kBlock];
    shape.kernels.row_dots(shape.dim, grad_output[x], output[x], delta);
    float sum = 0;
    for (int i = 0; i < kBlock; i++) {
      bool is_real = sample.real[x] >> i & 1;
      lse2[i] = is_real ? lse[static_cast<long>(x) * kBlock + i] * kLog2E : INFINITY;
      weights[i] = maxima ? exp2f(maxima[x] - lse2[i]) : 0.f;
      sum += weights[i] * delta[i];
    }
    if (!maxima) continue;
    grads.delta_sums[x] = sum;
    shape.kernels.weighted_sum(shape.dim, weights, grad_output[x],
                               grads.sums + static_cast<long>(x) * shape.dim);
  }
}

// The same for every token of a block: what the means and sums of the coarse part pass on.
void spread_coarse(const Shape& shape, const Sample& sample, Gradients& grads) {
  for (int y = 0; y < shape.n_blocks; y++) {
    long at = static_cast<long>(y) * shape.dim, block = y * shape.block_floats();
    float share = sample.counts[y] ? static_cast<float>(shape.call.scale) / sample.counts[y] : 0.f;
    for (int d = 0; d < shape.dim; d++) {
      grads.of_query_means[at + d] *= share;
      grads.of_keys[block + d] = grads.of_key_means[at + d] * share;
      grads.of_values[block + d] = grads.of_value_sums[at + d];
    }
    for (int i = 1; i < kBlock; i++) {
      memcpy(grads.of_keys + block + i * shape.dim, grads.of_keys + block,
             sizeof(float) * shape.dim);
      memcpy(grads.of_values + block + i * shape.dim, grads.of_values + block,
             sizeof(float) * shape.dim);
    }
  }
}

// Adds gradients of logits to those of distances; pairs that are global have no bias.
void add_coarse_biases(const Shape& shape, const Sample& sample, int first, const float* of_logits,
                       double* by_distance) {
  for (int q = 0; q < kBlock && first + q < shape.n_blocks; q++) {
    int x = first + q;
    if (sample.is_first[x]) continue;
    for (int y = 0; y < shape.n_blocks; y++)
      if (!sample.is_first[y])
        by_distance[x < y ? y - x : x - y] += of_logits[static_cast<long>(y) * kBlock + q];
  }
}

void add_exact_biases(const Sample& sample, int x, const BlockList& list, const float* of_biases,
                      double* by_distance) {
  if (sample.is_first[x]) return;
  for (int c = 0; c < list.count; c++) {
    int y = list.blocks[c];
    if (!sample.is_first[y]) by_distance[x < y ? y - x : x - y] += of_biases[c];
  }
}

}  // namespace

void backward_head(const Shape& shape, long item, Arena arena, size_t* bytes) {
  const MraCall& call = shape.call;
  Blocks query(shape, arena), key(shape, arena), value(shape, arena);
  Blocks grad_output(shape, arena), output(shape, arena);
  CoarsePart coarse(shape, arena);
  PairBiases pair_biases(shape, arena);
  RowList row_list(shape, arena);
  Gradients grads(shape, arena);
  float* block = arena.take<float>(shape.block_floats());
  float* scratch = arena.take<float>(shape.kernels.scratch_floats(shape.dim));
  if (bytes) {
    *bytes = arena.used();
    return;
  }
  const KernelTable& kernels = shape.kernels;
  long sample_number = item / call.heads, head = item % call.heads;
  const Sample& sample = shape.samples[sample_number];
  query.read(call.query, call.dtype, sample_number, head);
  key.read(call.key, call.dtype, sample_number, head);
  value.read(call.value, call.dtype, sample_number, head);
  grad_output.read(call.grad_output, kFloat32, sample_number, head);
  output.read(call.output, kFloat32, sample_number, head);
  const uint8_t* selected = selected_pairs(shape, item);
  double* by_distance = call.grad_bias ? call.grad_bias + item * shape.n_blocks : nullptr;
  if (by_distance) memset(by_distance, 0, sizeof(double) * shape.n_blocks);
  bool is_merged = has_coarse(call);
  size_t vectors = sizeof(float) * shape.padded_blocks * shape.dim;
  for (float* x : {grads.of_query_means, grads.of_key_means, grads.of_value_sums, grads.sums})
    memset(x, 0, vectors);
  memset(grads.delta_sums, 0, sizeof(float) * shape.padded_blocks);
  if (is_merged) coarse.read(shape, sample, query, key, value);
  for (int x = 0; is_merged && x < shape.n_blocks; x += kBlock) {
    const float* biases = pair_biases.read(shape, sample, head, x);
    kernels.coarse(coarse.rows(shape, sample, selected, biases, x), coarse.maxima + x,
                   coarse.denominators + x, coarse.numerators + static_cast<long>(x) * shape.dim,
                   scratch);
  }
  read_queries(shape, sample, call.lse + item * call.length, grad_output, output,
               is_merged ? coarse.maxima : nullptr, grads);
  for (int x = 0; is_merged && x < shape.n_blocks; x += kBlock) {
    long at = static_cast<long>(x) * shape.dim;
    const float* biases = pair_biases.read(shape, sample, head, x);
    kernels.coarse_backward(coarse.rows(shape, sample, selected, biases, x), coarse.maxima + x,
                            grads.sums + at, grads.delta_sums + x, grads.of_query_means + at,
                            grads.of_key_means, grads.of_value_sums,
                            by_distance ? grads.of_logits : nullptr, scratch);
    if (by_distance) add_coarse_biases(shape, sample, x, grads.of_logits, by_distance);
  }
  spread_coarse(shape, sample, grads);
  auto of = [&](void* tensor) {
    long at = item * call.length * call.dim, size = call.dtype == kFloat32 ? 4 : 2;
    return static_cast<void*>(static_cast<char*>(tensor) + at * size);
  };
  const float* biases = nullptr;
  for (int x = 0; x < shape.n_blocks; x++) {
    if (x % kBlock == 0) biases = pair_biases.read(shape, sample, head, x);
    bool is_live = sample.counts[x] > 0;
    if (is_live) {
      BlockList list = row_list.read(shape, sample, selected, biases, x, key, value);
      kernels.attend_backward(shape.dim, static_cast<float>(call.scale), query[x], grad_output[x],
                              grads.lse2 + x * kBlock, grads.delta + x * kBlock, list,
                              grads.of_query_means + static_cast<long>(x) * shape.dim, block,
                              grads.of_keys, grads.of_values,
                              by_distance ? grads.of_biases : nullptr, scratch);
      if (by_distance) add_exact_biases(sample, x, list, grads.of_biases, by_distance);
    }
    write_block(shape, sample, x, is_live ? block : nullptr, call.dtype, of(call.grad_query));
  }
  for (int y = 0; y < shape.n_blocks; y++) {
    write_block(shape, sample, y, grads.of_keys + y * shape.block_floats(), call.dtype,
                of(call.grad_key));
    write_block(shape, sample, y, grads.of_values + y * shape.block_floats(), call.dtype,
                of(call.grad_value));
  }
}

}  // namespace mra
