// Vectors of the instruction set this file is compiled for, and products of small matrices.
// Included once by each isa_*.cpp, with MRA_ISA as its namespace: the same source for all of them.
// It uses nothing of the standard library that is not inline and trivial, so that no two
// instruction sets share a function.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#define MRA_INLINE static inline __attribute__((always_inline))
#define MRA_NOINLINE static __attribute__((noinline))

namespace MRA_ISA {

constexpr int kBlock = 32;  // tokens of a block: the lanes of all attention kernels

// Lanes of a vector, and the rows and vectors of a tile of a product that stays in registers.
// MRA_LANES=16: those of AVX-512 without it, for tests (kernels/emulate_native.py).
#if defined(__AVX512F__) || MRA_LANES == 16
constexpr int kLanes = 16, kTileRows = 8, kTileVectors = 2;
#elif defined(__AVX2__)
constexpr int kLanes = 8, kTileRows = 4, kTileVectors = 2;
#elif defined(__aarch64__)
constexpr int kLanes = 4, kTileRows = 4, kTileVectors = 4;
#else
constexpr int kLanes = 4, kTileRows = 4, kTileVectors = 2;
#endif
constexpr int kBlockVectors = kBlock / kLanes;
constexpr int kTileColumns = kTileVectors * kLanes;
constexpr int kDoubles = kLanes / 2;

using Vector = float __attribute__((vector_size(kLanes * 4)));
using Unaligned = float __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
using Integers = int32_t __attribute__((vector_size(kLanes * 4)));
using Doubles = double __attribute__((vector_size(kLanes * 4), aligned(8), may_alias));
using HalfVector = float __attribute__((vector_size(kLanes * 2), aligned(4), may_alias));

MRA_INLINE Vector load(const float* from) { return *reinterpret_cast<const Unaligned*>(from); }
MRA_INLINE void store(float* to, Vector x) { *reinterpret_cast<Unaligned*>(to) = x; }
MRA_INLINE Vector all(float x) { return x - Vector{}; }  // x - 0 is x, for -0 too
MRA_INLINE Vector larger(Vector a, Vector b) { return a > b ? a : b; }

constexpr float kInfinity = __builtin_inff();
constexpr float kLog2E = 1.4426950408889634f;
// A maximum of nothing: below every logit, and differences to it are finite.
constexpr float kNothing = -1e30f;

// 2^x to about 2 units in the last place; 0 below -126; NaN stays.
MRA_INLINE Vector exp2(Vector x) {
  constexpr float kRounder = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer
  Vector clipped = x < -130.f ? all(-130.f) : x;
  Vector shifted = clipped + kRounder;
  Vector f = clipped - (shifted - kRounder);
  Vector p = all(1.3276460813358426e-3f);
  p = p * f + 9.675540961325169e-3f;
  p = p * f + 5.550713464617729e-2f;
  p = p * f + 2.4022120237350464e-1f;
  p = p * f + 6.931469440460205e-1f;
  p = p * f + 1.0000001192092896f;
  Integers exponent = ((Integers)shifted + 127) << 23;  // casts of vectors keep the bits
  Vector scaled = p * (Vector)exponent;
  return x < -126.f ? Vector{} : scaled;
}

using Tile = Vector[kTileRows][kTileVectors];

template <bool kLoads>
MRA_INLINE void start_tile(const float* c, long ldc, Tile& sums) {
#pragma GCC unroll 16
  for (int r = 0; r < kTileRows; r++)
#pragma GCC unroll 16
    for (int v = 0; v < kTileVectors; v++)
      sums[r][v] = kLoads ? load(c + r * ldc + v * kLanes) : Vector{};
}

MRA_INLINE void finish_tile(const Tile& sums, float* c, long ldc) {
#pragma GCC unroll 16
  for (int r = 0; r < kTileRows; r++)
#pragma GCC unroll 16
    for (int v = 0; v < kTileVectors; v++) store(c + r * ldc + v * kLanes, sums[r][v]);
}

// Adds A B over K to a tile: A(r, k) = a[r * row + k * column]. One line of `next` is fetched for
// each k: the operand of the next product.
template <int kFetch>
MRA_INLINE void add_to_tile(int k_size, const float* a, long row, long column, const float* b,
                            long ldb, Tile& sums, const float* next) {
  for (int k = 0; k < k_size; k++) {
    if (kFetch) __builtin_prefetch(next + k * kFetch);
    Vector vectors[kTileVectors];
#pragma GCC unroll 16
    for (int v = 0; v < kTileVectors; v++) vectors[v] = load(b + k * ldb + v * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kTileRows; r++) {
      Vector factor = all(a[r * row + k * column]);
#pragma GCC unroll 16
      for (int v = 0; v < kTileVectors; v++) sums[r][v] += factor * vectors[v];
    }
  }
}

// A tile of C (+)= A B over K.
template <bool kAdds, int kFetch>
MRA_INLINE void tile(int k_size, const float* a, long row, long column, const float* b, long ldb,
                     float* c, long ldc, const float* next) {
  Tile sums;
  start_tile<kAdds>(c, ldc, sums);
  add_to_tile<kFetch>(k_size, a, row, column, b, ldb, sums, next);
  finish_tile(sums, c, ldc);
}

constexpr int kFetched = kTileRows * kTileColumns / kBlock;

// C [rows, columns] (+)= A [rows, k_size] B. Sizes are multiples of the tile's.
template <bool kAdds>
MRA_NOINLINE void product(int rows, int columns, int k_size, const float* a, long lda,
                          const float* b, long ldb, float* c, long ldc) {
  for (int v = 0; v < columns; v += kTileColumns)
    for (int r = 0; r < rows; r += kTileRows)
      tile<kAdds, 0>(k_size, a + r * lda, lda, 1, b + v, ldb, c + r * ldc + v, ldc, nullptr);
}

// C [rows, columns] += A^T B, with A stored as [k_size, rows].
MRA_NOINLINE void add_transposed_product(int rows, int columns, int k_size, const float* a,
                                         long lda, const float* b, long ldb, float* c, long ldc) {
  for (int v = 0; v < columns; v += kTileColumns)
    for (int r = 0; r < rows; r += kTileRows)
      tile<true, 0>(k_size, a + r, 1, lda, b + v, ldb, c + r * ldc + v, ldc, nullptr);
}

// S [kWidth, 32] = A [kWidth, dim] B [dim, 32], and fetch the kWidth x dim block `next`.
template <int kWidth>
MRA_NOINLINE void block_logits(int dim, const float* a, const float* b, float* s,
                               const float* next) {
  for (int r = 0; r < kWidth; r += kTileRows)
    for (int v = 0; v < kBlock; v += kTileColumns)
      tile<false, kFetched>(dim, a + static_cast<long>(r) * dim, dim, 1, b + v, kBlock,
                            s + r * kBlock + v, kBlock,
                            next + static_cast<long>(r + v / kBlock * kTileRows) * dim);
}

// C [dim, 32] += A^T P for A [32, dim] and P [32, 32], and fetch the block `next`.
MRA_NOINLINE void add_block_values(int dim, const float* a, const float* p, float* c,
                                   const float* next) {
  for (int r = 0; r < dim; r += kTileRows)
    for (int v = 0; v < kBlock; v += kTileColumns)
      tile<true, kFetched>(kBlock, a + r, 1, dim, p + v, kBlock, c + r * kBlock + v, kBlock,
                           next + static_cast<long>(r) * kBlock);
}

// The same for up to 32 / kWidth narrow blocks [kWidth, dim], whose rows of P follow each other,
// and as many to fetch. A tile stays in registers for all of them.
template <int kWidth>
MRA_NOINLINE void add_narrow_values(int dim, int blocks, const float* const* a, const float* p,
                                    float* c, const float* const* next) {
  for (int r = 0; r < dim; r += kTileRows)
    for (int v = 0; v < kBlock; v += kTileColumns) {
      Tile sums;
      float* to = c + r * kBlock + v;
      start_tile<true>(to, kBlock, sums);
      for (int b = 0; b < blocks; b++)
        add_to_tile<kFetched>(kWidth, a[b] + r, 1, dim, p + b * kWidth * kBlock + v, kBlock, sums,
                              next[b] + r * kWidth);
      finish_tile(sums, to, kBlock);
    }
}

// C [kWidth, dim] += P [kWidth, 32] A [32, dim], and fetch the kWidth x dim block `next`.
template <int kWidth>
MRA_NOINLINE void add_block_rows(int dim, const float* p, const float* a, float* c,
                                 const float* next) {
  for (int v = 0; v < dim; v += kTileColumns)
    for (int r = 0; r < kWidth; r += kTileRows)
      tile<true, kFetched>(kBlock, p + r * kBlock, kBlock, 1, a + v, dim,
                           c + static_cast<long>(r) * dim + v, dim,
                           next + static_cast<long>(r) * dim + v * kTileRows);
}

// Lane i of the result is lane k_i of the pair (a, b).
#if defined(__clang__) || __GNUC__ >= 12
#define MRA_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define MRA_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Integers{__VA_ARGS__})
#endif

template <int kStep, int... kLane>
MRA_INLINE void transpose_stage(Vector* rows, std::integer_sequence<int, kLane...>) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; i++)
    if (!(i & kStep)) {
      Vector a = rows[i], b = rows[i + kStep];
      rows[i] = MRA_SHUFFLE(a, b, ((kLane & kStep) ? kLanes + kLane - kStep : kLane)...);
      rows[i + kStep] = MRA_SHUFFLE(a, b, ((kLane & kStep) ? kLanes + kLane : kLane + kStep)...);
    }
}

