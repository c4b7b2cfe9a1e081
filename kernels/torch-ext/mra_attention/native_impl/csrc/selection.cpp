#include <cmath>
#include <cstring>
#include <initializer_list>

#include "head.h"

namespace mra {
namespace {

constexpr int kStrip = 32;  // block rows that are scored at a time

// What a pair is ranked by: larger is better, 0 is never chosen. The order of floats as integers.
inline uint32_t sort_key(float score) {
  score += 0.f;  // -0 becomes 0
  int32_t bits;
  memcpy(&bits, &score, 4);
  uint32_t mask = static_cast<uint32_t>(bits >> 31) | 0x80000000u;
  return static_cast<uint32_t>(bits) ^ mask;
}

// The order of keys as signed integers, which every instruction set can compare.
inline int32_t signed_key(uint32_t key) { return static_cast<int32_t>(key ^ 0x80000000u); }

// Sort keys of scores, 0 for dead key blocks.
void write_ranks(int count, const float* __restrict scores, const uint32_t* __restrict live,
                 uint32_t* __restrict keys) {
  for (int y = 0; y < count; y++) keys[y] = sort_key(scores[y]) & live[y];
}

// Selects the pairs whose key is above `key`.
void mark_above(long count, uint32_t key, const uint32_t* __restrict keys,
                uint8_t* __restrict selected) {
  int32_t bound = signed_key(key);
  for (long i = 0; i < count; i++) selected[i] |= signed_key(keys[i]) > bound;
}

// Means of the real tokens of blocks [count, dim], in float64.
template <class BlockOf>
void write_means(const Shape& shape, int blocks, int width, const float* counts, BlockOf block,
                 double* means) {
  for (int y = 0; y < blocks; y++, means += shape.dim) {
    int count = counts[y] > 0 ? static_cast<int>(counts[y]) : 1;
    shape.kernels.sum_rows_double(shape.dim, width, block(y), means);
    double share = 1. / count;
    if ((count & (count - 1)) == 0)  // exact, and faster
      for (int d = 0; d < shape.dim; d++) means[d] *= share;
    else
      for (int d = 0; d < shape.dim; d++) means[d] /= count;
  }
}

// Turns coarse logits into what pairs are ranked by.
class Scores {
 public:
  Scores(const Shape& shape, Arena& arena) : shape_(shape) {
    columns_ = (shape.n_keys + 15) / 16 * 16;
    row_ = arena.take<float>(columns_);
    biases_ = arena.take<float>(columns_);
    log_counts_ = arena.take<float>(columns_);
    live_ = arena.take<uint32_t>(columns_);
  }
  void start(const Sample& sample) {
    for (int y = 0; y < columns_; y++) {
      float count = y < shape_.n_keys ? sample.key_counts[y] : 0.f;
      log_counts_[y] = count > 0 ? std::log(count) : -INFINITY;
      live_[y] = count > 0 ? ~0u : 0;
      biases_[y] = 0;
    }
  }
  // Keys [C] of the pairs of live row x: 0 for dead ones.
  void write_keys(const Sample& sample, long head, int x, const double* logits, uint32_t* keys) {
    if (shape_.call.distance_bias) read_biases(sample, head, x);
    if (shape_.call.rule == kMass)
      write_masses(sample.counts[x], logits);
    else
      write_logits(logits);
    write_ranks(shape_.n_keys, row_, live_, keys);
  }

