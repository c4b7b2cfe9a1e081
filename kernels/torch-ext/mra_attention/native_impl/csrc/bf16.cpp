// The passes of a head whose exact attention is computed by `Bf16Kernels`. The coarse part stays
// float32.
#include <cstring>

#include "gradients.h"

namespace mra {
namespace {

// Sets the thread up for as long as it lives.
class Opened {
 public:
  explicit Opened(const Bf16Kernels& kernels) : kernels_(kernels) { kernels_.open(found_); }
  ~Opened() { kernels_.close(found_); }
  Opened(const Opened&) = delete;
  Opened& operator=(const Opened&) = delete;

 private:
  const Bf16Kernels& kernels_;
  alignas(64) char found_[64];
};

float* take_scratch(const Shape& shape, Arena& arena) {
  long ours = shape.kernels.bf16->scratch_floats(shape.dim);
  long others = shape.kernels.scratch_floats(shape.dim);
  return arena.take<float>(ours > others ? ours : others);
}

uint16_t* take_columns(const Shape& shape, Arena& arena) {
  return arena.take<uint16_t>(shape.n_blocks * shape.block_floats());
}

void transpose(const Shape& shape, const HalfBlocks& blocks, uint16_t* columns, float* scratch) {
  for (int y = 0; y < shape.n_blocks; y++)
    shape.kernels.bf16->transpose(shape.dim, blocks[y], columns + y * shape.block_floats(),
                                  scratch);
}

// x [rows, dim] = x * scale + row
void finish_gradient(const Shape& shape, int rows, float scale, const float* row, float* x) {
  for (int i = 0; i < rows; i++, x += shape.dim)
    for (int d = 0; d < shape.dim; d++) x[d] = x[d] * scale + row[d];
}

// What the backward passes of squares and of narrow key blocks both read.
struct BackwardOperands {
  BackwardOperands(const Shape& shape, Arena& arena)
      : query(shape, arena),
        key(shape, arena),
        value(shape, arena),
        grad(shape, arena),
        grad_output(shape, arena),
        output(shape, arena),
        coarse(shape, arena),
        pair_biases(shape, arena),
        row_list(shape, arena),
        grads(shape, arena),
        block(arena.take<float>(shape.block_floats())),
        scratch(take_scratch(shape, arena)) {}

  // Reads the tokens of a head, and goes through its coarse part.
  void read(const Shape& shape, long item) {
    const MraCall& call = shape.call;
    long sample_number = item / call.heads, head = item % call.heads;
    const Sample& sample = shape.samples[sample_number];
    query.read(call.query, call.dtype, sample_number, head);
    key.read(call.key, call.dtype, sample_number, head);
    value.read(call.value, call.dtype, sample_number, head);
    grad.read(call.grad_output, kFloat32, sample_number, head);
    grad_output.read(call.grad_output, kFloat32, sample_number, head);
    output.read(call.output, kFloat32, sample_number, head);
    const uint8_t* selected = selected_pairs(shape, item);
    bool is_merged = has_coarse(call);
    grads.start(shape, item);
    if (is_merged) {
      coarse.read(shape, sample, query, key, value, block);
      coarse.attend(shape, sample, head, selected, pair_biases, scratch);
    }
    grads.read_queries(shape, sample, call.lse + item * call.length, grad_output, output,
                       is_merged ? coarse.maxima : nullptr);
    if (is_merged)
      grads.go_through_coarse(shape, sample, item, selected, pair_biases, coarse, scratch);
  }

