// The eight tiles of AMX: 16 rows of 64 bytes each. The instructions are written out, because
// GCC's intrinsics do not say that they read and write memory.
#pragma once

#include <cstdint>
#include <cstring>

#include "vectors.h"

namespace MRA_ISA {

#if defined(MRA_EMULATES)
// The same in plain C++, for tests on machines without AMX.
struct EmulatedTile {
  uint32_t rows[16][16];
};
static thread_local EmulatedTile emulated[8];

MRA_INLINE void open_tiles(void*) {}
MRA_INLINE void close_tiles(const void*) {}

template <int kTileNumber>
MRA_INLINE void zero_tile() {
  emulated[kTileNumber] = {};
}
template <int kTileNumber>
MRA_INLINE void load_tile(const void* from, long stride) {
  for (int r = 0; r < 16; r++)
    memcpy(emulated[kTileNumber].rows[r], static_cast<const char*>(from) + r * stride, 64);
}
template <int kTileNumber>
MRA_INLINE void store_tile(void* to, long stride) {
  for (int r = 0; r < 16; r++)
    memcpy(static_cast<char*>(to) + r * stride, emulated[kTileNumber].rows[r], 64);
}
// C += A B, with two terms in each word of A and B.
template <int kC, int kA, int kB>
MRA_INLINE void multiply_tiles() {
  for (int m = 0; m < 16; m++) {
    auto* sums = reinterpret_cast<float*>(emulated[kC].rows[m]);
    for (int k = 0; k < 16; k++) {
      Words a = Words{} + emulated[kA].rows[m][k];
      Words b = *reinterpret_cast<const Words*>(emulated[kB].rows[k]);
      Vector sum = load(sums) + (Vector)(a << 16) * (Vector)(b << 16);
      store(sums, sum + (Vector)(a & 0xffff0000) * (Vector)(b & 0xffff0000));
    }
  }
}
#else
// All eight tiles are 16 rows of 64 bytes. Other code of the thread may have set them up in its own
// way: that is put back.
struct alignas(64) TileConfiguration {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfiguration) == 64);

MRA_INLINE void configure_tiles(const void* from) {
  __asm__ volatile("ldtilecfg (%0)" ::"r"(from) : "memory");
}
MRA_INLINE void open_tiles(void* found) {
  static constexpr TileConfiguration kConfiguration;
  __asm__ volatile("sttilecfg (%0)" ::"r"(found) : "memory");
  configure_tiles(&kConfiguration);
}
MRA_INLINE void close_tiles(const void* found) {
  if (static_cast<const TileConfiguration*>(found)->palette)
    configure_tiles(found);
  else
    __asm__ volatile("tilerelease" ::: "memory");
}

template <int kTileNumber>
MRA_INLINE void zero_tile() {
  __asm__ volatile("tilezero %%tmm%c0" ::"i"(kTileNumber));
}
template <int kTileNumber>
MRA_INLINE void load_tile(const void* from, long stride) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(kTileNumber)
                   : "memory");
}
template <int kTileNumber>
MRA_INLINE void store_tile(void* to, long stride) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(kTileNumber)
                   : "memory");
}
// C += A B, with two terms in each word of A and B.
template <int kC, int kA, int kB>
MRA_INLINE void multiply_tiles() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kC), "i"(kA), "i"(kB));
}
#endif

// The operands of one step of a product: 32 rows of 32 terms, and 16 rows of 32 pairs of terms.
struct Step {
  const Half* a;
  const uint32_t* b;
};

// C [32, 32] (+)= sum over steps of A B; leading dimensions in elements.
template <bool kAdds, class Steps>
MRA_INLINE void tile_product(int count, Steps step, long lda, long ldb, float* c, long ldc) {
  if (kAdds) {
    load_tile<0>(c, ldc * 4);
    load_tile<1>(c + 16, ldc * 4);
    load_tile<2>(c + 16 * ldc, ldc * 4);
    load_tile<3>(c + 16 * ldc + 16, ldc * 4);
  } else {
    zero_tile<0>(), zero_tile<1>(), zero_tile<2>(), zero_tile<3>();
  }
  for (int s = 0; s < count; s++) {
    Step at = step(s);
    load_tile<4>(at.a, lda * 2);
    load_tile<6>(at.b, ldb * 4);
    multiply_tiles<0, 4, 6>();
    load_tile<7>(at.b + 16, ldb * 4);
    multiply_tiles<1, 4, 7>();
    load_tile<5>(at.a + 16 * lda, lda * 2);
    multiply_tiles<2, 5, 6>();
    multiply_tiles<3, 5, 7>();
  }
  store_tile<0>(c, ldc * 4);
  store_tile<1>(c + 16, ldc * 4);
  store_tile<2>(c + 16 * ldc, ldc * 4);
  store_tile<3>(c + 16 * ldc + 16, ldc * 4);
}

}  // namespace MRA_ISA
