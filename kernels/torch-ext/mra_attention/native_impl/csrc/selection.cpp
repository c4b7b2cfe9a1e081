#include <cmath>
#include <cstring>

#include "head.h"

namespace mra {
namespace {

// What a pair is ranked by: larger is better, 0 is never chosen. The order of floats as integers.
uint32_t sort_key(float score) {
  score += 0.f;  // -0 becomes 0
  int32_t bits;
  memcpy(&bits, &score, 4);
  uint32_t mask = static_cast<uint32_t>(bits >> 31) | 0x80000000u;
  return static_cast<uint32_t>(bits) ^ mask;
}

// Keys [R, R] of all pairs: 0 for dead ones; of the coarse logits, less the row's largest if asked.
void write_keys(const Shape& shape, const Sample& sample, const double* logits, long head,
                float* row, uint32_t* keys) {
  int n = shape.n_blocks;
  const float* bias = shape.call.distance_bias;
  if (bias) bias += head * n;
  for (int x = 0; x < n; x++) {
    uint32_t* to = keys + static_cast<long>(x) * n;
    if (sample.counts[x] == 0) {
      memset(to, 0, sizeof(uint32_t) * n);
      continue;
    }
    float largest = -INFINITY;
    for (int y = 0; y < n; y++) {
      double logit = logits[static_cast<long>(x) * n + y];
      if (bias && !(sample.is_first[x] | sample.is_first[y])) logit += bias[x < y ? y - x : x - y];
      row[y] = static_cast<float>(logit);
      if (sample.counts[y] > 0 && row[y] > largest) largest = row[y];
    }
    for (int y = 0; y < n; y++) {
      float score = shape.call.row_normalized ? row[y] - largest : row[y];
      to[y] = sample.counts[y] > 0 ? sort_key(score) : 0;
    }
  }
}

bool is_prior(const MraCall& call, const Sample& sample, int x, int y) {
  if (call.first_blocks && (sample.is_first[x] | sample.is_first[y])) return true;
  int distance = x < y ? y - x : x - y;
  return call.diagonal_blocks && distance <= call.diagonal_blocks / 2;
}

// The `wanted`-th largest key, 8 bits at a time, and how many of that key are wanted.
uint32_t threshold(const uint32_t* keys, long count, long* wanted) {
  uint32_t prefix = 0, mask = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    long histogram[256] = {};
    for (long i = 0; i < count; i++)
      if ((keys[i] & mask) == prefix) histogram[keys[i] >> shift & 255]++;
    int digit = 255;
    while (digit > 0 && histogram[digit] < *wanted) *wanted -= histogram[digit--];
    prefix |= static_cast<uint32_t>(digit) << shift;
    mask |= 255u << shift;
  }
  return prefix;
}

// Selects the `wanted` largest keys; of equal ones those nearest the diagonal, then of the lowest
// row, then column. Takes away the keys of what it selects.
void select_largest(int n, long wanted, uint32_t* keys, uint8_t* selected) {
  long count = static_cast<long>(n) * n, equal = wanted;
  if (wanted <= 0) return;
  uint32_t last = threshold(keys, count, &equal);
  for (long i = 0; i < count; i++)
    if (keys[i] > last) selected[i] = 1, keys[i] = 0;
  if (last == 0) return;  // only dead pairs are left
  auto take = [&](long x, long y) {
    if (y < 0 || y >= n || keys[x * n + y] != last || equal == 0) return;
    selected[x * n + y] = 1, keys[x * n + y] = 0, equal--;
  };
  for (long distance = 0; distance < n && equal; distance++)
    for (long x = 0; x < n && equal; x++) {
      if (distance) take(x, x - distance);
      take(x, x + distance);
    }
}

long pair_budget(const MraCall& call, long live) {
  long pairs = live * live;
  long budget = call.block_budget >= 0 ? call.block_budget : live * call.block_per_row;
  return budget < pairs ? budget : pairs;
}

}  // namespace

void select_head(const Shape& shape, long item, Arena arena, size_t* bytes) {
  const MraCall& call = shape.call;
  int n = shape.n_blocks, dim = shape.dim;
  long pairs = static_cast<long>(n) * n, rounded = (n + 15L) / 16 * 16;
  Blocks query(shape, arena), key(shape, arena);
  double* query_means = arena.take<double>(static_cast<long>(n) * dim);
  double* key_means = arena.take<double>(static_cast<long>(n) * dim);
  double* transposed = arena.take<double>(rounded * dim);
  double* logits = arena.take<double>(pairs);
  float* row = arena.take<float>(n);
  uint32_t* keys = arena.take<uint32_t>(pairs);
  uint32_t* prior_keys = arena.take<uint32_t>(pairs);
  if (bytes) {
    *bytes = arena.used();
    return;
  }
  long sample_number = item / call.heads, head = item % call.heads;
  const Sample& sample = shape.samples[sample_number];
  query.read(call.query, call.dtype, sample_number, head);
  key.read(call.key, call.dtype, sample_number, head);
  for (int y = 0; y < n; y++) {
    long at = static_cast<long>(y) * dim;
    double count = sample.counts[y] > 0 ? sample.counts[y] : 1;
    shape.kernels.sum_rows_double(dim, query[y], query_means + at);
    shape.kernels.sum_rows_double(dim, key[y], key_means + at);
    for (int d = 0; d < dim; d++) query_means[at + d] /= count, key_means[at + d] /= count;
  }
  shape.kernels.coarse_logits(dim, n, call.scale, query_means, key_means, logits, transposed);
  write_keys(shape, sample, logits, head, row, keys);
  uint8_t* selected = call.new_blocks + item * pairs;
  memset(selected, 0, pairs);
  long budget = pair_budget(call, sample.live);
  if (call.first_blocks || call.diagonal_blocks) {  // they rank before everything else
    long priors = 0;
    for (int x = 0; x < n; x++)
      for (int y = 0; y < n; y++) {
        long i = static_cast<long>(x) * n + y;
        bool counts = keys[i] && is_prior(call, sample, x, y);
        prior_keys[i] = counts ? keys[i] : 0;
        if (counts) keys[i] = 0, priors++;
      }
    long chosen = priors < budget ? priors : budget;
    select_largest(n, chosen, prior_keys, selected);
    budget -= chosen;
  }
  select_largest(n, budget, keys, selected);
}

}  // namespace mra