MRA_INLINE void transpose_lanes(Vector* rows) {  // [kLanes] in place
  using Lanes = std::make_integer_sequence<int, kLanes>;
  transpose_stage<1>(rows, Lanes{});
  transpose_stage<2>(rows, Lanes{});
  if constexpr (kLanes >= 8) transpose_stage<4>(rows, Lanes{});
  if constexpr (kLanes >= 16) transpose_stage<8>(rows, Lanes{});
}

// to[c][r] = from[r][c] * factor; rows and columns are multiples of the lanes.
MRA_NOINLINE void transpose(int rows, int columns, const float* from, long ld_from, float* to,
                            long ld_to, float factor) {
  for (int r = 0; r < rows; r += kLanes)
    for (int c = 0; c < columns; c += kLanes) {
      Vector x[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; i++) x[i] = load(from + (r + i) * ld_from + c) * factor;
      transpose_lanes(x);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; i++) store(to + (c + i) * ld_to + r, x[i]);
    }
}

// bfloat16 is the upper half of a float32.
using Half = uint16_t;
using Halves = Half __attribute__((vector_size(kLanes * 2), aligned(2), may_alias));
using Words = uint32_t __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));

MRA_INLINE Words words(const Half* from) {
  return __builtin_convertvector(*reinterpret_cast<const Halves*>(from), Words);
}

// Rounds to nearest, ties to even; NaN stays.
MRA_INLINE Words rounded_halves(Vector x) {
  Words bits = (Words)x, rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return x == x ? rounded : (bits >> 16 | 0x40);
}

MRA_INLINE Halves narrow(Vector x) {
#if defined(__AVX512BF16__)
  return (Halves)_mm512_cvtneps_pbh((__m512)x);
#else
  return __builtin_convertvector(rounded_halves(x), Halves);
#endif
}

MRA_NOINLINE void widen_row(int count, const Half* from, float* to) {
  int i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, (Vector)(words(from + i) << 16));
  for (; i < count; i++) {
    uint32_t bits = static_cast<uint32_t>(from[i]) << 16;
    memcpy(to + i, &bits, 4);
  }
}

MRA_NOINLINE void narrow_row(int count, const float* from, Half* to) {
  int i = 0;
  for (; i + kLanes <= count; i += kLanes)
    *reinterpret_cast<Halves*>(to + i) = narrow(load(from + i));
  for (; i < count; i++) to[i] = static_cast<Half>(rounded_halves(all(from[i]))[0]);
}

}  // namespace MRA_ISA