  HalfBlocks query, key, value, grad;
  Blocks grad_output, output;
  CoarsePart coarse;
  PairBiases pair_biases;
  RowList row_list;
  Gradients grads;
  float *block, *scratch;  // block: [32, dim]
};

// By key block: only the gradient of queries is added to in memory.
void backward_of_squares(const Shape& shape, long item, Arena arena, size_t* bytes) {
  const MraCall& call = shape.call;
  BackwardOperands of(shape, arena);
  uint16_t *query_columns = take_columns(shape, arena), *grad_columns = take_columns(shape, arena);
  float* of_queries = arena.take<float>(shape.n_blocks * shape.block_floats());
  float *of_key = of.block, *of_value = arena.take<float>(shape.block_floats());
  if (bytes) {
    *bytes = arena.used();
    return;
  }
  const Bf16Kernels& kernels = *shape.kernels.bf16;
  const Sample& sample = shape.samples[item / call.heads];
  const uint8_t* selected = selected_pairs(shape, item);
  of.read(shape, item);
  transpose(shape, of.query, query_columns, of.scratch);
  transpose(shape, of.grad, grad_columns, of.scratch);
  memset(of_queries, 0, sizeof(float) * shape.n_blocks * shape.block_floats());
  float scale = static_cast<float>(call.scale);
  Opened opened(kernels);
  const float* biases = nullptr;
  for (int y = 0; y < shape.n_blocks; y++) {
    if (y % kBlock == 0) biases = of.pair_biases.read(shape, sample, item % call.heads, y);
    bool is_live = sample.counts[y] > 0;
    if (is_live) {
      long at = static_cast<long>(y) * shape.dim;
      BlockList column = of.row_list.read_column(shape, sample, selected, biases, y);
      Bf16QueryList list{column.blocks,       column.biases,      column.count,
                         of.query.pointers(), of.grad.pointers(), query_columns,
                         grad_columns,        of.grads.lse2,      of.grads.delta};
      kernels.attend_backward(shape.dim, scale, of.key[y], of.value[y], sample.real[y], list,
                              of_queries, of_key, of_value, of.grads.of_biases, of.scratch);
      of.grads.add_biases(shape, sample, y, column);
      finish_gradient(shape, kBlock, scale, of.grads.of_key_means + at, of_key);
      finish_gradient(shape, kBlock, 1.f, of.grads.of_value_sums + at, of_value);
    }
    write_block(shape, sample, y, is_live ? of_key : nullptr, call.dtype,
                head_of(shape, call.grad_key, item));
    write_block(shape, sample, y, is_live ? of_value : nullptr, call.dtype,
                head_of(shape, call.grad_value, item));
  }
  for (int x = 0; x < shape.n_blocks; x++) {
    float* of_query = of_queries + x * shape.block_floats();
    finish_gradient(shape, kBlock, scale,
                    of.grads.of_query_means + static_cast<long>(x) * shape.dim, of_query);
    write_block(shape, sample, x, of_query, call.dtype, head_of(shape, call.grad_query, item));
  }
}

// By query block, as in float32: a tile of keys holds blocks of several squares.
void backward_of_narrow(const Shape& shape, long item, Arena arena, size_t* bytes) {
  const MraCall& call = shape.call;
  BackwardOperands of(shape, arena);
  uint16_t* key_columns = take_columns(shape, arena);
  long tokens = shape.n_blocks * shape.block_floats();
  float *of_keys = arena.take<float>(tokens), *of_values = arena.take<float>(tokens);
  if (bytes) {
    *bytes = arena.used();
    return;
  }
  const Bf16Kernels& kernels = *shape.kernels.bf16;
  const Sample& sample = shape.samples[item / call.heads];
  const uint8_t* selected = selected_pairs(shape, item);
  of.read(shape, item);
  transpose(shape, of.key, key_columns, of.scratch);
  memset(of_keys, 0, sizeof(float) * tokens);
  memset(of_values, 0, sizeof(float) * tokens);
  float scale = static_cast<float>(call.scale);
  Opened opened(kernels);
  const float* biases = nullptr;
  for (int x = 0; x < shape.n_blocks; x++) {
    if (x % kBlock == 0) biases = of.pair_biases.read(shape, sample, item % call.heads, x);
    bool is_live = sample.counts[x] > 0;
    if (is_live) {
      Bf16BlockList list{of.row_list.read(shape, sample, selected, biases, x), of.key.pointers(),
                         of.value.pointers(), key_columns, nullptr};
      kernels.attend_backward_narrow(shape.dim, scale, of.query[x], of.grad[x],
                                     of.grads.lse2 + x * kBlock, of.grads.delta + x * kBlock, list,
                                     of.block, of_keys, of_values, of.grads.of_biases, of.scratch);
      of.grads.add_biases(shape, sample, x, list.list);
      finish_gradient(shape, kBlock, scale,
                      of.grads.of_query_means + static_cast<long>(x) * shape.dim, of.block);
    }
    write_block(shape, sample, x, is_live ? of.block : nullptr, call.dtype,
                head_of(shape, call.grad_query, item));
  }
  for (int y = 0; y < shape.n_keys; y++) {
    long at = static_cast<long>(y) * shape.dim, token = y * shape.key_floats();
    finish_gradient(shape, shape.width, scale, of.grads.of_key_means + at, of_keys + token);
    finish_gradient(shape, shape.width, 1.f, of.grads.of_value_sums + at, of_values + token);
  }
  for (int y = 0; y < shape.n_blocks; y++) {
    long token = y * shape.block_floats();
    write_block(shape, sample, y, of_keys + token, call.dtype, head_of(shape, call.grad_key, item));
    write_block(shape, sample, y, of_values + token, call.dtype,
                head_of(shape, call.grad_value, item));
  }
}

}  // namespace

void forward_head_bf16(const Shape& shape, long item, Arena arena, size_t* bytes) {
  const MraCall& call = shape.call;
  HalfBlocks query(shape, arena), key(shape, arena), value(shape, arena);
  CoarsePart coarse(shape, arena);
  PairBiases pair_biases(shape, arena);
  RowList row_list(shape, arena);
  uint16_t* value_columns = take_columns(shape, arena);
  float* block = arena.take<float>(shape.block_floats());
  float* block_lse = arena.take<float>(kBlock);
  float* scratch = take_scratch(shape, arena);
  if (bytes) {
    *bytes = arena.used();
    return;
  }
  const Bf16Kernels& kernels = *shape.kernels.bf16;
  long sample_number = item / call.heads, head = item % call.heads;
  const Sample& sample = shape.samples[sample_number];
  query.read(call.query, call.dtype, sample_number, head);
  key.read(call.key, call.dtype, sample_number, head);
  value.read(call.value, call.dtype, sample_number, head);
  transpose(shape, value, value_columns, scratch);
  const uint8_t* selected = selected_pairs(shape, item);
  bool is_merged = has_coarse(call);
  if (is_merged) {
    coarse.read(shape, sample, query, key, value, block);
    coarse.attend(shape, sample, head, selected, pair_biases, scratch);
  }
  Opened opened(kernels);
  const float* biases = nullptr;
  for (int x = 0; x < shape.n_blocks; x++) {
    if (x % kBlock == 0) biases = pair_biases.read(shape, sample, head, x);
    bool is_live = sample.counts[x] > 0;
    if (is_live) {
      Bf16BlockList list{row_list.read(shape, sample, selected, biases, x), key.pointers(), nullptr,
                         nullptr, value_columns};
      CoarseState state = is_merged ? coarse.state(shape, x) : CoarseState{};
      kernels.attend(shape.dim, static_cast<float>(call.scale), query[x], list, state, block,
                     block_lse, scratch);
    }
    write_output(shape, sample, item, x, is_live ? block : nullptr, block_lse);
  }
}

void backward_head_bf16(const Shape& shape, long item, Arena arena, size_t* bytes) {
  auto pass = shape.width == kBlock ? backward_of_squares : backward_of_narrow;
  pass(shape, item, arena, bytes);
}

}  // namespace mra
