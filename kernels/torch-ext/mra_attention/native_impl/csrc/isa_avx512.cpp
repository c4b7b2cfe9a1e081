#define MRA_ISA isa_avx512
#include "block_kernels.h"

namespace mra {
const KernelTable* kernels_avx512() {
  static constexpr KernelTable kTable = MRA_ISA::table("avx512");
  return &kTable;
}
}  // namespace mra
