#define MRA_ISA isa_base
#include "block_kernels.h"

namespace mra {
const KernelTable* kernels_base() {
  static constexpr KernelTable kTable = MRA_ISA::table("base");
  return &kTable;
}
}  // namespace mra
