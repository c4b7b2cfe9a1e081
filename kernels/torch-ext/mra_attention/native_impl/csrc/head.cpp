#include "head.h"

#include <cmath>
#include <cstring>
#include <initializer_list>

namespace mra {
namespace {

float widen_half(uint16_t x) {  // float16
  uint32_t bits = x, sign = (bits & 0x8000) << 16, rest = (bits & 0x7fff) << 13;
  if (rest >= 0x0f800000) {  // infinity and NaN
    bits = sign | rest | 0x7f800000;
  } else {  // shift the exponent by a product, which subnormals survive
    float scaled;
    memcpy(&scaled, &rest, 4);
    scaled *= 5.192296858534828e33f;  // 2^112
    memcpy(&bits, &scaled, 4);
    bits |= sign;
  }
  float result;
  memcpy(&result, &bits, 4);
  return result;
}

// To float16: rounds to nearest, ties to even.
uint16_t narrow_half(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  uint32_t sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
  if (size > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
  if (size >= 0x47800000) return static_cast<uint16_t>(sign | 0x7c00);
  if (size < 0x38800000) {  // subnormal: let an addition round
    float magnitude;
    memcpy(&magnitude, &size, 4);
    magnitude += 0.5f;
    memcpy(&size, &magnitude, 4);
    return static_cast<uint16_t>(sign | (size - 0x3f000000));
  }
  size += 0xc8000fff + (size >> 13 & 1);
  return static_cast<uint16_t>(sign | size >> 13);
}

}  // namespace

Blocks::Blocks(const Shape& shape, Arena& arena) : shape_(shape) {
  pointers_ = arena.take<const float*>(shape.n_blocks);
  bool is_square = shape.width == kBlock;
  key_pointers_ = is_square ? pointers_ : arena.take<const float*>(shape.n_keys);
  copies_ = arena.take<float>(shape.n_blocks * shape.block_floats());
}

void Blocks::read(const MraTensor& tensor, int64_t dtype, long sample, long head) {
  const MraCall& call = shape_.call;
  int dim = shape_.dim, given = static_cast<int>(call.dim);
  bool is_direct = dtype == kFloat32 && tensor.token_stride == dim && given == dim;
  long first = sample * tensor.batch_stride + head * tensor.head_stride;
  const uint32_t* real = shape_.samples[sample].real;
  for (int y = 0; y < shape_.n_blocks; y++) {
    long at = first + static_cast<long>(y) * kBlock * tensor.token_stride;
    if (is_direct && real[y] == ~0u) {
      pointers_[y] = static_cast<const float*>(tensor.data) + at;
      continue;
    }
    float* copy = copies_ + y * shape_.block_floats();
    pointers_[y] = copy;
    for (int i = 0; i < kBlock; i++, copy += dim, at += tensor.token_stride) {
      int kept = real[y] >> i & 1 ? given : 0;
      if (kept && dtype == kFloat32) {
        memcpy(copy, static_cast<const float*>(tensor.data) + at, sizeof(float) * kept);
      } else if (kept) {
        const uint16_t* from = static_cast<const uint16_t*>(tensor.data) + at;
        if (dtype == kBFloat16)
          shape_.kernels.widen_row(kept, from, copy);
        else
          for (int d = 0; d < kept; d++) copy[d] = widen_half(from[d]);
      }
      if (kept < dim) memset(copy + kept, 0, sizeof(float) * (dim - kept));
    }
  }
  if (key_pointers_ == pointers_) return;
  int per_block = shape_.per_block();
  for (int y = 0; y < shape_.n_keys; y++)
    key_pointers_[y] = pointers_[y / per_block] + y % per_block * shape_.key_floats();
}

HalfBlocks::HalfBlocks(const Shape& shape, Arena& arena) : shape_(shape) {
  pointers_ = arena.take<const uint16_t*>(shape.n_blocks);
  copies_ = arena.take<uint16_t>(shape.n_blocks * shape.block_floats());
}

void HalfBlocks::read(const MraTensor& tensor, int64_t dtype, long sample, long head) {
  const MraCall& call = shape_.call;
  int dim = shape_.dim, given = static_cast<int>(call.dim);
  bool is_direct = dtype == kBFloat16 && tensor.token_stride == dim && given == dim;
  long first = sample * tensor.batch_stride + head * tensor.head_stride;
  const uint32_t* real = shape_.samples[sample].real;
  for (int y = 0; y < shape_.n_blocks; y++) {
    long at = first + static_cast<long>(y) * kBlock * tensor.token_stride;
    if (is_direct && real[y] == ~0u) {
      pointers_[y] = static_cast<const uint16_t*>(tensor.data) + at;
      continue;
    }
    uint16_t* copy = copies_ + y * shape_.block_floats();
    pointers_[y] = copy;
    for (int i = 0; i < kBlock; i++, copy += dim, at += tensor.token_stride) {
      int kept = real[y] >> i & 1 ? given : 0;
      if (kept && dtype == kBFloat16)
        memcpy(copy, static_cast<const uint16_t*>(tensor.data) + at, sizeof(uint16_t) * kept);
      else if (kept)
        shape_.kernels.narrow_row(kept, static_cast<const float*>(tensor.data) + at, copy);
      if (kept < dim) memset(copy + kept, 0, sizeof(uint16_t) * (dim - kept));
    }
  }
}

void write_block(const Shape& shape, const Sample& sample, int block, const float* from,
                 int64_t dtype, void* head_of_tensor) {
  int dim = static_cast<int>(shape.call.dim);
  long first = static_cast<long>(block) * kBlock, left = shape.call.length - first;
  int rows = left < kBlock ? static_cast<int>(left) : kBlock;
  for (int i = 0; i < rows; i++) {
    bool is_real = from && (sample.real[block] >> i & 1);
    const float* row = from + static_cast<long>(i) * shape.dim;
    long at = (first + i) * dim;
    if (dtype == kFloat32) {
      float* to = static_cast<float*>(head_of_tensor) + at;
      if (is_real)
        memcpy(to, row, sizeof(float) * dim);
      else
        memset(to, 0, sizeof(float) * dim);
    } else {
      uint16_t* to = static_cast<uint16_t*>(head_of_tensor) + at;
      if (!is_real)
        memset(to, 0, sizeof(uint16_t) * dim);
      else if (dtype == kBFloat16)
        shape.kernels.narrow_row(dim, row, to);
      else
        for (int d = 0; d < dim; d++) to[d] = narrow_half(row[d]);
    }
  }
}

void write_output(const Shape& shape, const Sample& sample, long item, int block,
                  const float* output, const float* lse) {
  const MraCall& call = shape.call;
  write_block(shape, sample, block, output, kFloat32,
              call.new_output + item * call.length * call.dim);
  float* to = call.lse + item * call.length;
  long token = static_cast<long>(block) * kBlock;
  for (int i = 0; i < kBlock && token + i < call.length; i++)
    to[token + i] = output && (sample.real[block] >> i & 1) ? lse[i] : INFINITY;
}

CoarsePart::CoarsePart(const Shape& shape, Arena& arena) {
  long vectors = static_cast<long>(shape.padded_blocks) * shape.dim;
  long key_vectors = static_cast<long>(shape.padded_keys) * shape.dim;
  query_means = arena.take<float>(vectors);
  key_means = arena.take<float>(key_vectors);
  value_sums = arena.take<float>(key_vectors);
  numerators = arena.take<float>(vectors);
  maxima = arena.take<float>(shape.padded_blocks);
  denominators = arena.take<float>(shape.padded_blocks);
}

void CoarsePart::read(const Shape& shape, const Sample& sample, const Blocks& query,
                      const Blocks& key, const Blocks& value) {
  auto sum = shape.kernels.sum_rows;
  int dim = shape.dim, width = shape.width;
  for (int x = 0; x < shape.n_blocks; x++)
    sum(dim, kBlock, query[x], query_means + static_cast<long>(x) * dim);
  for (int y = 0; y < shape.n_keys; y++) {
    long at = static_cast<long>(y) * dim;
    sum(dim, width, key.key_block(y), key_means + at);
    sum(dim, width, value.key_block(y), value_sums + at);
  }
  divide_means(shape, sample);
}

void CoarsePart::read(const Shape& shape, const Sample& sample, const HalfBlocks& query,
                      const HalfBlocks& key, const HalfBlocks& value, float* block) {
  auto sum = [&](const uint16_t* from, int rows, float* to) {
    shape.kernels.widen_row(static_cast<int>(shape.block_floats()), from, block);
    for (int i = 0; i < kBlock; i += rows, to += shape.dim)
      shape.kernels.sum_rows(shape.dim, rows, block + static_cast<long>(i) * shape.dim, to);
  };
  for (int y = 0; y < shape.n_blocks; y++) {
    long at = static_cast<long>(y) * shape.dim, key_at = at * shape.per_block();
    sum(query[y], kBlock, query_means + at);
    sum(key[y], shape.width, key_means + key_at);
    sum(value[y], shape.width, value_sums + key_at);
  }
  divide_means(shape, sample);
}

// Sums of queries and keys become means; what is no live block becomes zeros.
void CoarsePart::divide_means(const Shape& shape, const Sample& sample) {
  size_t bytes = sizeof(float) * shape.dim;
  auto divide = [&](float* means, float count) {
    float share = 1.f / count;
    for (int d = 0; d < shape.dim; d++) means[d] *= share;
  };
  for (int x = 0; x < shape.padded_blocks; x++) {
    float* means = query_means + static_cast<long>(x) * shape.dim;
    if (x < shape.n_blocks && sample.counts[x] > 0)
      divide(means, sample.counts[x]);
    else
      memset(means, 0, bytes);
  }
  for (int y = 0; y < shape.padded_keys; y++) {
    long at = static_cast<long>(y) * shape.dim;
    if (y < shape.n_keys && sample.key_counts[y] > 0)
      divide(key_means + at, sample.key_counts[y]);
    else
      memset(key_means + at, 0, bytes), memset(value_sums + at, 0, bytes);
  }
}

CoarseRows CoarsePart::rows(const Shape& shape, const Sample& sample, const uint8_t* selected,
                            const float* biases, int first) const {
  int left = shape.n_blocks - first;
  constexpr double kLog2E = 1.4426950408889634;
  return {shape.dim,
          shape.n_keys,
          left < kBlock ? left : kBlock,
          static_cast<float>(shape.call.scale * kLog2E),
          query_means + static_cast<long>(first) * shape.dim,
          key_means,
          value_sums,
          sample.key_counts,
          selected + static_cast<long>(first) * shape.n_keys,
          biases};
}

void CoarsePart::attend(const Shape& shape, const Sample& sample, long head,
                        const uint8_t* selected, PairBiases& pair_biases, float* scratch) {
  for (int x = 0; x < shape.n_blocks; x += kBlock) {
    const float* biases = pair_biases.read(shape, sample, head, x);
    shape.kernels.coarse(rows(shape, sample, selected, biases, x), maxima + x, denominators + x,
                         numerators + static_cast<long>(x) * shape.dim, scratch);
  }
}

PairBiases::PairBiases(const Shape& shape, Arena& arena) {
  biases_ = shape.call.distance_bias ? arena.take<float>(static_cast<long>(kBlock) * shape.n_keys)
                                     : nullptr;
}

const float* PairBiases::read(const Shape& shape, const Sample& sample, long head, int first) {
  if (!shape.call.distance_bias) return nullptr;
  constexpr float kLog2E = 1.4426950408889634f;
  const float* by_distance = shape.call.distance_bias + head * shape.n_blocks;
  for (int x = first; x < first + kBlock && x < shape.n_blocks; x++) {
    float* to = biases_ + static_cast<long>(x - first) * shape.n_keys;
    for (int y = 0; y < shape.n_blocks; y++) {
      bool is_global = sample.is_first[x] | sample.is_first[y];
      float bias = is_global ? 0.f : by_distance[x < y ? y - x : x - y] * kLog2E;
      for (int part = 0; part < shape.per_block(); part++) *to++ = bias;
    }
  }
  return biases_;
}

RowList::RowList(const Shape& shape, Arena& arena) {
  blocks_ = arena.take<int>(shape.n_keys);
  biases_ = arena.take<float>(shape.n_keys);
}

BlockList RowList::read(const Shape& shape, const Sample& sample, const uint8_t* selected,
                        const float* biases, int x) {
  if (biases) biases += static_cast<long>(x % kBlock) * shape.n_keys;
  if (selected) selected += static_cast<long>(x) * shape.n_keys;
  int count = 0;
  for (int y = 0; y < shape.n_keys; y++) {
    uint64_t eight = 1;  // few are selected
    if (selected && y + 8 <= shape.n_keys) memcpy(&eight, selected + y, 8);
    if (!eight) {
      y += 7;
      continue;
    }
    if (sample.key_counts[y] == 0 || (selected && !selected[y])) continue;
    blocks_[count] = y;
    biases_[count] = biases ? biases[y] : 0.f;
    count++;
  }
  return list(count, shape, sample);
}

BlockList RowList::read_column(const Shape& shape, const Sample& sample, const uint8_t* selected,
                               const float* biases, int y) {
  if (biases) biases += static_cast<long>(y % kBlock) * shape.n_keys;
  int count = 0;
  for (int x = 0; x < shape.n_blocks; x++) {
    if (sample.counts[x] == 0) continue;
    if (selected && !selected[static_cast<long>(x) * shape.n_keys + y]) continue;
    blocks_[count] = x;
    biases_[count] = biases ? biases[x] : 0.f;
    count++;
  }
  return list(count, shape, sample);
}

BlockList RowList::list(int count, const Shape& shape, const Sample& sample) const {
  return {shape.width, blocks_, biases_, count, nullptr, nullptr, sample.key_real};
}

}  // namespace mra
