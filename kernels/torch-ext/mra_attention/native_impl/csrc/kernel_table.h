// What each instruction set offers: one function per step, on float32 blocks of 32 tokens.
//
// Blocks are [32, dim] with dim a multiple of `dim_multiple`; tokens that are not real are zero.
// Logits are in powers of two. All scratch comes from the caller.
#pragma once

#include <cstdint>

namespace mra {

// The key blocks that a query block attends to, and what they are attended with.
struct BlockList {
  int width;            // tokens of a key block
  const int* blocks;    // numbers of the key blocks
  const float* biases;  // of each, in powers of two
  int count;
  const float* const* keys;    // [C] key blocks [width, dim]
  const float* const* values;  // [C] key blocks [width, dim]
  const uint32_t* real;        // [C] a bit for each real token
};

// What the coarse part leaves for one query block: the softmax's maximum and denominator, and a
// numerator [dim]. Null: there is none.
struct CoarseState {
  const float* maximum = nullptr;
  const float* denominator = nullptr;
  const float* numerator = nullptr;
};

// The coarse part of 32 block rows, and of all C columns.
struct CoarseRows {
  int dim, n_keys, rows;     // n_keys: C; rows: block rows that exist, at most 32
  float scale;               // of logits, times log2(e)
  const float* query_means;  // [32, dim]
  const float* key_means;    // [C rounded up to 32, dim]
  const float* value_sums;   // [C rounded up to 32, dim]
  const float* counts;       // [C rounded up to 32] real tokens
  const uint8_t* selected;   // [rows, C]
  const float* biases;       // [rows, C] in powers of two, or null
};

// As BlockList, of bfloat16 blocks.
struct Bf16BlockList {
  BlockList list;                 // its keys and values are null
  const uint16_t* const* keys;    // [R] blocks [32, dim]
  const uint16_t* const* values;  // [R] blocks [32, dim]; backward only
  const uint16_t* key_columns;    // [R, dim, 32]; backward only
  const uint16_t* value_columns;  // [R, dim, 32]; forward only
};

// The query blocks that attend to a key block, and what the backward pass knows of them.
struct Bf16QueryList {
  const int* blocks;    // numbers of the query blocks
  const float* biases;  // of each, in powers of two
  int count;
  const uint16_t* const* queries;  // [R] blocks [32, dim]
  const uint16_t* const* grads;    // [R] blocks [32, dim] of the output's gradient
  const uint16_t* query_columns;   // [R, dim, 32]
  const uint16_t* grad_columns;    // [R, dim, 32]
  const float *lse2, *delta;       // [R, 32]; lse2 is +inf at padding
};

// Exact attention in products of bfloat16, summed in float32. Calls stand between `open` and
// `close`; the scale is positive.
struct Bf16Kernels {
  int dim_multiple;
  long (*scratch_floats)(int dim);

  // Set the thread up, and back: what `open` found is kept in 64 bytes, aligned to 64.
  void (*open)(void* found);
  void (*close)(const void* found);

  void (*transpose)(int dim, const uint16_t* block, uint16_t* columns, float* scratch);

  // As KernelTable::attend.
  void (*attend)(int dim, float scale, const uint16_t* query, const Bf16BlockList& list,
                 const CoarseState& coarse, float* output, float* lse, float* scratch);

  // Its backward, for one key block. Adds to grad_queries ([R] blocks, before the factor `scale`),
  // writes grad_key (before the factor `scale`) and grad_value [32, dim], and the gradient of each
  // pair's bias to grad_biases (or null).
  void (*attend_backward)(int dim, float scale, const uint16_t* key, const uint16_t* value,
                          uint32_t real, const Bf16QueryList& list, float* grad_queries,
                          float* grad_key, float* grad_value, float* grad_biases, float* scratch);

  // The same for one query block and its list of key blocks narrower than 32. Writes grad_query
  // [32, dim] (before the factor `scale`), adds to grad_keys (before it, too) and grad_values
  // ([C] key blocks).
  void (*attend_backward_narrow)(int dim, float scale, const uint16_t* query, const uint16_t* grad,
                                 const float* lse2, const float* delta, const Bf16BlockList& list,
                                 float* grad_query, float* grad_keys, float* grad_values,
                                 float* grad_biases, float* scratch);
};

struct KernelTable {
  const char* name;
  int dim_multiple;

  // Floats of scratch that a kernel below takes.
  long (*scratch_floats)(int dim);

  // Exact attention of one query block, merged with the coarse state. Writes output [32, dim] and
  // lse [32] (natural logarithm, +inf where there is nothing to attend to).
  void (*attend)(int dim, float scale, const float* query, const BlockList& list,
                 const CoarseState& coarse, float* output, float* lse, float* scratch);

  // Its backward. lse2 is lse * log2(e), +inf at padding. Writes grad_query [32, dim], starting
  // from grad_query_row [dim] (or null), adds to grad_keys and grad_values ([C] key blocks), and
  // writes the gradient of each block's bias to grad_biases (or null).
  void (*attend_backward)(int dim, float scale, const float* query, const float* grad_output,
                          const float* lse2, const float* delta, const BlockList& list,
                          const float* grad_query_row, float* grad_query, float* grad_keys,
                          float* grad_values, float* grad_biases, float* scratch);

  // The coarse state of the rows: maxima [32], denominators [32], numerators [32, dim].
  void (*coarse)(const CoarseRows& part, float* maxima, float* denominators, float* numerators,
                 float* scratch);

  // Its backward: writes grad_query_means [32, dim], adds to grad_key_means and grad_value_sums
  // [C rounded up to 32, dim], both without the factor scale / count, and writes the gradients of
  // the logits to grad_logits [C rounded up to 32, 32] (or null).
  void (*coarse_backward)(const CoarseRows& part, const float* maxima, const float* grad_sums,
                          const float* delta_sums, float* grad_query_means, float* grad_key_means,
                          float* grad_value_sums, float* grad_logits, float* scratch);

  void (*sum_rows)(int dim, int rows, const float* block, float* sum);
  void (*sum_rows_double)(int dim, int rows, const float* block, double* sum);
  void (*weighted_sum)(int dim, const float* weights, const float* block, float* sum);
  void (*row_dots)(int dim, const float* a, const float* b, float* dots);  // of 32 rows

  // What `coarse_logits` takes of means of keys [columns, dim]: `columns` rounded up to 16, times
  // dim doubles.
  void (*pack_columns)(int dim, int columns, const double* key_means, double* packed);

  // Coarse logits [rows, columns] of means of queries [rows, dim], all in float64.
  void (*coarse_logits)(int dim, int rows, int columns, double scale, const double* query_means,
                        const double* packed, double* logits);

  // Softmax of a row of logits in place, with subnormal results; columns are a multiple of 16. All
  // are 0 where all logits are -inf, or one is NaN.
  void (*softmax_row)(int columns, float* logits);

  void (*widen_row)(int count, const uint16_t* from, float* to);   // of bfloat16
  void (*narrow_row)(int count, const float* from, uint16_t* to);  // to bfloat16

  const Bf16Kernels* bf16;  // null: blocks of bfloat16 are widened
};

// The tables that this build has; null where the machine cannot run them.
const KernelTable* kernels_base();
const KernelTable* kernels_avx2();
const KernelTable* kernels_avx512();
const KernelTable* kernels_amx();

}  // namespace mra
