#include "head.h"

namespace mra {

void forward_head(const Shape& shape, long item, Arena arena, size_t* bytes) {
  const MraCall& call = shape.call;
  Blocks query(shape, arena), key(shape, arena), value(shape, arena);
  CoarsePart coarse(shape, arena);
  PairBiases pair_biases(shape, arena);
  RowList row_list(shape, arena);
  float* block = arena.take<float>(shape.block_floats());
  float* block_lse = arena.take<float>(kBlock);
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
  const uint8_t* selected = selected_pairs(shape, item);
  bool is_merged = has_coarse(call);
  if (is_merged) {
    coarse.read(shape, sample, query, key, value);
    coarse.attend(shape, sample, head, selected, pair_biases, scratch);
  }
  const float* biases = nullptr;
  for (int x = 0; x < shape.n_blocks; x++) {
    if (x % kBlock == 0) biases = pair_biases.read(shape, sample, head, x);
    bool is_live = sample.counts[x] > 0;
    if (is_live) {
      BlockList list = row_list.read(shape, sample, selected, biases, x);
      list.keys = key.key_pointers(), list.values = value.key_pointers();
      CoarseState state = is_merged ? coarse.state(shape, x) : CoarseState{};
      shape.kernels.attend(shape.dim, static_cast<float>(call.scale), query[x], list, state, block,
                           block_lse, scratch);
    }
    write_output(shape, sample, item, x, is_live ? block : nullptr, block_lse);
  }
}

}  // namespace mra
