#include "cpu.h"

#include <cstdint>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace mra {

#if defined(__x86_64__)
namespace {

// Bits of the register XCR0: vector registers that the operating system saves.
constexpr uint32_t kSavesAvx = 0x06, kSavesAvx512 = 0xe6, kSavesTiles = 0x60000;

// By cpuid itself: __builtin_cpu_supports needs a runtime that not every compiler links.
bool saves(uint32_t registers) {
  uint32_t a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> 27 & 1)) return false;  // OSXSAVE
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (low & registers) == registers;
}

uint32_t leaf_7_features() {
  uint32_t a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) ? b : 0;
}

}  // namespace

bool has_avx2() {
  uint32_t a, b, c, d;
  bool has_fma = __get_cpuid(1, &a, &b, &c, &d) && (c >> 12 & 1);
  return has_fma && saves(kSavesAvx) && (leaf_7_features() >> 5 & 1);
}

#if defined(MRA_EMULATES)
bool has_avx512() { return has_avx2(); }
bool has_amx() { return has_avx2(); }
#else
bool has_avx512() {
  constexpr uint32_t kNeeded = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;  // F, DQ, BW, VL
  return has_avx2() && saves(kSavesAvx512) && (leaf_7_features() & kNeeded) == kNeeded;
}

// Linux gives the tiles to processes that ask; threads and children have what it gave.
bool may_use_tiles() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // arch_prctl
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

bool has_amx() {
  constexpr uint32_t kNeeded = 1u << 22 | 1u << 24;  // AMX-BF16, AMX-TILE
  uint32_t a, b, c, d;
  if (!has_avx512() || !saves(kSavesTiles)) return false;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kNeeded) != kNeeded) return false;
  bool has_bf16 = __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);
  return has_bf16 && may_use_tiles();
}
#endif
#else
bool has_avx2() { return false; }
bool has_avx512() { return false; }
bool has_amx() { return false; }
#endif

}  // namespace mra
