// Which instruction sets this machine and its operating system can run.
#pragma once

namespace mra {

bool has_avx2();    // and FMA
bool has_avx512();  // F, BW, DQ and VL
bool has_amx();     // tiles of bfloat16, AVX-512 with bfloat16, and leave to use them

}  // namespace mra
