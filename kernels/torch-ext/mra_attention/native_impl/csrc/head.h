// One (sample, head) of a call: its tokens as clean float32 blocks, its coarse part, its passes.
#pragma once

#include <cstddef>
#include <cstdint>

#include "api.h"
#include "kernel_table.h"

namespace mra {

constexpr int kBlock = 32;

// The real tokens of a sample.
struct Sample {
  uint32_t* real;     // [R] a bit for each real token
  float* counts;      // [R rounded up to 32]
  uint8_t* is_first;  // [R] among the first live blocks that are global, or dead before them
  long live;          // blocks that hold a real token
};

// Sizes of a call, the same for all of its heads.
struct Shape {
  const MraCall& call;
  const KernelTable& kernels;
  int dim;            // rounded up to kernels.dim_multiple
  int n_blocks;       // R
  int padded_blocks;  // R rounded up to 32
  const Sample* samples;

  long block_floats() const { return static_cast<long>(kBlock) * dim; }
};

// Hands out parts of one piece of memory, aligned to 64; counts only where there is none.
class Arena {
 public:
  explicit Arena(char* memory = nullptr) : memory_(memory) {}
  template <class T>
  T* take(long count) {
    size_t at = used_;
    used_ += (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
    return memory_ ? reinterpret_cast<T*>(memory_ + at) : nullptr;
  }
  size_t used() const { return used_; }

 private:
  char* memory_;
  size_t used_ = 0;
};

// Blocks of one operand: pointers to [32, dim], some into the tensor itself.
class Blocks {
 public:
  Blocks(const Shape& shape, Arena& arena);
  // Points at the blocks of a head; blocks that are not whole, float32 and dim wide are copied,
  // with zeros for what is not real.
  void read(const MraTensor& tensor, int64_t dtype, long sample, long head);
  const float* operator[](int block) const { return pointers_[block]; }
  const float* const* pointers() const { return pointers_; }

 private:
  const Shape& shape_;
  const float** pointers_;
  float* copies_;
};

// Writes the real tokens of block [32, dim] to a contiguous [length, call.dim] in the dtype, zeros
// to the others; null: zeros to all.
void write_block(const Shape& shape, const Sample& sample, int block, const float* from,
                 int64_t dtype, void* head_of_tensor);

// Pooled blocks, the pairs that stay coarse, and the biases of pairs.
struct CoarsePart {
  CoarsePart(const Shape& shape, Arena& arena);
  void read(const Shape& shape, const Sample& sample, const Blocks& query, const Blocks& key,
            const Blocks& value);
  CoarseRows rows(const Shape& shape, const Sample& sample, const uint8_t* selected,
                  const float* biases, int first) const;

  float *query_means, *key_means, *value_sums;  // [R rounded up to 32, dim]
  float *maxima, *denominators, *numerators;    // [R rounded up to 32], and [.., dim]
};

// The bias of each pair in powers of two, [32, R] for the block rows from `first`; null without.
class PairBiases {
 public:
  PairBiases(const Shape& shape, Arena& arena);
  const float* read(const Shape& shape, const Sample& sample, long head, int first);

 private:
  float* biases_;
};

// The selected live key blocks of block row x, with their biases.
class RowList {
 public:
  RowList(const Shape& shape, Arena& arena);
  BlockList read(const Shape& shape, const Sample& sample, const uint8_t* selected,
                 const float* biases, int x, const Blocks& key, const Blocks& value);

 private:
  int* blocks_;
  float* biases_;
};

// Pairs of one head, or null where every live pair is selected.
inline const uint8_t* selected_pairs(const Shape& shape, long item) {
  long pairs = static_cast<long>(shape.n_blocks) * shape.n_blocks;
  return shape.call.blocks ? shape.call.blocks + item * pairs : nullptr;
}
inline bool has_coarse(const MraCall& call) { return call.blocks && !call.sparse; }

// One work item each: sample item / heads, head item % heads. With an empty arena they only count.
void select_head(const Shape& shape, long item, Arena arena, size_t* bytes);
void forward_head(const Shape& shape, long item, Arena arena, size_t* bytes);
void backward_head(const Shape& shape, long item, Arena arena, size_t* bytes);

}  // namespace mra