 private:
  // Those of global pairs are 0.
  void read_biases(const Sample& sample, long head, int x) {
    const float* by_distance = shape_.call.distance_bias + head * shape_.n_blocks;
    float* to = biases_;
    for (int y = 0; y < shape_.n_blocks; y++) {
      bool is_global = sample.is_first[x] | sample.is_first[y];
      float bias = is_global ? 0.f : by_distance[x < y ? y - x : x - y];
      for (int part = 0; part < shape_.per_block(); part++) *to++ = bias;
    }
  }
  void write_logits(const double* logits) {
    float largest = -INFINITY;
    for (int y = 0; y < shape_.n_keys; y++) {
      row_[y] = static_cast<float>(logits[y] + biases_[y]);
      bool is_larger = live_[y] && row_[y] > largest;
      largest = is_larger ? row_[y] : largest;
    }
    if (shape_.call.rule != kRowNormalized) return;
    for (int y = 0; y < shape_.n_keys; y++) row_[y] -= largest;
  }
  // The share of attention times the queries of the row, in float32 as by `softmax_mass`.
  void write_masses(float queries, const double* logits) {
    for (int y = 0; y < shape_.n_keys; y++)
      row_[y] = static_cast<float>(logits[y]) + log_counts_[y] + biases_[y];
    for (int y = shape_.n_keys; y < columns_; y++) row_[y] = -INFINITY;
    shape_.kernels.softmax_row(columns_, row_);
    for (int y = 0; y < shape_.n_keys; y++) row_[y] *= queries;
  }

