// The C interface: one struct, mirrored in library.py, and one function for each pass.
#pragma once

#include <cstdint>

extern "C" {

// A tensor [batch, heads, length, dim] with a last stride of 1; other strides in elements.
struct MraTensor {
  const void* data;
  int64_t batch_stride, head_stride, token_stride;
};

enum MraDtype : int64_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// What pairs are ranked by; selection.py says what the rules are.
enum MraRule : int64_t { kGlobal = 0, kRowNormalized = 1, kMass = 2 };

// There are R = length / 32 blocks of queries, rounded up, and C = R * 32 / key_block_size blocks
// of keys. Budgets, priors and biases count squares, of 32 / key_block_size pairs each.
struct MraCall {
  int64_t batch, heads, length, dim;
  double scale;
  int64_t dtype;           // MraDtype of query, key, value and their gradients
  int64_t key_block_size;  // 8, 16 or 32
  int64_t sparse;          // 1: MRA-2-s
  int64_t threads;
  int64_t isa;              // -1: the best of this machine; else an index of mra_isa_name
  int64_t first_blocks;     // initial_prior_first_n_blocks
  int64_t diagonal_blocks;  // initial_prior_diagonal_n_blocks; selection only
  int64_t block_per_row, block_budget;  // selection only; block_budget -1: none
  int64_t rule;                         // MraRule; selection only
  MraTensor query, key, value;
  MraTensor grad_output, output;             // float32; backward only
  const uint8_t* token_mask;                 // [batch, length], null: all real
  const uint8_t* blocks;                     // [batch, heads, R, C], null: every live pair
  const float* distance_bias;                // [heads, R], null: none
  float* lse;                                // [batch, heads, length]; read by the backward pass
  float* new_output;                         // [batch, heads, length, dim]
  void *grad_query, *grad_key, *grad_value;  // [batch, heads, length, dim]
  double* grad_bias;                         // [batch, heads, R], null: not wanted
  uint8_t* new_blocks;                       // [batch, heads, R, C]
};

// All return 0, or 1 where there was no memory.
int mra_select(const MraCall* call);
int mra_forward(const MraCall* call);
int mra_backward(const MraCall* call);

// Names of the instruction sets that this machine can run, best first; null past the last.
const char* mra_isa_name(int64_t index);

// Bytes of MraCall, for the caller to compare with its own.
int64_t mra_call_bytes();

// Hand over torch's `torch_parallel_for`, whose threads are then used; without it, threads are
// started for each call.
void mra_set_parallel_for(void* function);
}
