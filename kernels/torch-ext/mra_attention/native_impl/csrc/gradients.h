// What both backward passes share: the gradients that go through the coarse part.
#pragma once

#include "head.h"

namespace mra {

// The gradients of one head that are kept per block, and what is known of its queries.
struct Gradients {
  Gradients(const Shape& shape, Arena& arena);
  void start(const Shape& shape, long item);  // with zeros
  // delta = dO . O, the log-sum-exp in powers of two, and the sums the coarse part needs; maxima:
  // of the coarse part, null without one.
  void read_queries(const Shape& shape, const Sample& sample, const float* lse,
                    const Blocks& grad_output, const Blocks& output, const float* maxima);
  // The backward pass of the coarse part. Afterwards the gradients of means are those of each of
  // their tokens.
  void go_through_coarse(const Shape& shape, const Sample& sample, long item,
                         const uint8_t* selected, PairBiases& pair_biases, CoarsePart& coarse,
                         float* scratch);
  // Adds of_biases to those of the distances; `list`: of the row or column x.
  void add_biases(const Shape& shape, const Sample& sample, int x, const BlockList& list);

  float* of_query_means;                // [R rounded up to 32, dim]
  float *of_key_means, *of_value_sums;  // [C rounded up to 32, dim]
  float *sums, *delta_sums;             // sums over a block's queries of w dO and w delta
  float *delta, *lse2;                  // [R, 32]
  float* of_logits;                     // [C rounded up to 32, 32] of coarse logits of 32 rows
  float* of_biases;                     // [C] of the pairs of one row or column; null: not wanted
  double* by_distance;                  // [R] of the distance bias; null: not wanted

 private:
  void add_coarse_biases(const Shape& shape, const Sample& sample, int first);
};

// Fills all tokens of a key block with the row [dim].
void fill_key_block(const Shape& shape, const float* row, float* block);

}  // namespace mra