  const Shape& shape_;
  int columns_;  // C rounded up to 16; what follows are arrays of them
  float *row_, *biases_, *log_counts_;
  uint32_t* live_;  // all bits of live key blocks
};

bool is_prior(const MraCall& call, const Sample& sample, int x, int y) {
  if (call.first_blocks && (sample.is_first[x] | sample.is_first[y])) return true;
  int distance = x < y ? y - x : x - y;
  return call.diagonal_blocks && distance <= call.diagonal_blocks / 2;
}

// A key, how many keys there are of its value, and how many of those are wanted.
struct Threshold {
  uint32_t key;
  long equal, wanted;
};

// The `wanted`-th largest key, 11 bits at a time. candidates: scratch, [count].
Threshold find_threshold(const uint32_t* keys, long count, long wanted, uint32_t* candidates) {
  constexpr int kDigits = 1 << 11;
  uint32_t key = 0;
  for (int shift : {21, 10, 0}) {
    // Two histograms: neighbours often fall into the same place.
    uint32_t histograms[2][kDigits] = {}, mask = shift ? kDigits - 1 : kDigits / 2 - 1;
    for (long i = 0; i < count; i++) histograms[i & 1][keys[i] >> shift & mask]++;
    auto keys_of = [&](uint32_t digit) {
      return static_cast<long>(histograms[0][digit]) + histograms[1][digit];
    };
    uint32_t digit = mask;
    while (digit > 0 && keys_of(digit) < wanted) wanted -= keys_of(digit--);
    key |= digit << shift;
    long kept = 0, equal = keys_of(digit);
    for (long i = 0; i < count && shift; i++) {
      candidates[kept] = keys[i];  // without a branch; at most place `equal`, which is below count
      kept += (keys[i] >> shift & mask) == digit;
    }
    keys = candidates, count = equal;
  }
  return {key, count, wanted};
}

// Selects the `wanted` largest keys; of equal ones those whose square is nearest the diagonal, then
// of the lowest row, then column.
void select_largest(const Shape& shape, long wanted, const uint32_t* keys, uint32_t* candidates,
                    uint8_t* selected) {
  if (wanted <= 0) return;
  int n = shape.n_blocks, per_block = shape.per_block();
  Threshold last = find_threshold(keys, shape.pairs(), wanted, candidates);
  bool takes_equal = last.key && last.equal == last.wanted;
  mark_above(shape.pairs(), takes_equal ? last.key - 1 : last.key, keys, selected);
  if (takes_equal || !last.key) return;  // key 0: only dead pairs are left
  auto take = [&](long x, long y) {
    if (y < 0 || y >= n) return;
    for (long i = (x * n + y) * per_block, end = i + per_block; i < end; i++)
      if (keys[i] == last.key && last.wanted > 0) selected[i] = 1, last.wanted--;
  };
  for (long distance = 0; distance < n && last.wanted; distance++)
    for (long x = 0; x < n && last.wanted; x++) {
      if (distance) take(x, x - distance);
      take(x, x + distance);
    }
}

long pair_budget(const Shape& shape, const Sample& sample) {
  const MraCall& call = shape.call;
  long pairs = sample.live * sample.live_keys;
  long squares = call.block_budget >= 0 ? call.block_budget : sample.live * call.block_per_row;
  return squares <= pairs / shape.per_block() ? squares * shape.per_block() : pairs;
}

// Moves the keys of priors to `prior_keys`, with 0 for all others, and returns how many there are.
long split_priors(const Shape& shape, const Sample& sample, uint32_t* keys, uint32_t* prior_keys) {
  long priors = 0;
  for (int x = 0; x < shape.n_blocks; x++)
    for (int y = 0; y < shape.n_keys; y++, keys++, prior_keys++) {
      bool counts = *keys && is_prior(shape.call, sample, x, y / shape.per_block());
      *prior_keys = counts ? *keys : 0;
      if (counts) *keys = 0, priors++;
    }
  return priors;
}

}  // namespace

void select_head(const Shape& shape, long item, Arena arena, size_t* bytes) {
  const MraCall& call = shape.call;
  int n = shape.n_blocks, columns = shape.n_keys, dim = shape.dim;
  Blocks query(shape, arena), key(shape, arena);
  double* query_means = arena.take<double>(static_cast<long>(n) * dim);
  double* key_means = arena.take<double>(static_cast<long>(columns) * dim);
  double* packed = arena.take<double>((columns + 15L) / 16 * 16 * dim);
  double* logits = arena.take<double>(static_cast<long>(kStrip) * columns);
  Scores scores(shape, arena);
  uint32_t* keys = arena.take<uint32_t>(shape.pairs());
  uint32_t* candidates = arena.take<uint32_t>(shape.pairs());
  bool has_priors = call.first_blocks || call.diagonal_blocks;
  uint32_t* prior_keys = arena.take<uint32_t>(has_priors ? shape.pairs() : 0);
  if (bytes) {
    *bytes = arena.used();
    return;
  }
  long sample_number = item / call.heads, head = item % call.heads;
  const Sample& sample = shape.samples[sample_number];
  query.read(call.query, call.dtype, sample_number, head);
  key.read(call.key, call.dtype, sample_number, head);
  auto query_block = [&](int x) { return query[x]; };
  auto key_block = [&](int y) { return key.key_block(y); };
  write_means(shape, n, kBlock, sample.counts, query_block, query_means);
  write_means(shape, columns, shape.width, sample.key_counts, key_block, key_means);
  shape.kernels.pack_columns(dim, columns, key_means, packed);
  scores.start(sample);
  for (int first = 0; first < n; first += kStrip) {
    int rows = n - first < kStrip ? n - first : kStrip;
    shape.kernels.coarse_logits(dim, rows, columns, call.scale,
                                query_means + static_cast<long>(first) * dim, packed, logits);
    for (int i = 0; i < rows; i++) {
      uint32_t* to = keys + static_cast<long>(first + i) * columns;
      if (sample.counts[first + i] > 0)
        scores.write_keys(sample, head, first + i, logits + static_cast<long>(i) * columns, to);
      else
        memset(to, 0, sizeof(uint32_t) * columns);
    }
  }
  uint8_t* selected = call.new_blocks + item * shape.pairs();
  memset(selected, 0, shape.pairs());
  long budget = pair_budget(shape, sample);
  if (has_priors) {  // they rank before everything else
    long priors = split_priors(shape, sample, keys, prior_keys);
    long chosen = priors < budget ? priors : budget;
    select_largest(shape, chosen, prior_keys, candidates, selected);
    budget -= chosen;
  }
  select_largest(shape, budget, keys, candidates, selected);
}

}  // namespace mra
