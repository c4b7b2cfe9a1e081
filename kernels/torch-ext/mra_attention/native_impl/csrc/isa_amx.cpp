#define MRA_ISA isa_amx
#include "amx_kernels.h"

namespace mra {
const KernelTable* kernels_amx() {
  static constexpr Bf16Kernels kBf16 = MRA_ISA::bf16_kernels();
  static constexpr KernelTable kTable = MRA_ISA::table("amx", &kBf16);
  return &kTable;
}
}  // namespace mra
