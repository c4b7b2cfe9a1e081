#include "gradients.h"

namespace mra {

void backward_head(const Shape& shape, long item, Arena arena, size_t* bytes) {
  const MraCall& call = shape.call;
  Blocks query(shape, arena), key(shape, arena), value(shape, arena);
  Blocks grad_output(shape, arena), output(shape, arena);
  CoarsePart coarse(shape, arena);
  PairBiases pair_biases(shape, arena);
  RowList row_list(shape, arena);
  Gradients grads(shape, arena);
  long tokens = shape.n_blocks * shape.block_floats();
  float *of_keys = arena.take<float>(tokens), *of_values = arena.take<float>(tokens);
  float* block = arena.take<float>(shape.block_floats());
  float* scratch = arena.take<float>(shape.kernels.scratch_floats(shape.dim));
  if (bytes) {
    *bytes = arena.used();
    return;
  }
  long sample_number = item / call.heads, head = item % call.heads;
  const Sample& sample = shape.samples[sample_number];
  query.read(call.query, call.dtype, sample_number, head);
  key.read(call.key, call.dtype, sample_number, head);
  value.read(call.value, call.dtype, sample_number, head);
  grad_output.read(call.grad_output, kFloat32, sample_number, head);
  output.read(call.output, kFloat32, sample_number, head);
  const uint8_t* selected = selected_pairs(shape, item);
  bool is_merged = has_coarse(call);
  grads.start(shape, item);
  if (is_merged) {
    coarse.read(shape, sample, query, key, value);
    coarse.attend(shape, sample, head, selected, pair_biases, scratch);
  }
  grads.read_queries(shape, sample, call.lse + item * call.length, grad_output, output,
                     is_merged ? coarse.maxima : nullptr);
  if (is_merged)
    grads.go_through_coarse(shape, sample, item, selected, pair_biases, coarse, scratch);
  for (int y = 0; y < shape.n_keys; y++) {
    long at = static_cast<long>(y) * shape.dim, token = y * shape.key_floats();
    fill_key_block(shape, grads.of_key_means + at, of_keys + token);
    fill_key_block(shape, grads.of_value_sums + at, of_values + token);
  }
  const float* biases = nullptr;
  for (int x = 0; x < shape.n_blocks; x++) {
    if (x % kBlock == 0) biases = pair_biases.read(shape, sample, head, x);
    bool is_live = sample.counts[x] > 0;
    if (is_live) {
      BlockList list = row_list.read(shape, sample, selected, biases, x);
      list.keys = key.key_pointers(), list.values = value.key_pointers();
      shape.kernels.attend_backward(shape.dim, static_cast<float>(call.scale), query[x],
                                    grad_output[x], grads.lse2 + x * kBlock,
                                    grads.delta + x * kBlock, list,
                                    grads.of_query_means + static_cast<long>(x) * shape.dim, block,
                                    of_keys, of_values, grads.of_biases, scratch);
      grads.add_biases(shape, sample, x, list);
    }
    write_block(shape, sample, x, is_live ? block : nullptr, call.dtype,
                head_of(shape, call.grad_query, item));
  }
  for (int y = 0; y < shape.n_blocks; y++) {
    long token = y * shape.block_floats();
    write_block(shape, sample, y, of_keys + token, call.dtype, head_of(shape, call.grad_key, item));
    write_block(shape, sample, y, of_values + token, call.dtype,
                head_of(shape, call.grad_value, item));
  }
}

}  // namespace mra
