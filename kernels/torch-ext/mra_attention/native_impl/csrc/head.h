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

  // The same of key blocks; of squares these are those of blocks.
  uint32_t* key_real;  // [C]
  float* key_counts;   // [C rounded up to 32]
  long live_keys;
};

// The bits of a key block without padding.
constexpr uint32_t all_real(int width) { return ~0u >> (kBlock - width); }

// Sizes of a call, the same for all of its heads.
struct Shape {
  const MraCall& call;
  const KernelTable& kernels;
  int dim;            // rounded up to kernels.dim_multiple
  int n_blocks;       // R
  int padded_blocks;  // R rounded up to 32
  int width;          // tokens of a key block
  int n_keys;         // C
  int padded_keys;    // C rounded up to 32
  const Sample* samples;

  int per_block() const { return kBlock / width; }  // key blocks to a block
  long block_floats() const { return static_cast<long>(kBlock) * dim; }
  long key_floats() const { return static_cast<long>(width) * dim; }
  long pairs() const { return static_cast<long>(n_blocks) * n_keys; }
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
  const float* key_block(int y) const { return key_pointers_[y]; }
  const float* const* key_pointers() const { return key_pointers_; }

 private:
  const Shape& shape_;
  const float **pointers_, **key_pointers_;  // [R], and [C] to parts of the same
  float* copies_;
};

// The same of bfloat16, for `Bf16Kernels`.
class HalfBlocks {
 public:
  HalfBlocks(const Shape& shape, Arena& arena);
  // A tensor that is not bfloat16 is float32, and is rounded.
  void read(const MraTensor& tensor, int64_t dtype, long sample, long head);
  const uint16_t* operator[](int block) const { return pointers_[block]; }
  const uint16_t* const* pointers() const { return pointers_; }

 private:
  const Shape& shape_;
  const uint16_t** pointers_;
  uint16_t* copies_;
};

// Writes the real tokens of block [32, dim] to a contiguous [length, call.dim] in the dtype, zeros
// to the others; null: zeros to all.
void write_block(const Shape& shape, const Sample& sample, int block, const float* from,
                 int64_t dtype, void* head_of_tensor);

// The bias of each pair in powers of two, [32, C] for the block rows from `first`; null without.
class PairBiases {
 public:
  PairBiases(const Shape& shape, Arena& arena);
  const float* read(const Shape& shape, const Sample& sample, long head, int first);

 private:
  float* biases_;
};

// Writes output and log-sum-exp of a block of queries; null: nothing is attended to.
void write_output(const Shape& shape, const Sample& sample, long item, int block,
                  const float* output, const float* lse);

// Pooled blocks, the pairs that stay coarse, and the biases of pairs.
struct CoarsePart {
  CoarsePart(const Shape& shape, Arena& arena);
  void read(const Shape& shape, const Sample& sample, const Blocks& query, const Blocks& key,
            const Blocks& value);
  // Widens one block after the other into `block` [32, dim].
  void read(const Shape& shape, const Sample& sample, const HalfBlocks& query,
            const HalfBlocks& key, const HalfBlocks& value, float* block);
  CoarseRows rows(const Shape& shape, const Sample& sample, const uint8_t* selected,
                  const float* biases, int first) const;
  CoarseState state(const Shape& shape, int x) const {
    return {maxima + x, denominators + x, numerators + static_cast<long>(x) * shape.dim};
  }
  // The state of all rows; after `read`.
  void attend(const Shape& shape, const Sample& sample, long head, const uint8_t* selected,
              PairBiases& pair_biases, float* scratch);

  float* query_means;                         // [R rounded up to 32, dim]
  float *key_means, *value_sums;              // [C rounded up to 32, dim]
  float *maxima, *denominators, *numerators;  // [R rounded up to 32], and [.., dim]

 private:
  void divide_means(const Shape& shape, const Sample& sample);
};

// The selected live key blocks of block row x, with their biases; keys and values are left to
// the caller.
class RowList {
 public:
  RowList(const Shape& shape, Arena& arena);
  BlockList read(const Shape& shape, const Sample& sample, const uint8_t* selected,
                 const float* biases, int x);
  // The query blocks that attend to the square key block y instead; the biases are symmetric.
  BlockList read_column(const Shape& shape, const Sample& sample, const uint8_t* selected,
                        const float* biases, int y);

 private:
  BlockList list(int count, const Shape& shape, const Sample& sample) const;

  int* blocks_;
  float* biases_;
};

// Pairs of one head, or null where every live pair is selected.
inline const uint8_t* selected_pairs(const Shape& shape, long item) {
  return shape.call.blocks ? shape.call.blocks + item * shape.pairs() : nullptr;
}
// Where the gradients of a head lie in a contiguous tensor of the inputs' dtype.
inline void* head_of(const Shape& shape, void* tensor, long item) {
  long at = item * shape.call.length * shape.call.dim, size = shape.call.dtype == kFloat32 ? 4 : 2;
  return static_cast<char*>(tensor) + at * size;
}
inline bool has_coarse(const MraCall& call) { return call.blocks && !call.sparse; }

// One work item each: sample item / heads, head item % heads. With an empty arena they only count.
void select_head(const Shape& shape, long item, Arena arena, size_t* bytes);
void forward_head(const Shape& shape, long item, Arena arena, size_t* bytes);
void backward_head(const Shape& shape, long item, Arena arena, size_t* bytes);
// The same where `shape.kernels.bf16` computes.
void forward_head_bf16(const Shape& shape, long item, Arena arena, size_t* bytes);
void backward_head_bf16(const Shape& shape, long item, Arena arena, size_t* bytes);

}  // namespace mra
