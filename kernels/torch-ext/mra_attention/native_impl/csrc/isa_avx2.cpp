#define MRA_ISA isa_avx2
#include "block_kernels.h"

namespace mra {
const KernelTable* kernels_avx2() {
  static constexpr KernelTable kTable = MRA_ISA::table("avx2");
  return &kTable;
}
}  // namespace mra
